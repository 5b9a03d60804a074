# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors that the user can fix, interruptions, and words for messages: the closest match, numbers with nouns."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """
    An error that the user can fix: an unknown key, a missing file, a directory with unexpected content.

    The command line prints the message without a traceback and exits with 2, so the message must be complete: what is
    wrong, where (file, record id, key), and what to do next.

    Args:
        *messages (`str`): Usually one; several if problems are reported together. One may have several lines.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class Interrupted(SystemExit):
    """A signal other than Ctrl-C has ended the command after its work was saved. The exit code is 128 + the signal."""


class Problems:
    """
    Collect the messages of several errors, to report them together.

    Example:

    ```python
    problems = Problems()
    for step in steps:
        with problems.collect():
            check(step)
    problems.report()
    ```
    """

    def __init__(self):
        self.messages: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the messages of a [`UserError`] raised inside the block, and continue after the block."""
        try:
            yield
        except UserError as error:
            self.messages.extend(error.args)

    def report(self) -> None:
        """Raise a [`UserError`] with all messages, if there are any."""
        if self.messages:
            raise UserError(*dict.fromkeys(self.messages))


@contextmanager
def located(where: str) -> Iterator[None]:
    """
    Put a place, such as the section of a recipe, in front of each message of an error raised inside the block, unless
    the message names it already.
    """
    try:
        yield
    except UserError as error:
        raise UserError(*(text if where in text else f"{where}: {text}" for text in error.args)) from None


def closest(word: str, known: Collection[str]) -> str:
    """Return " Did you mean 'x'?", or an empty text if no known word is close."""
    near = [name for name in known if len(word) > 3 and name.startswith(word)]
    near = near or get_close_matches(word, list(known), n=1, cutoff=0.6)
    near = near or [name for name in known if len(name) > 3 and word.startswith(name)]
    return f" Did you mean {near[0]!r}?" if near else ""


def number_of(number: int | str, what: str) -> str:
    """A number with its noun: `4 GPUs`, `1 process`."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if str(number) == '1' else plural}"

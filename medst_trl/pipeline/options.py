# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Options of `medst run` and `python -m medst_trl`: settings for whatever stage the recipe has."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.redaction import is_secret_key


@dataclass(frozen=True)
class Option:
    """
    One setting from the command line.

    Args:
        target (`str` or `None`):
            `"sft"` or `"prepare/<name>"` for `--sft.key` or `--prepare/<name>.key`; None for a plain `--key`, which
            goes to every stage that knows it.
        key (`str`):
            The setting.
        value (`str`, `list` of `str` or `bool`):
            As written; True for a flag without a value.
    """

    target: str | None
    key: str
    value: Any

    def as_words(self) -> list[str]:
        """The option as another command line would have it."""
        name = f"--{self.target}.{self.key}" if self.target else f"--{self.key}"
        if isinstance(self.value, list):
            return [name, *self.value]
        return [name] if self.value is True else [f"{name}={self.value}"]


_ASSIGNMENT = re.compile(r"[a-z][\w/.-]*\.\w+=.*", re.DOTALL)


def read_options(argv: Sequence[str]) -> tuple[list[str], list[Option]]:
    """
    Divide a command line into what it names and what it sets.

    Args:
        argv (sequence of `str`):
            `recipe [recipe ...] [--key value] [--key=value] [--flag] [--section.key value] [section.key=value]`

    Returns:
        The leading words, and the options in their order.

    Raises:
        UserError: for a word that belongs to no option, and for a secret, which other users of the machine could read.
    """
    rest = list(argv)
    words, options = [], []
    while rest and not _opens_option(rest[0]):
        words.append(rest.pop(0))
    while rest:
        name, equals, text = rest.pop(0).removeprefix("--").partition("=")
        values = [text] if equals else []
        while not equals and rest and not _opens_option(rest[0]):
            values.append(rest.pop(0))
        value = values if len(values) > 1 else values[0] if values else True
        target, _, key = name.rpartition(".")
        options.append(Option(target or None, key.replace("-", "_"), value))
    refuse_secrets(option.key for option in options)
    return words, options


def take(options: Sequence[Option], key: str) -> tuple[str | None, list[Option]]:
    """Divide the value of one plain option from all the others."""
    value = None
    for option in options:
        if option.target is None and option.key == key:
            if not isinstance(option.value, str):
                raise UserError(f"--{key} takes one value.")
            value = option.value
    return value, [option for option in options if option.target is not None or option.key != key]


def take_flag(options: Sequence[Option], key: str) -> tuple[bool, list[Option]]:
    """Divide a plain option that is on or off from all the others; it is off where it does not stand."""
    value, rest = False, []
    for option in options:
        if option.target is not None or option.key != key:
            rest.append(option)
        elif option.value is True or str(option.value).lower() in ("true", "false"):
            value = option.value is True or option.value.lower() == "true"
        else:
            raise UserError(f"--{key} is on or off, and takes no {option.value!r}.")
    return value, rest


def take_word(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Divide `name value` or `name=value` from a command line that a parser reads later."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name} takes a value.")
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def refuse_secrets(keys: Iterable[str]) -> None:
    """Raise a `UserError` if one of the keys that stand on a command line, or in a file, holds a secret."""
    for key in keys:
        if is_secret_key(key):
            raise UserError(
                f"{key}: secrets do not belong on a command line or in a recipe, where others can read them. "
                "Set them in the environment instead (HF_TOKEN, OPENAI_API_KEY), or use `hf auth login`."
            )


def _opens_option(word: str) -> bool:
    return word.startswith("--") or bool(_ASSIGNMENT.fullmatch(word))

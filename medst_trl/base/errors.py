# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The exception whose message is written for the user, and the closest match of a misspelt name."""

from collections.abc import Collection
from difflib import get_close_matches


class UserError(Exception):
    """
    Something the user can fix: a wrong key, a missing file, a directory with other content than expected.

    The command line prints the message without a traceback and exits with 2, so the message must be complete: what is
    wrong, where (file, record id, key), and what to do next.
    """


def closest(word: str, known: Collection[str]) -> str:
    """The text " Did you mean 'x'?", or an empty text if no known word is close."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""

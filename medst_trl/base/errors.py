# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The one exception whose message is written for the user."""

from collections.abc import Collection
from difflib import get_close_matches


class UserError(Exception):
    """
    Something the user can put right: a wrong key, a missing file, a folder that is not what it should be.

    The command line prints the message without a traceback and exits with 2, so the message has to stand on its own:
    what is wrong, where (file, record id, key), and what to do next.
    """


def closest(word: str, known: Collection[str]) -> str:
    """ " Did you mean 'x'?", or nothing where nothing is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""

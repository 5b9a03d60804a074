# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Judges that `medst judge` serves itself, in place of a model behind an API, and the registry of them."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medst_trl.base.registry import Registry


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class JudgeServer:
    """
    A judge on loopback that answers the requests of [`PairwiseJudge`] for as long as the stage runs. It costs nothing.

    Args:
        name (`str`):
            Its name in the registry.
        summary (`str`):
            What it is, for the plan of a run.
        settings (`type`):
            Dataclass of its settings on the command line of `medst judge`. Names are unique over all servers, and
            defaults are `None`: settings of a server that is not chosen do not count.
        is_chosen (`Callable`):
            `is_chosen(settings)`: whether these settings ask for this judge.
        check (`Callable`):
            `check(settings, args)` raises a `UserError` for invalid settings. `args` are the stage's arguments.
        model (`Callable`):
            `model(settings, args)` returns the judge's name. Replies are cached by it, so it must contain everything
            that decides them.
        serve (`Callable`):
            `serve(settings, args, candidates)` returns a context manager that yields the base URL.
    """

    name: str
    summary: str
    settings: type
    is_chosen: Callable[[Any], bool]
    check: Callable[[Any, Any], None]
    model: Callable[[Any, Any], str]
    serve: Callable[[Any, Any, "Dataset"], AbstractContextManager[str]]


JUDGE_SERVERS: Registry[JudgeServer] = Registry(
    "judge server", ("medst_trl.demo.oracle",), ("summary", "settings", "is_chosen", "check", "model", "serve")
)


def chosen_server(arguments: Iterable[Any]) -> tuple[JudgeServer, Any] | None:
    """Return the server that one of these dataclasses asks for, with that dataclass."""
    for settings in arguments:
        for server in JUDGE_SERVERS.values():
            if isinstance(settings, server.settings) and server.is_chosen(settings):
                return server, settings
    return None

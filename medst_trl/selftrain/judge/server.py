# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The settings of a judge, and judges that `medst judge` serves itself in place of a model behind an API."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medst_trl.base.registry import Registry
from medst_trl.base.settings import documented


if TYPE_CHECKING:
    from datasets import Dataset


@documented
@dataclass
class JudgeSettings:
    """
    Which judge compares the answers, how it is asked, and what that may cost.

    Args:
        model (`str`, *optional*):
            Name of the judge on its server, such as gpt-4o.
        base_url (`str`, *optional*):
            URL of an OpenAI-compatible API, such as http://localhost:8000/v1. Default: OpenAI's.
        prompt_version (`str`, *optional*, defaults to `"rubric"`):
            Prompt for the judge.
        order (`str`, *optional*, defaults to `"both"`):
            both: show each pair in both orders, and drop it if the verdicts differ. single: show it in one order, as
            in the paper.
        min_margin (`float`, *optional*, defaults to `1.0`):
            Drop pairs whose mean scores differ by less than this.
        concurrency (`int`, *optional*, defaults to `16`):
            Maximum number of concurrent calls.
        max_cost (`float`, *optional*):
            Budget in US dollars for these judgements, including earlier runs. It is a hard limit.
        price_per_million_input_tokens (`float`, *optional*):
            Price in US dollars. Known for gpt-4o, gpt-4.1 and their small versions.
        price_per_million_output_tokens (`float`, *optional*):
            Price in US dollars. Known for the same models.
        image_size (`int`, *optional*, defaults to `768`):
            Maximum side length in pixels of the images that are sent.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature of the judge.
        max_tokens (`int`, *optional*, defaults to `600`):
            Maximum number of tokens of a reply.
        cache_dir (`str`, *optional*):
            Directory of judge_cache.jsonl. The key of a reply is made of model name, prompt, images and settings, not
            of base_url: give different models different names. By default replies are kept in memory.
        timeout (`float`, *optional*, defaults to `120.0`):
            Maximum duration of a call in seconds.
        max_retries (`int`, *optional*, defaults to `6`):
            Maximum number of retries of a call after 429, 5xx or a timeout.
        key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Name of the environment variable that holds the API key.
    """

    model: str | None = None
    base_url: str | None = None
    prompt_version: str = "rubric"
    order: str = "both"
    min_margin: float = 1.0
    concurrency: int = 16
    max_cost: float | None = None
    price_per_million_input_tokens: float | None = None
    price_per_million_output_tokens: float | None = None
    image_size: int = 768
    temperature: float = 0.0
    max_tokens: int = 600
    cache_dir: str | None = None
    timeout: float = 120.0
    max_retries: int = 6
    key_variable: str = "OPENAI_API_KEY"


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

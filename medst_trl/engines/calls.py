# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Calls to a chat server: their settings, one call and its outcome."""

import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_bounds, documented

from .cost import Budget, Prices, RequestSize, prices_of
from .responses import CallError


FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a retry


@documented
@dataclass(kw_only=True, eq=False)
class CallSettings:
    """
    How a server is called, and what that may cost.

    Args:
        key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Name of the environment variable that holds the API key.
        concurrency (`int`, *optional*, defaults to `16`):
            Maximum number of concurrent calls.
        timeout (`float`, *optional*, defaults to `120.0`):
            Maximum duration of a call in seconds.
        max_retries (`int`, *optional*, defaults to `6`):
            Maximum number of retries of a call after 429, 5xx or a timeout.
        max_cost (`float`, *optional*):
            Budget in US dollars. It is a hard limit.
        price_per_million_input_tokens (`float`, *optional*):
            Price in US dollars. Known for gpt-4o, gpt-4.1 and their small versions.
        price_per_million_output_tokens (`float`, *optional*):
            Price in US dollars. Known for the same models.
    """

    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    max_retries: int = 6
    max_cost: float | None = None
    price_per_million_input_tokens: float | None = None
    price_per_million_output_tokens: float | None = None

    @property
    def budget_note(self) -> str:
        """The budget in words, for the plan of a run."""
        return "no max_cost is set" if self.max_cost is None else f"stops at {self.max_cost:g} US dollars"

    def prices_of(self, model: str) -> Prices:
        """Return the prices that are set, else the known prices of a model."""
        return prices_of(model, self.price_per_million_input_tokens, self.price_per_million_output_tokens)

    def check_calls(self, model: str) -> None:
        """Raise a `UserError` for numbers out of bounds, or for a budget if the prices of a model are unknown."""
        check_bounds(self, at_least=_BOUNDS)
        Budget(self.prices_of(model), self.max_cost)


# These settings change how replies are obtained, not their content.
CALL_SETTINGS = frozenset({"base_url", *(item.name for item in fields(CallSettings))})
_BOUNDS = {"concurrency": 1, "max_cost": 0, "max_retries": 0, "timeout": 0.01,
           "price_per_million_input_tokens": 0, "price_per_million_output_tokens": 0}  # fmt: skip
# In a recipe, shared values of these are for the judge; engines take them only by name. See `Stage.not_shared`.
NOT_SHARED = CALL_SETTINGS - {"base_url", "concurrency"}


@dataclass(eq=False)
class Call:
    """
    One request to a chat API. Compared by identity.

    Attributes:
        body (`Callable`): Makes the body of the request; images are encoded only then.
        size (`RequestSize`): Tokens of its prompt, for the budget.
        key (`str`, *optional*): Hash of everything that decides the reply. None: the reply is not cached.
        max_tokens (`int`): Maximum number of tokens of its reply, for the budget, if the body has no `max_tokens`.
        read (`Callable`): Maps a reply to its meaning, or to None if it cannot be read. By default the reply itself.
        reminder (`str`): User message after a reply that cannot be read.
        tag: Any value; the caller identifies the call by it.
        on_piece (`Callable`, *optional*): Called with each piece of the reply as the server sends it.
    """

    body: Callable[[], dict[str, Any]]
    size: RequestSize
    key: str | None = None
    max_tokens: int = 0
    read: Callable[[str], Any | None] = str
    reminder: str = ""
    tag: Any = None
    on_piece: Callable[[str], None] | None = None


@dataclass
class Outcome:
    """
    The outcome of a call.

    Attributes:
        reading: What [`Call.read`] made of the reply, or None.
        reason (`str` or `None`): Why there is no reading, in one word.
        attempts (`list[dict]`): The replies so far as the cache keeps them, or the one that could be read.
        cached (`bool`): Whether no call had to be made.
        detail (`str`): The server's message, if there is no reply.
        error (`CallError` or `None`): The error that ended it, if the server gave no reply in this run.
    """

    reading: Any | None
    reason: str | None
    attempts: list[dict[str, Any]]
    cached: bool
    detail: str = ""
    error: CallError | None = None


class Stopped(Exception):
    """The run is being stopped; no further call is made."""


def api_key(variable: str, base_url: str | None) -> str:
    """
    Return the API key from the environment. Your own server needs none.

    Raises:
        UserError: if it is missing, or if the key itself was given instead of the variable's name.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", variable):
        raise UserError("key_variable must be the name of an environment variable, not the key itself.")
    value = os.environ.get(variable, "").strip()
    if not value and base_url is None and not os.environ.get("OPENAI_BASE_URL"):
        raise UserError(
            f"No API key. Set the environment variable {variable} (export {variable}=...), or give base_url for your "
            "own server."
        )
    if not value.isascii() or not value.isprintable():
        raise UserError(f"The API key in the environment variable {variable} has invalid characters. Copy it again.")
    return value or "none"


def wait_before(attempt: int, retry_after: float | None) -> float:
    """Return the seconds before a retry: doubling from half a second, and at least what the server asks for."""
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
    return max(wait, (retry_after or 0.0) * random.uniform(1, 1.02))

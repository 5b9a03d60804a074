# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Calls to a chat server: their settings and outcomes, what they cost, and the cache of replies."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_bounds, documented
from medst_trl.data.schema import text_of

from .responses import CallError


CACHE_FILE = "judge_cache.jsonl"
BYTES_PER_TOKEN = 4.0  # English in UTF-8, for estimates
MESSAGE_TOKENS = 40  # roles, separators, name of the schema


@dataclass(frozen=True)
class Prices:
    """Prices in US dollars per million tokens; None if unknown."""

    input: float | None = None
    output: float | None = None

    @property
    def known(self) -> bool:
        return self.input is not None and self.output is not None

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """Return dollars; 0 if a price is unknown."""
        return ((self.input or 0) * input_tokens + (self.output or 0) * output_tokens) / 1e6

    def cost_of(self, row: Mapping[str, Any]) -> float:
        """Return what a cached call cost in dollars, by its `usage` or, if the server reported none, its `at_most`."""
        tokens = row.get("usage") or row.get("at_most") or {}
        return self.cost(tokens.get("prompt_tokens", 0), tokens.get("completion_tokens", 0))


class _KnownModel(NamedTuple):
    input: float
    output: float
    image_base: int  # tokens of an image
    image_tile: int  # further tokens per tile of 512 x 512 pixels


# List prices of November 2026.
_KNOWN_MODELS = {
    "gpt-4o-mini": _KnownModel(0.15, 0.60, 2833, 5667),
    "gpt-4o": _KnownModel(2.50, 10.00, 85, 170),
    "gpt-4.1-nano": _KnownModel(0.10, 0.40, 85, 170),
    "gpt-4.1-mini": _KnownModel(0.40, 1.60, 85, 170),
    "gpt-4.1": _KnownModel(2.00, 8.00, 85, 170),
}


def prices_of(model: str, input: float | None = None, output: float | None = None) -> Prices:
    """Return the given prices, else the known prices of a model (also of a dated one, `gpt-4o-2024-08-06`)."""
    known = _known_model(model) or Prices()
    return Prices(known.input if input is None else input, known.output if output is None else output)


def _known_model(model: str) -> _KnownModel | None:
    return _KNOWN_MODELS.get(re.sub(r"(-\d+)+$", "", model))  # without a date


def image_tokens(model: str, width: int, height: int) -> int:
    """Return the tokens of one image: OpenAI's tiles, or 28 x 28 pixels per token for other models."""
    known = _known_model(model)
    if known is None:
        return math.ceil(width / 28) * math.ceil(height / 28) + 2
    scale = min(1.0, 2048 / max(width, height), 768 / min(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return known.image_base + known.image_tile * tiles


@dataclass(frozen=True)
class RequestSize:
    """
    Number of tokens of a request before it is sent.

    Attributes:
        likely (`int`): An estimate.
        at_most (`int`): An upper bound, for the budget.
    """

    likely: int
    at_most: int

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], images: int) -> "RequestSize":
        """
        Return the size of messages with this number of image tokens.

        `at_most` counts one token per byte of text; no tokenizer makes more.
        """
        size = sum(len(text_of(message["content"]).encode("utf-8", "replace")) for message in messages)
        likely = math.ceil(size / BYTES_PER_TOKEN) + images + MESSAGE_TOKENS
        return cls(likely, size + math.ceil(images * 1.1) + 4 * MESSAGE_TOKENS)


@dataclass(eq=False)
class Budget:
    """
    Spending limit that includes calls in flight.

    A call reserves the most it can cost before it is sent and settles its real cost afterwards. A call whose outcome
    is unknown (a timeout) settles all of it, since the server may have charged it.

    Args:
        prices (`Prices`, *optional*):
            Prices of the model.
        max_cost (`float`, *optional*):
            Limit in US dollars. None for no limit.
        spent (`float`, *optional*, defaults to `0.0`):
            Dollars that earlier runs spent.

    Attributes:
        reserved (`float`):
            Dollars for calls in flight.

    Raises:
        UserError: for a limit without prices.
    """

    prices: Prices = Prices()
    max_cost: float | None = None
    spent: float = 0.0
    reserved: float = field(default=0.0, init=False)

    def __post_init__(self):
        if self.max_cost is not None and not self.prices.known:
            raise UserError(
                "max_cost needs prices, which are unknown for this model. Set price_per_million_input_tokens and "
                "price_per_million_output_tokens (0 for your own server)."
            )

    def reserve(self, amount: float) -> bool:
        """Reserve an amount, and return whether there was enough."""
        if self.max_cost is not None and self.spent + self.reserved + amount > self.max_cost + 1e-12:
            return False
        self.reserved += amount
        return True

    def used_up_message(self, amount: float) -> str:
        """Return the error message for an amount that exceeds the budget."""
        return (
            f"The budget is used up: ${self.spent:.4f} of max_cost {self.max_cost:g} is spent, and "
            f"the next call may cost ${amount:.4f}. Finished work is kept: raise --max_cost and run the same command "
            "again to resume."
        )

    def settle(self, reserved: float, cost: float) -> None:
        """Release a reservation and spend the real cost."""
        self.reserved = max(0.0, self.reserved - reserved)
        self.spent += cost


class ReplyCache:
    """
    Replies by the key of their request, in an append-only file, so that no reply is paid for twice.

    A line is `{"key", "reply", "finish_reason", "usage"}`. `{"key", "lost", "usage"}` is a call that may have been
    charged and left no reply: a timeout, or a reply that was filtered. If the server reported no usage, `at_most`
    holds an upper bound of the tokens; dollars are not kept, since prices can be corrected. `{"key", "failed",
    "status", "detail", "without"}` is a result of the Batch API without a reply; its request was sent without these
    fields. Refusals of other requests are not kept: the next run asks again. An incomplete line of a killed run is
    skipped. Neither requests nor API keys are in the file.

    Args:
        directory (`str` or `os.PathLike`, *optional*):
            Directory of `judge_cache.jsonl`. Stages may share one. None keeps replies in memory.

    Attributes:
        failures (`dict[str, list]`):
            Results of the Batch API without a reply, by the key of the request: the [`CallError`], and the fields that
            the request was sent without.
    """

    def __init__(self, directory: str | os.PathLike | None = None):
        self.path = Path(directory, CACHE_FILE) if directory is not None else None
        self._replies: dict[str, list[dict[str, Any]]] = {}
        self._lost: dict[str, list[dict[str, Any]]] = {}
        self.failures: dict[str, list[tuple[CallError, list[str]]]] = {}
        if self.path is not None and self.path.exists():
            with open(self.path, "rb") as file:
                for line in file:
                    with suppress(ValueError, TypeError, KeyError):  # an incomplete line, or one of something else
                        self._keep(json.loads(line))

    def attempts(self, key: str | None) -> list[dict[str, Any]]:
        """Return the replies to a request, oldest first; perhaps none of them can be read."""
        return list(self._replies.get(key, ()))

    def is_open(self, key: str, read: Callable[[str], Any]) -> bool:
        """Return whether no reply to a request can be read."""
        return all(read(row["reply"]) is None for row in self.attempts(key))

    def charges(self, key: str | None) -> list[dict[str, Any]]:
        """Return all calls for a request that may have been charged: its replies, and the calls without one."""
        return self.attempts(key) + self._lost.get(key, [])

    def add(self, row: Mapping[str, Any]) -> None:
        """
        Keep a reply, or what a call without a reply may have cost, in memory and on disk.

        Raises:
            OSError: if the disk is full.
        """
        self._keep(row)
        if self.path is None:
            return
        data = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # an incomplete line of a killed run: end it
                    data = b"\n" + data
            # One write per line: another process that shares the file cannot interleave.
            while data:
                data = data[file.write(data) :]

    def _keep(self, row: dict[str, Any]) -> None:
        if "lost" in row:
            self._lost.setdefault(row["key"], []).append(row)
        elif "failed" in row:
            failure = CallError(row["failed"], row["detail"], row["status"]), row.get("without", [])
            self.failures.setdefault(row["key"], []).append(failure)
        elif "reply" in row:
            self._replies.setdefault(row["key"], []).append(row)


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

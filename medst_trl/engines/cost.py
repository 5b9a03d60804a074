# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What judging costs: prices, tokens of a request before it is sent, and a budget that is never overdrawn."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medst_trl.base.errors import UserError


BYTES_PER_TOKEN = 4.0  # of English in UTF-8, for estimates
MESSAGE_TOKENS = 40  # roles, separators and the schema's name


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens; None where unknown."""

    input: float | None
    output: float | None

    @property
    def known(self) -> bool:
        return self.input is not None and self.output is not None

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """Dollars; 0 where a price is unknown."""
        return ((self.input or 0) * input_tokens + (self.output or 0) * output_tokens) / 1e6

    def cost_of(self, row: Mapping[str, Any]) -> float:
        """Dollars that a call in the cache cost: by its `usage` or, where the server told none, by its `at_most`."""
        tokens = row.get("usage") or row.get("at_most") or {}
        return self.cost(tokens.get("prompt_tokens", 0), tokens.get("completion_tokens", 0))


# List prices and the tokens of an image (base, each tile of 512 x 512) of November 2026. Longest name first.
_KNOWN: dict[str, tuple[float, float, int, int]] = {
    "gpt-4o-mini": (0.15, 0.60, 2833, 5667),
    "gpt-4o": (2.50, 10.00, 85, 170),
    "gpt-4.1-nano": (0.10, 0.40, 85, 170),
    "gpt-4.1-mini": (0.40, 1.60, 85, 170),
    "gpt-4.1": (2.00, 8.00, 85, 170),
}


def prices_of(model: str, input: float | None = None, output: float | None = None) -> Prices:
    """The prices given, else those known of a model (also of a dated one, `gpt-4o-2024-08-06`)."""
    known = _known(model)
    return Prices(
        input if input is not None else known and known[0], output if output is not None else known and known[1]
    )


def _known(model: str) -> tuple[float, float, int, int] | None:
    for name, facts in _KNOWN.items():
        rest = model.removeprefix(name)
        if model.startswith(name) and (not rest or (rest[0] == "-" and rest[1:].replace("-", "").isdigit())):
            return facts
    return None


def image_tokens(model: str, width: int, height: int) -> int:
    """Tokens of one image: by tiles as OpenAI counts them, 28 x 28 pixels a token for other models."""
    known = _known(model)
    if known is None:
        return math.ceil(width / 28) * math.ceil(height / 28) + 2
    scale = min(1.0, 2048 / max(width, height), 768 / min(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return known[2] + known[3] * tiles


def text_bytes(messages: Sequence[Mapping[str, Any]]) -> int:
    """Length of all text in a request. No tokenizer in use makes more tokens than bytes."""
    texts = []
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


@dataclass(frozen=True)
class RequestSize:
    """
    Tokens of a request before it is sent.

    Attributes:
        likely (`int`): For the estimate.
        at_most (`int`): For the budget.
    """

    likely: int
    at_most: int

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], images: int) -> "RequestSize":
        size = text_bytes(messages)
        likely = math.ceil(size / BYTES_PER_TOKEN) + images + MESSAGE_TOKENS
        return cls(likely, size + math.ceil(images * 1.1) + 4 * MESSAGE_TOKENS)


class Budget:
    """
    Spends no more than `max_cost`, calls in flight included.

    A call reserves the most it can cost before it is sent and settles what it did cost afterwards. One whose outcome
    is unknown (a time-out) keeps its reservation, since the server may have charged it.

    Args:
        prices (`Prices`):
            Of the judge.
        max_cost (`float`, *optional*):
            In US dollars. None for no limit.
        spent (`float`, *optional*, defaults to `0.0`):
            By earlier runs.

    Raises:
        UserError: for a limit without prices.
    """

    def __init__(self, prices: Prices, max_cost: float | None = None, spent: float = 0.0):
        if max_cost is not None and not prices.known:
            raise UserError(
                "max_cost needs the judge's prices, which are not known for this model: give "
                "price_per_million_input_tokens and price_per_million_output_tokens (0 for a server of your own)."
            )
        self.prices, self.max_cost = prices, max_cost
        self.spent = spent
        self.uncertain = 0.0
        self.reserved = 0.0

    def reserve(self, amount: float) -> bool:
        """Set `amount` apart, if there is still so much."""
        if self.max_cost is not None and self.spent + self.uncertain + self.reserved + amount > self.max_cost + 1e-12:
            return False
        self.reserved += amount
        return True

    def settle(self, reserved: float, cost: float) -> None:
        """A call was answered and cost so much."""
        self.reserved = max(0.0, self.reserved - reserved)
        self.spent += cost

    def leave_open(self, reserved: float) -> None:
        """Nobody knows whether a call was charged."""
        self.reserved = max(0.0, self.reserved - reserved)
        self.uncertain += reserved

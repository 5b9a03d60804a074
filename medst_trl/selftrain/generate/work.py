# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One record while candidates are made of it."""

from dataclasses import dataclass, field
from typing import Any

from medst_trl.data.source import printable
from medst_trl.engines.prompts import OpenedImage


SHOWN = 500  # characters of a rejected text that are kept


@dataclass
class Work:
    """
    What there is of a record so far.

    Args:
        id (`str`): The record's.
        images (`list[OpenedImage]`): Its images.
        history (`list[dict]`): The messages that describe them, where that is asked for.
        drawn (`int`): Questions drawn.
        questions (`dict[int, str]`): Those that are kept, by their numbers.
        candidates (`list[dict]`): `id`, `prompt`, `answers` of those that can be compared.
        rejected (`list[dict]`): `id`, `reason`, `value` of the others.
    """

    id: str
    images: list[OpenedImage] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    drawn: int = 0
    questions: dict[int, str] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)

    def reject(self, reason: str, value: str, number: int | None = None) -> None:
        """Set the record aside, or its question of that number."""
        row_id = self.id if number is None else f"{self.id}#{number}"
        self.rejected.append({"id": row_id, "reason": reason, "value": printable(value[:SHOWN])})

    def outcome(self) -> dict[str, Any]:
        """What became of it, as JSON can hold it."""
        return {"id": self.id, "drawn": self.drawn, "candidates": self.candidates, "rejected": self.rejected}

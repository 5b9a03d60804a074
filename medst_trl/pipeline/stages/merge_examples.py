# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversations on which a merged model is compared with its adapter: of the user's data, or about drawn scans."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError


def read_examples(dataset: str, split: str, count: int) -> list[dict[str, Any]]:
    """
    The first conversations with an image and an answer in a dataset of any kind that a stage trains or evaluates on.

    Args:
        dataset (`str`):
            Folder or Hub id: conversations (`messages`), preference pairs (`prompt` and `chosen`), or a benchmark
            (`questions`).
        split (`str`):
            Its split.
        count (`int`):
            How many at most.

    Returns:
        `list[dict]`: `id`, `images`, `messages`.

    Raises:
        UserError: if it cannot be read or has none.
    """
    from medst_trl.data.schema import load_records

    found = list(islice(filter(None, map(_conversation, load_records(dataset, split))), count))
    if not found:
        raise UserError(
            f"{dataset}, split {split!r}, has no conversation, preference pair or benchmark question with an image "
            "and an answer to compare the merged model on."
        )
    return found


def recorded_dataset(adapter: str) -> tuple[str, str] | None:
    """The local dataset, with its split, that an adapter's own record names; `None` if it is gone."""
    try:
        record = json.loads(Path(adapter, "stage.json").read_text(encoding="utf-8"))
        dataset = record["inputs"]["dataset"][0]["path"]
        split = record["settings"].get("train_split") or "train"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no record, or of a Hub dataset
        return None
    return (dataset, split) if Path(dataset).is_dir() else None


def built_in_examples(count: int = 2) -> list[dict[str, Any]]:
    """Conversations about drawn scans."""
    from medst_trl.demo.phantoms import instruct_rows, make_phantoms

    return list(instruct_rows(make_phantoms(count, seed=0), seed=0, turns=1))


def _conversation(row: dict[str, Any]) -> dict[str, Any] | None:
    from medst_trl.data.schema import image_part, message, text_part

    if row.get("questions"):
        asked = row["questions"][0]
        turns = [
            message("user", [image_part(), text_part(asked["question"])]),
            message("assistant", [text_part(asked["answer"])]),
        ]
        return {"id": row["image_id"], "images": [row["image"]], "messages": turns}
    if "chosen" in row:
        row = row | {"messages": [*row["prompt"], *row["chosen"]]}
    if not row.get("images") or not _answers(row.get("messages") or ()):
        return None
    return {"id": row.get("id", ""), "images": row["images"], "messages": row["messages"]}


def _answers(messages: Iterable[dict[str, Any]]) -> bool:
    return any(message["role"] == "assistant" for message in messages)

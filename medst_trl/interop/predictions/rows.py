# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the readers of all formats share: rows of JSON files, and texts that can be written again."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from medst_trl.data.json_records import read_json_records
from medst_trl.data.records import Rejected, printable
from medst_trl.evaluation.metrics import RecordError


Item = tuple[str, dict[str, Any] | RecordError]
"""A row's name, and its record or why there is none."""

NOT_ENGLISH = "not in English"

_REASONS = {"malformed_json": "not JSON", "not_an_object": "not a JSON object"}


def json_rows(path: Path, keys: Collection[str]) -> Iterator[Item]:
    """The objects of a JSON array or of JSON lines that have a value for each of `keys`, the others as errors."""
    for position, row in read_json_records(path, known_by=next(iter(keys))):
        name = f"row {position + 1}"
        if isinstance(row, Rejected):
            yield name, RecordError(_REASONS[row.reason], row.value, name)
        elif missing := [key for key in keys if row.get(key) is None or row[key] != row[key]]:
            yield name, RecordError(f"no {missing[0]}", row, name)
        else:
            yield name, {key: None if value != value else value for key, value in row.items()}  # a gap of pandas


def answer_type(answer: Any, given: Any) -> dict[str, Any]:
    """The answer type a file gives, or else a guess that is marked as one: yes and no make a closed question."""
    kind = str(given).strip().lower()
    if kind in ("open", "closed"):
        return {"answer_type": kind}
    closed = str(answer).strip().lower() in ("yes", "no")
    return {"answer_type": "closed" if closed else "open", "answer_type_guessed": True}


def printable_record(record: dict[str, Any], name: str) -> dict[str, Any]:
    """
    The record, if UTF-8 can hold its texts.

    Raises:
        RecordError: for half a character, which bytes of another encoding become.
    """
    text = json.dumps(record, ensure_ascii=False, default=str)
    if printable(text) != text:
        raise RecordError("characters that are no Unicode", text, name)
    return record


def write_text(path: Path, text: str) -> None:
    """Write a file that appears under its name when it is complete, line breaks as they are."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    temporary.replace(path)

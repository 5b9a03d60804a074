# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Prediction files: one JSON object a line. Written line by line so that a killed run goes on, read with suspicion."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.data.records import printable
from medst_trl.data.text_files import read_text_file

from .metrics import RecordError, read_record


SHOWN = 200  # characters of an offending value that are kept


def read_predictions(path: str | os.PathLike) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Read a predictions file; lines that cannot be scored are set aside.

    Args:
        path (`str` or `os.PathLike`):
            File of JSON lines with at least `answer`, `answer_type` and `prediction`.

    Returns:
        `tuple`: the records, and for each line set aside its `id` (or line number), `reason` and offending `value`.

    Raises:
        UserError: if the file is missing, is not text, or holds no record that can be scored.
    """
    lines = read_text_file(Path(path), "predictions").split("\n")
    advice = "A predictions file is JSON lines: an object a line with answer, answer_type and prediction."
    return sort_out(_records(lines), path, advice)


def sort_out(
    items: Iterable[tuple[str, dict[str, Any] | RecordError]], path: str | os.PathLike, advice: str
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """
    Divide what a file holds into records that can be scored and rows that are set aside.

    Args:
        items (iterable of `tuple`):
            For each row its name, for messages, and its record or why there is none.
        path (`str` or `os.PathLike`):
            The file, to name it.
        advice (`str`):
            What the file should hold.

    Returns:
        `tuple`: records and rows set aside, see [`read_predictions`].

    Raises:
        UserError: if no record is left.
    """
    records, rejected, seen = [], [], set()
    for place, (name, record) in enumerate(items):
        key = name
        try:
            if isinstance(record, RecordError):
                raise record
            if not isinstance(record, dict):
                raise RecordError("not a JSON object", record, name)
            key = record.get("id", name)
            if not isinstance(key, str | int):
                raise RecordError("id is not a text", key, name)
            read_record(record, place)
            if record.get("id") in seen:
                raise RecordError("repeated id", record["id"], key)
        except RecordError as error:
            rejected.append(_rejected(key, error.reason, error.value))
        else:
            records.append(record)
            seen.add(key)
    if not records:
        first = rejected[0] if rejected else {"id": "the file", "reason": "empty"}
        raise UserError(f"{path} holds no prediction that can be scored ({first['id']}: {first['reason']}). {advice}")
    return records, rejected


def _records(lines: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"line {number}"
        try:
            line.encode()  # half a character stands for bytes of another encoding
            yield name, json.loads(line)
        except (ValueError, RecursionError):  # UnicodeEncodeError and JSONDecodeError are ValueErrors
            yield name, RecordError("not JSON", line, name)


def _rejected(key: Any, reason: str, value: Any) -> dict[str, str]:
    return {"id": printable(str(key)), "reason": reason, "value": printable(str(value)[:SHOWN])}

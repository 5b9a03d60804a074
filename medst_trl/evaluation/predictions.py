# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Prediction files: one JSON object a line. Written line by line so that a killed run goes on, read with suspicion."""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_jsonl
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


class PredictionLog:
    """
    The predictions of one run while it lasts: `<path>.incomplete`, one such file a rank, and `path` once all are
    there.

    Args:
        path (`pathlib.Path`):
            The final file.
        rank (`int`, *optional*, defaults to `0`):
            This process; each writes a file of its own.
    """

    def __init__(self, path: Path, rank: int = 0):
        self.path = path
        self._own = path.with_name(f"{path.name}.incomplete" + (f"-{rank}" if rank else ""))

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is there so far, of all ranks and of earlier runs with another number of them."""
        for part in self._parts():
            for line in part.read_bytes().split(b"\n")[:-1]:  # what has no line break at its end was cut off
                yield json.loads(line)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows as they come. What an earlier run left of its last line is dropped first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._own, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()

    def finish(self, ids: Collection[str]) -> None:
        """
        Put the rows into the order of `ids` and give the file its final name.

        Raises:
            UserError: if some are missing.
        """
        rows = {row["id"]: row for row in self.rows()}
        if missing := [key for key in ids if key not in rows]:
            raise UserError(
                f"{len(missing)} of {len(ids)} predictions are missing beside {self.path}, for example "
                f"{missing[0]!r}. All processes have to see the same output_dir; run the command again to add them."
            )
        write_jsonl(self.path, (rows[key] for key in ids))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.incomplete*"))

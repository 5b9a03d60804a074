# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Every call that was paid for, in a file that only grows: a reply that is in it is never asked for again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medst_trl.base.files import explain_full_disk


FILE_NAME = "judge_cache.jsonl"


class ReplyCache:
    """
    Replies by the key of their request.

    A line is `{"key", "attempt", "reply", "finish_reason", "usage"}`, or `{"key", "attempt", "error", "detail"}` for a
    request that was refused for its content. `{"key", "lost", "usage"}` is a call that may be on the bill and left no
    reply: a time-out, or a reply that was filtered. Where the server told no usage, `at_most` holds the most tokens
    it can have been; dollars are not kept, since prices can be corrected. A killed run can leave half a line: it is
    passed over. Neither requests nor API keys are in the file.

    Args:
        folder (`str` or `os.PathLike`, *optional*):
            Where `judge_cache.jsonl` lies or is to be made. Stages may share one. None keeps replies in memory.

    Attributes:
        added (`int`):
            Replies that this run added.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.path = Path(folder, FILE_NAME) if folder is not None else None
        self._rows: dict[str, dict[int, dict[str, Any]]] = {}
        self._lost: dict[str, list[dict[str, Any]]] = {}
        self._file = None
        self.added = 0
        if self.path is not None and self.path.exists():
            with open(self.path, "rb") as file:
                for line in file:
                    self._take(line)

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """The replies to a request in their order: unreadable ones, then perhaps one that can be read."""
        rows = self._rows.get(key, {})
        return [rows[attempt] for attempt in sorted(rows)]

    def charges(self, key: str) -> list[dict[str, Any]]:
        """All that a request may be on the bill for: its replies, and the calls without one."""
        return self.attempts(key) + self._lost.get(key, [])

    def add(self, row: Mapping[str, Any]) -> None:
        """
        Keep a reply, now and on disk.

        Raises:
            UserError: if the disk is full.
        """
        row = dict(row)
        self.added += 1
        self._rows.setdefault(row["key"], {})[row["attempt"]] = row
        self._write(row)

    def add_lost(self, row: Mapping[str, Any]) -> None:
        """Keep what a call without a reply may have cost, as [`add`] does."""
        row = dict(row)
        self._lost.setdefault(row["key"], []).append(row)
        self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        with explain_full_disk(self.path.parent):
            if self._file is None:
                self._file = self._open()
            # One write for one line: another process that shares the file cannot come between.
            data = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            while data:
                data = data[os.write(self._file, data) :]

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # half a line of a killed run: end it
            os.write(file, b"\n")
        return file

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            if isinstance(row["key"], str) and "lost" in row:
                self._lost.setdefault(row["key"], []).append(row)
            elif (
                isinstance(row["key"], str) and isinstance(row["attempt"], int) and ("reply" in row or "error" in row)
            ):
                self._rows.setdefault(row["key"], {}).setdefault(row["attempt"], row)
        except (ValueError, KeyError, TypeError):
            return

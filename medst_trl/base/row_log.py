# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A file of JSON lines that several processes write together and that an interrupted run resumes."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_jsonl
from .processes import process_state


class RowLog:
    """
    Rows by their `id`, appended as they are computed.

    While the run lasts, each process appends to a file of its own, `<path>.incomplete` or `<path>.incomplete-<rank>`.
    `path` itself appears once all rows are there.

    Args:
        path (`pathlib.Path`):
            The final file.
        rank (`int`, *optional*, defaults to `0`):
            Number of this process.
    """

    def __init__(self, path: Path, rank: int = 0):
        self.path = path
        self._own = path.with_name(f"{path.name}.incomplete" + (f"-{rank}" if rank else ""))

    @classmethod
    def fill(cls, path: Path, ids: Collection[str], compute: Callable[[set[str]], Iterable[dict[str, Any]]]) -> None:
        """
        Write the rows of `ids` to `path`, in that order. Does nothing where the file is complete.

        Args:
            path (`pathlib.Path`):
                The final file.
            ids (collection of `str`):
                Ids of all rows. All processes of a launch have to call this with the same ones.
            compute (`Callable`):
                From the ids that earlier runs have finished to the rows that are left for this process.

        Raises:
            UserError: if rows are missing in the end.
        """
        state = process_state()
        log = cls(path, state.process_index)
        is_complete, done = path.exists(), {row["id"] for row in log.rows()}
        state.wait_for_everyone()  # all processes have seen the same before one of them writes
        if is_complete:
            return
        if not done.issuperset(ids):
            log.append(compute(done))
            state.wait_for_everyone()
        if state.is_main_process:
            log.finish(ids)
        state.wait_for_everyone()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows so far, of all processes, also of an earlier run with another number of them."""
        for part in self._parts():
            for line in part.read_bytes().split(b"\n")[:-1]:  # a last line without a line break is incomplete
                yield json.loads(line)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append each row as soon as it is there. An incomplete last line of an earlier run is removed first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._own, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()

    def finish(self, ids: Collection[str]) -> None:
        """
        Write all rows to the final file in the order of `ids`, and delete the parts.

        Raises:
            UserError: if some are missing.
        """
        rows = {row["id"]: row for row in self.rows()}
        if missing := [key for key in ids if key not in rows]:
            raise UserError(
                f"{len(missing)} of {len(ids)} rows are missing beside {self.path}, for example {missing[0]!r}. All "
                "processes have to see the same output_dir. Run the command again to add the missing ones."
            )
        write_jsonl(self.path, (rows[key] for key in ids))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.incomplete*"))

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""JSON lines file that several processes write together. A re-run resumes it."""

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

    During the run, each process appends to its own file, `<path>.incomplete` or `<path>.incomplete-<rank>`. `path`
    itself appears when all rows are computed.

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
        Write the rows of `ids` to `path`, in that order. Does nothing if the file is complete.

        Args:
            path (`pathlib.Path`):
                The final file.
            ids (collection of `str`):
                Ids of all rows. All processes of a launch must pass the same ids.
            compute (`Callable`):
                Takes the ids that earlier runs finished and yields the remaining rows of this process.

        Raises:
            UserError: if rows are missing after all processes have finished.
        """
        state = process_state()
        log = cls(path, state.process_index)
        is_complete, done = path.exists(), {row["id"] for row in log.rows()}
        state.wait_for_everyone()  # all processes must read the same state before one of them writes
        if is_complete:
            return
        if not done.issuperset(ids):
            log.append(compute(done))
            state.wait_for_everyone()
        if state.is_main_process:
            log.finish(ids)
        state.wait_for_everyone()

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows written so far, also by an earlier run with another number of processes."""
        for part in self._parts():
            for line in part.read_bytes().split(b"\n")[:-1]:  # a last line without a line break is incomplete
                yield json.loads(line)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append each row as soon as it is computed. An incomplete last line of an earlier run is removed first."""
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
                f"{len(missing)} of {len(ids)} rows are missing in {self.path}, for example {missing[0]!r}. All "
                "processes must use the same output_dir. Run the command again to add the missing rows."
            )
        write_jsonl(self.path, (rows[key] for key in ids))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.incomplete*"))

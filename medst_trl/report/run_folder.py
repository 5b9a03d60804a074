# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What lies in the folder of a run: its stages and rounds. Damaged files are noted, not fatal."""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.redaction import hide_secrets
from medst_trl.pipeline.record import FILE_NAME
from medst_trl.pipeline.stage import STAGES


DEPTH = 3  # <run>/round_1/evaluate/aligned
_ROUND = re.compile(r"round_(\d{1,6})")
_SORT = {"settings": dict, "counts": dict, "versions": dict, "seconds": int | float, "started": str}


@dataclass(frozen=True)
class StageRun:
    """
    One stage that ran, or is running.

    Attributes:
        stage (`str`): `"sft"`.
        name (`str`): Its folder, relative to the run.
        folder (`pathlib.Path`): Where that is.
        round (`int`): Number of the round it belongs to, 0 outside of rounds.
        record (`dict`): Its `stage.json`; empty where that is damaged.
    """

    stage: str
    name: str
    folder: Path
    round: int
    record: dict[str, Any]

    @property
    def state(self) -> str:
        if not self.record:
            return "damaged record"
        return "complete" if self.record["status"] == "complete" else "not finished (still running, or cut short)"

    @property
    def settings(self) -> dict[str, Any]:
        return self.record.get("settings", {})

    @property
    def counts(self) -> dict[str, Any]:
        return self.record.get("counts", {})


@dataclass
class Run:
    """
    A run's folder. Made by [`read_run`].

    Attributes:
        folder (`pathlib.Path`): Absolute.
        stages (`list` of [`StageRun`]): Outside of rounds first, then by round, each in the order of the data's way.
        notes (`list[str]`): What could not be read, for the page.
    """

    folder: Path
    stages: list[StageRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rounds(self) -> list[int]:
        return sorted({stage.round for stage in self.stages if stage.stage in ("generate", "judge", "dpo")})

    def of(self, stage: str, round: int | None = None) -> list[StageRun]:
        return [run for run in self.stages if run.stage == stage and round in (None, run.round)]

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """The object in a file; None where there is no file, and with a note where it is damaged."""
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("not a JSON object")
            return content
        except FileNotFoundError:
            return None
        except OSError as error:
            self.notes.append(f"{self.name(path)} cannot be read: {error.strerror}.")
        except (ValueError, RecursionError):
            self.notes.append(f"{self.name(path)} is damaged (not a JSON object) and is left out.")
        return None

    def read_lines(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a JSON lines file, each with the byte it begins at; bad lines are counted in a note."""
        bad, offset = [], 0
        try:
            with open(path, "rb") as file:
                for line_number, line in enumerate(file, start=1):
                    content = parse_line(line)
                    if content is not None:
                        yield offset, content
                    elif line.strip():
                        bad.append(line_number)
                    offset += len(line)
        except FileNotFoundError:
            return
        except OSError as error:
            self.notes.append(f"{self.name(path)} cannot be read: {error.strerror}.")
        if bad:
            lines = "line" if len(bad) == 1 else "lines"
            self.notes.append(
                f"{self.name(path)}: {len(bad):,} damaged {lines} left out, the first is line {bad[0]:,}."
            )


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None for anything else."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_run(folder: str | os.PathLike) -> Run:
    """
    Find the stages of a run.

    Args:
        folder (`str` or `os.PathLike`): The folder that holds the stages' folders, such as `runs/demo`.

    Raises:
        UserError: if there is no such folder, or no stage in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"There is no folder {path} to report on. Give the folder of a run (`medst run RECIPE` makes it)."
        )
    if (path / FILE_NAME).exists():
        raise UserError(f"{path} is the folder of a single stage. Give the folder around it: --run {path.parent}")
    run = Run(Path(os.path.abspath(path)))
    for stage_folder in _stage_folders(run.folder, DEPTH):
        stage = _read_stage(run, stage_folder)
        if stage is not None:
            run.stages.append(stage)
    if not run.stages:
        raise UserError(
            f"{path} holds no stage yet ({FILE_NAME} in a folder of its own), so there is nothing to report. Run a "
            f"recipe first (`medst run demo`), or give the folder that its output_dir names."
        )
    order = list(STAGES)
    run.stages.sort(key=lambda s: (s.round, order.index(s.stage), s.record.get("started", ""), s.name))
    return run


def _stage_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError:
        return
    for child in children:
        if (child / FILE_NAME).is_file():
            yield child
        if depth > 1 and not child.name.startswith("checkpoint-"):
            yield from _stage_folders(child, depth - 1)


def _read_stage(run: Run, folder: Path) -> StageRun | None:
    name = run.name(folder)
    parts = name.split("/")
    match = _ROUND.fullmatch(parts[0])
    record = run.read_json(folder / FILE_NAME)
    if record is not None and (problem := _problem(record)):
        run.notes.append(f"{name}/{FILE_NAME} is left out: {problem}.")
        record = None
    stage = record["stage"] if record else next((part for part in parts if part in STAGES), None)
    if stage is None:
        return None
    record = hide_secrets(record or {})
    return StageRun(stage, name, folder, int(match[1]) if match else 0, record)


def _problem(record: dict[str, Any]) -> str | None:
    if record.get("stage") not in list(STAGES):
        return "it names no stage that this version knows"
    if not isinstance(record.get("status"), str):
        return "it has no status"
    for key, kind in _SORT.items():
        if not isinstance(record.get(key, kind() if kind in (dict, str) else 0), kind):
            return f"its {key} is of another kind than a stage writes"
    if not math.isfinite(record.get("seconds", 0)):
        return "its seconds are no number"
    return None

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The contents of a run directory: its stages and rounds. Damaged files are noted, and the rest is read."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.redaction import hide_secrets
from medst_trl.pipeline.record import RECORD_FILE
from medst_trl.pipeline.stage import STAGES, Stage


DEPTH = 3  # <run>/round_1/evaluate/aligned
_ROUND = re.compile(r"round_(\d{1,6})")
_TYPES = {"settings": dict, "counts": dict, "versions": dict, "inputs": dict, "seconds": int | float, "started": str}


@dataclass(frozen=True)
class StageRun:
    """
    One stage that ran, or is running.

    Attributes:
        stage ([`Stage`]): The stage.
        name (`str`): Its directory, relative to the run directory.
        directory (`pathlib.Path`): Absolute.
        round (`int`): The round it belongs to, 0 for none.
        record (`dict`): Its `stage.json`; empty if that is damaged.
    """

    stage: Stage
    name: str
    directory: Path
    round: int
    record: dict[str, Any]

    @property
    def state(self) -> str:
        if not self.record:
            return "damaged record"
        return "complete" if self.record["status"] == "complete" else "not finished (running or interrupted)"

    @property
    def settings(self) -> dict[str, Any]:
        return self.record.get("settings", {})

    @property
    def counts(self) -> dict[str, Any]:
        return self.record.get("counts", {})

    @property
    def started(self) -> str:
        return self.record.get("started", "")


@dataclass
class Run:
    """
    A run directory, see [`read_run`].

    Attributes:
        directory (`pathlib.Path`): Absolute.
        stages (`list` of [`StageRun`]): Those without a round first, then by round, in pipeline order.
        notes (`list[str]`): What could not be read, for the page.
    """

    directory: Path
    stages: list[StageRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rounds(self) -> list[int]:
        return sorted({run.round for run in self.select(lambda stage: stage.repeats)})

    def select(self, is_wanted: Callable[[Stage], bool], round: int | None = None) -> list[StageRun]:
        """Return the runs of the stages that are wanted, in all rounds or in one."""
        return [run for run in self.stages if is_wanted(run.stage) and round in (None, run.round)]

    def datasets(self, kind: str, round: int | None = None) -> list[Path]:
        """Return the directories of the datasets of a kind that the stages make."""
        return [
            run.directory / output.directory
            for run in self.select(lambda stage: stage.makes(kind), round)
            for output in run.stage.outputs
            if output.kind == kind
        ]

    def name(self, path: Path) -> str:
        return path.relative_to(self.directory).as_posix()

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """Read the object in a file. Return None if the file is missing, or, with a note, if it is damaged."""
        try:
            content = parse_object(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            self.notes.append(f"{self.name(path)} cannot be read: {error.strerror}.")
            return None
        if content is None:
            self.notes.append(f"{self.name(path)} is damaged (not a JSON object) and is left out.")
        return content

    def read_lines(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the objects in a JSON lines file with their byte offsets. Damaged lines are counted in a note."""
        damaged, offset = [], 0
        try:
            with open(path, "rb") as file:
                for line_number, line in enumerate(file, start=1):
                    content = parse_object(line)
                    if content is not None:
                        yield offset, content
                    elif line.strip():
                        damaged.append(line_number)
                    offset += len(line)
        except FileNotFoundError:
            return
        except OSError as error:
            self.notes.append(f"{self.name(path)} cannot be read: {error.strerror}.")
        if damaged:
            lines = "line is" if len(damaged) == 1 else "lines are"
            self.notes.append(
                f"{self.name(path)}: {len(damaged):,} damaged {lines} left out, the first is line {damaged[0]:,}."
            )


def parse_object(text: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_run(directory: str | os.PathLike) -> Run:
    """
    Find the stages of a run.

    Args:
        directory (`str` or `os.PathLike`): The directory that holds the stages' directories, such as `runs/demo`.

    Raises:
        UserError: if there is no such directory, or no stage in it.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory. Give a run directory, which `medst run RECIPE` makes.")
    if (path / RECORD_FILE).exists():
        raise UserError(f"{path} is the directory of a single stage. Give the run directory: --run {path.parent}")
    run = Run(Path(os.path.abspath(path)))
    run.stages = [
        stage for place in _stage_directories(run.directory) if (stage := _read_stage(run, place)) is not None
    ]
    if not run.stages:
        raise UserError(
            f"{path} holds no stage yet (no {RECORD_FILE} in a directory of its own), so there is nothing to report. "
            "Run a recipe first (`medst run demo`), or give the directory that its output_dir names."
        )
    order = list(STAGES)
    run.stages.sort(key=lambda stage: (stage.round, order.index(stage.stage.name), stage.started, stage.name))
    return run


def _stage_directories(directory: Path) -> list[Path]:
    found = {path.parent for depth in range(1, DEPTH + 1) for path in directory.glob("*/" * depth + RECORD_FILE)}
    hidden = (".", "checkpoint-")
    return sorted(p for p in found if not any(part.startswith(hidden) for part in p.relative_to(directory).parts))


def _read_stage(run: Run, directory: Path) -> StageRun | None:
    name = run.name(directory)
    parts = name.split("/")
    match = _ROUND.fullmatch(parts[0])
    record = run.read_json(directory / RECORD_FILE)
    if record is not None and (problem := _problem(record)):
        run.notes.append(f"{name}/{RECORD_FILE} is left out: {problem}.")
        record = None
    stage = record["stage"] if record else next((part for part in parts if part in STAGES), None)
    if stage is None:
        return None
    return StageRun(STAGES.get(stage), name, directory, int(match[1]) if match else 0, hide_secrets(record or {}))


def _problem(record: dict[str, Any]) -> str | None:
    if record.get("stage") not in list(STAGES):
        return "it names a stage that is not registered"
    if not isinstance(record.get("status"), str):
        return "it has no status"
    for key, kind in _TYPES.items():
        if key in record and not isinstance(record[key], kind):
            return f"its {key} has the wrong type"
    return None if math.isfinite(record.get("seconds", 0)) else "its seconds are not a number"

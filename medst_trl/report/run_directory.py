# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The contents of a run directory: its stages and rounds. Damaged files are noted, and the rest is read."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_object
from medst_trl.base.redaction import hide_secrets
from medst_trl.pipeline.record import RECORD_FILE, read_record
from medst_trl.pipeline.stage import MODEL, STAGES, Stage


DEPTH = 3  # <run>/round_1/evaluate/aligned
_ROUND = re.compile(r"round_(\d{1,6})(?:/|$)")
_HIDDEN = re.compile(r"(?:^|/)(?:\.|checkpoint-)")


class StageRun:
    """
    One stage that ran, or is running.

    Args:
        stage ([`Stage`]): The stage.
        name (`str`): Its directory, relative to the run directory.
        directory (`pathlib.Path`): Absolute.
        record (`dict`): Its `stage.json`; empty if that is damaged.

    Attributes:
        round (`int`): The round it belongs to, 0 for none.
        state (`str`): Whether it is complete, in words.
        settings, counts, started: From its record.
    """

    def __init__(self, stage: Stage, name: str, directory: Path, record: dict[str, Any]):
        self.stage, self.name, self.directory, self.record = stage, name, directory, record
        match = _ROUND.match(name)
        self.round = int(match[1]) if match else 0
        self.settings, self.counts = record.get("settings", {}), record.get("counts", {})
        self.started = record.get("started", "")
        self.state = "not finished (running or interrupted)" if record else "damaged record"
        if record.get("status") == "complete":
            self.state = "complete"


class Run:
    """
    A run directory: the stages that are found in it.

    Args:
        directory (`str` or `os.PathLike`): The directory that holds the stages' directories, such as `runs/demo`.

    Attributes:
        directory (`pathlib.Path`): Absolute.
        stages (`list` of [`StageRun`]): Those without a round first, then by round, in pipeline order.
        notes (`list[str]`): What could not be read, for the page.

    Raises:
        UserError: if there is no such directory, or no stage in it.
    """

    def __init__(self, directory: str | os.PathLike):
        path = Path(directory)
        if not path.is_dir():
            raise UserError(f"{path} is not a directory. Give a run directory, which `medst run RECIPE` makes.")
        if (path / RECORD_FILE).exists():
            raise UserError(f"{path} is the directory of a single stage. Give the run directory: --run {path.parent}")
        self.directory, self.notes = Path(os.path.abspath(path)), []
        records = {file for depth in range(1, DEPTH + 1) for file in self.directory.glob("*/" * depth + RECORD_FILE)}
        places = [file.parent for file in sorted(records) if not _HIDDEN.search(self.name(file))]
        self.stages = [stage for place in places if (stage := self._read_stage(place)) is not None]
        if not self.stages:
            raise UserError(f"{path} holds no stage yet. Give the output_dir of a recipe, such as `medst run demo`.")
        order = list(STAGES)
        self.stages.sort(key=lambda stage: (stage.round, order.index(stage.stage.name), stage.started, stage.name))

    def _read_stage(self, directory: Path) -> StageRun | None:
        name, record = self.name(directory), read_record(directory)
        stage = record.get("stage") or next((part for part in name.split("/") if part in STAGES), None)
        if not record or stage not in STAGES:
            self.notes.append(f"{name}/{RECORD_FILE} is damaged or names an unknown stage, and is left out.")
        return StageRun(STAGES.get(stage), name, directory, hide_secrets(record)) if stage in STAGES else None

    def select(self, is_wanted: Callable[[Stage], bool], round: int | None = None) -> list[StageRun]:
        """Return the runs of the stages that are wanted, in all rounds or in one."""
        return [run for run in self.stages if is_wanted(run.stage) and round in (None, run.round)]

    def lineage(self, reader: StageRun, name: str) -> list[StageRun]:
        """Return the stages that made a model which a stage read under this name, the last one first."""
        found: list[StageRun] = []
        while name and (maker := self._maker(reader, name)) is not None and maker not in found:
            found.append(maker)
            keys = [key for item in maker.stage.inputs if item.kind == MODEL for key in (item.key, item.replaced_by)]
            names = (maker.settings.get(key) for key in keys)
            reader, name = maker, next((value for value in names if value and isinstance(value, str)), "")
        return found

    def _maker(self, reader: StageRun, name: str) -> StageRun | None:
        """Return the stage in whose directory a path is. The run directory may have moved since, or be a copy."""
        path = Path(os.path.realpath(os.path.expanduser(name)))
        earlier = os.path.abspath(str(reader.settings.get("output_dir", ""))).removesuffix(f"/{reader.name}")
        for stage in sorted(self.stages, key=lambda one: -len(one.name)):
            places = (os.path.realpath(Path(root, stage.name)) for root in (self.directory, earlier))
            if any(map(path.is_relative_to, places)):
                return stage
        return None

    def name(self, path: Path) -> str:
        return path.relative_to(self.directory).as_posix()

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """Read the object in a file. Return None if the file is missing, or, with a note, if it is damaged."""
        content = read_object(path)
        if not content and path.exists():
            self.notes.append(f"{self.name(path)} is damaged and is left out.")
        return content or None

    def read_log(self, stage: StageRun) -> list[dict[str, Any]]:
        """Return the log of a trainer: of the finished run, or of the newest checkpoint of an unfinished one."""
        checkpoints = sorted(stage.directory.glob("checkpoint-*[0-9]"), key=lambda path: path.name.zfill(30))
        for path in (place / "trainer_state.json" for place in (stage.directory, *reversed(checkpoints))):
            content = self.read_json(path)
            if content is None:
                continue
            if isinstance(content.get("log_history"), list):
                return [entry for entry in content["log_history"] if isinstance(entry, dict)]
            self.notes.append(f"{self.name(path)} has no log_history and is left out.")
        return []

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
`stage.json`, the record of a stage: its settings and inputs, and whether it is complete.

It is written when a stage starts and again when it ends, so that a second run can decide whether to skip the stage, to
resume it or to refuse. A directory without a record is not ours, and nothing in it is ever deleted.
"""

import fcntl
import json
import math
import os
import shutil
import socket
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_object, write_json
from medst_trl.base.fingerprints import REFERENCE_FOLDER, fingerprint, package_versions, same_source
from medst_trl.base.processes import on_main_process, process_state, world_size
from medst_trl.base.redaction import hide_secrets
from medst_trl.base.settings import settings_among
from medst_trl.data.loading import fingerprint_dataset
from medst_trl.selftrain.judge.judge import LocalJudge

from .stage import STAGES, Stage


RECORD_FILE = "stage.json"
LOCK = ".stage.lock"

# Never affect the result: where it is written, and whether it replaces an earlier one.
ALWAYS_OPERATIONAL = frozenset({"output_dir", "overwrite"})

# Files that may exist before a stage starts, and that --overwrite keeps (besides *.log and .stage.*).
NOT_RESULTS = frozenset({".gitignore", ".gitkeep", ".DS_Store", "judge_cache.jsonl", REFERENCE_FOLDER})

# `medst run` sets it for its stages, to their labels: a skipped one then prints a single line, not its results again.
RUN_VARIABLE = "MEDST_RUN"

_MISSING = "(not set)"
# The entries that every record has, and their types
_TYPES = {
    "stage": str,
    "status": str,
    "started": str,
    "seconds": int | float,
    "versions": dict,
    "inputs": dict,
    "settings": dict,
    "counts": dict,
}


class StageRecord:
    """
    The record of one run of one stage in `<output_dir>/stage.json`. Made by [`StageRecord.of`].

    Attributes:
        decision (`str`):
            `"start"`: there is no earlier run. `"resume"`: an earlier run with the same settings was interrupted.
            `"skip"`: an earlier run with the same settings is complete; the caller returns.
        output_dir (`pathlib.Path`):
            The stage's directory.
        content (`dict`):
            The content of `stage.json`.

    Example:

    ```python
    record = StageRecord.of(STAGE, args)
    if record.decision == "skip":
        return
    with record:  # a failure deletes the record of a new run, so that a corrected command is not refused
        ...
    record.finish(counts={"records": 315})
    ```
    """

    def __init__(self, output_dir: Path, decision: str, content: dict[str, Any], lock: TextIO | None = None):
        self.output_dir = output_dir
        self.decision = decision
        self.content = content
        self._lock = lock  # None if this process does not write the record
        self._start = time.monotonic()

    @classmethod
    def of(cls, stage: Stage, args: Any, *others: Any, inputs: Mapping[str, Any] | None = None) -> "StageRecord":
        """
        Decide whether to start, resume or skip a stage in its `output_dir`, and write its record.

        Under a distributed launch, every rank must call this. Rank 0 decides and writes, the others follow.

        Args:
            stage ([`Stage`]):
                The stage. Its `operational` settings may differ from an earlier run, and its `earlier_defaults` fill
                in what the record of an earlier version lacks.
            args (dataclass):
                Its own settings. Secrets are stored as `"<hidden>"` and never compared.
            *others (dataclass, *optional*):
                Settings of the trainer, sources, engines and so on. Settings of sources, engines and metrics that
                `args` do not choose are neither recorded nor compared. Records of earlier versions list them. One of
                the dataclasses has `output_dir`, which is created if it is missing. One may have `overwrite`: delete
                the results of an earlier run, and start again.
            inputs (`dict`, *optional*):
                Name to path, Hub id, fingerprint, list of these, or None. They are compared by content or revision, so
                a setting of the same name is not compared as text. By default the stage's inputs that `args` name,
                without operational ones and names on a server.

        Raises:
            UserError: if the directory holds something else, another process is writing it, an input is missing, or a
                setting or input that affects the result has changed (naming each, with its old and new value).
        """
        settings, free = _settings_of(stage, args, others)
        if inputs is None:
            named = [item for item in stage.inputs if hasattr(args, item.key) and item.key not in stage.operational]
            inputs = {item.key: settings[item.key] for item in named if not item.is_remote(settings)}
        if world_size() == 1:
            return cls._decide(stage, settings, inputs, free)
        import torch.distributed

        process_state()
        if not torch.distributed.is_initialized():  # each rank would act as if it were the only one
            raise UserError(
                f"{world_size()} processes were started, but there are no GPUs for them. To use CPUs: "
                "--accelerate_config cpu, or ACCELERATE_USE_CPU=true in the environment."
            )
        # Rank 0 alone reads the directory: a later rank would read what rank 0 has just written.
        return on_main_process(lambda: cls._decide(stage, settings, inputs, free))

    def __getstate__(self) -> dict[str, Any]:
        """The record as the other ranks receive it: a lock cannot be sent."""
        return vars(self) | {"_lock": None}

    @property
    def is_silent(self) -> bool:
        """Whether the stage is skipped in `medst run`, where it does not print its earlier results again."""
        return self.decision == "skip" and RUN_VARIABLE in os.environ

    def finish(self, counts: Mapping[str, Any] | None = None, **extra: Any) -> None:
        """
        Mark the stage complete. Nothing may change its results afterwards.

        Args:
            counts (`dict`, *optional*):
                Numbers to keep: records read, rejected by reason, steps taken.
            **extra:
                More entries of `stage.json`.
        """
        if self._lock is None:
            return
        inputs = self.content["inputs"]
        for name, value in inputs.items():  # a Hub revision is known once something was downloaded
            inputs[name] = [fingerprint(item["hub_id"]) if "hub_id" in item else item for item in value]
        seconds = round(self.content["seconds"] + time.monotonic() - self._start, 3)
        self.content |= _plain({"counts": counts or {}} | extra)
        self.content |= {"status": "complete", "seconds": seconds, "finished": _now()}
        # This file must survive a crash of the machine: it tells whether the others are complete.
        write_json(self.output_dir / RECORD_FILE, self.content, fsync=True)
        self._lock.close()

    def __enter__(self) -> "StageRecord":
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        """Delete the record of a new run that failed before it wrote a result."""
        if isinstance(error, Exception) and self._lock is not None and self.decision == "start":
            self._forget()

    def _forget(self) -> None:
        """Delete the record of a run without results, so that a corrected command is not refused."""
        is_alone = world_size() == 1  # another process may be about to fill an empty file
        record = self.output_dir / RECORD_FILE

        def is_result(path: Path) -> bool:
            # A cache that is newer than the record has replies that this run has paid for.
            is_new = path.is_file() and path.stat().st_mtime > record.stat().st_mtime
            return path != record and (not _is_ignorable(path) or (is_new and path.name in NOT_RESULTS))

        left = list(filter(is_result, self.output_dir.iterdir()))
        if all(is_alone and path.is_file() and not path.stat().st_size for path in left):
            for path in left:
                path.unlink()
            record.unlink()

    @classmethod
    def _decide(cls, stage, settings, inputs, free) -> "StageRecord":
        directory, overwrite = Path(settings["output_dir"]), settings.get("overwrite", False)
        sources = {name: item if isinstance(item, list | tuple) else [item] for name, item in inputs.items()}
        new = {
            "stage": stage.name,
            "status": "running",
            "started": _now(),
            "seconds": 0.0,
            "versions": package_versions(),
            "inputs": {
                name: [one if isinstance(one, dict) else fingerprint_dataset(one) for one in items if one is not None]
                for name, items in sources.items()
            },
            "settings": hide_secrets(_plain(settings)),
            "counts": {},
        }
        old = _read(directory, stage.name, overwrite)
        if old is None or overwrite:
            directory.mkdir(parents=True, exist_ok=True)
            decision, lock = "start", _lock(directory)
            if old is not None:
                _delete_results(directory)
        else:
            _refuse_changes(stage, directory, old, new, {*free, *inputs})
            versions, earlier = new["versions"], old["versions"]
            if others := [f"{x} {earlier.get(x)} -> {versions[x]}" for x in versions if earlier.get(x) != versions[x]]:
                warnings.warn(f"{directory} was made with other versions: {', '.join(others)}.", stacklevel=3)
            if old["status"] == "complete":
                print(f"{stage.name}: {directory} is finished and unchanged, nothing to do.")
                return cls(directory, "skip", old)
            decision, lock = "resume", _lock(directory)
            print(f"{stage.name}: resuming {directory}, started {old['started']}.")
            new |= {"started": old["started"], "seconds": old["seconds"] + _seconds_of_interrupted_run(directory)}
        write_json(directory / RECORD_FILE, new, fsync=True)  # see `finish`
        return cls(directory, decision, new, lock)


def read_record(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the content of the record in a directory; empty if there is none, or it is damaged."""
    record = read_object(Path(directory, RECORD_FILE))
    return record if _is_sound(record) else {}


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Whether a record has the form of [`StageRecord`], and each of its inputs is a list of fingerprints."""
    has_types = all(isinstance(record[key], kind) for key, kind in _TYPES.items() if key in record)
    if not has_types or not math.isfinite(record.get("seconds", 0)):
        return False
    inputs = [item if isinstance(item, list) else [None] for item in record.get("inputs", {}).values()]
    return all(isinstance(one, dict) and isinstance(one.get("path", ""), str) for item in inputs for one in item)


def is_complete(directory: str | os.PathLike, stage: str | None = None) -> bool:
    """Whether a directory holds the complete output of a stage, by default of any stage."""
    record = read_record(directory)
    return record.get("status") == "complete" and stage in (None, record.get("stage"))


def changes_of(stage: Stage, args: Any, *others: Any) -> list[str]:
    """
    Describe the settings for which [`StageRecord.of`] would refuse to run, with their old and new values, or a record
    that is damaged or of another stage.

    It is for plans, so inputs are not compared: hashing them takes time, and they may not exist yet.
    """
    settings, free = _settings_of(stage, args, others)
    directory = Path(settings["output_dir"])
    if settings.get("overwrite") or not (directory / RECORD_FILE).exists():
        return []
    try:
        old = _read(directory, stage.name, overwrite=False)
    except UserError as error:
        return list(error.args)
    return list(_changed_settings(stage, old["settings"], hide_secrets(_plain(settings)), {*free, *old["inputs"]}))


def was_skipped_as_empty(path: str | os.PathLike, kind: str) -> bool:
    """Whether a path is an output of this kind that a finished stage did not write because it had no data for it."""
    path = Path(path)
    stage = read_record(path.parent).get("stage")
    output = STAGES.get(stage).output(path.name) if stage in STAGES and is_complete(path.parent) else None
    return output is not None and output.kind == kind and not path.exists()


# An earlier run in the directory


def _read(directory: Path, stage: str, overwrite: bool) -> dict[str, Any] | None:
    """Return the record of an earlier run of this stage; None if the directory is empty or missing."""
    path = directory / RECORD_FILE
    if file := next((path for path in (directory, *directory.parents) if path.is_file()), None):
        raise UserError(f"output_dir {directory}: {file} is a file, not a directory. Choose another output_dir.")
    if not path.exists():
        if others := sorted(path.name for path in directory.glob("*") if not _is_ignorable(path)):
            raise UserError(
                f"{directory} is not empty and holds no {RECORD_FILE}. It has {', '.join(others[:3])}"
                f"{', ...' if len(others) > 3 else ''}. Nothing in it was touched. Choose another output_dir."
            )
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # truncated by a crash of the machine: the directory is ours, but its settings are lost
        if overwrite:
            return {}
        record = {}
    needed = {"stage", "status", "versions", "inputs", "settings"}
    if not isinstance(record, dict) or not needed <= record.keys() or not _is_sound(record):
        raise UserError(
            f"{path} is damaged, or was not written by medst_trl. Nothing was touched. Choose another output_dir. If "
            f"the file is cut off, --overwrite starts again (deletes the contents of {directory})."
        )
    if record["stage"] != stage:
        raise UserError(
            f"{directory} holds the output of stage {record['stage']!r}, not of {stage!r}. Nothing was touched. "
            "Choose another output_dir."
        )
    return record


def _refuse_changes(stage: Stage, directory: Path, old: dict, new: dict, free: Collection[str]) -> None:
    changes = [
        *_changed_settings(stage, old["settings"], new["settings"], free),
        *_changed_inputs(old["inputs"], new["inputs"]),
    ]
    if changes:
        raise UserError(
            f"{directory} was made with other settings:\n  " + "\n  ".join(changes) + "\nRestore the old ones, choose "
            f"another output_dir, or start again with --overwrite (deletes the contents of {directory})."
        )


def _settings_of(stage: Stage, args: Any, others: Sequence[Any]) -> tuple[dict[str, Any], set[str]]:
    """Return the settings that count in a run, and the names of those that may differ from an earlier run."""
    chosen = _chosen_objects(stage, args)
    used = [args, *_used_settings(stage, chosen, others)]
    settings = {item.name: getattr(part, item.name) for part in used for item in fields(part) if item.init}
    # A local judge decides the result, also one that an earlier run chose and this one does not.
    kinds = [kind for kind in stage.arguments() if not issubclass(kind, LocalJudge)]
    unused = {item.name for kind in kinds for item in fields(kind)} - settings.keys()
    free = unused.union(*(getattr(item, "operational", ()) for item in chosen))
    return settings, free if "operational" in settings else free.union(getattr(args, "operational", ()))


def _chosen_objects(stage: Stage, args: Any) -> list[Any]:
    """Return the registered objects that `args` name, such as a source or metrics."""
    chosen = []
    for key, registry in stage.registries.items():
        names = getattr(args, key, None) or ()
        chosen += map(registry.get, [names] if isinstance(names, str) else names)
    return chosen


def _used_settings(stage: Stage, chosen: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """
    Return the settings of the chosen objects, and those that belong to no registered object. Settings of a local judge
    count only if it is chosen.
    """
    owned = {getattr(item, "settings", None) for registry in stage.registries.values() for item in registry.values()}
    used = [settings_among(others, getattr(item, "settings", None)) for item in chosen]
    used += [item for item in others if type(item) not in owned]
    return [item for item in used if item is not None and (not isinstance(item, LocalJudge) or item.is_chosen)]


def _changed_settings(
    stage: Stage, old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str]
) -> Iterator[str]:
    """Describe each setting that differs from that of an earlier run, without those that match `free`."""
    patterns = {*free, *stage.operational, *ALWAYS_OPERATIONAL}
    old = {key: value for key, value in stage.earlier_defaults.items() if key in new} | old
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key, _MISSING), new.get(key, _MISSING)
        is_added_or_removed = (key in old) != (key in new)  # by another version
        is_unset = any(value is None or value is False for value in (before, now))
        is_free = any(fnmatchcase(key, pattern) for pattern in patterns)
        if before != now and not (is_added_or_removed and is_unset) and not is_free:
            yield f"{key}: {_short(before)} before, {_short(now)} now"


def _changed_inputs(old: dict[str, list[dict]], new: dict[str, list[dict]]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, []), new.get(name, [])
        if len(before) != len(now) or not all(map(same_source, before, now)):
            shown = [", ".join(map(_describe, sources)) or "(none)" for sources in (before, now)]
            yield f"input {name}: {shown[0]} before, {shown[1]} now"


def _delete_results(directory: Path) -> None:
    if nested := [path for path in directory.rglob(RECORD_FILE) if path.parent != directory]:
        raise UserError(
            f"--overwrite would also delete {nested[0].parent}, which is the output of another stage. Nothing was "
            "touched. Move it, or choose another output_dir."
        )
    record = directory / RECORD_FILE
    for child in directory.iterdir():
        if child.is_dir() and not (child.is_symlink() or _is_ignorable(child)):
            shutil.rmtree(child)
        elif child != record and not _is_ignorable(child):
            child.unlink()
    record.unlink()  # last, so that the directory is still ours if this is interrupted


def _seconds_of_interrupted_run(directory: Path) -> float:
    """Seconds from the record to the last file: a killed run cannot record its duration."""
    start = (directory / RECORD_FILE).stat().st_mtime
    written = [path.stat().st_mtime for path in directory.rglob("*") if path.is_file() and not _is_ignorable(path)]
    return round(max(0.0, max(written) - start), 3)


def _is_ignorable(path: Path) -> bool:
    return path.name in NOT_RESULTS or path.suffix == ".log" or path.name.startswith(".stage.")


# Writing


def _lock(directory: Path) -> TextIO:
    """Lock the directory; the system releases the lock when the process ends."""
    file = open(directory / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held until the stage or the process ends)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"Another process is writing {directory} ({holder}). Wait for it, or choose another output_dir."
        ) from None
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    print(f"host {socket.gethostname()}, pid {os.getpid()}", file=file, flush=True)
    return file


def _plain(value: Any) -> Any:
    """The value as JSON reads it back, so that old and new can be compared."""
    return json.loads(json.dumps(value, default=lambda item: sorted(item) if isinstance(item, set) else str(item)))


def _short(value: Any) -> str:
    text = value if value == _MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _describe(source: dict) -> str:
    if "hub_id" in source:
        return f"{source['hub_id']} at {source.get('revision') or 'no revision'}"
    return f"{source.get('path')} (SHA-256 {str(source.get('sha256', source.get('used_sha256')))[:12]})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
`stage.json`: what a stage was asked to do, with what, and how far it came.

It is written when a stage starts and again when it ends, so that a second run knows whether to skip, to continue or to
refuse. A folder without one is not ours, and nothing in it is ever deleted.
"""

import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import REFERENCE_FOLDER, fingerprint, same_source
from medst_trl.base.redaction import hide_secrets


FILE_NAME = "stage.json"
PACKAGES = ("medst_trl", "torch", "transformers", "trl", "peft", "datasets", "accelerate")

# Never part of a result: where it lies, and how the run was asked to treat what lay there.
ALWAYS_OPERATIONAL = frozenset({"output_dir", "overwrite"})

# May lie in a folder before a stage starts there, and stays when the stage is overwritten (besides *.log).
NOT_RESULTS = frozenset(
    {".stage.lock", ".stage.json.tmp", ".gitignore", ".gitkeep", ".DS_Store", "judge_cache.jsonl", REFERENCE_FOLDER}
)


class StageRecord:
    """
    The record of one run of one stage in `<output_dir>/stage.json`. Made by [`StageRecord.open`].

    Attributes:
        status (`str`):
            `"new"`: start from nothing. `"continue"`: an earlier run with the same settings was cut short, go on from
            what it left. `"finished"`: everything is there, return.
        output_dir (`pathlib.Path`):
            The stage's folder.
        content (`dict`):
            What `stage.json` holds.

    Example:

    ```python
    record = StageRecord.open(
        args.output_dir,
        stage="prepare",
        settings=dataclasses.asdict(args),
        inputs={"source": args.source},
        operational={"num_workers"},
        overwrite=args.overwrite,
    )
    if record.status == "finished":
        return
    ...
    record.finish(counts={"records": 315})
    ```
    """

    def __init__(
        self, output_dir: Path, status: str, content: dict[str, Any], *, writes: bool, lock: TextIO | None = None
    ):
        self.output_dir = output_dir
        self.status = status
        self.content = content
        self._writes = writes
        self._lock = lock
        self._begun = time.monotonic()

    @classmethod
    def open(
        cls,
        output_dir: str | os.PathLike,
        *,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        operational: Collection[str] = (),
        earlier_defaults: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> "StageRecord":
        """
        Begin, continue or recognise a stage in `output_dir`, and write its record.

        Under a distributed launch every rank has to call this; rank 0 decides and writes, the others follow.

        Args:
            output_dir (`str` or `os.PathLike`):
                Folder of the stage; made if it is missing.
            stage (`str`):
                Name of the stage, for example `"sft"`.
            settings (`dict`):
                All settings, as JSON can hold them. Secrets are stored as `"<hidden>"` and never compared.
            inputs (`dict`, *optional*):
                Name to path, Hub id, list of these, or None. They are compared by content or revision, so a setting of
                the same name is not compared as text.
            operational (collection of `str`, *optional*):
                Keys of `settings` that change no result (workers, logging) and so may differ from an earlier run.
            earlier_defaults (`dict`, *optional*):
                Values of settings that records of earlier versions lack, see [`~medst_trl.pipeline.stage.Stage`].
            overwrite (`bool`, *optional*, defaults to `False`):
                Delete what an earlier run of this stage left in `output_dir` and start again.

        Raises:
            UserError: if the folder holds something else, another process is writing it, an input is missing, or a
                setting or input that affects the result has changed (naming each, with its old and new value).
        """
        arguments = (Path(output_dir), stage, settings, inputs or {}, set(operational), earlier_defaults, overwrite)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls._decide(*arguments)
        return cls._decide_for_all_ranks(*arguments)

    def finish(self, counts: Mapping[str, Any] | None = None, **extra: Any) -> None:
        """
        Mark the stage complete: nothing that follows may change its results.

        Args:
            counts (`dict`, *optional*):
                Numbers worth keeping (records read, rejected by reason, steps taken).
            **extra:
                Further entries of `stage.json`.
        """
        if not self._writes:
            return
        inputs = self.content["inputs"]
        for name, value in inputs.items():  # a Hub revision is known once something was downloaded
            inputs[name] = [fingerprint(item["hub_id"]) if "hub_id" in item else item for item in value]
        self.content |= _plain({"counts": counts or {}} | extra)
        self.content["status"] = "complete"
        self.content["seconds"] = round(self.content["seconds"] + time.monotonic() - self._begun, 3)
        self.content["finished"] = _now()
        _write(self.output_dir, self.content)
        if self._lock is not None:
            self._lock.close()

    def forget(self) -> None:
        """
        Takes the record back where a new run has failed before it left anything: settings that were the reason of the
        failure must not stand in the way of better ones.
        """
        left = [child for child in self.output_dir.iterdir() if child.name != FILE_NAME and not _is_ignorable(child)]
        if self._writes and self.status == "new" and not left:
            (self.output_dir / FILE_NAME).unlink()

    @classmethod
    def _decide(cls, folder, stage, settings, inputs, operational, earlier_defaults, overwrite) -> "StageRecord":
        new = {
            "stage": stage,
            "status": "running",
            "started": _now(),
            "seconds": 0.0,
            "versions": package_versions(),
            "inputs": {name: _fingerprints(source) for name, source in inputs.items()},
            "settings": hide_secrets(_plain(settings)),
            "counts": {},
        }
        old = _read(folder, stage, overwrite)
        if old is not None and overwrite:
            lock = _lock(folder)
            _empty(folder)
        elif old is not None:
            completed = old | {"settings": {**(earlier_defaults or {}), **old["settings"]}}
            _refuse_changes(folder, completed, new, operational | set(inputs) | ALWAYS_OPERATIONAL)
            _warn_of_versions(folder, old["versions"], new["versions"])
            if old["status"] == "complete":
                print(f"{stage}: {folder} is finished and unchanged, nothing to do.")
                return cls(folder, "finished", old, writes=False)
            lock = _lock(folder)
            print(f"{stage}: continuing {folder}, begun {old['started']}.")
            new |= {"started": old["started"], "seconds": old["seconds"] + _seconds_of_cut_run(folder)}
        else:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
        _write(folder, new)
        return cls(folder, "new" if old is None or overwrite else "continue", new, writes=True, lock=lock)

    @classmethod
    def _decide_for_all_ranks(cls, folder, *arguments) -> "StageRecord":
        """Rank 0 alone looks at the folder: what it writes there would mislead a rank that comes a moment later."""
        import torch.distributed
        from accelerate.utils import broadcast_object_list

        from medst_trl.base.processes import process_state

        state = process_state()
        if not torch.distributed.is_initialized():  # each would take itself for the only one
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes were started, but there are no GPUs for them. To use CPUs: "
                "--accelerate_config cpu, or ACCELERATE_USE_CPU=true in the environment."
            )
        record, news = None, [None]
        if state.is_main_process:
            try:
                record = cls._decide(folder, *arguments)
                news = [(record.status, record.content)]
            except Exception as error:  # the other ranks would wait for ever
                news = [error]
        broadcast_object_list(news)
        if isinstance(news[0], Exception):  # on all ranks alike, so the group can be left in order
            torch.distributed.destroy_process_group()
            raise news[0]
        return record or cls(folder, *news[0], writes=False)


def _read(folder: Path, stage: str, overwrite: bool) -> dict[str, Any] | None:
    """The record of an earlier run of this stage; None where there is nothing at all."""
    path = folder / FILE_NAME
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; output_dir has to be a folder.")
    if not path.exists():
        if folder.exists() and (theirs := [child.name for child in folder.iterdir() if not _is_ignorable(child)]):
            raise UserError(
                f"{folder} is not empty and holds no {FILE_NAME}, so it is not the output of a stage "
                f"(it has {', '.join(sorted(theirs)[:3])}{', ...' if len(theirs) > 3 else ''}). "
                "Nothing in it was touched. Choose another output_dir."
            )
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # cut off by a crash of the machine: it was ours, but no longer says with which settings
        if overwrite:
            return {}
        raise UserError(
            f"{path} is damaged, so it cannot be told how the files beside it were made. "
            f"Choose another output_dir, or start again with --overwrite (deletes the contents of {folder})."
        ) from None
    if not isinstance(record, dict) or not {"stage", "status", "versions", "inputs", "settings"} <= record.keys():
        raise UserError(f"{path} was not written by medst_trl. Nothing was touched. Choose another output_dir.")
    if record["stage"] != stage:
        raise UserError(
            f"{folder} holds the output of stage {record['stage']!r}, not of {stage!r}. Nothing was touched. "
            "Choose another output_dir."
        )
    return record


def _refuse_changes(folder: Path, old: dict, new: dict, not_compared: set[str]) -> None:
    lines = []
    for key in sorted((old["settings"].keys() | new["settings"].keys()) - not_compared):
        before, now = (side["settings"].get(key, "(not set)") for side in (old, new))
        came_or_went = (key in old["settings"]) != (key in new["settings"])  # with another version of this package
        is_off = any(value is None or value is False for value in (before, now))
        if before != now and not (came_or_went and is_off):
            lines.append(f"  {key}: {_short(before)} before, {_short(now)} now")
    for name in sorted(old["inputs"].keys() | new["inputs"].keys()):
        before, now = (side["inputs"].get(name, []) for side in (old, new))
        if len(before) != len(now) or not all(map(same_source, before, now)):
            lines.append(f"  input {name}: {_describe(before)} before, {_describe(now)} now")
    if lines:
        raise UserError(
            f"{folder} was made with other settings:\n" + "\n".join(lines) + "\nPut the old ones back, choose another "
            f"output_dir, or start again with --overwrite (deletes the contents of {folder})."
        )


def _warn_of_versions(folder: Path, old: dict, new: dict) -> None:
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    if changed:
        warnings.warn(f"{folder} was made with other versions: {', '.join(changed)}.", stacklevel=5)


def _empty(folder: Path) -> None:
    nested = [path for path in folder.rglob(FILE_NAME) if path.parent != folder]
    if nested:
        raise UserError(
            f"--overwrite would delete {nested[0].parent} too, which is the output of another stage. Nothing was "
            "touched. Move it, or choose another output_dir."
        )
    record = folder / FILE_NAME
    for child in folder.iterdir():
        if child == record or _is_ignorable(child):
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    record.unlink()  # last: a run killed in here leaves a folder that is still known as ours


def _lock(folder: Path) -> TextIO | None:
    """Keep a second process out for as long as this one lives; the system lets go of it whatever happens."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    file = open(folder / ".stage.lock", "w")  # noqa: SIM115 (held until the stage or the process ends)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"Another process is writing {folder}. Wait for it, or choose another output_dir.") from None
    except OSError:  # a file system without locks
        pass
    return file


def _write(folder: Path, content: dict) -> None:
    temporary = folder / f".{FILE_NAME}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())  # unlike other files: whether the rest can be trusted hangs on this one
    os.replace(temporary, folder / FILE_NAME)


def _seconds_of_cut_run(folder: Path) -> float:
    """A killed run could not say how long it took: from its record to the last thing it wrote."""
    begun = (folder / FILE_NAME).stat().st_mtime
    written = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file() and not _is_ignorable(path)]
    return round(max(0.0, max(written) - begun), 3)


def _is_ignorable(path: Path) -> bool:
    return path.name in NOT_RESULTS or path.suffix == ".log"


def _fingerprints(source: Any) -> list[dict]:
    sources = source if isinstance(source, list | tuple) else [source]
    return [fingerprint(item) for item in sources if item is not None]


def package_versions() -> dict[str, str | None]:
    """Python's version and those of the packages that a result hangs on; None for one that is not installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _plain(value: Any) -> Any:
    """As it will read back from JSON, so that old and new compare as equals."""
    return json.loads(json.dumps(value, default=lambda item: sorted(item) if isinstance(item, set) else str(item)))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if value != "(not set)" else value
    return text if len(text) <= 80 else text[:77] + "..."


def _describe(sources: list[dict]) -> str:
    parts = []
    for source in sources:
        if "hub_id" in source:
            parts.append(f"{source['hub_id']} at {source['revision'] or 'no revision'}")
        else:
            parts.append(f"{source['path']} (SHA-256 {source['sha256'][:12]})")
    return ", ".join(parts) or "(none)"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

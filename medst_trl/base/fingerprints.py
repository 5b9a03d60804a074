# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a result depends on: the content or Hub revision of its inputs, and the versions of packages."""

import hashlib
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import UserError
from .files import visible_files
from .hub_ids import cached_revision, can_be_hub_id


PACKAGES = ("medst_trl", "torch", "transformers", "trl", "peft", "datasets", "accelerate")
SAMPLE_BYTES = 1 << 20  # a large file inside a directory is read only at its start, middle and end
MANY_FILES = 10_000  # with more files (raw images), only names and sizes are compared
# Beside preference pairs: log-probabilities under the reference, computed by training. Not part of the dataset.
REFERENCE_FOLDER = "reference_log_probs"


def fingerprint(source: str | os.PathLike, used: Iterable[str] | None = None) -> dict[str, str | None]:
    """
    Describe the current content of `source`, for a later comparison.

    Args:
        source (`str` or `os.PathLike`):
            A file, a directory, or a Hub id with an optional revision (`"org/name@main"`).
        used (iterable of `str`, *optional*):
            Names of the files of a directory that are read. The others are not.

    Returns:
        `dict`: `{"path", "sha256"}` for a file or directory (moving it does not change the hash), with `used_sha256`
        instead if only some files are used; `{"hub_id", "revision"}` for a Hub id. The revision is the commit in the
        local Hub cache, None before a download.

    Raises:
        UserError: if `source` does not exist and cannot be a Hub id.
    """
    path = Path(source)
    if path.is_file():
        with open(path, "rb") as file:
            return {"path": str(source), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if path.is_dir():
        if used is not None:
            return {"path": str(source), "used_sha256": _sha256_of_files(path, sorted(set(used)))}
        return {"path": str(source), "sha256": _sha256_of_files(path, _results_in(path))}
    if path.exists() or not can_be_hub_id(str(source)):
        problem = "neither a file nor a directory" if path.exists() else "no such file or directory"
        raise UserError(f"{source}: {problem}. Run the stage that makes it, or correct the path.")
    return {"hub_id": str(source), "revision": cached_revision(str(source))}


def same_source(old: dict, new: dict) -> bool:
    """
    Whether two fingerprints can be of the same content. An unknown revision matches any other. Whole directories are
    compared if the older one is of a whole directory, as earlier versions made them.
    """
    if "hub_id" in old and "hub_id" in new:
        revisions = {old.get("revision"), new.get("revision")} - {None}
        return old["hub_id"] == new["hub_id"] and len(revisions) < 2
    if "used_sha256" in new and "sha256" in old:
        new = fingerprint(new["path"])
    same = {key for key in ("sha256", "used_sha256", "images_sha256") if key in old and old[key] == new.get(key)}
    return bool(same - {"images_sha256"}) and same >= old.keys() & {"images_sha256"}


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _results_in(directory: Path) -> list[str]:
    skipped = (".", "checkpoint-", "__pycache__", REFERENCE_FOLDER)  # not part of the result, nor are records
    # `medst evaluate` adds contamination.json to results of earlier versions.
    others = ("stage.json", "contamination.json")
    return sorted(name for name in visible_files(directory, skipped) if Path(name).name not in others)


def _sha256_of_files(directory: Path, names: list[str]) -> str:
    """Hash the names and contents of files. Broken links, pipes and devices are skipped."""
    names = [name for name in names if os.path.isfile(directory / name)]  # `Path.is_file` raises for a long name
    digest = hashlib.sha256()
    for name in names:
        path = directory / name
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        if len(names) <= MANY_FILES:
            digest.update(_sample(path, size))
    return digest.hexdigest()


def _sample(path: Path, size: int) -> bytes:
    if size <= 3 * SAMPLE_BYTES:
        return path.read_bytes()
    with open(path, "rb") as file:
        parts = []
        for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
            file.seek(start)
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)

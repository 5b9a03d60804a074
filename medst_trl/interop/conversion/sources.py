# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders and Hub repositories that a conversion reads."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import split_revision
from medst_trl.policy.loading import check_reachable


_SMALL_FILES = ("*.json", "*.model")
_NOT_READ = ("checkpoint-*/*", "global_step*/*", "runs/*", "*/optimizer.*", "optimizer.*")


def local_folder(source: str, what: str, *, weights: bool = True) -> Path:
    """
    The folder of a model: as given, or downloaded from the Hub, only the files that are read.

    Args:
        source (`str`):
            Folder, or Hub id (`org/name`, `org/name@revision`).
        what (`str`):
            What it is, for messages.
        weights (`bool`, *optional*, defaults to `True`):
            Whether its weights are read, too.

    Raises:
        UserError: if there is no such folder and the Hub has no such repository.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision = split_revision(source)
    check_reachable(name)
    try:
        patterns = [*_SMALL_FILES, *(_weight_patterns(name, revision) if weights else ())]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_READ))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[:1] or [""]
        raise UserError(
            f"{what} {source!r} is neither a folder nor to be had from the Hub ({type(error).__name__}: {first[0]})."
        ) from error


def _weight_patterns(name: str, revision: str | None) -> list[str]:
    """A model that is there in both formats is downloaded once; a training output has parts in each."""
    import httpx2
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        files = list_repo_files(name, revision=revision)
    except (OfflineModeIsEnabled, httpx2.TransportError):  # the cache holds what was chosen when it was downloaded
        files = []
    return (
        ["*.safetensors"] if any(fnmatch(file, "model*.safetensors") for file in files) else ["*.safetensors", "*.bin"]
    )


def read_json(path: Path, what: str) -> dict[str, Any]:
    """
    A JSON object in a file.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: {what} cannot be read from there.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object.")
    return content

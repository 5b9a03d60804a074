# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of models and datasets: Hub ids, revisions, paths of this machine, and whether the Hub answers."""

import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from .errors import UserError


HUB_TIMEOUT = 10  # seconds, for an answer of any kind

_HUB_ID = re.compile(r"(\w[\w.-]*/)?[\w-][\w.-]*(@[\w./-]+)?", re.ASCII)


def can_be_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, with or without an owner and a revision."""
    return _HUB_ID.fullmatch(name) is not None


def is_repo_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME, without a revision."""
    return can_be_hub_id(name) and "/" in name and "@" not in name


def is_hub_id(name: object) -> bool:
    """Whether a setting is looked for on the Hub: `org/name` or `org/name@revision`, and no path of this machine."""
    is_name = isinstance(name, str) and can_be_hub_id(name) and "/" in name.partition("@")[0]
    return is_name and not os.path.exists(name)


def is_only_on_hub(name: str) -> bool:
    """
    Whether a name is a Hub id and hardly a misspelled path: no file of data, nor in a directory that exists or in
    `data`, where the recipes expect it.
    """
    path = Path(name)
    is_file = path.suffix.lower() in (".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".parquet")
    return is_hub_id(name) and not is_file and not (path.parts[0] == "data" or Path(path.parts[0]).is_dir())


def looks_local(name: str) -> bool:
    """Whether a name is a path on this machine, and not a Hub id."""
    return _is_absolute(name) or name.count("/") > 1 or ("/" in name and os.path.exists(name))


def public_name(model: str) -> str:
    """Return a model's name as it may be published: only the last part of a path on this machine."""
    is_path = _is_absolute(model) or os.path.exists(model)  # the name of a model on a server may have several slashes
    return Path(model).name if is_path else model


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "~", "./", "../", "file:")) or "\\" in name


def split_revision(source: str) -> tuple[str, str | None]:
    """Split `org/name@main` into a Hub id and its revision. An existing path is returned unchanged."""
    if os.path.exists(source) or not can_be_hub_id(source):
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None


def cached_repository(hub_id: str, kind: str = "model") -> Path:
    """The directory of the local Hub cache for a model or a dataset; it may not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"{kind}s--{hub_id.partition('@')[0].replace('/', '--')}")


def cached_revision(hub_id: str) -> str | None:
    """The commit of a Hub id in the local cache, without a network call."""
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    for kind in ("model", "dataset"):
        with suppress(OSError, ValueError):  # it is not in the cache
            return Path(snapshot_download(name, repo_type=kind, revision=revision or None, local_files_only=True)).name
    return None


def hub_failure(timeout: float = HUB_TIMEOUT) -> str | None:
    """
    Return why the Hub does not answer one short request; None if it does.

    transformers and huggingface_hub try every file six times, with pauses: almost three minutes without a network.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # of any HTTP client that huggingface_hub uses
        return f"{constants.ENDPOINT} does not answer ({str(error) or type(error).__name__})"
    return None


@cache
def hub_answers() -> bool:
    """Whether the Hub can be reached. Asked once per process."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and hub_failure(timeout=3) is None


def check_reachable(name_or_path: str) -> None:
    """
    Check that a model is a directory, in the local cache, or on a Hub that answers.

    Args:
        name_or_path (`str`):
            Directory or Hub id, without revision.

    Raises:
        UserError: if it is none of these. If the Hub does not answer but the cache has the model, a line says how to
            use it without waiting.
    """
    from huggingface_hub import constants

    if Path(name_or_path).is_dir() or constants.HF_HUB_OFFLINE or (reason := hub_failure()) is None:
        return
    if not (cached_repository(name_or_path) / "snapshots").is_dir():
        raise UserError(
            f"{name_or_path!r} is not a directory, {reason}, and the local cache has no copy of it. Correct the path, "
            "or check the network."
        )
    print(f"{reason}; looking for {name_or_path} in the cache. HF_HUB_OFFLINE=1 skips this check.")

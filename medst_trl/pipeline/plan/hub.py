# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the Hub says of a repository, if it can be asked. A plan has to come at once, with or without it."""

import re
from functools import cache
from pathlib import Path


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WEIGHTS = (".safetensors", ".bin")  # the first kind that a model's repository has is fetched


def is_hub_id(source: object) -> bool:
    """Whether a setting that names no file or folder here would be looked for on the Hub."""
    return isinstance(source, str) and bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


@cache
def hub_answers() -> bool:
    """
    Whether the Hub can be reached. Asked once, without the repetitions of huggingface_hub, which take half a minute
    for each file where there is no network.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # of whatever HTTP client huggingface_hub uses
        return False
    return True


def is_cached(hub_id: str, kind: str) -> bool:
    """Whether the local cache has the large files of a repository, so that little or nothing is downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE, f"{kind}s--{hub_id.partition('@')[0].replace('/', '--')}", "snapshots")
    return any(path.suffix in (*_WEIGHTS, ".parquet") for path in snapshots.glob("*/**/*"))


@cache
def download_size(hub_id: str, kind: str) -> int | None:
    """
    Bytes of a repository that will be fetched: a model's weights, all Parquet and other files of a dataset; None
    where the Hub cannot be asked or does not tell.

    Args:
        hub_id (`str`): `org/name`, or `org/name@revision`.
        kind (`str`): `"model"` or `"dataset"`.
    """
    if not hub_answers():
        return None
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = hub_id.partition("@")
    try:
        tree = HfApi().list_repo_tree(name, recursive=True, repo_type=kind, revision=revision or None)
        sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    except (OSError, HfHubHTTPError):
        return None
    weights = next((end for end in _WEIGHTS if any(path.endswith(end) for path in sizes)), "")
    return sum(size for path, size in sizes.items() if kind == "dataset" or path.endswith(weights))

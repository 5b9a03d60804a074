# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a step downloads, where its engine sends prompts, and what it uploads: quickly, with and without a network."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from medst_trl.base.hub_ids import cached_repository, hub_answers, is_hub_id
from medst_trl.base.settings import settings_among
from medst_trl.engines.engine import ENGINES
from medst_trl.pipeline.stage import FILE, RUN

from .steps import maker_of


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Step

_WEIGHTS = (".safetensors", ".bin")  # transformers downloads the first of these that a repository has


def downloads(step: "Step", steps: Sequence["Step"], known: set[str]) -> Iterator[tuple[str, str]]:
    """
    Rows on the models and datasets that a step downloads from the Hub.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            The step.
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`]):
            All steps of the recipe: what they make is not on the Hub.
        known (`set[str]`):
            What earlier steps have downloaded. The downloads of this step are added.
    """
    for item in step.stage.inputs:
        for source in item.names(step.settings) if item.kind not in (FILE, RUN) else ():
            if is_hub_id(source) and source not in known and maker_of(source, steps)[0] is None:
                known.add(source)
                kind = "dataset" if item.is_dataset else "model"
                yield "downloads", f"{kind} {source} ({_size(source, kind)})"


def prompts(arguments: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """The row on the server to which the engine of a step sends its prompts, if it is not in the same process."""
    if hasattr(arguments[0], "engine"):
        kind = ENGINES.get(arguments[0].engine)
        if address := kind.address(settings_among(arguments, kind.settings)):
            yield "asks", f"{address}, model {arguments[0].model_name_or_path}"


def uploads(step: "Step", arguments: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Rows on the repositories to which a step pushes its outputs."""
    for settings in arguments:
        if getattr(settings, "push_to_hub", False):
            repo_id = getattr(settings, "hub_dataset_id", None) or getattr(settings, "hub_model_id", None)
            private = "PUBLIC" if settings.hub_private_repo is False else "private"
            if len(step.stage.published) == 1:
                yield "uploads", f"{repo_id}, {private}"
            else:
                for directory in step.stage.published:
                    yield "uploads", f"{repo_id}-{directory}, {private}, if it is made"


def _size(source: str, kind: str) -> str:
    if _is_cached(source, kind):
        return "in the cache"
    size = _download_size(source, kind)
    if size is not None:
        return f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"
    return "size unknown" if hub_answers() else "size unknown: the Hub cannot be reached"


def _is_cached(hub_id: str, kind: str) -> bool:
    """Whether the local cache has the large files of a repository, so that little or nothing is downloaded."""
    files = cached_repository(hub_id, kind).glob("snapshots/*/**/*")
    return any(path.suffix in (*_WEIGHTS, ".parquet") for path in files)


@cache
def _download_size(hub_id: str, kind: str) -> int | None:
    """
    Bytes of a repository that are downloaded, those of a model's weights or of a whole dataset. None if the Hub cannot
    be reached or does not say.
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

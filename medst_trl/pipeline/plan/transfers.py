# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a step downloads, whom it asks, and what it uploads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.engines.engine import ENGINES
from medst_trl.pipeline.stage import FILE, RUN

from .hub import download_size, hub_answers, is_cached, is_hub_id


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Step


def downloads(step: "Step", steps: Sequence["Step"], known: set[str]) -> list[str]:
    """
    Lines on the models and datasets that a step fetches from the Hub.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]): The step.
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`]): All of the recipe: what they make is not on the Hub.
        known (`set[str]`): What steps before have fetched already; added to.
    """
    lines, made = [], [Path(other.settings["output_dir"]) for other in steps if "output_dir" in other.settings]
    for item in step.stage.inputs:
        if item.kind in (FILE, RUN):
            continue
        for source in item.names(step.settings):
            if not is_hub_id(source) or source in known or any(Path(source).is_relative_to(path) for path in made):
                continue
            known.add(source)
            kind = "dataset" if item.is_dataset else "model"
            lines.append(f"{kind} {source} {_size(source, kind)}")
    return lines


def requests(arguments: tuple[Any, ...]) -> list[str]:
    """Where the engine of a step sends its prompts, if not to a model in the same process."""
    if not hasattr(arguments[0], "engine"):
        return []
    kind = ENGINES.get(arguments[0].engine)
    address = kind.address(kind.settings_among(arguments))
    return [f"{address}, model {arguments[0].model_name_or_path}"] if address else []


def uploads(step: "Step", arguments: tuple[Any, ...]) -> list[str]:
    """Lines on the repositories that a step pushes to."""
    settings = next((item for item in arguments if getattr(item, "push_to_hub", False)), None)
    if settings is None:
        return []
    repo_id = getattr(settings, "hub_dataset_id", None) or getattr(settings, "hub_model_id", None)
    private = "PUBLIC" if settings.hub_private_repo is False else "private"
    if len(step.stage.published) == 1:
        return [f"{repo_id}, {private}"]
    return [f"{repo_id}-{folder}, {private}, if there is one" for folder in step.stage.published]


def _size(source: str, kind: str) -> str:
    if is_cached(source, kind):
        return "(in the cache)"
    size = download_size(source, kind)
    if size is not None:
        return f"({size / 1e9:.1f} GB)" if size > 1e8 else f"({size / 1e6:.1f} MB)"
    return "(size not told)" if hub_answers() else "(size unknown: the Hub cannot be asked)"

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a step downloads, whom it asks, and what it uploads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.engines.engine import ENGINES
from medst_trl.pipeline.stage import FILE, RUN, Count
from medst_trl.pipeline.stages.judge import pairs_to_judge

from .hub import download_size, hub_answers, is_cached, is_hub_id
from .steps import Rows


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


def requests(step: "Step", arguments: tuple[Any, ...], steps: Sequence["Step"]) -> list[str]:
    """Lines on the servers that a step asks."""
    from medst_trl.selftrain.judge.server import chosen_server

    args = arguments[0]
    if hasattr(args, "engine"):
        kind = ENGINES.get(args.engine)
        address = kind.address(kind.settings_among(arguments))
        return [f"{address}, model {args.model_name_or_path}"] if address else []
    if step.stage.name != "judge":
        return []
    if served := chosen_server(arguments):
        return [f"none: {served[0].summary}"]
    if args.read_batch:
        return ["none: replies come from read_batch"]
    if args.write_batch:
        return [f"none: they are written to {args.write_batch}"]
    orders = 2 if args.order == "both" else 1
    count = pairs_to_judge(step.settings, Rows(steps)).times(orders)
    lines = [f"{_number(count)} requests to {args.base_url or _openai()}, model {args.model}"]
    stop = f"stops at {args.max_cost:g} US dollars" if args.max_cost is not None else "no max_cost is set"
    return [*lines, stop + _cost(args, count)]


def uploads(step: "Step", arguments: tuple[Any, ...]) -> list[str]:
    """Lines on the repositories that a step pushes to."""
    if step.stage.name == "push":
        args = arguments[0]
        return [f"{args.source} to {args.repo_id}, {_visibility(args.private)}"]
    settings = next((item for item in arguments if getattr(item, "push_to_hub", False)), None)
    if settings is None:
        return []
    repo_id = getattr(settings, "hub_dataset_id", None) or getattr(settings, "hub_model_id", None)
    private = _visibility(settings.hub_private_repo is not False)
    if len(step.stage.published) == 1:
        return [f"{repo_id}, {private}"]
    return [f"{repo_id}-{folder}, {private}, if there is one" for folder in step.stage.published]


def _visibility(private: bool) -> str:
    return "private" if private else "PUBLIC"


def _size(source: str, kind: str) -> str:
    if is_cached(source, kind):
        return "(in the cache)"
    size = download_size(source, kind)
    if size is not None:
        return f"({size / 1e9:.1f} GB)" if size > 1e8 else f"({size / 1e6:.1f} MB)"
    return "(size not told)" if hub_answers() else "(size unknown: the Hub cannot be asked)"


def _openai() -> str:
    import os

    return os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"


def _number(count: Count) -> str:
    return f"requests: depends on {count.depends_on}, so" if count.number is None else f"at most {count.number:,}"


def _cost(args: Any, count: Count) -> str:
    """What they may cost together, where the prices are known."""
    from medst_trl.engines.cost import BYTES_PER_TOKEN, image_tokens, prices_of
    from medst_trl.selftrain.judge.prompt import JUDGE_PROMPTS

    prices = prices_of(args.model, args.price_per_million_input_tokens, args.price_per_million_output_tokens)
    if not prices.known or count.number is None:
        return ""
    words = 4000 / BYTES_PER_TOKEN  # instructions, question and two answers
    question = image_tokens(args.model, args.image_size, args.image_size) + words
    dollars = count.number * prices.cost(
        question, min(args.max_tokens, JUDGE_PROMPTS.get(args.prompt_version).reply_tokens)
    )
    return f"; about {dollars:,.0f} US dollars for all of them"

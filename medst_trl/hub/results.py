# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of `medst evaluate`, as a model card shows them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.redaction import looks_local
from medst_trl.evaluation.metric import recorded_figures

from .provenance import read_merged, steps_to


if TYPE_CHECKING:
    from huggingface_hub import EvalResult


@dataclass(frozen=True)
class Results:
    """
    One `scores.json`.

    Attributes:
        name (`str`): Hub id of the benchmark, or its source; never a path.
        content (`dict`): The content of the file.
    """

    name: str
    content: dict[str, Any]

    @property
    def questions(self) -> int:
        return next(iter(self.content["scores"].values()))["n"]

    @property
    def images(self) -> int:
        return next(iter(self.content["scores"].values()))["n_images"]

    @property
    def controls(self) -> dict[str, Any]:
        return self.content.get("controls") or {}

    def figures(self) -> Iterator[tuple[str, Sequence[str], str, dict[str, Any]]]:
        """Metric, path, label and values of each figure for cards that has a value."""
        for figure in recorded_figures(self.content):
            leaf = _leaf(self.content["scores"], figure["metric"], figure["path"])
            if figure["in_card"] and leaf.get("value") is not None:
                yield figure["metric"], figure["path"], figure["label"].replace(": ", " "), leaf

    def rows(self) -> list[list[str]]:
        """Rows of the card's table: metric, figure, value with its interval, n, majority, one column per control."""
        rows = []
        for metric, path, label, leaf in self.figures():
            interval = leaf.get("interval")
            value = _number(leaf["value"]) + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")
            controls = [_leaf(scores, metric, path).get("value") for scores in self.controls.values()]
            others = map(_number, (leaf.get("majority"), *controls))
            rows.append([metric, label, value, str(leaf.get("n", "")), *others])
        return rows


def read_results(directory: Path, model: Path) -> list[Results]:
    """
    Read the scores in an output directory of `medst evaluate`, which has subdirectories for several benchmarks.

    Args:
        directory (`Path`): Where the scores are.
        model (`Path`): Directory of the model that must have been evaluated, if the scores name one that exists.

    Raises:
        UserError: if there are no scores, they cannot be read, or another model was evaluated.
    """
    paths = sorted(directory.glob("scores.json")) or sorted(directory.glob("*/scores.json"))
    if not paths:
        raise UserError(f"{directory} has no scores.json. Give an output directory of `medst evaluate`.")
    results = [_read(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        evaluated = Path(result.content.get("model") or "")
        if result.content.get("model") and evaluated.exists() and not _is_model(evaluated, model):
            raise UserError(f"{path} has the scores of {evaluated}, not of {model}. Leave it out, or push that model.")
    return results


def eval_results(results: list[Results]) -> list["EvalResult"]:
    """The scores in the form that the Hub shows beside a model card."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=result.name,
            dataset_name=result.name,
            dataset_split=result.content.get("split") or "test",
            metric_type=path[-1],
            metric_name=f"{metric} {label}",
            metric_value=round(leaf["value"], 2),
        )
        for result in results
        for metric, path, label, leaf in result.figures()
    ]


def _is_model(evaluated: Path, model: Path) -> bool:
    """Whether the evaluated model is this one, or the adapter that was merged into it: their answers are the same."""
    merged = read_merged(model)
    adapter = Path(merged.adapter_path) if merged and merged.adapter_path else model
    return evaluated.samefile(model) or (adapter.exists() and evaluated.samefile(adapter))


def _read(path: Path) -> Results:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        benchmark = content.get("benchmark") or ""
        is_hub_id = benchmark.count("/") == 1 and not looks_local(benchmark) and not Path(benchmark).exists()
        name = benchmark.partition("@")[0] if is_hub_id else _local_name(benchmark, path)
        results = Results(name, content)
        _ = results.questions, results.images, results.rows()  # raises if something is missing
        return results
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise UserError(f"{path} was not written by `medst evaluate`. Evaluate again, or leave it out.") from None


def _local_name(benchmark: str, path: Path) -> str:
    """The source that the benchmark's record names, or else the directory of the scores."""
    sources = [step.settings.get("source") for step in (steps_to(Path(benchmark)) if benchmark else [])]
    if sources and sources[-1]:
        return sources[-1]
    return "benchmark" if path.parent.name == "evaluate" else path.parent.name


def _leaf(scores: Mapping[str, Any], metric: str, path: Sequence[str]) -> dict[str, Any]:
    found = scores.get(metric)
    for key in path:
        found = (found or {}).get(key)
    return found or {}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of `medst evaluate`, as a card tells them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .provenance import looks_local


if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# (rules, part, figure): what papers report, and the strict rules to trust.
FIGURES = (
    ("strict", None, "exact_match"), ("strict", "open", "f1"), ("strict", "open", "recall"),
    ("strict", "closed", "accuracy"), ("llava_med", "open", "recall"), ("llava_med", "open", "f1"),
    ("llava_med", "closed", "accuracy"),
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """
    One `scores.json`.

    Attributes:
        name (`str`): Of the benchmark, never a path.
        dataset (`str`): Its Hub id, or the name again.
        split (`str`): Of the benchmark.
        scores, controls (`dict`): As the file has them.
        model (`str`, *optional*): Folder or Hub id of what was evaluated.
    """

    name: str
    dataset: str
    split: str
    scores: dict[str, Any]
    controls: dict[str, Any]
    model: str | None = None

    @property
    def questions(self) -> int:
        return next(iter(self.scores.values()))["n"]

    @property
    def images(self) -> int:
        return next(iter(self.scores.values()))["n_images"]

    def figures(self) -> list[tuple[str, str, str, dict]]:
        """Rules, part, figure and its values, for the figures that there are."""
        found = []
        for rules, part, figure in FIGURES:
            value = _at(self.scores, rules, part, figure)
            if value and value.get("value") is not None:
                found.append((rules, part, figure, value))
        return found

    def rows(self) -> list[list[str]]:
        """Lines of the card's table: rules, figure, value, n, majority, one column a control."""
        lines = []
        for rules, part, figure, value in self.figures():
            controls = [_at(scores, rules, part, figure) for scores in self.controls.values()]
            lines.append(
                [
                    rules,
                    f"{part} {figure}" if part else figure,
                    f"{value['value']:.1f}" + _interval(value.get("interval")),
                    str(value.get("n", "")),
                    _number(value.get("majority")),
                    *(_number(control and control.get("value")) for control in controls),
                ]
            )
        return lines


def read_results(folder: Path, model: Path) -> list[Results]:
    """
    The scores in a folder of `medst evaluate`, or in the folders that it has for several benchmarks.

    Args:
        folder (`Path`): Where the scores are.
        model (`Path`): The folder of the model that they have to be of, as far as they say.

    Raises:
        UserError: if there are none, they cannot be read, or are of another model.
    """
    paths = sorted(folder.glob("scores.json")) or sorted(folder.glob("*/scores.json"))
    if not paths:
        raise UserError(f"{folder} has no scores.json. `medst evaluate` writes one.")
    results = [_read(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if result.model and Path(result.model).exists() and not _is_of(model, Path(result.model)):
            raise UserError(
                f"{path} has the scores of {result.model}, not of {model}. Leave it out, or push that model."
            )
    return results


def _is_of(model: Path, evaluated: Path) -> bool:
    """Whether what was evaluated is the model, or the adapter merged into it, which says the same."""
    from .merged import merged_from

    merged = merged_from(model)
    adapter = Path(merged.adapter_path) if merged and merged.adapter_path else model
    return evaluated.samefile(model) or (adapter.exists() and evaluated.samefile(adapter))


def eval_results(results: list[Results]) -> list["EvalResult"]:
    """The scores as the Hub shows them beside a model card."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=result.dataset,
            dataset_name=result.name,
            dataset_split=result.split,
            metric_type=figure,
            metric_name=" ".join(filter(None, (rules, part, figure))),
            metric_value=round(value["value"], 2),
        )
        for result in results
        for rules, part, figure, value in result.figures()
    ]


def _read(path: Path) -> Results:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        benchmark = content.get("benchmark") or ""
        name = _name(benchmark, path)
        results = Results(
            name=name,
            dataset=benchmark.partition("@")[0] if benchmark and not _is_path(benchmark) else name,
            split=content.get("split") or "test",
            scores=content["scores"],
            controls=content.get("controls") or {},
            model=content.get("model"),
        )
        _ = results.questions, results.images, results.rows()  # a wrong shape shows here
        return results
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise UserError(f"{path} was not written by `medst evaluate`. Evaluate again, or leave it out.") from None


def _name(benchmark: str, path: Path) -> str:
    """What the benchmark's own record calls its source; else the last name that says something."""
    from .provenance import steps_to

    if benchmark and not _is_path(benchmark):
        return benchmark.partition("@")[0]
    sources = [step.settings.get("source") for step in (steps_to(Path(benchmark)) if benchmark else [])]
    if sources and sources[-1]:
        return sources[-1]
    return "benchmark" if path.parent.name == "evaluate" else path.parent.name


def _is_path(name: str) -> bool:
    return looks_local(name) or name.count("/") != 1 or Path(name).exists()


def _at(scores: dict, rules: str, part: str | None, figure: str) -> dict | None:
    found = scores.get(rules) or {}
    return (found.get(part) or {} if part else found).get(figure)


def _interval(interval: list[float] | None) -> str:
    return f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

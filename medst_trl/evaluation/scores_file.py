# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`scores.json`: its figures with their labels, for the terminal, model cards and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError, number_of
from medst_trl.base.files import read_object

from .metric import METRICS, Figure, FigurePath, describe_figures
from .scoring import iter_figures


SCORES_FILE = "scores.json"

Leaf = Mapping[str, Any]
"""A figure in the scores: `value`, `n`, `interval`, perhaps `majority`, `difference` and `difference_interval`."""


Scores = dict[str, dict[FigurePath, Leaf]]
"""Metric to path to a figure."""


def score_files(directory: Path) -> list[Path]:
    """Return the `scores.json` in an output directory of `medst evaluate`, or those of several benchmarks below it."""
    return sorted(directory.glob(SCORES_FILE)) or sorted(directory.glob(f"*/{SCORES_FILE}"))


class ScoresFile:
    """
    The content of a `scores.json`.

    Args:
        content (`dict`): The content.
        name (`str` or `pathlib.Path`, *optional*): The file, for messages.

    Attributes:
        content (`dict`): The content.
        figures (`dict`): Metric and path to the fields of a [`~medst_trl.evaluation.metric.Figure`]. Those of the
            registered metrics if version 0.1.0 wrote the file.
        scores (`dict`): Figures by metric and path.
        controls (`dict`): Scores of each control.
        n (`int`), n_images (`int`): Size of the benchmark.
        unit (`str`): What the bootstrap drew: `"group"`, `"image"` or `"record"`.

    Raises:
        UserError: if the content has another form.
    """

    def __init__(self, content: Any, name: str | Path = "The file"):
        try:
            self.content = content
            described = content.get("figures") or describe_figures([m for m in content["scores"] if m in METRICS])
            self.figures = {(figure["metric"], tuple(figure["path"])): figure for figure in described}
            self.scores = _read_scores(content["scores"])
            controls = content.get("controls") or {}
            self.controls = {control: _read_scores(scores) for control, scores in controls.items()}
            first, *_ = content["scores"].values()
            self.n, self.n_images = first["n"], first["n_images"]
            self.unit = (first.get("bootstrap") or {}).get("unit", "image")
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f"{name} was not written by `medst evaluate`. Evaluate again, or leave it out.") from None

    @classmethod
    def read(cls, path: Path) -> "ScoresFile":
        """Read a file. Raises a [`UserError`] if `medst evaluate` did not write it."""
        return cls(read_object(path), path)

    def leaf(self, metric: str, path: FigurePath) -> Leaf | None:
        """Return a figure, or None if it has no value."""
        leaf = self.scores.get(metric, {}).get(path)
        return leaf if leaf and leaf["value"] is not None else None

    def about(self, metric: str, path: FigurePath) -> Mapping[str, Any]:
        """Return the fields of a [`~medst_trl.evaluation.metric.Figure`], if the file describes it."""
        return self.figures.get((metric, path[2:] if path[0] == "question_types" else path), {})

    def label(self, metric: str, path: FigurePath) -> str:
        """Return the name of a figure in tables."""
        if path[0] == "question_types":
            return f"{path[1].replace('_', ' ')}: {self.label(metric, path[2:])}"
        return self.about(metric, path).get("label") or Figure(path).label

    def shown(self, metric: str) -> list[FigurePath]:
        """Return the figures of a metric that tables list: those with records, by question type if `by_type`."""
        leaves = self.scores.get(metric, {})
        paths = [path for path, leaf in leaves.items() if leaf["n"]]
        return [path for path in paths if path[0] != "question_types" or self.about(metric, path).get("by_type")]

    def for_card(self) -> list[tuple[str, FigurePath, str, Leaf]]:
        """Return metric, path, label and values of the figures that model cards list."""
        return [
            (metric, path, figure["label"].replace(": ", " "), leaf)
            for (metric, path), figure in self.figures.items()
            if figure["in_card"] and (leaf := self.leaf(metric, path))
        ]

    def table(self, metric: str) -> str:
        """
        Format the scores of a metric with one line per figure: n, value with its interval, the majority baseline, and
        each control with the difference to it. Question types have one line for each figure with `by_type`; their
        other figures are in the scores.
        """
        leaves, shown = self.scores[metric], self.shown(metric)
        with_majority = any("majority" in leaves[path] for path in shown)
        header = ["", "n", "%", "95% interval", *(["majority"] if with_majority else [])]
        rows = [header + [title for name in self.controls for title in (name, f"real - {name}")]]
        for path in shown:
            leaf, name = leaves[path], self.label(metric, path)
            name = f"  {name}" if path[0] == "question_types" else name
            row = [name, str(leaf["n"]), tenths(leaf["value"]), brackets(leaf["interval"])]
            row += [tenths(leaf.get("majority"))] if with_majority else []
            for control in self.controls.values():
                other = control.get(metric, {}).get(path, {})
                row += [tenths(other.get("value")), format_change(other)]
            rows.append(row)
        return "\n".join([_title(self.content["scores"][metric]), *align(rows)])

    def __str__(self) -> str:
        """Format all tables, below a line that names the data."""
        data, counts = self.content.get("data") or {}, self.content["counts"]
        revision = data.get("revision") or data.get("sha256")
        source = [self.content.get("benchmark") or self.content.get("predictions") or "predictions"]
        source += [f"split {self.content['split']}"] if "split" in self.content else []
        source += [f"data {revision[:12]}"] if revision else []
        blocks = [", ".join(source), *map(self.table, self.scores)]
        if counts["cut_off"]:
            blocks.append(f"{counts['cut_off']} answers were cut off at max_new_tokens.")
        if counts.get("refused"):
            blocks.append(f"{counts['refused']} questions were refused and count as wrong.")
        return "\n\n".join(blocks)


def _read_scores(by_metric: Mapping[str, Any]) -> Scores:
    return {metric: dict(iter_figures(scores)) for metric, scores in by_metric.items()}


def _title(scores: Mapping[str, Any]) -> str:
    shown = [
        f", {name.replace('_', ' ')} {value}"
        for name, value in scores.items()
        if name not in ("variant", "n", "n_images", "n_groups") and not isinstance(value, Mapping)
    ]
    images = f" on {scores['n_images']} images" if scores["n_images"] is not None else ""
    images += f" of {number_of(scores['n_groups'], 'group')}" if scores.get("n_groups") else ""
    return f"{scores['variant']}{''.join(shown)}: {scores['n']} questions{images}"


def tenths(value: float | None, sign: str = "") -> str:
    """Format a number with one decimal; empty for None."""
    return "" if value is None else f"{value:{sign}.1f}"


def brackets(interval: Sequence[float] | None, sign: str = "") -> str:
    """Format an interval; empty for None."""
    return f"[{tenths(interval[0], sign)}, {tenths(interval[1], sign)}]" if interval else ""


def format_change(leaf: Leaf) -> str:
    """Format the difference of a figure with its interval; empty if it has none."""
    return f"{tenths(leaf.get('difference'), '+')} {brackets(leaf.get('difference_interval'), '+')}".strip()


def align(rows: list[list[str]]) -> list[str]:
    """Format the lines of a table, the first column aligned to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    cells = ([row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]

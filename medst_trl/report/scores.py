# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""All evaluations of a run side by side, and the changes since the one before preference training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medst_trl.base.errors import UserError
from medst_trl.evaluation.controls import compare_vqa
from medst_trl.evaluation.metric import METRICS, FigurePath, recorded_figures, setting_names
from medst_trl.evaluation.predictions import OWN_FORMAT, read_predictions
from medst_trl.evaluation.scoring import figures, score_records
from medst_trl.evaluation.tables import align
from medst_trl.pipeline.stage import STAGES

from .charts import Bar, Group, bar_chart
from .run_directory import Run, StageRun
from .text import place, sentence, words


Scores = dict[str, dict[FigurePath, dict[str, Any]]]
"""Metric to path to a figure: `value`, `n`, `interval` and more."""


@dataclass
class Evaluation:
    """
    One `scores.json`.

    Attributes:
        label (`str`): `"aligned"`, `"round 2/aligned"`: its directory without what all have in common.
        run ([`StageRun`]): The stage that wrote it.
        trained_by ([`StageRun`], *optional*): The stage that made the model, if it is in the run.
        benchmark (`str`): The benchmark, in words.
        key (`tuple`): Data and split by content: evaluations of one key can be compared.
        content (`dict`): The content of the file.
        scores (`dict`): Its scores.
        controls (`dict`): Control to its scores, whose figures have `difference` and `difference_interval`.
        changes (`dict`): Metric to path to `(difference, interval)`, against the evaluation before training.
    """

    label: str
    directory: Path
    run: StageRun
    trained_by: StageRun | None
    benchmark: str
    key: tuple
    content: dict[str, Any]
    scores: Scores
    controls: dict[str, Scores]
    changes: dict[str, dict[FigurePath, tuple[float | None, list[float] | None]]] = field(default_factory=dict)

    @property
    def is_supervised(self) -> bool:
        """Whether a training stage made the model that does not belong to the rounds of preference training."""
        return self.trained_by is not None and self.trained_by.stage.trains and not self.trained_by.stage.repeats

    def leaf(self, metric: str, path: FigurePath) -> dict[str, Any] | None:
        """A figure, if it has a value."""
        leaf = self.scores.get(metric, {}).get(path)
        return leaf if leaf and leaf["value"] is not None else None


@dataclass
class Comparison:
    """
    Evaluations of one benchmark, the oldest policy first.

    Attributes:
        before ([`Evaluation`]): What the others are compared with: the last policy before preference training.
        metrics (`list[str]`): Names of the metrics; the first one is shown in charts and controls.
    """

    benchmark: str
    evaluations: list[Evaluation]
    before: Evaluation
    metrics: list[str]

    @property
    def compared(self) -> list[Evaluation]:
        """Evaluations with differences, which are paired question by question."""
        return [evaluation for evaluation in self.evaluations if evaluation.changes]

    @property
    def described(self) -> dict[tuple[str, FigurePath], dict[str, Any]]:
        """Metric and path to the description of a figure: `label`, `in_chart`, `higher_is_better`."""
        found = (figure for evaluation in self.evaluations for figure in recorded_figures(evaluation.content))
        return {(figure["metric"], tuple(figure["path"])): figure for figure in found}

    def label(self, metric: str, path: FigurePath) -> str:
        if path[0] == "question_types":
            return words(path[1])
        figure = self.described.get((metric, path))
        return figure["label"] if figure else words(": ".join(path))

    def is_better(self, metric: str, path: FigurePath, change: float) -> bool:
        figure = self.described.get((metric, path)) or {}
        return (change > 0) == figure.get("higher_is_better", True)

    def title(self, metric: str) -> str:
        """The name of a metric, and what it measures if it is registered."""
        return words(metric) + (f" ({METRICS.get(metric).summary})" if metric in METRICS else "")

    def rows(self, metric: str) -> list[FigurePath]:
        """Figures with a value anywhere; of question types only their exact match."""
        found = {}
        for evaluation in self.evaluations:
            for path, leaf in evaluation.scores.get(metric, {}).items():
                if leaf["n"] and (path[0] != "question_types" or path[2:] == ("exact_match",)):
                    found[path] = None
        return sorted(found, key=lambda path: path[0] == "question_types")

    def first(self, metric: str, path: FigurePath) -> dict[str, Any]:
        """The figure in the first evaluation that has it, for its n and majority baseline."""
        return next(e.scores[metric][path] for e in self.evaluations if path in e.scores.get(metric, {}))

    def has_majority(self, metric: str) -> bool:
        return any("majority" in self.first(metric, path) for path in self.rows(metric))

    def controls(self) -> list[str]:
        return list(dict.fromkeys(control for evaluation in self.evaluations for control in evaluation.controls))

    def charted(self) -> list[tuple[str, FigurePath]]:
        """Figures for charts: those of the first metric, and those of the others that it does not have."""
        found: dict[FigurePath, str] = {}
        for metric in self.metrics:
            rows = self.rows(metric)
            for (name, path), figure in self.described.items():
                if name == metric and figure["in_chart"] and path in rows:
                    found.setdefault(path, metric)
        return [(metric, path) for path, metric in found.items()]

    def charts(self) -> list[Markup]:
        """A chart for each figure, with the newest policy's controls and the majority baseline."""
        charts = []
        for metric, path in self.charted():
            bars = [_bar(e.label, e.scores, metric, path) for e in self.evaluations]
            newest = self.evaluations[-1].controls.items()
            bars += [_bar(f"{control} images", scores, metric, path, muted=True) for control, scores in newest]
            first, label = self.first(metric, path), self.label(metric, path)
            charts.append(
                bar_chart(
                    f"{sentence(label)}, {first['n']:,} questions",
                    [Group("", list(filter(None, bars)), first.get("majority"))],
                    unit=f"percent ({words(metric)}), with 95% intervals",
                    limits=(0, 100),
                    mark_name="majority baseline",
                )
            )
        return charts

    def terminal_table(self) -> str:
        """The figures before and after, for the terminal."""
        metric = self.metrics[0]
        rows = [["", "n", *(e.label for e in self.evaluations)]]
        rows[0] += [f"{e.label} - {self.before.label}" for e in self.compared]
        for path in self.rows(metric):
            leaves = [e.leaf(metric, path) for e in self.evaluations]
            row = [self.label(metric, path), str(self.first(metric, path)["n"])]
            row += [f"{leaf['value']:.1f}" if leaf else "" for leaf in leaves]
            for evaluation in self.compared:
                difference, bounds = evaluation.changes.get(metric, {}).get(path, (None, None))
                interval = f" [{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else ""
                row.append("" if difference is None else f"{difference:+.1f}{interval}")
            rows.append(row)
        return "\n".join([f"{self.benchmark} ({words(metric)}, %, differences with 95% intervals)", *align(rows)])


def _bar(label: str, scores: Scores, metric: str, path: FigurePath, muted: bool = False) -> Bar | None:
    leaf = scores.get(metric, {}).get(path)
    return Bar(label, leaf["value"], *(leaf["interval"] or (None, None)), muted) if leaf and leaf["n"] else None


def read_evaluations(run: Run) -> list[Evaluation]:
    """Every complete evaluation, the oldest policy first."""
    found = []
    for stage in run.select(lambda stage: stage.makes("predictions")):
        evaluations = []
        for path in (stage.directory / "scores.json", *sorted(stage.directory.glob("*/scores.json"))):
            if (content := run.read_json(path)) is None:
                continue
            try:
                evaluations.append(_evaluation(run, stage, path.parent, content))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                run.notes.append(f"{run.name(path)} was not written by `medst evaluate` and is left out.")
        if not evaluations:
            run.notes.append(f"{stage.name} has no scores yet ({stage.state}).")
        found += evaluations
    order = STAGES.names()

    def age(evaluation: Evaluation) -> tuple[int, int, str]:
        trained_by = evaluation.trained_by
        place = order.index(trained_by.stage.name) if trained_by else len(order)
        return evaluation.run.round, place, evaluation.run.started

    return sorted(found, key=age)


def compare(run: Run, evaluations: Sequence[Evaluation], bootstrap_samples: int) -> list[Comparison]:
    """Group evaluations by benchmark, and compare each with the one before preference training."""
    groups: dict[tuple, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.key, []).append(evaluation)
    comparisons = []
    for group in groups.values():
        rounds = [evaluation.run.round for evaluation in group]
        for evaluation in group:  # `round 1/aligned` is `round 1` if the round has no other evaluation
            if (number := evaluation.run.round) and rounds.count(number) == 1:
                evaluation.label = f"round {number}"
        before = next((e for e in group if e.is_supervised), group[0])
        metrics = list(dict.fromkeys(metric for evaluation in group for metric in evaluation.scores))
        for evaluation in group[group.index(before) + 1 :]:
            evaluation.changes = _changes(run, before, evaluation, bootstrap_samples)
        comparisons.append(Comparison(group[0].benchmark, group, before, metrics))
    return comparisons


def read_answers(run: Run, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """The predictions of an evaluation by id; empty, with a note, if they cannot be read."""
    try:
        records, _ = read_predictions(evaluation.directory / "predictions.jsonl", OWN_FORMAT)
        return {str(row["id"]): row for row in records}
    except (UserError, KeyError):
        path = f"{run.name(evaluation.directory)}/predictions.jsonl"
        note = f"{path} is missing or damaged, so its answers and their differences are left out."
        if note not in run.notes:
            run.notes.append(note)
        return {}


def is_right(record: Mapping[str, Any]) -> bool:
    """Whether an answer is right by the metric `strict`: the verdict of a closed question, else the exact answer."""
    ((_, scored),) = score_records([record], "strict")
    return bool(scored.get(("closed", "accuracy"), scored[("exact_match",)]))


def _evaluation(run: Run, stage: StageRun, directory: Path, content: dict[str, Any]) -> Evaluation:
    data, split = content.get("data") or {}, content.get("split")
    source = str(content.get("benchmark") or content.get("predictions") or "predictions")
    model = place(content.get("model") or "", run.directory)
    parts = [part for part in run.name(directory).split("/") if part != stage.stage.name]
    for figure in recorded_figures(content):  # raises if one has the wrong shape
        tuple(figure["path"]), figure["metric"] + figure["label"], figure["in_chart"], figure["higher_is_better"]
    return Evaluation(
        label=words("/".join(parts)) or stage.stage.name,
        directory=directory,
        run=stage,
        trained_by=next((one for one in run.stages if one.name == model), None),
        benchmark=place(source, run.directory) + (f", split {split}" if split else ""),
        key=(data.get("sha256") or data.get("revision") or source, split),
        content=content,
        scores=_checked(content["scores"]),
        controls={control: _checked(scores) for control, scores in content["controls"].items()},
    )


def _checked(by_metric: Mapping[str, Any]) -> Scores:
    """The figures of each metric. Raises if one has something else than a number where a number belongs."""
    found = {metric: dict(figures(scores)) for metric, scores in by_metric.items()}
    for leaf in (leaf for leaves in found.values() for leaf in leaves.values()):
        int(leaf["n"])
        values = [leaf["value"], leaf.get("majority"), leaf.get("difference")]
        for bounds in filter(None, (leaf["interval"], leaf.get("difference_interval"))):
            values += [bounds[0], bounds[1]]
        for value in values:
            float(value or 0)
    return found


def _changes(run: Run, before: Evaluation, after: Evaluation, bootstrap_samples: int) -> dict:
    """Differences paired question by question; empty if the predictions of one side are missing."""
    sides = [read_answers(run, evaluation) for evaluation in (after, before)]
    changes = {}
    for metric in after.scores.keys() & before.scores.keys() if all(sides) else ():
        if metric not in METRICS:  # a plugin that this process does not have
            continue
        settings = {name: after.content["scores"][metric].get(name) for name in setting_names(METRICS.get(metric))}
        try:
            compared = compare_vqa(
                *(side.values() for side in sides), metric, bootstrap_samples=bootstrap_samples, **settings
            )
        except UserError:
            run.notes.append(
                f"{after.label} and {before.label} did not answer the same questions of {after.benchmark}, so no "
                "difference is shown."
            )
            return {}
        changes[metric] = {path: (leaf["difference"], leaf["difference_interval"]) for path, leaf in figures(compared)}
    return changes

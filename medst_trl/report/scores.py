# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Every evaluation of a run side by side, and what changed since the one before the preference training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medst_trl.base.errors import UserError
from medst_trl.evaluation.controls import compare_vqa
from medst_trl.evaluation.predictions import read_predictions
from medst_trl.evaluation.scoring import figures, score_records

from .charts import Bar, Group, bar_chart
from .run_folder import Run, StageRun
from .text import place, words


Figure = tuple[str, ...]
CHARTED = (("exact_match",), ("open", "f1"), ("open", "recall"), ("closed", "accuracy"))
_ORDER = {"base": 0, "sft": 1, "dpo": 2}  # of what is evaluated


@dataclass
class Evaluation:
    """
    One `scores.json`.

    Attributes:
        label (`str`): `"aligned"`, `"round 2/aligned"`: its folder, without what all have in common.
        trained_by (`str`, *optional*): Stage that made the model (`base`, `sft`, `dpo`) where that lies in the run.
        benchmark (`str`): What was answered, for reading.
        key (`tuple`): The data and split by content: evaluations of one key can be compared.
        scores (`dict`): Variant to figure to `{"value", "n", "interval"}`.
        controls (`dict`): Control to variant to figure, with `difference` and `difference_interval`.
        changes (`dict`): Variant to figure to `(difference, interval)` against the evaluation before.
    """

    label: str
    folder: Path
    stage: StageRun
    trained_by: str | None
    benchmark: str
    key: tuple
    content: dict[str, Any]
    scores: dict[str, dict[Figure, dict]]
    controls: dict[str, dict[str, dict[Figure, dict]]]
    changes: dict[str, dict[Figure, tuple[float | None, list[float] | None]]] = field(default_factory=dict)


@dataclass
class Comparison:
    """
    Evaluations of one benchmark, the oldest policy first.

    Attributes:
        before (`Evaluation`): What the others are compared with: the last policy before any preference training.
        compared (`list`): Evaluations with differences, paired question by question.
    """

    benchmark: str
    evaluations: list[Evaluation]
    before: Evaluation
    variants: list[str]

    @property
    def compared(self) -> list[Evaluation]:
        return [evaluation for evaluation in self.evaluations if evaluation.changes]

    def rows(self, variant: str) -> list[Figure]:
        """Figures with a value anywhere; of question types their exact match only."""
        found = {}
        for evaluation in self.evaluations:
            for path, leaf in evaluation.scores.get(variant, {}).items():
                if leaf["n"] and (path[0] != "question_types" or path[2:] == ("exact_match",)):
                    found[path] = None
        return sorted(found, key=lambda path: path[0] == "question_types")

    def leaf(self, variant: str, path: Figure) -> dict:
        """The figure in the first evaluation that has it, for its n and majority baseline."""
        return next(e.scores[variant][path] for e in self.evaluations if path in e.scores.get(variant, {}))

    def controls(self) -> list[str]:
        return list(dict.fromkeys(control for evaluation in self.evaluations for control in evaluation.controls))

    def charts(self) -> list[Markup]:
        """The main figures by the rules to trust, with the newest policy's controls and the majority baseline."""
        variant, charts = self.variants[0], []
        for path in CHARTED:
            bars = [
                Bar(evaluation.label, leaf["value"], *(leaf["interval"] or (None, None)))
                for evaluation in self.evaluations
                if (leaf := evaluation.scores.get(variant, {}).get(path)) and leaf["n"]
            ]
            for control, scores in self.evaluations[-1].controls.items() if bars else ():
                if (leaf := scores.get(variant, {}).get(path)) and leaf["n"]:
                    bars.append(Bar(f"{control} images", leaf["value"], *(leaf["interval"] or (None, None)), True))
            if bars:
                leaf = self.leaf(variant, path)
                charts.append(
                    bar_chart(
                        f"{figure_name(path).capitalize()}, {leaf['n']:,} questions",
                        [Group("", bars, leaf.get("majority"))],
                        unit=f"percent ({words(variant)}), with 95% intervals",
                        limits=(0, 100),
                        mark_name="majority baseline",
                    )
                )
        return charts


def figure_name(path: Sequence[str]) -> str:
    return words(f"{path[1]}" if path[0] == "question_types" else ": ".join(path))


def read_evaluations(run: Run) -> list[Evaluation]:
    """Every complete evaluation, the oldest policy first."""
    found = []
    for stage in run.of("evaluate"):
        files = [stage.folder / "scores.json", *sorted(stage.folder.glob("*/scores.json"))]
        for path in files:
            if (content := run.read_json(path)) is None:
                continue
            try:
                found.append(_evaluation(run, stage, path.parent, content))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                run.notes.append(f"{run.name(path)} is not as `medst evaluate` writes it and is left out.")
    for stage in run.of("evaluate"):
        if not any(evaluation.stage is stage for evaluation in found):
            run.notes.append(f"{stage.name} has no scores yet ({stage.state}).")
    return sorted(found, key=lambda e: (e.stage.round, _ORDER.get(e.trained_by, 3), e.stage.record.get("started", "")))


def compare(run: Run, evaluations: Sequence[Evaluation], bootstrap_samples: int) -> list[Comparison]:
    """Group evaluations by benchmark, and compare each with the one before the preference training."""
    groups: dict[tuple, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.key, []).append(evaluation)
    comparisons = []
    for group in groups.values():
        _name_by_round(group)
        untuned = [evaluation for evaluation in group if evaluation.trained_by == "sft"]
        before = untuned[0] if untuned else group[0]
        variants = list(dict.fromkeys(variant for evaluation in group for variant in evaluation.scores))
        comparison = Comparison(group[0].benchmark, group, before, variants)
        for evaluation in group[group.index(before) + 1 :]:
            evaluation.changes = _changes(run, before, evaluation, bootstrap_samples)
        comparisons.append(comparison)
    return comparisons


def _name_by_round(group: Sequence[Evaluation]) -> None:
    """`round 1/aligned` is `round 1` where a round has no second evaluation."""
    for evaluation in group:
        number = evaluation.stage.round
        if number and [other.stage.round for other in group].count(number) == 1:
            evaluation.label = f"round {number}"


def read_answers(run: Run, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Its predictions by id; empty where they cannot be read."""
    try:
        return {str(row["id"]): row for row in read_predictions(evaluation.folder / "predictions.jsonl")[0]}
    except (UserError, KeyError):
        note = (
            f"{run.name(evaluation.folder)}/predictions.jsonl is missing or damaged, so single answers are left out."
        )
        if note not in run.notes:
            run.notes.append(note)
        return {}


def is_right(record: Mapping[str, Any]) -> bool:
    """Right by the strict rules: the verdict of a closed question, the exact answer of an open one."""
    ((_, scored),) = score_records([record], "strict")
    return bool(scored.get(("closed", "accuracy"), scored[("exact_match",)]))


def _evaluation(run: Run, stage: StageRun, folder: Path, content: dict[str, Any]) -> Evaluation:
    data = content.get("data") or {}
    source = str(content.get("benchmark") or content.get("predictions") or "predictions")
    key = (data.get("sha256") or data.get("revision") or source, content.get("split"))
    benchmark = place(source, run.folder) + (f", split {content['split']}" if content.get("split") else "")
    parts = [part for part in run.name(folder).split("/") if part != "evaluate"]
    return Evaluation(
        label=words("/".join(parts)) or "evaluate",
        folder=folder,
        stage=stage,
        trained_by=_trained_by(run, content.get("model")),
        benchmark=benchmark,
        key=key,
        content=content,
        scores={variant: _checked(scores) for variant, scores in content["scores"].items()},
        controls={
            control: {variant: _checked(scores) for variant, scores in by_variant.items()}
            for control, by_variant in content["controls"].items()
        },
    )


def _checked(scores: Mapping[str, Any]) -> dict[Figure, dict]:
    """The figures, each with numbers where numbers have to be."""
    found = dict(figures(scores))
    for leaf in found.values():
        int(leaf["n"])
        for value in (leaf["value"], leaf.get("majority"), leaf.get("difference")):
            None if value is None else float(value)
        for bounds in (leaf["interval"], leaf.get("difference_interval")):
            None if bounds is None else (float(bounds[0]), float(bounds[1]))
    return found


def _trained_by(run: Run, model: Any) -> str | None:
    name = place(model or "", run.folder)
    return next((stage.stage for stage in run.stages if stage.name == name), None)


def _changes(run: Run, before: Evaluation, after: Evaluation, bootstrap_samples: int) -> dict:
    """Paired question by question; without intervals where the predictions are not there any more."""
    sides = [read_answers(run, evaluation) for evaluation in (after, before)]
    if not all(sides):
        return {}
    changes = {}
    for variant in after.scores.keys() & before.scores.keys():
        rule = after.content["scores"][variant].get("closed_rule")
        try:
            compared = compare_vqa(
                sides[0].values(),
                sides[1].values(),
                variant,
                closed_rule=rule,
                bootstrap_samples=bootstrap_samples,
            )
        except UserError:
            run.notes.append(
                f"{after.label} and {before.label} did not answer the same questions of {after.benchmark}, so no "
                "difference is given."
            )
            return {}
        changes[variant] = {
            path: (leaf["difference"], leaf["difference_interval"]) for path, leaf in figures(compared)
        }
    return changes


def terminal_table(comparison: Comparison, align) -> str:
    """The figures before and after, for the terminal."""
    variant = comparison.variants[0]
    header = ["", "n", *(e.label for e in comparison.evaluations)]
    header += [f"{e.label} - {comparison.before.label}" for e in comparison.compared]
    rows = [header]
    for path in comparison.rows(variant):
        leaves = [e.scores.get(variant, {}).get(path, {}) for e in comparison.evaluations]
        row = [figure_name(path), str(comparison.leaf(variant, path)["n"])]
        row += ["" if leaf.get("value") is None else f"{leaf['value']:.1f}" for leaf in leaves]
        for evaluation in comparison.compared:
            difference, bounds = evaluation.changes.get(variant, {}).get(path, (None, None))
            between = f" [{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else ""
            row.append("" if difference is None else f"{difference:+.1f}{between}")
        rows.append(row)
    return "\n".join([f"{comparison.benchmark} ({words(variant)}, %, differences with 95% intervals)", *align(rows)])

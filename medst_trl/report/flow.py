# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The data flow of a run: what each stage made and left out, and how the judge decided."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from markupsafe import Markup

from medst_trl.data.schema import KINDS
from medst_trl.pipeline.stage import STAGES, Stage
from medst_trl.selftrain.judge.judgements import judge_statistics, warnings_of

from .charts import Bar, bar_chart
from .run_directory import Run, StageRun
from .text import relative_path, sentence, words


KEPT = "kept"
LEFT_OUT = ("rejected", "set_aside", "dropped")  # keys in `counts` that map reasons to numbers
UNNAMED = ("datasets", "notes")  # keys in `counts` that only group others
MAX_REASONS = 12


@dataclass
class Judging:
    """
    What one run of a judge did.

    Attributes:
        statistics (`dict`): See [`~medst_trl.selftrain.judge.judgements.judge_statistics`].
        cost (`float`, *optional*): Cost of all its replies in dollars, if the stage knew the prices.
        models (`Counter`): Judging model and prompt version.
        offsets (`dict`): `"kept"` or the reason to drop, to the byte offsets of its lines in the file.
    """

    statistics: dict[str, Any] = field(default_factory=dict)
    cost: float | None = None
    models: Counter = field(default_factory=Counter)
    offsets: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def warnings(self) -> list[str]:
        return [sentence(warning) for warning in warnings_of(self.statistics)]


@dataclass
class FlowStep:
    """
    One stage of the data flow.

    Attributes:
        run ([`StageRun`]): The stage.
        made (`list`): Name and number of what it made.
        left_out (`Counter`): Reason to number.
        chart (`Markup`): What was kept and left out, as bars.
    """

    run: StageRun
    made: list[tuple[str, float]] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    chart: Markup | None = None


def data_flow(run: Run, judgings: Mapping[str, Judging]) -> list[tuple[int, list[tuple[Stage, list[FlowStep]]]]]:
    """
    Group the stages in pipeline order by round, and within a round by stage: there may be several evaluations.

    Args:
        run ([`Run`]): The run.
        judgings (`dict`): Judge statistics by the names of stages.
    """
    found = [_step(run, stage, judgings) for stage in run.stages]
    return [
        (round, [(stage, list(steps)) for stage, steps in groupby(steps, lambda step: step.run.stage)])
        for round, steps in groupby(found, lambda step: step.run.round)
    ]


def missing_stages(run: Run) -> list[str]:
    """Return the names of the stages that read or make datasets and are not in the run (yet)."""
    return [
        stage.name
        for stage in STAGES.values()
        if any(item.kind in KINDS for item in (*stage.inputs, *stage.outputs))
        if not any(stage_run.stage is stage for stage_run in run.stages)
    ]


def settings(run: Run, stage: StageRun) -> list[tuple[str, str]]:
    """Return a stage's inputs and the settings to show with their values, without those that are empty or off."""
    inputs = {item.key: stage.settings.get(item.key) for item in stage.stage.inputs}
    shown = []
    for key, value in (inputs | stage.stage.shown_settings(stage.settings)).items():
        if not (value in (None, "", [], -1) or value is False or isinstance(value, dict)):
            items = value if isinstance(value, list) else [value]
            shown.append((key, ", ".join(relative_path(item, run.directory) for item in items)))
    return shown


def _step(run: Run, stage: StageRun, judgings: Mapping[str, Judging]) -> FlowStep:
    step, judging, counts = FlowStep(stage), judgings.get(stage.name), stage.counts
    kept = counts.get("candidates") if is_count(counts.get("candidates")) else None
    if "judge" in counts:  # statistics with a section of their own
        preferences = counts.get("preferences") if isinstance(counts.get("preferences"), dict) else {}
        counts = {key: value for key, value in preferences.items() if key in ("train", "validation", *LEFT_OUT)}
    if judging:
        step.made.append(("pairs of answers", judging.statistics["pairs"]))
    _add(run, step, "", counts)
    if judging:
        step.left_out = step.left_out or Counter(judging.statistics["dropped"])
        kept = judging.statistics["pairs"] - step.left_out.total()
    step.chart = _bars(step.left_out, kept)
    return step


def _add(run: Run, step: FlowStep, name: str, value: Any) -> None:
    """Sort what a stage counted, at any depth, into what it made and what it left out."""
    if is_count(value):
        step.made.append((name, value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in LEFT_OUT and isinstance(inner, dict):
                step.left_out.update({reason: n for reason, n in inner.items() if is_count(n) and n})
            else:
                prefix = f"{name}: " if name else ""
                _add(run, step, name if key in UNNAMED else prefix + words(relative_path(key, run.directory)), inner)


def _bars(left_out: Counter, kept: int | None) -> Markup | None:
    if not left_out and kept is None:
        return None
    ordered = left_out.most_common()
    bars = [] if kept is None else [Bar("kept", kept)]
    bars += [Bar(words(reason), n, muted=True) for reason, n in ordered[:MAX_REASONS]]
    if rest := sum(n for _, n in ordered[MAX_REASONS:]):
        bars.append(Bar(f"{len(ordered) - MAX_REASONS} other reasons", rest, muted=True))
    title = "Left out, by reason" if kept is None else "Kept, and left out by reason"
    return bar_chart(title, bars, digits=None, axis=False)


def is_count(value: Any) -> bool:
    """Whether a value in `counts` is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_judgings(run: Run) -> dict[str, Judging]:
    """Read what each judge did, by the names of stages, from `judgements.jsonl`, which is read once, line by line."""
    found = {stage.name: _read_judging(run, stage) for stage in run.stages}
    return {name: judging for name, judging in found.items() if judging.statistics["pairs"]}


def _read_judging(run: Run, stage: StageRun) -> Judging:
    judging = Judging()
    judging.statistics = judge_statistics(_judgements(run, stage, judging))
    cost = stage.counts.get("judge")
    for key in ("usage", "all", "cost"):
        cost = cost.get(key) if isinstance(cost, dict) else None
    judging.cost = float(cost) if is_count(cost) else None
    return judging


def _judgements(run: Run, stage: StageRun, judging: Judging) -> Iterator[dict[str, Any]]:
    invalid = 0
    for offset, row in run.read_lines(stage.directory / "judgements.jsonl"):
        if is_judgement(row):
            judging.offsets[row["dropped"] or KEPT].append(offset)
            judging.models[str(row.get("model")), str(row.get("prompt_version"))] += 1
            yield row
        else:
            invalid += 1
    if invalid:
        run.notes.append(f"{stage.name}/judgements.jsonl: {invalid:,} lines are not judgements and are left out.")


def is_judgement(row: Mapping[str, Any]) -> bool:
    """Whether a line has everything that the page reads, with the right types."""
    try:
        dropped, answers = row["dropped"], row["answers"]
        valid = is_pair(answers) and isinstance("".join(answers), str)
        if dropped is None:
            low, high = row["scores"]
            valid &= row["verdict"] in (0, 1) and answers[row["verdict"]] is not None
            valid &= isinstance(low, int | float) and isinstance(high, int | float)
        else:
            valid &= isinstance(dropped, str) and dropped not in ("", KEPT)
        for order in row["orders"]:
            valid &= order["shown"] in ([0, 1], [1, 0]) and order.get("verdict") in (None, "tie", 0, 1)
            valid &= order["cached"] is not None and sum((order.get("usage") or {}).values()) >= 0
    except (LookupError, TypeError, ValueError, AttributeError):
        return False
    return valid


def is_pair(value: Any) -> bool:
    """Whether a value is a list of two items."""
    return isinstance(value, list) and len(value) == 2

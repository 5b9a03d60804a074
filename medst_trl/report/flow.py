# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The data flow of a run: what each stage made and left out, and how the judge decided."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from typing import Any

from medst_trl.base.files import read_jsonl
from medst_trl.data.schema import KINDS
from medst_trl.pipeline.stage import STAGES, Stage
from medst_trl.selftrain.judge.statistics import judge_statistics, warnings_of

from .charts import Bar, bar_chart
from .run_directory import Run, StageRun
from .text import is_number, relative_path, sentence, words


LEFT_OUT = ("rejected", "set_aside", "dropped")  # keys in `counts` that map reasons to numbers
UNNAMED = ("datasets", "notes")  # keys in `counts` that only group others


class Judging:
    """
    What a judge did.

    Args:
        run ([`Run`]): Receives a note about judgements that cannot be read.
        stage ([`StageRun`]): The judge.

    Attributes:
        statistics (`dict`): See [`~medst_trl.selftrain.judge.statistics.judge_statistics`], from its record.
        preferences (`dict`): What its record counts about the pairs to train on.
        kept (`int`): Their number: those that were judged, without what the stage left out then.
        rows (`list[dict]`): Its judgements.
        models (`Counter`): Judging model and prompt version.
        warnings (`list[str]`): What the statistics warn of.
    """

    def __init__(self, run: Run, stage: StageRun):
        path = stage.directory / "judgements.jsonl"
        self.statistics, self.preferences = stage.counts["judge"], stage.counts["preferences"]
        splits = (self.preferences.get(name, {}) for name in ("train", "validation"))
        self.kept = sum(split.get("pairs", 0) for split in splits)
        self.rows = [row for row in read_jsonl(path) if is_judgement(row)]
        self.models = Counter((str(row.get("model")), str(row.get("prompt_version"))) for row in self.rows)
        self.warnings = [sentence(warning) for warning in warnings_of(self.statistics)]
        if missing := self.statistics["pairs"] - len(self.rows):
            run.notes.append(f"{run.name(path)}: {missing:,} judgements are missing or damaged, and are left out.")


def read_judgings(run: Run) -> dict[str, Judging]:
    """Return what each judge did that has finished, by the name of its stage."""
    judges = [stage for stage in run.stages if stage.counts.keys() >= {"judge", "preferences"}]
    return {stage.name: Judging(run, stage) for stage in judges}


def is_judgement(row: Any) -> bool:
    """Whether a line has what the statistics and the page read."""
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        return bool(judge_statistics([row]))
    return False


def data_flow(run: Run, judgings: Mapping[str, Judging]) -> list[tuple[int, list[tuple[Stage, list[dict[str, Any]]]]]]:
    """
    Group the stages in pipeline order by round, and within a round by stage: there may be several evaluations.

    Args:
        run ([`Run`]): The run.
        judgings (`dict`): Judge statistics by the names of stages.

    Returns:
        `list`: each stage as a dict of its `run`, of names and numbers of what it `made`, and of a `chart` of what was
        kept and left out.
    """
    found = [_step(run, stage, judgings.get(stage.name)) for stage in run.stages]
    return [
        (round, [(stage, list(steps)) for stage, steps in groupby(steps, lambda step: step["run"].stage)])
        for round, steps in groupby(found, lambda step: step["run"].round)
    ]


def missing_stages(run: Run) -> list[str]:
    """Return the names of the stages that read or make datasets and are not in the run (yet)."""
    present = [stage_run.stage for stage_run in run.stages]
    missing = [stage for stage in STAGES.values() if stage not in present]
    return [one.name for one in missing if any(item.kind in KINDS for item in (*one.inputs, *one.outputs))]


def settings(run: Run, stage: StageRun) -> Iterator[tuple[str, str]]:
    """Yield a stage's inputs and the settings to show with their values, without those that are empty or off."""
    inputs = {item.key: stage.settings.get(item.key) for item in stage.stage.inputs}
    for key, value in (inputs | stage.stage.shown_settings(stage.settings)).items():
        if not (value in (None, "", [], -1) or value is False or isinstance(value, dict)):
            items = value if isinstance(value, list) else [value]
            yield key, ", ".join(relative_path(item, run.directory) for item in items)


def _step(run: Run, stage: StageRun, judging: Judging | None) -> dict[str, Any]:
    counts, made, left_out = stage.counts, [], Counter()
    kept = counts.get("candidates")
    if judging:  # its statistics have a section of their own
        made.append(("pairs of answers", judging.statistics["pairs"]))
        counts = {key: judging.preferences.get(key) for key in ("train", "validation", *LEFT_OUT)}
    _add(run, made, left_out, "", counts)
    if judging:
        kept = judging.statistics["pairs"] - left_out.total()
    bars = [Bar("kept", kept)] if is_number(kept) else []
    title = "Kept, and left out by reason" if bars else "Left out, by reason"
    bars += [Bar(words(reason), n, muted=True) for reason, n in left_out.most_common()]
    return {"run": stage, "made": made, "chart": bar_chart(title, bars, digits=None, axis=False)}


def _add(run: Run, made: list[tuple[str, float]], left_out: Counter, name: str, value: Any) -> None:
    """Sort what a stage counted, at any depth, into what it made and what it left out."""
    if is_number(value):
        made.append((name, value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in LEFT_OUT and isinstance(inner, dict):
                left_out.update({reason: n for reason, n in inner.items() if is_number(n) and n})
            else:
                inner_name = (f"{name}: " if name else "") + words(relative_path(key, run.directory))
                _add(run, made, left_out, name if key in UNNAMED else inner_name, inner)

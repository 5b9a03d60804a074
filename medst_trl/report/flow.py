# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The data flow of a run: what each stage made and left out, and how the judge decided."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medst_trl.base.fingerprints import fingerprint, same_source
from medst_trl.data.schema import KINDS
from medst_trl.pipeline.lineage import possible_places
from medst_trl.pipeline.stage import STAGES, Stage
from medst_trl.selftrain.judge.statistics import judge_statistics, warnings_of

from .charts import Bar, bar_chart
from .run_directory import Run, StageRun
from .text import is_number, is_pair, relative_path, sentence, words


KEPT = "kept"
LEFT_OUT = ("rejected", "set_aside", "dropped")  # keys in `counts` that map reasons to numbers
UNNAMED = ("datasets", "notes")  # keys in `counts` that only group others
MAX_REASONS = 12


class Judging:
    """
    What one run of a judge did, from its `judgements.jsonl`, which is read once, line by line.

    Args:
        run ([`Run`]): Receives notes about lines that are not judgements.
        stage ([`StageRun`]): The judge.

    Attributes:
        statistics (`dict`): See [`~medst_trl.selftrain.judge.statistics.judge_statistics`].
        cost (`float`, *optional*): Cost of all its replies in dollars, if the stage knew the prices.
        models (`Counter`): Judging model and prompt version.
        offsets (`dict`): `"kept"` or the reason to drop, to the byte offsets of its lines in the file.
        warnings (`list[str]`): What the statistics warn of.
    """

    def __init__(self, run: Run, stage: StageRun):
        self.models, self.offsets = Counter(), defaultdict(list)
        self.statistics = judge_statistics(self._read(run, stage))
        self.warnings = [sentence(warning) for warning in warnings_of(self.statistics)]
        self.cost = None
        with suppress(LookupError, TypeError, ValueError):  # another stage, or a damaged record
            self.cost = float(stage.counts["judge"]["usage"]["all"]["cost"])

    def _read(self, run: Run, stage: StageRun) -> Iterator[dict[str, Any]]:
        invalid = 0
        for offset, row in run.read_lines(stage.directory / "judgements.jsonl"):
            if is_judgement(row):
                self.offsets[row["dropped"] or KEPT].append(offset)
                self.models[str(row.get("model")), str(row.get("prompt_version"))] += 1
                yield row
            else:
                invalid += 1
        if invalid:
            run.notes.append(f"{stage.name}/judgements.jsonl: {invalid:,} lines are not judgements and are left out.")


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
    found = [_step(run, stage, judgings) for stage in run.stages]
    return [
        (round, [(stage, list(steps)) for stage, steps in groupby(steps, lambda step: step["run"].stage)])
        for round, steps in groupby(found, lambda step: step["run"].round)
    ]


def missing_stages(run: Run) -> list[str]:
    """Return the names of the stages that read or make datasets and are not in the run (yet)."""
    present = [stage_run.stage for stage_run in run.stages]
    missing = [stage for stage in STAGES.values() if stage not in present]
    return [one.name for one in missing if any(item.kind in KINDS for item in (*one.inputs, *one.outputs))]


def note_other_data(run: Run) -> None:
    """Note each stage whose training data has been made again since, by another run of the judge for example."""
    for training in run.select(lambda stage: stage.trains and stage.input("dataset")):
        sources = training.record.get("inputs", {}).get("dataset") or []
        for directory in filter(Path.is_dir, run.datasets(training.stage.input("dataset").kind, training.round)):
            with suppress(TypeError, AttributeError):  # a damaged record
                places = ((item, possible_places(item.get("path", ""), run.directory)) for item in sources)
                read = [item for item, found in places if found and found[0].samefile(directory)]
                if read and not same_source(read[0], fingerprint(directory)):
                    # Only the recipe knows the section of a directory with a name of its own.
                    is_label = training.stage.name in training.name.split("/")
                    run.notes.append(
                        f"{training.name} was trained on other {training.stage.trains} than those now in "
                        f"{run.name(directory)}. To train on these, run it again: medst run RECIPE --stage "
                        f"{training.name if is_label else training.stage.name} --overwrite"
                    )


def settings(run: Run, stage: StageRun) -> Iterator[tuple[str, str]]:
    """Yield a stage's inputs and the settings to show with their values, without those that are empty or off."""
    inputs = {item.key: stage.settings.get(item.key) for item in stage.stage.inputs}
    for key, value in (inputs | stage.stage.shown_settings(stage.settings)).items():
        if not (value in (None, "", [], -1) or value is False or isinstance(value, dict)):
            items = value if isinstance(value, list) else [value]
            yield key, ", ".join(relative_path(item, run.directory) for item in items)


def _step(run: Run, stage: StageRun, judgings: Mapping[str, Judging]) -> dict[str, Any]:
    judging, counts, made, left_out = judgings.get(stage.name), stage.counts, [], Counter()
    kept = counts.get("candidates") if is_number(counts.get("candidates")) else None
    if "judge" in counts:  # statistics with a section of their own
        preferences = counts.get("preferences") if isinstance(counts.get("preferences"), dict) else {}
        counts = {key: value for key, value in preferences.items() if key in ("train", "validation", *LEFT_OUT)}
    if judging:
        made.append(("pairs of answers", judging.statistics["pairs"]))
    _add(run, made, left_out, "", counts)
    if judging:
        left_out = left_out or Counter(judging.statistics["dropped"])
        kept = judging.statistics["pairs"] - left_out.total()
    return {"run": stage, "made": made, "chart": _bars(left_out, kept)}


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


def _bars(left_out: Counter, kept: int | None) -> Markup:
    ordered = left_out.most_common()
    bars = [] if kept is None else [Bar("kept", kept)]
    bars += [Bar(words(reason), n, muted=True) for reason, n in ordered[:MAX_REASONS]]
    if rest := sum(n for _, n in ordered[MAX_REASONS:]):
        bars.append(Bar(f"{len(ordered) - MAX_REASONS} other reasons", rest, muted=True))
    title = "Left out, by reason" if kept is None else "Kept, and left out by reason"
    return bar_chart(title, bars, digits=None, axis=False)


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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A self-contained HTML page about a run: no network, no script, no other file, no path of this machine."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medst_trl import __version__
from medst_trl.base.errors import UserError
from medst_trl.base.files import write_text
from medst_trl.evaluation.contamination import CONTAMINATION_FILE, EXPLANATION, Contamination

from . import ReportArguments
from .curves import displacement, final_values, read_log, training_charts
from .flow import Judging, data_flow, missing_stages, read_judgings, settings
from .gallery import changed_answers, judged_cases
from .run_directory import Run, StageRun
from .scores import Comparison, read_comparisons
from .text import environment, is_number, number, percent, relative_path, without_paths


GENERATOR = "medst_trl report"  # written into the page, so that a page of ours is recognized and can be replaced

# Values at the end of training.
_TRAINED = {
    "loss at the end, nats": "loss",
    "reward margin at the end": "rewards/margins",
    "pairs in the judge's order at the end": "rewards/accuracies",
    "change of the chosen answers, nats": "logratios/chosen",
    "change of the rejected answers, nats": "logratios/rejected",
}


class Round:
    """
    What was generated, judged and learned in one round.

    Args:
        run ([`Run`]): The run.
        number (`int`): The round; 0 holds what belongs to no round.
        judgings (`dict`): Judge statistics by the names of stages.
        gallery (`int`): Number of judged pairs to show.
    """

    def __init__(self, run: Run, number: int, judgings: dict[str, Judging], gallery: int):
        # A stage that makes preferences without a judge, such as a filter, records no judge statistics.
        judges = run.select(lambda stage: stage.makes("preferences"), number)
        judges = [one for one in judges if one.name in judgings or one.state != "complete"]
        self.number = number
        self.judge = judges[0] if judges else None
        self.judging = judgings.get(self.judge.name) if self.judge else None
        trainings = run.select(lambda stage: stage.trains and stage.repeats, number)
        self.trainings = [_training(run, training) for training in trainings]
        self.cases = judged_cases(run, self.judge, self.judging, gallery) if self.judging else []

    @property
    def kept(self) -> int:
        """The preference pairs to train on: those that were judged, without what the judge's stage left out then."""
        counts = self.judge.counts.get("preferences") if self.judge else None
        splits = [split for split in counts.values() if isinstance(split, dict)] if isinstance(counts, dict) else []
        pairs = [split["pairs"] for split in splits if is_number(split.get("pairs"))]
        return sum(pairs) if pairs else self.judging.statistics["judged"]


@dataclass
class Report:
    """A finished page, and the scores before and after training as a table for the terminal."""

    html: str
    table: str
    notes: list[str]


def make_report(args: ReportArguments) -> Report:
    """
    Make a page about a run. Stages that are missing or not finished are listed as missing.

    Args:
        args ([`ReportArguments`]): The run, and what to show. `output_dir` is not used here.

    Returns:
        [`Report`]: the page as text.

    Raises:
        UserError: if there is no such directory, or no stage in it.

    Example:

    ```python
    >>> from medst_trl.report import ReportArguments
    >>> page = make_report(ReportArguments("runs/demo")).html
    ```
    """
    run = Run(args.run)
    judgings = read_judgings(run)
    comparisons = read_comparisons(run, args.bootstrap_samples)
    numbers = sorted({one.round for one in run.select(lambda stage: stage.repeats)})
    rounds = [Round(run, number, judgings, args.gallery) for number in numbers]
    missing = missing_stages(run)
    if not (comparisons or judgings):
        waiting = ", ".join([*(stage.name for stage in run.stages if stage.state != "complete"), *missing])
        run.notes.append(f"There are no scores and no judged pairs yet. Not finished or missing: {waiting}.")
    page = {
        "title": args.title or run.directory.name,
        "run": run,
        "generator": f"{GENERATOR} {__version__}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "flow": data_flow(run, judgings),
        "settings": [(stage, settings(run, stage)) for stage in run.stages],
        "missing": missing,
        "comparisons": comparisons,
        "contamination": [contamination_table(run, comparison) for comparison in comparisons],
        "contamination_explained": EXPLANATION,
        "changed_answers": [changed for c in comparisons if (changed := changed_answers(run, c, args.gallery))],
        "supervised": [_training(run, one) for one in run.select(lambda stage: stage.trains and not stage.repeats)],
        "rounds": rounds,
        "round_rows": round_rows(rounds, comparisons),
        "versions": _versions(run),
        "seconds": sum(stage.record.get("seconds", 0) for stage in run.stages),
    }
    notes = [without_paths(note, run.directory) for note in run.notes]
    html = environment().get_template("report.html.jinja").render(page, notes=notes)
    return Report(html, "\n\n".join(comparison.terminal_table() for comparison in comparisons), run.notes)


def write_report(report: Report, output_dir: str | os.PathLike) -> Path:
    """
    Write `index.html` into a directory, atomically.

    Raises:
        UserError: if there is an `index.html` that is not a report.
    """
    path = Path(output_dir) / "index.html"
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise UserError(f"output_dir is not a directory: {output_dir}")
    if path.exists() and f'content="{GENERATOR}'.encode() not in path.read_bytes()[:2000]:
        raise UserError(f"{path} is not a report of medst_trl and was not changed. Choose another output_dir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, report.html)
    return path


def round_rows(rounds: Sequence[Round], comparisons: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """
    Return the rows that compare rounds (judge, training and scores): a figure and its value in each round as text,
    empty if the round has none. Rows without any value are left out.
    """
    judged = [one.judging.statistics if one.judging else None for one in rounds]
    rows = [
        ("preference pairs kept", [number(one.kept) if one.judging else "" for one in rounds]),
        ("verdicts that flip with the order", [percent(one["flip_rate"]) if one else "" for one in judged]),
    ]
    trained = [one.trainings[0]["final_values"] if one.trainings else {} for one in rounds]
    for name, key in _TRAINED.items():
        rows.append((name, [number(values[key], 3) if key in values else "" for values in trained]))
    for comparison in comparisons:
        for metric, path in comparison.charted():
            found = [(e.round, e.file.leaf(metric, path)) for e in comparison.evaluations if e.level >= 0]
            last = {number: leaf for number, leaf in found if leaf}
            cells = [number(last[one.number]["value"], 1) if one.number in last else "" for one in rounds]
            rows.append((f"{comparison.label(metric, path)} on {comparison.benchmark}, %", cells))
    return [(name, cells) for name, cells in rows if any(cells)]


def contamination_table(run: Run, comparison: Comparison) -> dict[str, Any]:
    """
    Return what a benchmark shares with the training data of each evaluated model: for each figure its label and the
    text of each evaluation (`rows`), and for each dataset what it is and the label of the evaluation (`sources`).
    What was found is noted on the run.
    """
    labeled = [
        (one.label, Contamination.read(one.directory / CONTAMINATION_FILE) or Contamination())
        for one in comparison.evaluations
    ]

    def name_of(source: Mapping[str, Any]) -> str:
        return source.get("hub_id") or relative_path(source["path"], run.directory)

    if labels := [label for label, found in labeled if found.is_contaminated]:
        run.notes.append(
            f"The training data of {' and '.join(labels)} contains parts of the benchmark {comparison.benchmark}, so "
            "these scores can be too high: see Contamination."
        )
    return {
        "comparison": comparison,
        "rows": list(zip(*(found.rows() for _, found in labeled))),
        "sources": [(label, text) for label, found in labeled for text in found.sources(name_of)],
    }


def _training(run: Run, stage: StageRun) -> dict[str, Any]:
    """Return the curves of a training stage and what they show."""
    log = read_log(run, stage)
    values = final_values(log, list(_TRAINED.values()))
    return {"run": stage, "charts": training_charts(log), "final_values": values, "displacement": displacement(log)}


def _versions(run: Run) -> dict[str, list[str]]:
    """Packages and the versions that the stages ran with: several if they differ."""
    ran = (version for stage in run.stages for version in stage.record.get("versions", {}).items())
    found = dict.fromkeys((name, str(version)) for name, version in ran if version)
    return {name: [version for other, version in found if other == name] for name, _ in found}

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A self-contained HTML page about a run: no network, no script, no other file, no path of this machine."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medst_trl import __version__
from medst_trl.base.errors import UserError
from medst_trl.base.files import write_text
from medst_trl.evaluation.contamination import EXPLANATION
from medst_trl.evaluation.metric import METRICS

from . import ReportArguments
from .charts import displacement, final_values, training_charts
from .data import Judging, changed_answers, data_flow, judged_cases, missing_stages, read_judgings, settings
from .run_directory import Run, StageRun
from .scores import read_comparisons
from .text import environment, relative_path, without_paths


GENERATOR = "medst_trl report"  # written into the page, so that a page of ours is recognized and can be replaced


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
    for comparison in comparisons:
        if labels := [one.label for one in comparison.evaluations if one.contamination.is_contaminated]:
            run.notes.append(
                f"The training data of {' and '.join(labels)} contains parts of the benchmark {comparison.benchmark}, "
                "so these scores can be too high: see Contamination."
            )
    if not (comparisons or judgings):
        waiting = ", ".join([*(stage.name for stage in run.stages if stage.state != "complete"), *missing])
        run.notes.append(f"There are no scores and no judged pairs yet. Not finished or missing: {waiting}.")

    def name_of(source: Mapping[str, Any]) -> str:
        return source.get("hub_id") or relative_path(source["path"], run.directory)

    page = {
        "title": args.title or run.directory.name,
        "run": run,
        "generator": f"{GENERATOR} {__version__}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "flow": data_flow(run, judgings),
        "settings": [(stage, settings(run, stage)) for stage in run.stages],
        "missing": missing,
        "comparisons": comparisons,
        "contamination_explained": EXPLANATION,
        "name_of": name_of,
        "summaries": {metric.name: metric.summary for metric in METRICS.values()},
        "changed_answers": [changed for c in comparisons if (changed := changed_answers(run, c, args.gallery))],
        "supervised": [_training(run, one) for one in run.select(lambda stage: stage.trains and not stage.repeats)],
        "rounds": rounds,
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


def _training(run: Run, stage: StageRun) -> dict[str, Any]:
    """Return the curves of a training stage and what they show."""
    log = run.read_log(stage)
    values = final_values(log, {key for entry in log for key in entry})
    return {"run": stage, "charts": training_charts(log), "final_values": values, "displacement": displacement(log)}


def _versions(run: Run) -> dict[str, list[str]]:
    """Packages and the versions that the stages ran with: several if they differ."""
    ran = (version for stage in run.stages for version in stage.record.get("versions", {}).items())
    found = dict.fromkeys((name, str(version)) for name, version in ran if version)
    return {name: [version for other, version in found if other == name] for name, _ in found}

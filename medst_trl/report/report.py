# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page on a run: no network, no script, no other file, nothing of the machine it ran on."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medst_trl import __version__
from medst_trl.base.errors import UserError
from medst_trl.evaluation.tables import align
from medst_trl.pipeline.stage import STAGES

from . import text
from .curves import displacement, last_values, read_log, training_charts
from .flow import missing, settings, way
from .gallery import Case, crossings, judged_cases
from .judging import Judging, read_judging
from .rounds import judge_rows, side_by_side
from .run_folder import Run, StageRun, read_run
from .scores import compare, figure_name, read_evaluations, terminal_table


TEMPLATE = "report.html.jinja"
GENERATOR = "medst_trl report"  # stands in the page, so that a page of ours is known when it is written again


@dataclass
class Training:
    """A training stage with its curves."""

    stage: StageRun
    charts: list[Markup]
    ends: dict[str, float]
    displacement: str | None


@dataclass
class Lap:
    """What was generated, judged and learned in one round; round 0 stands outside of rounds."""

    round: int
    judge: StageRun | None
    judging: Judging | None
    training: Training | None
    cases: list[Case]


@dataclass
class Report:
    """A finished page, and the scores before and after as a table for the terminal."""

    html: str
    table: str
    notes: list[str]


def make_report(
    run: str | os.PathLike,
    *,
    title: str | None = None,
    gallery: int = 12,
    image_size: int = 320,
    bootstrap_samples: int = 1000,
) -> Report:
    """
    Report on the folder of a run. Stages that are missing or not finished are said to be so.

    Args:
        run (`str` or `os.PathLike`):
            The folder that holds the stages' folders, and the rounds'.
        title (`str`, *optional*):
            Heading of the page; by default the folder's name.
        gallery (`int`, *optional*, defaults to `12`):
            How many judged pairs of each round, and how many benchmark questions, are shown with their images.
        image_size (`int`, *optional*, defaults to `320`):
            Longest side of a shown image, in pixels.
        bootstrap_samples (`int`, *optional*, defaults to `1000`):
            Resamples behind the interval of each difference between evaluations; 0 for none.

    Returns:
        [`Report`]: the page as text.

    Raises:
        UserError: if there is no such folder, or no stage in it.

    Example:

    ```python
    >>> from medst_trl.report.report import make_report
    >>> page = make_report("runs/demo").html
    ```
    """
    run = read_run(run)
    judgings = {stage.name: read_judging(run, stage) for stage in run.of("judge")}
    comparisons = compare(run, read_evaluations(run), bootstrap_samples)
    laps = [_lap(run, number, judgings, gallery, image_size) for number in run.rounds]
    page = {
        "title": title or run.folder.name,
        "run": run,
        "generator": f"{GENERATOR} {__version__}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "way": way(run, judgings),
        "summaries": {stage.name: stage.summary for stage in STAGES.values()},
        "settings": [(stage, settings(run, stage)) for stage in run.stages],
        "missing": missing(run),
        "comparisons": comparisons,
        "crossings": [crossing for c in comparisons if (crossing := crossings(run, c, gallery, image_size))],
        "stage_1": [_training(run, stage) for stage in run.of("sft")],
        "laps": laps,
        "judge_rows": judge_rows(laps),
        "rounds": side_by_side(laps, comparisons),
        "versions": _versions(run),
        "seconds": sum(stage.record.get("seconds", 0) for stage in run.stages),
    }
    html = _environment(run).get_template(TEMPLATE).render(page)
    return Report(html, "\n\n".join(terminal_table(c, align) for c in comparisons), run.notes)


def write_report(report: Report, output_dir: str | os.PathLike) -> Path:
    """
    Write `index.html` into a folder, in one piece.

    Raises:
        UserError: if an `index.html` lies there that is no report.
    """
    path = Path(output_dir) / "index.html"
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise UserError(f"{output_dir} is a file; output_dir has to be a folder.")
    if path.exists() and not _is_report(path):
        raise UserError(f"{path} is not a report of medst_trl and was not touched. Choose another output_dir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(report.html, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        return f'content="{GENERATOR}'.encode() in file.read(2000)


def _environment(run: Run):
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) else "" if value is None else text.clean(value)

    environment = Environment(
        loader=PackageLoader("medst_trl", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,  # of whatever the page shows
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(text, name) for name in ("cut", "duration", "number", "words")}
    environment.filters |= {
        "score": lambda value: f"{value:g}" if isinstance(value, int | float) else text.cut(value, 20),
        "figure": figure_name,
        "place": lambda value: text.place(value, run.folder),
        "without_paths": lambda value: text.without_paths(value, run.folder),
    }
    return environment


def _training(run: Run, stage: StageRun) -> Training:
    log = read_log(run, stage)
    keys = ("loss", "rewards/margins", "rewards/accuracies", "logratios/chosen", "logratios/rejected")
    told = displacement(log) if stage.stage == "dpo" else None
    return Training(stage, training_charts(stage.stage, log), last_values(log, keys), told)


def _lap(run: Run, number: int, judgings: dict[str, Judging | None], gallery: int, image_size: int) -> Lap:
    judge, dpo = ((run.of(stage, number) or [None])[0] for stage in ("judge", "dpo"))
    judging = judgings[judge.name] if judge else None
    return Lap(
        round=number,
        judge=judge,
        judging=judging,
        training=_training(run, dpo) if dpo else None,
        cases=judged_cases(run, judge, judging, gallery, image_size) if judging else [],
    )


def _versions(run: Run) -> dict[str, list[str]]:
    """Package to the versions that the stages ran with: several where they differ."""
    found: dict[str, dict[str, None]] = {}
    for stage in run.stages:
        for name, version in stage.record.get("versions", {}).items():
            if version:
                found.setdefault(name, {})[str(version)] = None
    return {name: list(versions) for name, versions in found.items()}

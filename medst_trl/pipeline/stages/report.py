# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Write an HTML page about a run: scores, data flow, training curves, judge statistics and examples.

```bash
medst report --run runs/demo
```

Input: a run directory; not all stages need to be finished. Output: `index.html` in `output_dir` (by default `report`
in the run directory). It is a single file without scripts, network access or local paths. A table of the scores before
and after training is printed. Each run of the command writes the page again.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from medst_trl.base.settings import check_bounds, documented
from medst_trl.pipeline.stage import RUN, STAGES, Input, Stage


@documented
@dataclass
class ReportArguments:
    """
    Arguments of `medst report`.

    Args:
        run (`str`):
            The run directory, which contains the directories of the stages.
        output_dir (`str`, *optional*):
            Directory for index.html. Default: report in the run directory.
        title (`str`, *optional*):
            Heading of the page. Default: the name of the run directory.
        gallery (`int`, *optional*, defaults to `12`):
            Number of judged pairs (per round) and of benchmark questions to show with their images.
        image_size (`int`, *optional*, defaults to `320`):
            Longest side of the images on the page, in pixels.
        bootstrap_samples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap samples for the interval of each difference; 0 for no intervals.
    """

    run: str
    output_dir: str | None = None
    title: str | None = None
    gallery: int = 12
    image_size: int = 320
    bootstrap_samples: int = 1000


def main(args: ReportArguments) -> None:
    # No StageRecord: a page takes seconds and follows a run that grows, so nothing is skipped, resumed or refused.
    from medst_trl.report.report import make_report, write_report

    check_bounds(args, at_least={"gallery": 0, "image_size": 16, "bootstrap_samples": 0})
    settings = asdict(args)
    output_dir = settings.pop("output_dir") or Path(args.run, "report")
    report = make_report(**settings)
    path = write_report(report, output_dir)
    for note in report.notes:
        print(f"report: {note}")
    if report.table:
        print(f"{report.table}\n")
    print(f"The report is {path} ({len(report.html) / 1e6:.1f} MB): open it in a browser. It needs no other file.")


STAGE = Stage(
    name="report",
    summary="write an HTML page about a run: scores, data flow, training curves, judge, examples",
    help=__doc__,
    after=("evaluate",),
    arguments=lambda: (ReportArguments,),
    main=main,
    inputs=(Input("run", RUN),),
)
STAGES.register(STAGE)

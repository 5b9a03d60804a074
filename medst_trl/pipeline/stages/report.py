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

from pathlib import Path

from medst_trl.base.settings import check_bounds
from medst_trl.pipeline.stage import RUN, STAGES, Input, Stage
from medst_trl.report import ReportArguments


def main(args: ReportArguments) -> None:
    # No StageRecord: a page takes seconds and follows a run that grows, so nothing is skipped, resumed or refused.
    from medst_trl.report.report import make_report, write_report

    check_bounds(args, at_least={"gallery": 0, "bootstrap_samples": 0})
    report = make_report(args)
    path = write_report(report, args.output_dir or Path(args.run, "report"))
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

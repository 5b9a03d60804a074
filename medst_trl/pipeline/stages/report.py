# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
One HTML page on a whole run: the way of the data, training curves, scores, the judge, and cases to look at.

```bash
medst report --run runs/demo
```

Input: the folder of a run with whatever stages it has so far. Output: `index.html` in `output_dir` (by default
`report` in the run), a single file without network, scripts or paths of this machine, and the scores before and after
as a table on the terminal. The page is made anew each time.
"""

from dataclasses import dataclass, field
from pathlib import Path

from medst_trl.pipeline.stage import RUN, STAGES, Input, Stage


@dataclass
class ReportArguments:
    """Arguments of `medst report`."""

    run: str = field(metadata={"help": "Folder of the run, with its stages' folders in it."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for index.html. Default: the folder report in the run."}
    )
    title: str | None = field(default=None, metadata={"help": "Heading of the page. Default: the run folder's name."})
    gallery: int = field(
        default=12,
        metadata={"help": "Judged pairs of each round, and benchmark questions, shown with images; 0 for none."},
    )
    image_size: int = field(default=320, metadata={"help": "Longest side of the images in the page, in pixels."})
    bootstrap_samples: int = field(
        default=1000, metadata={"help": "Resamples behind the interval of each difference; 0 for none."}
    )


def main(args: ReportArguments) -> None:
    # No StageRecord: a page is made in seconds and has to follow a run that grows, so there is nothing to skip,
    # continue or refuse.
    from medst_trl.base.errors import UserError
    from medst_trl.base.files import explain_full_disk
    from medst_trl.report.report import make_report, write_report

    for name, least in {"gallery": 0, "image_size": 16, "bootstrap_samples": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"{name} is {getattr(args, name)}; it has to be at least {least}.")
    report = make_report(
        args.run,
        title=args.title,
        gallery=args.gallery,
        image_size=args.image_size,
        bootstrap_samples=args.bootstrap_samples,
    )
    output_dir = args.output_dir or Path(args.run, "report")
    with explain_full_disk(output_dir):
        path = write_report(report, output_dir)
    for note in report.notes:
        print(f"report: {note}")
    if report.table:
        print(f"{report.table}\n")
    print(f"The report is {path} ({len(report.html) / 1e6:.1f} MB): open it in a browser, it needs no other file.")


STAGE = STAGES.register(
    Stage(
        name="report",
        summary="one HTML page on a whole run: data, curves, scores, judge, gallery",
        help=__doc__,
        after=("evaluate",),
        arguments=lambda: (ReportArguments,),
        main=main,
        inputs=(Input("run", RUN, sources=((RUN, ""),)),),
    )
)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Publish a dataset, an adapter or a model to the Hub, with its card. Repositories are private by default.

```bash
hf auth login
medst push --source runs/vqa_rad/judge/preferences --repo_id my-org/vqa-rad-preferences
medst push --source runs/vqa_rad/dpo --repo_id my-org/vqa-rad-aligned --evaluation runs/vqa_rad/evaluate
```

The source is the output of a stage: a dataset (Parquet files), an adapter or a model. The upload contains the Parquet
files, or the weights, processor and chat template. It also contains a card with sources, settings, statistics and
scores. Checkpoints, records and local paths are not uploaded. If the base of an adapter is a local model, push the
base first and give its Hub id with `--base_model_name_or_path`. If a push is interrupted, run the same command again.

Afterwards, use the Hub id instead of the directory: `medst dpo --dataset my-org/vqa-rad-preferences`.
"""

from collections.abc import Iterator
from contextlib import nullcontext

from medst_trl.base.errors import UserError
from medst_trl.base.hub_ids import is_hub_id
from medst_trl.hub import PushArguments, check_repo_id
from medst_trl.pipeline.record import StageRecord
from medst_trl.pipeline.stage import FILE, STAGES, Input, RowCounter, Stage


def main(args: PushArguments) -> None:
    from medst_trl.hub.push import push_directory

    check(args)
    record = nullcontext() if args.output_dir is None else StageRecord.of(STAGE, args)
    if args.output_dir is not None and record.decision == "skip":
        return
    with record:
        pushed = push_directory(args)
        if args.output_dir is not None:
            record.finish(counts={"files": pushed.files, "bytes": pushed.bytes}, url=pushed.url, commit=pushed.commit)
    print(
        f"push: the {pushed.title} in {args.source} is at {pushed.url} ({pushed.files} files, "
        f"{pushed.bytes / 1e6:.1f} MB), revision {pushed.commit[:12]}."
    )


def check(args: PushArguments) -> None:
    """Raise a `UserError` for a repository or a base model that is not a Hub id."""
    check_repo_id(args.repo_id, "repo_id")
    base = args.base_model_name_or_path
    if base is not None and not is_hub_id(base):
        advice = "Push that model first, and give its Hub id, such as my-org/base."
        raise UserError(f"base_model_name_or_path is {base!r}, which is not a Hub id. {advice}")


def plan(counter: RowCounter, args: PushArguments) -> Iterator[tuple[str, str]]:
    """Yield the stage's rows in a plan."""
    yield "uploads", f"{args.source} to {args.repo_id}, {'private' if args.private else 'PUBLIC'}"


STAGE = Stage(
    name="push",
    summary="publish a dataset, an adapter or a model to the Hub",
    help=__doc__,
    after=("report",),
    arguments=lambda: (PushArguments,),
    check=check,
    main=main,
    plan=plan,
    inputs=(Input("source", FILE), Input("evaluation", FILE)),
    operational=frozenset({"commit_message", "run"}),  # settings of earlier versions
)
STAGES.register(STAGE)

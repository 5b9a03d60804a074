# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Publishes a dataset, an adapter or a model on the Hub, with its card. Private unless told otherwise.

```bash
hf auth login
medst push --source runs/vqa_rad/judge/preferences --repo_id my-org/vqa-rad-preferences
medst push --source runs/vqa_rad/dpo --repo_id my-org/vqa-rad-aligned --evaluation runs/vqa_rad/evaluate
```

The folder says what it is: Parquet files of `prepare`, `generate` or `judge`, an adapter of `sft` or `dpo`, or a
model. Uploaded are the Parquet files, or weights, processor and chat template, and a card with counts, sources,
settings, statistics and scores; no checkpoints, no records of the run, no paths. An adapter of a local base needs that
base on the Hub first: push it, and name it with `--base_model_name_or_path`. Interrupted, the same command goes on.

Afterwards the Hub id stands wherever a folder can: `medst dpo --dataset my-org/vqa-rad-preferences`.
"""

from dataclasses import asdict, dataclass, field

from medst_trl.pipeline.stage import FILE, STAGES, Input, Stage


@dataclass
class PushArguments:
    """Arguments of `medst push`. There is none for the token: `hf auth login`, or HF_TOKEN in the environment."""

    source: str = field(metadata={"help": "Folder of a dataset, an adapter or a model."})
    repo_id: str = field(metadata={"help": "Repository, OWNER/NAME; made if there is none."})
    private: bool = field(
        default=True, metadata={"help": "Make it private, and refuse one that is public. False: publish."}
    )
    evaluation: list[str] = field(
        default_factory=list, metadata={"help": "Folders of `medst evaluate` whose scores go onto a model's card."}
    )
    run: str | None = field(
        default=None, metadata={"help": "Folder of the run, to find the records of inputs that have moved."}
    )
    base_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id of the base of an adapter or merged model, where that names a local folder."},
    )
    license: str | None = field(default=None, metadata={"help": "The Hub's name of a licence, such as cc-by-4.0."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made if there is none."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    replace_content: bool = field(
        default=False,
        metadata={"help": "Push into a repository of other content, and delete that there (its history keeps it)."},
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the record of the push, as a recipe has one. Default: none."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Push again although output_dir has the record of an earlier push."}
    )


def main(args: PushArguments) -> None:
    from medst_trl.hub.push import push_folder
    from medst_trl.pipeline.record import StageRecord

    settings = asdict(args)
    record = None
    if args.output_dir is not None:
        record = StageRecord.open(
            args.output_dir,
            stage="push",
            settings=settings,
            inputs={"source": args.source, "evaluation": args.evaluation},
            operational=STAGE.operational,
            overwrite=args.overwrite,
        )
        if record.status == "finished":
            return
    for name in ("source", "output_dir", "overwrite"):
        del settings[name]
    pushed = push_folder(args.source, **settings)
    if record is not None:
        record.finish(counts={"files": pushed.files, "bytes": pushed.bytes}, url=pushed.url, commit=pushed.commit)
    print(
        f"push: the {pushed.title} in {args.source} is at {pushed.url} ({pushed.files} files, "
        f"{pushed.bytes / 1e6:.1f} MB), revision {pushed.commit[:12]}."
    )


STAGE = STAGES.register(
    Stage(
        name="push",
        summary="publish a dataset, an adapter or a model on the Hub",
        help=__doc__,
        after=("report",),
        arguments=lambda: (PushArguments,),
        main=main,
        inputs=(Input("source", FILE), Input("evaluation", FILE)),
        operational=frozenset({"commit_message", "run"}),
    )
)

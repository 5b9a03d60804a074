# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Makes a stand-alone model of a base and its adapter, for servers and other tools.

```bash
medst merge --model_name_or_path runs/vqa_rad/dpo --output_dir runs/vqa_rad/merged
transformers serve runs/vqa_rad/merged
```

Writes safetensors, processor, chat template and generation config to `output_dir`, to be loaded by plain
transformers, by [`load_policy`] and by servers, and published by `medst push`. Before the files get their names they
are loaded from disk and compared with the adapter: on the first conversations of `dataset`, or of what the adapter was
trained on, or on drawn scans, both answering and asking. In float32 no log-probability may differ by more than 1e-4;
in a smaller type by no more than three times what that type costs the adapter itself. `stage.json` has the figures.

It runs on the CPU and needs memory for the model in float32: 28 GB for 7B. An adapter trained on a 4-bit base is
merged into the base as published, which it has not seen: evaluate the result. Sampling defaults are for answering
(temperature 0.2); to let the model ask, send temperature 1.2.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medst_trl.pipeline.stage import ANY, MODEL, STAGES, Input, Output, Stage


@dataclass
class MergeArguments:
    """Arguments of `medst merge`."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of an adapter."})
    output_dir: str = field(metadata={"help": "Folder for the model."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Its base, where that has moved from the place the adapter names."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights written: float32, bfloat16, float16. auto: that of the base."},
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of conversations, preference pairs or a benchmark to compare on. Default: what "
            "the adapter was trained on where its record names a folder that is there, else drawn scans."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of that dataset."})
    num_examples: int = field(default=4, metadata={"help": "How many of its records to compare on."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let code from the base's repository run. Only for sources you trust."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Publish the model, with its card."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository for it, OWNER/NAME."})
    hub_private_repo: bool = field(default=True, metadata={"help": "Make it private; false publishes it."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run left and start again."})


def main(args: MergeArguments) -> None:
    from medst_trl.base.files import explain_full_disk
    from medst_trl.pipeline.record import StageRecord

    record = StageRecord.open(
        args.output_dir,
        stage="merge",
        settings=asdict(args),
        inputs={name: getattr(args, name) for name in ("model_name_or_path", "base_model_name_or_path", "dataset")},
        operational=STAGE.operational,
        overwrite=args.overwrite,
    )
    if record.status == "finished":
        return

    from medst_trl.hub.cards import write_card
    from medst_trl.policy.merging import merge_policy

    try:
        examples, source = _examples(args)
        with explain_full_disk(args.output_dir):
            merged = merge_policy(
                args.model_name_or_path,
                args.output_dir,
                examples,
                base_model_name_or_path=args.base_model_name_or_path,
                dtype=args.dtype,
                max_shard_size=args.max_shard_size,
                trust_remote_code=args.trust_remote_code,
            )
    except Exception:
        record.forget()
        raise
    merged["trained_in_4bit"] = _trained_in_4bit(args.model_name_or_path)
    record.finish(
        counts={"parameters": merged["parameters"], "examples": merged["proof"]["examples"]},
        metrics={name: merged["proof"][name] for name in ("float32_difference", "stored_difference")},
        merged=merged,
    )
    write_card(args.output_dir)
    print(_summary(args, merged, source))


def _examples(args: MergeArguments) -> tuple[list[dict[str, Any]], str]:
    """Conversations to compare on, and where they are from, in words."""
    from medst_trl.base.errors import UserError

    from .merge_examples import built_in_examples, read_examples, recorded_dataset

    if args.num_examples < 1:
        raise UserError(f"num_examples is {args.num_examples}: one conversation at least is needed to compare on.")
    recorded = recorded_dataset(args.model_name_or_path)
    if args.dataset is not None:
        return read_examples(args.dataset, args.split, args.num_examples), args.dataset
    if recorded is not None:
        return read_examples(*recorded, args.num_examples), recorded[0]
    return built_in_examples(args.num_examples), "drawn scans"


def _summary(args: MergeArguments, merged: dict[str, Any], source: str) -> str:
    proof = merged["proof"]
    conversations = f"{proof['examples']} conversation" + "s" * (proof["examples"] > 1)
    text = (
        f"merge: {merged['parameters']:,} parameters in {merged['dtype']}, in {args.output_dir}. On {proof['tokens']} "
        f"answer and question tokens of {conversations} ({source}) the log-probabilities differ from "
        f"the adapter's by at most {proof['float32_difference']:.1e} in float32"
    )
    if merged["dtype"] != "float32":
        text += (
            f" and {proof['stored_difference']:.1e} in {merged['dtype']} (allowed: {proof['stored_tolerance']:.1e}, "
            "three times what this type costs the adapter)"
        )
    if merged["trained_in_4bit"]:
        text += (
            ".\nThe adapter was trained on its base in 4 bits and is merged into the base as published: what is equal "
            "is the adapter on that base. Evaluate the merged model"
        )
    return f"{text}."


def _trained_in_4bit(adapter: str) -> bool:
    import json

    path = Path(adapter, "stage.json")
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["settings"].get("load_in_4bit"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


STAGE = STAGES.register(
    Stage(
        name="merge",
        summary="make a stand-alone model of an adapter, for servers and other tools",
        help=__doc__,
        after=("dpo",),
        arguments=lambda: (MergeArguments,),
        main=main,
        inputs=(
            Input("model_name_or_path", MODEL, sources=(("dpo", ""), ("sft", ""))),
            Input("base_model_name_or_path", MODEL),
            Input("dataset", ANY, split="split"),
        ),
        outputs=(Output("", MODEL),),
        operational=frozenset({"max_shard_size", "push_to_hub", "hub_model_id", "hub_private_repo"}),
    )
)

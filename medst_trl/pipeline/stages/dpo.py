# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Stage 2: the policy learns to prefer the better of its own answers.

```bash
medst dpo \
    --model_name_or_path runs/vqa_rad/sft \
    --dataset runs/vqa_rad/judge/preferences \
    --learning_rate 5e-6 \
    --vision_learning_rate 2e-5 \
    --projector_learning_rate 2e-5 \
    --output_dir runs/vqa_rad/dpo
```

Input: preference pairs with columns `id`, `images`, `prompt`, `chosen`, `rejected` (see `medst judge`), and an adapter
or a model. An adapter is trained further, its frozen copy being the reference; a model gets a new adapter, the model
without it being the reference. Output: an adapter with its processor and template in `output_dir`, for
[`load_policy`]; checkpoints beside it; `rejected.jsonl` if pairs could not be used. Run again after a crash, it goes
on from the newest complete checkpoint.

`--precompute_ref_log_probs true` has the reference read all pairs first and needs it in memory no more. What it says
is kept in `reference_log_probs` beside the pairs: later runs from the same policy take it from there, `medst push`
takes it along, and for a dataset of the Hub it is downloaded.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.pipeline.stage import MODEL, STAGES, Input, Output, Stage


if TYPE_CHECKING:
    from collections.abc import Iterable

    from medst_trl import MultimodalDPOConfig, MultimodalDPOTrainer


@dataclass
class DpoArguments:
    """What `medst dpo` needs beside the training arguments of [`MultimodalDPOConfig`]."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of an adapter (or of a model) to align."})
    dataset: str = field(metadata={"help": "Folder or Hub id of preference pairs (`medst judge` makes them)."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split for eval_strategy steps or epoch."})
    max_records: int | None = field(default=None, metadata={"help": "Train on the first so many pairs only."})
    use_lora: bool = field(
        default=True, metadata={"help": "Give a model without an adapter a new one; false trains every weight."}
    )
    lora_r: int = field(default=128, metadata={"help": "LoRA rank in the language model, for a new adapter."})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA scale in the language model, for a new adapter."})
    vision_lora_r: int = field(
        default=32, metadata={"help": "LoRA rank in the vision tower, for a new adapter; 0 leaves it frozen."}
    )
    vision_lora_alpha: int = field(default=64, metadata={"help": "LoRA scale there, for a new adapter."})
    train_vision: bool = field(
        default=True, metadata={"help": "Whether the adapter's part in the vision tower goes on training."}
    )
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base of an adapter, where it has moved from the place the adapter names."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the frozen weights: float32, bfloat16. Default: that of the training arguments bf16 and "
            "fp16, and float32 where every weight trains. What an adapter trains is kept in float32."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: hold the frozen language model in 4 bits (NF4), for a small GPU. Needs bitsandbytes "
            "(extra qlora)."
        },
    )
    effective_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs of a step over all processes: gradient_accumulation_steps follows from it, from "
            "per_device_train_batch_size and from the number of processes."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: sdpa, eager, flash_attention_2, ... Default: the model's own choice."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in output_dir and start anew."}
    )


def main(args: DpoArguments, training_args: "MultimodalDPOConfig") -> None:
    from medst_trl.base.files import explain_full_disk
    from medst_trl.training.batch_size import set_accumulation
    from medst_trl.training.end_of_log import end_of_log
    from medst_trl.training.resume import resume_checkpoint

    from .run_directory import load_splits, open_record, save_adapter, write_model_card

    check(args, training_args)
    set_accumulation(args, training_args)
    datasets = load_splits(args, training_args, "preferences")
    record = open_record(args, training_args, "dpo")
    if record.status == "finished":
        return

    if training_args.precompute_ref_log_probs:
        training_args.ref_log_probs_dir = _reference_folder(args.dataset, training_args)
    try:
        trainer = _make_trainer(args, training_args, datasets["train"], datasets.get("eval"))
    except Exception:
        record.forget()
        raise
    checkpoint = resume_checkpoint(training_args.output_dir, trainer.accelerator)
    with explain_full_disk(training_args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.accelerator.wait_for_everyone()
        set_aside = _write_set_aside(trainer)
        save_adapter(trainer)
    metrics = _figures(end_of_log(trainer.state.log_history))
    record.finish(
        counts={
            "pairs": len(datasets["train"]),
            "set_aside": set_aside,
            "truncated": trainer.pairs.truncated,
            "steps": trainer.state.global_step,
        },
        metrics=metrics,
    )
    write_model_card(trainer)
    trainer.accelerator.print(
        f"Stage 2 is done: {trainer.state.global_step} steps on {len(trainer.train_dataset)} preference pairs"
        + "".join(f", {count} set aside as {reason} (rejected.jsonl)" for reason, count in set_aside.items())
        + (f", {trainer.pairs.truncated} with an answer cut at max_length" if trainer.pairs.truncated else "")
        + f".{_ending(metrics)} Adapter and processor are in {training_args.output_dir}."
    )
    trainer.accelerator.wait_for_everyone()  # a rank that leaves while others work may abort
    trainer.end()


def check(args: DpoArguments, training_args: "MultimodalDPOConfig") -> None:
    """Refuse settings that cannot work together."""
    from .policy_for_training import check_how_it_runs

    check_how_it_runs(args, training_args)


def _reference_folder(dataset: str, training_args: "MultimodalDPOConfig") -> str:
    """Where the reference's log-probabilities are kept, with those in it that came with the dataset."""
    from medst_trl.base.fingerprints import REFERENCE_FOLDER

    beside, own = Path(dataset, REFERENCE_FOLDER), Path(training_args.output_dir, REFERENCE_FOLDER)
    writable = os.path.isdir(dataset) and os.access(beside if beside.exists() else dataset, os.W_OK)
    folder = Path(training_args.ref_log_probs_dir or (beside if writable else own))
    if folder != beside and int(os.environ.get("RANK", "0")) == 0:  # the main process reads the cache for all
        _copy_new(beside.glob("*.parquet") if os.path.isdir(dataset) else _downloaded(dataset), folder)
    return str(folder)


def _downloaded(hub_id: str) -> "Iterable[Path]":
    """The files of log-probabilities in a dataset on the Hub; none where it has none or the Hub cannot be asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from medst_trl.base.fingerprints import REFERENCE_FOLDER, split_revision

    name, revision = split_revision(hub_id)
    files = f"{REFERENCE_FOLDER}/*.parquet"
    try:
        found = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=files)
    except (OSError, HfHubHTTPError) as error:
        print(f"dpo: the reference's log-probabilities of {hub_id} cannot be fetched ({str(error).splitlines()[0]}).")
        return ()
    return Path(found).glob(files)


def _copy_new(files: "Iterable[Path]", folder: Path) -> None:
    import shutil

    for path in files:
        if not (folder / path.name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f".{path.name}.tmp")
            os.replace(folder / f".{path.name}.tmp", folder / path.name)


def _make_trainer(args, training_args, train_dataset, eval_dataset) -> "MultimodalDPOTrainer":
    from medst_trl import MultimodalDPOTrainer, adapter_config
    from medst_trl.policy.adapters import freeze_vision
    from medst_trl.policy.vusr import add_vusr

    from .policy_for_training import load_trainable_policy, say_what_trains

    model, processor = load_trainable_policy(args, training_args)
    if not args.train_vision:
        freeze_vision(model)
    config = None
    if args.use_lora and not hasattr(model, "peft_config"):
        config = adapter_config(
            model,
            vusr_token_id=add_vusr(processor),
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=0.0,  # DPO compares log-probabilities with and without the adapter
            vision_r=args.vision_lora_r if args.train_vision else 0,
            vision_lora_alpha=args.vision_lora_alpha,
        )
    trainer = MultimodalDPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=config,
    )
    say_what_trains(trainer, "pairs")
    return trainer


def _write_set_aside(trainer: "MultimodalDPOTrainer") -> dict[str, int]:
    """Writes `rejected.jsonl` and counts by reason."""
    from medst_trl.base.files import write_jsonl

    reasons = trainer.pairs.set_aside
    if reasons and trainer.accelerator.is_main_process:
        path = os.path.join(trainer.args.output_dir, "rejected.jsonl")
        write_jsonl(path, ({"id": key, "reason": reason, "value": ""} for key, reason in reasons.items()))
    return {reason: list(reasons.values()).count(reason) for reason in dict.fromkeys(reasons.values())}


def _figures(means: dict[str, float]) -> dict[str, float]:
    kinds = ("rewards/", "logps/", "logratios/", "lengths/", "eval_")
    return {name: value for name, value in means.items() if name in ("train_loss", "loss") or name.startswith(kinds)}


def _ending(metrics: dict[str, float]) -> str:
    """How training ended, in a sentence; nothing where nothing was logged."""
    if "logratios/chosen" not in metrics:
        return ""
    change = metrics["logratios/chosen"]
    return (
        f" At the end {metrics['rewards/accuracies']:.0%} of the pairs are ordered as the judge has them, and the "
        f"chosen answers are {'less' if change < 0 else 'more'} likely than under the reference ({change:+.2f} nats)."
    )


def _arguments() -> tuple[type, ...]:
    from medst_trl import MultimodalDPOConfig

    return DpoArguments, MultimodalDPOConfig


STAGE = STAGES.register(
    Stage(
        name="dpo",
        summary="stage 2: train the model to prefer its better answers",
        help=__doc__,
        after=("judge",),
        repeats=True,
        distributed=True,
        trains=True,
        arguments=_arguments,
        check=check,
        main=main,
        inputs=(
            Input("model_name_or_path", MODEL, sources=(("sft", ""), ("convert", ""), ("base", ""))),
            Input("base_model_name_or_path", MODEL),
            Input("dataset", "preferences", sources=(("judge", "preferences"),), split="train_split"),
        ),
        outputs=(Output("", MODEL),),
    )
)

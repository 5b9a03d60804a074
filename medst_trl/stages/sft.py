# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Stage 1: the policy learns to answer questions about an image, and to ask them.

```bash
medst sft \
    --model_name_or_path llava-hf/llava-1.5-7b-hf \
    --dataset runs/vqa_rad/prepare/instruct \
    --learning_rate 2e-4 \
    --vision_learning_rate 5e-5 \
    --projector_learning_rate 2e-5 \
    --per_device_train_batch_size 8 \
    --pack_sequences \
    --output_dir runs/vqa_rad/sft
```

Input: a dataset with columns `id`, `images`, `messages` (see `medst prepare`), and a vision-language model or an
adapter. Output: an adapter (`adapter_model.safetensors`: LoRA of language model and vision tower, projector, `<vusr>`
row) with its processor and template in `output_dir`, for [`load_policy`]; checkpoints beside it; `rejected.jsonl` if
records did not fit. Run again after a crash, it goes on from the newest complete checkpoint.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl.scripts.utils import TrlParser

    from medst_trl import SelfQuestioningConfig, SelfQuestioningTrainer


@dataclass
class SftArguments:
    """What `medst sft` needs beside the training arguments of [`SelfQuestioningConfig`]."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub id of a vision-language model, or of an adapter to train further."}
    )
    dataset: str = field(metadata={"help": "Folder or Hub id of an instruct dataset (`medst prepare` writes one)."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split for eval_strategy steps or epoch."})
    max_records: int | None = field(default=None, metadata={"help": "Train on the first so many records only."})
    use_lora: bool = field(default=True, metadata={"help": "Train one LoRA adapter; false trains every weight."})
    lora_r: int = field(default=128, metadata={"help": "LoRA rank in the language model."})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA scale in the language model."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before every LoRA layer."})
    vision_lora_r: int = field(default=32, metadata={"help": "LoRA rank in the vision tower; 0 leaves it frozen."})
    vision_lora_alpha: int = field(default=64, metadata={"help": "LoRA scale in the vision tower."})
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
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: sdpa, eager, flash_attention_2, ... Default: the model's own choice."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better eval_loss, and keep the best checkpoint."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in output_dir and start anew."}
    )


def main(args: SftArguments, training_args: "SelfQuestioningConfig") -> None:
    from medst_trl.full_disk import explain_full_disk
    from medst_trl.training.resume import resume_checkpoint
    from medst_trl.training.run_folder import load_splits, open_record, save_adapter, write_model_card

    _check(args, training_args)
    datasets = load_splits(args, training_args, "instruct")
    record = open_record(args, training_args, "sft")
    if record.status == "finished":
        return

    try:
        trainer = _make_trainer(args, training_args, datasets["train"], datasets.get("eval"))
    except Exception:
        record.forget()
        raise
    checkpoint = resume_checkpoint(training_args.output_dir, trainer.accelerator)
    with explain_full_disk(training_args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.accelerator.wait_for_everyone()
        set_aside, truncated = trainer.set_aside.write(record.output_dir), trainer.set_aside.count_truncated()
        save_adapter(trainer)
    last = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    figures = ("train_loss", "loss_question", "loss_answer", "eval_loss", "eval_loss_question", "eval_loss_answer")
    record.finish(
        counts={
            "records": len(datasets["train"]),
            "set_aside": set_aside,
            "truncated": truncated,
            "steps": trainer.state.global_step,
        },
        metrics={name: last[name] for name in figures if name in last},
    )
    write_model_card(trainer)
    trainer.accelerator.print(
        f"Stage 1 is done: {trainer.state.global_step} steps on {len(datasets['train'])} conversations"
        + "".join(f", {count} of them set aside as {reason} (rejected.jsonl)" for reason, count in set_aside.items())
        + (f", {truncated} of them cut behind an answer at max_length" if truncated else "")
        + f". Adapter and processor are in {training_args.output_dir}."
    )
    trainer.accelerator.wait_for_everyone()  # a rank that leaves while others work may abort
    trainer.end()


def _make_trainer(args, training_args, train_dataset, eval_dataset) -> "SelfQuestioningTrainer":
    from transformers import EarlyStoppingCallback

    from medst_trl import SelfQuestioningTrainer, adapter_config, load_policy
    from medst_trl.policy.vusr import add_vusr

    frozen = "float32"
    if args.use_lora and (training_args.bf16 or training_args.fp16):
        frozen = "bfloat16" if training_args.bf16 else "float16"
    model, processor = load_policy(
        args.model_name_or_path,
        base_model_name_or_path=args.base_model_name_or_path,
        dtype=args.dtype or frozen,
        is_trainable=True,
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=args.attn_implementation,
    )
    is_adapter = hasattr(model, "peft_config")
    config = None
    if args.use_lora and not is_adapter:
        config = adapter_config(
            model,
            vusr_token_id=add_vusr(processor),
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            vision_r=args.vision_lora_r,
            vision_lora_alpha=args.vision_lora_alpha,
        )
    patience = args.early_stopping_patience
    trainer = SelfQuestioningTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=config,
        callbacks=[EarlyStoppingCallback(patience)] if patience is not None else None,
    )
    counts = trainer.trainable_parameters()
    trainer.accelerator.print(
        "Training " + ", ".join(f"{part} {count:,}" for part, count in counts.items()) + " parameters."
    )
    return trainer


def _check(args: SftArguments, training_args: "SelfQuestioningConfig") -> None:
    from medst_trl.errors import UserError

    if args.early_stopping_patience is None:
        return
    if training_args.eval_strategy == "no" or not training_args.load_best_model_at_end:
        raise UserError(
            "early_stopping_patience compares evaluations and keeps the best: set eval_strategy (steps or epoch), the "
            "same save_strategy, and load_best_model_at_end: true."
        )


def make_parser(prog: str | None = None) -> "TrlParser":
    from trl.scripts.utils import TrlParser

    from medst_trl import SelfQuestioningConfig

    return TrlParser((SftArguments, SelfQuestioningConfig), prog=prog, description=__doc__)

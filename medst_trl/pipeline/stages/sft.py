# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
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

from medst_trl.pipeline.stage import MODEL, STAGES, Input, Output, Stage


if TYPE_CHECKING:
    from medst_trl import SelfQuestioningConfig, SelfQuestioningTrainer


@dataclass
class SftArguments:
    """What `medst sft` needs beside the training arguments of [`SelfQuestioningConfig`]."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub id of a vision-language model, or of an adapter to train further."}
    )
    dataset: list[str] = field(
        metadata={"help": "Folder or Hub id of an instruct dataset (`medst prepare` writes one), or several to join."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split for eval_strategy steps or epoch."})
    max_records: int | None = field(default=None, metadata={"help": "Train on the first so many records only."})
    use_lora: bool = field(default=True, metadata={"help": "Train one LoRA adapter; false trains every weight."})
    lora_r: int = field(default=128, metadata={"help": "LoRA rank in the language model; 0 leaves it frozen."})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA scale in the language model."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before every LoRA layer."})
    vision_lora_r: int = field(default=32, metadata={"help": "LoRA rank in the vision tower; 0 leaves it frozen."})
    vision_lora_alpha: int = field(default=64, metadata={"help": "LoRA scale in the vision tower."})
    train_vusr: bool = field(
        default=True,
        metadata={
            "help": "Train the embedding of <vusr> beside LoRA. False, with lora_r 0 and vision_lora_r 0: the "
            "projector alone, LLaVA's alignment step."
        },
    )
    vusr_role: str | None = field(
        default=None,
        metadata={
            "help": "text: open the turns that the model writes by the words VUSER: with their system prompt, as "
            "SQ-LLaVA and STLLaVA-Med do, in the place of the token <vusr>. Default: what the model was saved with, "
            "else the token. For models with Vicuna's chat format."
        },
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
            "help": "Conversations of a step over all processes: gradient_accumulation_steps follows from it, from "
            "per_device_train_batch_size and from the number of processes."
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

    def __post_init__(self):
        if isinstance(self.dataset, str):  # a recipe may give a single one without a list
            self.dataset = [self.dataset]


def main(args: SftArguments, training_args: "SelfQuestioningConfig") -> None:
    from medst_trl.base.files import explain_full_disk
    from medst_trl.training.batch_size import set_accumulation
    from medst_trl.training.resume import resume_checkpoint

    from .run_directory import load_splits, open_record, save_adapter, write_model_card

    check(args, training_args)
    set_accumulation(args, training_args)
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

    from medst_trl import SelfQuestioningTrainer, adapter_config
    from medst_trl.policy.vusr import add_vusr
    from medst_trl.training.continued_adapter import keep_shape

    from .policy_for_training import load_trainable_policy, say_what_trains

    model, processor = load_trainable_policy(args, training_args)
    config = None
    kept = keep_shape(args, model) if hasattr(model, "peft_config") else None
    if args.use_lora and kept is None:
        config = adapter_config(
            model,
            vusr_token_id=add_vusr(processor) if args.train_vusr else None,
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
    if kept:
        trainer.accelerator.print(kept)
    say_what_trains(trainer, "conversations")
    return trainer


def check(args: SftArguments, training_args: "SelfQuestioningConfig") -> None:
    from medst_trl.base.errors import UserError

    from .policy_for_training import check_how_it_runs

    check_how_it_runs(args, training_args)
    if args.early_stopping_patience is None:
        return
    if training_args.eval_strategy == "no" or not training_args.load_best_model_at_end:
        raise UserError(
            "early_stopping_patience compares evaluations and keeps the best: set eval_strategy (steps or epoch), the "
            "same save_strategy, and load_best_model_at_end: true."
        )


def _arguments() -> tuple[type, ...]:
    from medst_trl import SelfQuestioningConfig

    return SftArguments, SelfQuestioningConfig


STAGE = STAGES.register(
    Stage(
        name="sft",
        summary="stage 1: train a model to answer and to ask",
        help=__doc__,
        after=("prepare",),
        distributed=True,
        trains=True,
        arguments=_arguments,
        check=check,
        main=main,
        inputs=(
            Input("model_name_or_path", MODEL, sources=(("convert", ""), ("base", ""))),
            Input("base_model_name_or_path", MODEL),
            Input("dataset", "instruct", sources=(("prepare", "instruct"),), split="train_split"),
        ),
        outputs=(Output("", MODEL),),
    )
)

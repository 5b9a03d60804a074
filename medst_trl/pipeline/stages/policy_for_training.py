# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The policy as both training stages load it, what they may not ask of it together, and what they say of it."""

import os
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.training.bounds import check_bounds


if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments


def check_how_it_runs(args: Any, training_args: "TrainingArguments") -> None:
    """
    Raises:
        UserError: for a setting outside of its bounds, for `load_in_4bit` where weights of 4 bits would have to train,
            or to be divided among ranks, and for ZeRO-3 without GPUs where the token is to train.
    """
    check_bounds(args, training_args)
    plugin = training_args.deepspeed_plugin
    uses_zero_3 = plugin is not None and plugin.zero_stage == 3
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    uses_fsdp = by_accelerate or training_args.fsdp_plugin_args is not None
    if args.load_in_4bit and not args.use_lora:
        raise UserError("load_in_4bit freezes the language model, and use_lora: false trains it. Choose one of them.")
    if args.load_in_4bit and (uses_fsdp or uses_zero_3):
        raise UserError("load_in_4bit runs on one GPU, under DDP and ZeRO-2. Use multi_gpu or zero2, or leave it out.")
    if uses_zero_3 and args.use_lora and getattr(args, "train_vusr", True) and not _has_gpu():
        # PEFT (0.21) asks for the current CUDA device there, whatever the model is on.
        raise UserError(
            "ZeRO-3 trains the row of <vusr> on GPUs only. Use zero2, or in `medst sft` train_vusr: false."
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def load_trainable_policy(args: Any, training_args: "TrainingArguments") -> "tuple[PreTrainedModel, ProcessorMixin]":
    """
    The model and processor that a stage's `args` name, frozen weights in the type the training arguments compute in.

    Args:
        args ([`SftArguments`] or [`DpoArguments`]): The stage's arguments.
        training_args ([`~transformers.TrainingArguments`]): Those of its trainer.

    Raises:
        UserError: see [`load_policy`].
    """
    from medst_trl.policy.loading import load_policy

    frozen = "float32"
    if args.use_lora and (training_args.bf16 or training_args.fp16):
        frozen = "bfloat16" if training_args.bf16 else "float16"
    return load_policy(
        args.model_name_or_path,
        base_model_name_or_path=args.base_model_name_or_path,
        dtype=args.dtype or frozen,
        is_trainable=True,
        load_in_4bit=args.load_in_4bit,
        vusr_role=getattr(args, "vusr_role", None),  # stage 2 finds it in the template that stage 1 has saved
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=args.attn_implementation,
    )


def say_what_trains(trainer: "Trainer", examples: str) -> None:
    """Prints trained parameters by part, and what a step is made of, once for all processes."""
    from medst_trl.training.batch_size import division_of

    counts = trainer.trainable_parameters()
    trainer.accelerator.print(
        "Training " + ", ".join(f"{part} {count:,}" for part, count in counts.items()) + " parameters, "
        + division_of(trainer.args, examples)
    )  # fmt: skip

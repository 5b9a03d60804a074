# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the two trainers: our own and the common ones of TRL. `--help` reads them, so nothing imports torch."""

import os
from dataclasses import dataclass, field
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.processes import SHARDED, cores, launched_kind
from medst_trl.base.settings import documented


SAVE_STEPS = 0.1  # of all steps
MAX_WORKERS = 8  # with more, decoding is faster than any model here trains, and each worker holds batches in memory


def default_workers() -> int:
    """Default number of data loader workers with an accelerator: this process's share of the CPU cores, at most 8."""
    return min(MAX_WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def sharding_kind(training_args: Any) -> str:
    """How a run's processes share their work, see [`launched_kind`]; its training arguments come first."""
    if training_args.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{training_args.deepspeed_plugin.zero_stage}"
    return "FSDP" if training_args.fsdp else launched_kind()


def check_sharding(kind: str, *settings: Any) -> None:
    """
    Refuse settings that do not work if the weights are sharded.

    Args:
        kind (`str`): How the processes share their work, see [`sharding_kind`].
        *settings (dataclass): The stage's arguments and those of its trainer.
    """
    for name in ("load_in_4bit", "precompute_ref_log_probs"):
        if kind.startswith(SHARDED) and any(getattr(item, name, False) for item in settings):
            raise UserError(
                f"{name} does not work with {kind}, which shards the weights. Use zero2 or multi_gpu, or remove it."
            )


@documented
@dataclass
class TrainerSettings:
    """
    Mixin for [`~transformers.TrainingArguments`]: learning rates by part, and defaults that suit the machine.

    Args:
        vision_learning_rate (`float`, *optional*):
            Learning rate of the vision tower. Default: learning_rate. The paper's scripts: 2e-5 in stage 2.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector. Default: learning_rate. The paper's scripts: 2e-5 in stage 2.
        dataloader_num_workers (`int`, *optional*):
            Number of processes that decode and resize images in advance. Default: this process's share of the CPU
            cores, at most 8, with an accelerator; 0 without one.
        dataloader_persistent_workers (`bool`, *optional*):
            Whether to keep the workers between epochs. Default: true with an accelerator.
        save_steps (`float`, *optional*, defaults to `0.1`):
            Number of steps between checkpoints. A value below 1 is a fraction of all steps. With
            load_best_model_at_end, the default is one checkpoint after each evaluation.
        save_total_limit (`int`, *optional*):
            Number of checkpoints to keep, with the best one. Default: 2 if save_steps has its default, else all.
    """

    vision_learning_rate: float | None = None
    projector_learning_rate: float | None = None
    dataloader_num_workers: int | None = None
    dataloader_persistent_workers: bool | None = None
    save_steps: float = SAVE_STEPS
    save_total_limit: int | None = None

    def __post_init__(self):
        import torch

        from medst_trl.base.processes import backend_on_cpus

        if self.bf16 is None and not (torch.cuda.is_available() or torch.xpu.is_available()):
            self.bf16 = False  # TRL's default of True suits accelerators; on a CPU it is slow and less exact
        # Without an accelerator, workers would take cores from the model. Starting them also draws random numbers, as
        # dropout on a CPU does: with persistent workers, a resumed run, which starts them again, would differ.
        has_accelerator = torch.accelerator.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers() if has_accelerator else 0
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = has_accelerator and self.dataloader_num_workers > 0
        if not has_accelerator:
            self.dataloader_pin_memory = False  # it has no effect, and torch warns for every loader
        if self.ddp_backend is None:
            self.ddp_backend = backend_on_cpus()
        if self.save_steps == SAVE_STEPS and self.save_strategy == "steps":
            if self.save_total_limit is None:
                self.save_total_limit = 2
            if self.load_best_model_at_end and self.eval_strategy != "no":  # a checkpoint needs an evaluation
                self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.logging_steps
        if self.greater_is_better is None and "loss" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers asks for names that end in "loss", unlike loss_answer
        super().__post_init__()


@documented
@dataclass
class SelfQuestioningSettings(TrainerSettings):
    """
    Settings of [`SelfQuestioningConfig`] besides those of [`~trl.SFTConfig`].

    Args:
        restore_callback_states_from_checkpoint (`bool`, *optional*, defaults to `True`):
            Whether a resumed run restores the patience count of early stopping.
        max_length (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens per sequence, including image tokens. Longer conversations are cut after an
            answer.
        sq_ratio (`float`, *optional*, defaults to `0.5`):
            Fraction of the eligible user turns that become <vusr> turns, sampled again in each epoch. 1.0 is
            the paper's setting, 0.5 that of its released scripts.
        sq_first_turn (`bool`, *optional*, defaults to `True`):
            Whether the first user turn is eligible. A bare <vusr> after the image asks for a first question, so it
            should be, unless the image is described first, as in the paper.
        question_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the loss on question tokens, relative to answer tokens.
        pack_sequences (`bool`, *optional*, defaults to `False`):
            Pack the conversations of a batch into fewer rows without padding. Same result, faster. A model whose
            attention cannot separate conversations gets batches of similar length instead. Replaces TRL's packing and
            padding_free, which do not support images.
    """

    restore_callback_states_from_checkpoint: bool = True
    max_length: int | None = 2048
    sq_ratio: float = 0.5
    sq_first_turn: bool = True
    question_loss_weight: float = 1.0
    pack_sequences: bool = False


@documented
@dataclass
class MultimodalDPOSettings(TrainerSettings):
    """
    Settings of [`MultimodalDPOConfig`] besides those of [`~trl.DPOConfig`].

    Args:
        learning_rate (`float`, *optional*, defaults to `5e-6`):
            Peak learning rate (the paper: 5e-6).
        max_length (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens per sequence, including image tokens. Longer answers are truncated.
        beta (`float`, *optional*, defaults to `0.1`):
            Strength of the penalty that keeps the policy close to the reference.
        train_sampling_strategy (`str`, *optional*, defaults to `"group_by_length"`):
            Which pairs share a batch: `group_by_length` (pairs of similar length), `random` or `sequential`.
        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            Loss, or several losses, summed with loss_weights.
        loss_weights (`list[float]`, *optional*):
            Weight of each loss in loss_type. Default: 1 each.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Label smoothing of the losses robust and exo_pair.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Process the image and prompt of a pair once for both answers, if the model supports it. The training
            step is the same.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Compute the reference's log-probabilities of all pairs before the first step, save them for later runs
            from the same policy, and remove the reference from memory. The training step is the same.
        ref_log_probs_dir (`str`, *optional*):
            Directory of the reference's log-probabilities. Default: reference_log_probs in a local dataset's directory
            (`medst dpo`), or in output_dir.
    """

    learning_rate: float = 5e-6
    max_length: int | None = 2048
    beta: float = 0.1
    train_sampling_strategy: str = "group_by_length"
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    share_prefix: bool = True
    precompute_ref_log_probs: bool = False
    ref_log_probs_dir: str | None = None


@documented
@dataclass
class CommonTrlSettings:
    """
    The settings of TRL's configurations that most runs need: `--help` shows them without importing TRL.

    Types and defaults are those of [`~trl.SFTConfig`] and [`~trl.DPOConfig`]; a test compares them.

    Args:
        output_dir (`str`, *optional*):
            Directory for the adapter, the processor and the checkpoints.
        learning_rate (`float`, *optional*, defaults to `2e-5`):
            Peak learning rate.
        lr_scheduler_type (`str`, *optional*, defaults to `"linear"`):
            Learning rate schedule: linear, cosine, constant_with_warmup, ...
        warmup_steps (`float`, *optional*, defaults to `0`):
            Number of steps until the peak learning rate. A value below 1 is a fraction of all steps.
        num_train_epochs (`float`, *optional*, defaults to `3.0`):
            Number of epochs.
        max_steps (`int`, *optional*, defaults to `-1`):
            Number of optimizer steps; overrides num_train_epochs.
        per_device_train_batch_size (`int`, *optional*, defaults to `8`):
            Number of examples per batch on each process.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Number of batches per optimizer step on each process. Set this or effective_batch_size.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Maximum norm of the gradients (gradient clipping); 0 for none.
        bf16 (`bool`, *optional*):
            Compute in bfloat16. Default: true with an accelerator, unless fp16 is set.
        fp16 (`bool`, *optional*, defaults to `False`):
            Compute in float16.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Recompute activations in the backward pass. Needs less memory but is slower.
        logging_steps (`float`, *optional*, defaults to `10`):
            Number of steps between log lines.
        report_to (`str`, *optional*, defaults to `"none"`):
            Where to log: none, trackio, wandb, ...
        save_strategy (`str`, *optional*, defaults to `"steps"`):
            When to save checkpoints: no, steps, epoch, best (by metric_for_best_model).
        resume_from_checkpoint (`str`, *optional*):
            Checkpoint in output_dir to resume from; true for the newest one, false for none. Default: the newest one,
            if there is any.
        eval_strategy (`str`, *optional*, defaults to `"no"`):
            When to evaluate: no, steps, epoch.
        eval_steps (`float`, *optional*):
            Number of steps between evaluations. Default: logging_steps.
        load_best_model_at_end (`bool`, *optional*, defaults to `False`):
            Keep the checkpoint with the best eval_loss at the end.
        seed (`int`, *optional*, defaults to `42`):
            Seed for all random numbers in training.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Publish the adapter and its card on the Hub after training.
        hub_model_id (`str`, *optional*):
            Hub repository to publish to, OWNER/NAME.
        hub_private_repo (`bool`, *optional*):
            Whether the repository is private. Default: private.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run code from the model's repository. Use it only with models you trust.
    """

    output_dir: str | None = None
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool | None = None
    fp16: bool = False
    gradient_checkpointing: bool = True
    logging_steps: float = 10
    report_to: str | None = "none"
    save_strategy: str = "steps"
    resume_from_checkpoint: str | None = None
    eval_strategy: str = "no"
    eval_steps: float | None = None
    load_best_model_at_end: bool = False
    seed: int = 42
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    trust_remote_code: bool = False

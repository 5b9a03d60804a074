# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Stage 1: train a policy to answer questions about images, and to ask its own.

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
adapter. Output in `output_dir`: an adapter (`adapter_model.safetensors`: LoRA of the language model and the vision
tower, projector, `<vusr>` row) with its processor and chat template, checkpoints, and `rejected.jsonl` if records
could not be used. Load the adapter with `medst_trl.load_policy`. An interrupted run resumes from the newest complete
checkpoint.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.settings import documented
from medst_trl.training.settings import SelfQuestioningSettings

from ._training import LOGGED, TrainingStageArguments, describe_run, training_stage


if TYPE_CHECKING:
    from medst_trl import SelfQuestioningConfig, SelfQuestioningTrainer


@documented
@dataclass
class SftArguments(TrainingStageArguments):
    """
    Arguments of `medst sft` besides the training arguments of [`SelfQuestioningConfig`]. The class also makes
    the trainer and summarizes its run.

    Args:
        lora_dropout (`float`, *optional*, defaults to `0.05`):
            Dropout before every LoRA layer.
        train_vusr (`bool`, *optional*, defaults to `True`):
            Train the embedding of <vusr>. If it is false and lora_r and vision_lora_r are 0, only the projector is
            trained (LLaVA's alignment step).
        vusr_role (`str`, *optional*):
            How question turns start. token: with the token <vusr>. text: with the words VUSER: and a separate system
            prompt, as in SQ-LLaVA and STLLaVA-Med, for models with Vicuna's chat format. Default: what the model was
            saved with, otherwise token.
        early_stopping_patience (`int`, *optional*):
            Stop after N evaluations without a better eval_loss, and keep the best checkpoint.
    """

    best_metrics = (*LOGGED, "loss_answer", "loss_question", "answer_accuracy", "question_accuracy")

    lora_dropout: float = 0.05
    train_vusr: bool = True
    vusr_role: str | None = None
    early_stopping_patience: int | None = None

    def check(self, training_args: "SelfQuestioningConfig") -> None:
        super().check(training_args)
        if self.early_stopping_patience is not None and (
            training_args.eval_strategy == "no" or not training_args.load_best_model_at_end
        ):
            raise UserError(
                "early_stopping_patience compares evaluations and keeps the best: set eval_strategy, the same "
                "save_strategy and load_best_model_at_end: true."
            )

    def make_trainer(self, training_args: "SelfQuestioningConfig", **inputs: Any) -> "SelfQuestioningTrainer":
        from transformers import EarlyStoppingCallback

        from medst_trl import SelfQuestioningTrainer

        patience = self.early_stopping_patience
        callbacks = [EarlyStoppingCallback(patience)] if patience is not None else None
        return SelfQuestioningTrainer(args=training_args, callbacks=callbacks, **inputs)

    def summarize(
        self, trainer: "SelfQuestioningTrainer", records: int
    ) -> tuple[dict[str, Any], dict[str, float], str]:
        counts = {"records": records} | trainer.usable["train"].counts()
        last = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
        figures = ("train_loss", "loss_question", "loss_answer", "eval_loss", "eval_loss_question", "eval_loss_answer")
        summary = f"Stage 1 is done: {describe_run(trainer, 'conversations', counts)}."
        return counts, {name: last[name] for name in figures if name in last}, summary


STAGE = training_stage(
    SftArguments,
    "SelfQuestioningConfig",
    SelfQuestioningSettings,
    "instruct",
    name="sft",
    summary="stage 1: train a model to answer and to ask",
    help=__doc__,
    after=("prepare",),
    trains="conversations",
)

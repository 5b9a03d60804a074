# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Stage 1: TRL's SFTTrainer with the questions among the training targets."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length
from trl import SFTConfig, SFTTrainer

from medst_trl.base.errors import UserError
from medst_trl.policy.families import base_of

from .collator import DataCollatorForSelfQuestioning, usable_conversations
from .examples import check_has_images
from .packing import packing_cost, rope_positions
from .settings import SelfQuestioningSettings
from .trainer import PolicyTrainer, datasets_by_name
from .upstream import fused_outputs


logger = get_logger(__name__)

_OF_COLLATOR = ("max_length", "sq_ratio", "sq_first_turn", "seed", "pad_to_multiple_of")


@dataclass
class SelfQuestioningConfig(SelfQuestioningSettings, SFTConfig):
    """
    Configuration of [`SelfQuestioningTrainer`]: that of TRL's [`~trl.SFTConfig`], and the settings documented in
    [`SelfQuestioningSettings`] and [`TrainerSettings`].

    > [!NOTE]
    > Differs from [`~trl.SFTConfig`]: `max_length` defaults to `2048`,
    > `restore_callback_states_from_checkpoint` to `True`, `bf16` to `False` without an accelerator, and
    > `dataloader_num_workers` to this process's share of the CPU cores with an accelerator.
    """

    def __post_init__(self):
        if self.chat_template_path is not None:
            raise UserError(
                "chat_template_path would replace the template that opens `<vusr>` turns. Set "
                "`processor.chat_template` before you pass the processor to the trainer instead."
            )
        super().__post_init__()


class SelfQuestioningTrainer(PolicyTrainer, SFTTrainer):
    """
    Trainer of STLLaVA-Med's first stage (https://huggingface.co/papers/2406.19973): the policy learns to answer
    questions about an image and, in `<vusr>` turns, to ask them.

    Everything is TRL's [`~trl.SFTTrainer`] except the collator, the learning rates of vision tower and projector, and
    the metrics `loss_question`, `loss_answer`, `question_tokens`, `answer_tokens`, `question_accuracy` and
    `answer_accuracy`. Conversations that cannot be trained on are rejected before the first step: `rejected_records`
    has the reason of each by id (`eval/ID` in an evaluation set), and `rejected.jsonl` in `output_dir` lists them.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train: a name for [`load_policy`], or a loaded model. It gets the `<vusr>` token if it has none.
        args ([`SelfQuestioningConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Columns `messages` (or `prompt` and `completion`), `images` (with empty lists for text alone) and `id`.
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*):
            Evaluation data, with the same columns.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Processor, required with a loaded model.
        **kwargs:
            Further arguments of [`~trl.SFTTrainer`], such as `peft_config` (see [`adapter_config`]),
            `callbacks`, `data_collator`.

    Example:
    ```python
    >>> model, processor = load_policy("llava-hf/llava-1.5-7b-hf")
    >>> trainer = SelfQuestioningTrainer(
    ...     model=model,
    ...     args=SelfQuestioningConfig(output_dir="sft", learning_rate=2e-4, projector_learning_rate=2e-5),
    ...     train_dataset=dataset,
    ...     processing_class=processor,
    ...     peft_config=adapter_config(model, vusr_token_id=add_vusr(processor)),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "medst_trl", "self-questioning"]  # noqa: RUF012 (as in TRL)
    _name = "Self-questioning SFT"

    def __init__(
        self, model, args: SelfQuestioningConfig, *, train_dataset, eval_dataset=None, processing_class=None, **kwargs
    ):
        if kwargs.get("data_collator") is None:
            check_has_images(train_dataset)
        elif args.pack_sequences:
            raise UserError("pack_sequences needs the default collator. Remove pack_sequences or data_collator.")
        model, processing_class = self.load_model(model, processing_class, args)
        packing = _packing(base_of(model), args) if args.pack_sequences else None
        settings = {name: getattr(args, name) for name in _OF_COLLATOR}
        collator = kwargs.pop("data_collator", None) or DataCollatorForSelfQuestioning(
            processing_class, packing=packing, **settings
        )
        if isinstance(collator, DataCollatorForSelfQuestioning):  # what another one rejects is not known
            datasets = datasets_by_name(train_dataset, eval_dataset)
            train_dataset, eval_dataset = self.reject_examples(args, datasets, usable_conversations, collator)
        if args.train_sampling_strategy == "group_by_length" and not has_length(train_dataset):
            logger.warning("group_by_length: a stream has no lengths to group by. Training follows its order.")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )
        self.prepare_for_training()
        self._target_sums = {}

    def _run_epoch(self, *, epoch: int, **kwargs):
        if hasattr(self.data_collator, "set_epoch"):
            self.data_collator.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        # Evaluation losses of different epochs are only comparable over the same targets.
        training_collator = self.data_collator
        if hasattr(training_collator, "for_evaluation"):
            self.data_collator = training_collator.for_evaluation()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        question_mask = inputs.pop("question_mask", None)
        for name, reason in inputs.pop("rejected", {}).items():
            if reason != "nothing_to_train" or not has_length(self.train_dataset):  # else it is asked in other epochs
                logger.warning_once(f"Record {name!r} is skipped as {reason}.", main_process_only=False)
        with ExitStack() as hooks:
            outputs = hooks.enter_context(fused_outputs(model))
            if "token_mask" in inputs:
                inputs["position_ids"] = rope_positions(base_of(self.model), inputs)
                # TRL counts tokens with it. The model must not get it: it would then not separate the documents.
                inputs["attention_mask"] = inputs.pop("token_mask")
                hooks.callback(model.register_forward_pre_hook(_without_attention_mask, with_kwargs=True).remove)
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if question_mask is None or not outputs:
            return result
        fused = outputs[0]
        is_question = question_mask[:, 1:] & fused.label_mask
        self._add_to_metrics(fused, is_question)
        if self.args.question_loss_weight == 1.0:
            return result
        loss = result[0] if return_outputs else result
        loss = loss + (self.args.question_loss_weight - 1) * self._mean_loss(fused, is_question, num_items_in_batch)
        return (loss, result[1]) if return_outputs else loss

    def _mean_loss(self, fused: Any, selected: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """Negative log-likelihood of the selected tokens, scaled as TRL scales the loss over all of them."""
        tokens = fused.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -(fused.log_probs * selected).sum() / torch.as_tensor(tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _add_to_metrics(self, fused: Any, is_question: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        is_answer = fused.label_mask & ~is_question
        with torch.no_grad():
            per_kind = [
                torch.stack([-(fused.log_probs * mask).sum(), (fused.is_top1 & mask).sum(), mask.sum()]).float()
                for mask in (is_question, is_answer)
            ]
        self._target_sums[mode] = self._target_sums.get(mode, 0) + torch.cat(per_kind)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        sums = self._target_sums.pop(mode, None)
        if sums is not None:  # every rank has taken the same steps since the last log
            sums = self.accelerator.reduce(sums, "sum").tolist()
            for kind, (loss, correct, tokens) in {"question": sums[:3], "answer": sums[3:]}.items():
                logs[f"{prefix}{kind}_tokens"] = int(tokens)
                if tokens:
                    logs[f"{prefix}loss_{kind}"] = loss / tokens
                    logs[f"{prefix}{kind}_accuracy"] = correct / tokens
            name = next((name for name in logs if name.startswith("eval") and name.endswith("_loss")), None)
            if mode == "eval" and name is not None:
                # The Trainer's own mean over batches counts a batch whose rows were all rejected as a loss of zero.
                weight, tokens = self.args.question_loss_weight, sums[2] + sums[5]
                logs[name] = (weight * sums[0] + sums[3]) / max(tokens, 1)
        super().log(logs, start_time)


def _packing(model: PreTrainedModel, args: SelfQuestioningConfig) -> float | None:
    """
    Return the model's [`packing_cost`]. If rows cannot be packed, warn why, switch `args` to batches grouped by
    length, and return `None`.
    """
    cost, why = packing_cost(model)
    parallelism = args.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        cost, why = None, "context and sequence parallelism cut rows regardless of documents"
    if cost is None:
        logger.warning(f"pack_sequences: {why}. Batches are padded and grouped by length instead.")
        args.train_sampling_strategy = "group_by_length"
    return cost


def _without_attention_mask(module, args, kwargs):
    kwargs.pop("attention_mask", None)
    return args, kwargs

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Stage 1: TRL's SFTTrainer with the questions among the training targets."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import AutoProcessor, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stages.run_directory import OwnModelCard
from medst_trl.policy.adapters import retie_lm_head, train_in_full_precision
from medst_trl.policy.base_weights import write_base_file
from medst_trl.policy.loading import load_policy, prepare_policy

from .blank_images import encode_blank_images_where_needed
from .collator import DataCollatorForSelfQuestioning
from .example_images import check_has_images
from .fsdp_layers import name_fsdp_layers
from .input_pipeline import FeedsImages, InputPipelineArguments, with_stored_images
from .learning_rates import LearningRatesByPart
from .length_grouping import GroupsByLength, conversation_lengths
from .packing import packing_cost, rope_positions
from .resume import LoadsPublishedNames
from .set_aside import SetAsideExamples


logger = get_logger(__name__)


@dataclass
class SelfQuestioningConfig(InputPipelineArguments, SFTConfig):
    """
    Configuration of [`SelfQuestioningTrainer`]: TRL's [`~trl.SFTConfig`] and what self-questioning adds.

    Args:
        sq_ratio (`float`, *optional*, defaults to `0.5`):
            Share of the eligible user turns that become `<vusr>` turns, drawn anew in each epoch. `1.0` is the paper's
            setting, `0.5` that of its released scripts.
        sq_first_turn (`bool`, *optional*, defaults to `True`):
            Whether the first user turn takes part. A bare `<vusr>` behind the image asks for a first question, so it
            should, unless the image is described first, as in the paper.
        question_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the question tokens' loss beside the answer tokens'.
        vision_learning_rate (`float`, *optional*):
            Learning rate of the vision tower. Defaults to `learning_rate`.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector. Defaults to `learning_rate`.
        pack_sequences (`bool`, *optional*, defaults to `False`):
            Whether the conversations of a batch are packed into fewer rows without padding. What is learned is the
            same. A model whose attention cannot tell conversations apart gets padded batches of conversations of
            about equal length instead (`train_sampling_strategy="group_by_length"`). Takes the place of TRL's
            `packing` and `padding_free`, which know no images.

    > [!NOTE]
    > Differs from [`~trl.SFTConfig`]: `max_length` defaults to `2048` (the paper's),
    > `restore_callback_states_from_checkpoint` to `True`, `bf16` to `False` where there is no accelerator, and
    > `dataloader_num_workers` to this process's share of the CPU cores beside an accelerator.
    """

    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={"help": "Whether a resumed run goes on counting the patience of early stopping."},
    )
    max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Longest sequence in tokens, image tokens included. Longer conversations end after an answer."
        },
    )
    sq_ratio: float = field(
        default=0.5,
        metadata={"help": "Share of the eligible user turns that become <vusr> turns, drawn anew in each epoch."},
    )
    sq_first_turn: bool = field(
        default=True, metadata={"help": "Whether the first user turn can become a <vusr> turn. The paper: false."}
    )
    question_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the question tokens' loss beside the answer tokens'."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower. Default: learning_rate."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector. Default: learning_rate."}
    )

    pack_sequences: bool = field(
        default=False,
        metadata={"help": "Pack the conversations of a batch into fewer rows without padding: the same step, faster."},
    )

    def __post_init__(self):
        if self.packing or self.padding_free:
            name = "packing" if self.packing else "padding_free"
            raise UserError(f"TRL's {name} is for text alone. With images, set pack_sequences: true instead.")
        if self.bf16 is None and not (torch.cuda.is_available() or torch.xpu.is_available()):
            self.bf16 = False  # TRL's default of True suits accelerators; on a CPU it is slow and less exact
        super().__post_init__()


class SelfQuestioningTrainer(
    GroupsByLength, FeedsImages, LearningRatesByPart, LoadsPublishedNames, OwnModelCard, SFTTrainer
):
    """
    Trainer of STLLaVA-Med's first stage (https://huggingface.co/papers/2406.19973): the policy learns to answer
    questions about an image and, in `<vusr>` turns, to ask them.

    Everything is TRL's [`~trl.SFTTrainer`] but the collator, the learning rates of vision tower and projector, and the
    metrics `loss_question`, `loss_answer`, `question_tokens`, `answer_tokens`, `question_accuracy`, `answer_accuracy`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train: a name for [`load_policy`], or a loaded model. It gets the `<vusr>` token if it has none.
        args ([`SelfQuestioningConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Columns `messages`, `images` (with empty lists for text alone) and `id`.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Processor; needed with a loaded model.
        **kwargs:
            Further arguments of [`~trl.SFTTrainer`], such as `eval_dataset`, `peft_config` (see [`adapter_config`]),
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

    _tag_names = ["trl", "sft", "medst_trl", "self-questioning"]  # noqa: RUF012 (as TRL has it)
    _name = "Self-questioning SFT"

    def __init__(self, model, args: SelfQuestioningConfig, *, train_dataset, processing_class=None, **kwargs):
        if args.chat_template_path is not None:
            raise UserError(
                "chat_template_path would replace the template that opens `<vusr>` turns. Set "
                "`processor.chat_template` before the processor is given to the trainer instead."
            )
        if kwargs.get("data_collator") is None:
            check_has_images(train_dataset)
        if isinstance(model, str):
            kwargs_of_model = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            model, loaded = load_policy(model, is_trainable=True, **kwargs_of_model)
            processing_class = processing_class or loaded
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                base.config._name_or_path, trust_remote_code=args.trust_remote_code
            )
        prepare_policy(base, processing_class)
        if args.pack_sequences and kwargs.get("data_collator") is not None:
            raise UserError(
                "pack_sequences is the default collator's work: leave out pack_sequences or data_collator."
            )
        packing = _packing(base, args, train_dataset) if args.pack_sequences else None
        collator = kwargs.pop("data_collator", None) or DataCollatorForSelfQuestioning(
            processing_class,
            packing=packing,
            max_length=args.max_length,
            sq_ratio=args.sq_ratio,
            sq_first_turn=args.sq_first_turn,
            seed=args.seed,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        if args.train_sampling_strategy == "group_by_length":
            self.train_lengths = conversation_lengths(train_dataset, processing_class, args.max_length)
            if self.train_lengths is None:
                logger.warning("group_by_length: a stream has no lengths to group by. It is trained on in its order.")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )
        if hasattr(self.model, "peft_config"):
            retie_lm_head(self.model)
            zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
            if not zero3:  # TRL keeps one type there: https://github.com/huggingface/trl/issues/6089
                train_in_full_precision(self.model)
            # PEFT would store the whole embedding of an enlarged vocabulary; `load_policy` enlarges it again.
            self.model.save_pretrained = partial(self.model.save_pretrained, save_embedding_layers=False)
        name_fsdp_layers(self)
        encode_blank_images_where_needed(self, self.model)
        self.set_aside = SetAsideExamples(self.accelerator, args.max_length)
        self._target_sums = {}
        self.add_callback(self.set_aside)
        self.add_callback(_EpochOfDraws(self.data_collator))

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "id"]))

    def get_eval_dataloader(self, eval_dataset=None):
        # Evaluation losses of different epochs are only comparable over the same targets.
        training_collator = self.data_collator
        if hasattr(training_collator, "for_evaluation"):
            self.data_collator = training_collator.for_evaluation()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # A pickle that nothing reads again, and that would carry a `hub_token` given as an argument.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.args.should_save:  # every rank comes here under DDP, and the folder may not be there yet
            write_base_file(self.accelerator.unwrap_model(self.model), folder)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        question_mask = inputs.pop("question_mask", None)
        set_aside, truncated = inputs.pop("set_aside", {}), inputs.pop("truncated", ())
        if self.model.training:
            self.set_aside.add(set_aside, truncated)
        neutralised = inputs.pop("neutralised", 0)
        hooks, outputs = [], []
        # TRL keeps the per-token log-probabilities of its fused LM head to itself
        hooks.append(model.register_forward_hook(lambda module, args, output: outputs.append(output)))
        if "token_mask" in inputs:
            inputs["position_ids"] = rope_positions(self._base_model(), inputs)
            # TRL counts tokens by it; a model that saw it would not look for documents
            inputs["attention_mask"] = inputs.pop("token_mask")
            hooks.append(model.register_forward_pre_hook(_without_attention_mask, with_kwargs=True))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            for hook in hooks:
                hook.remove()
        fused = next((output for output in outputs if hasattr(output, "is_top1")), None)
        if question_mask is None or fused is None:
            return result
        is_question = question_mask[:, 1:] & fused.label_mask
        self._add_to_metrics(fused, is_question, neutralised)
        if self.args.question_loss_weight == 1.0:
            return result
        loss = result[0] if return_outputs else result
        loss = loss + (self.args.question_loss_weight - 1) * self._mean_loss(fused, is_question, num_items_in_batch)
        return (loss, result[1]) if return_outputs else loss

    def _base_model(self) -> PreTrainedModel:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _mean_loss(self, fused: Any, chosen: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """Negative log-likelihood of the chosen tokens, scaled as TRL scales the loss over all of them."""
        tokens = fused.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -(fused.log_probs * chosen).sum() / torch.as_tensor(tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _add_to_metrics(self, fused: Any, is_question: torch.Tensor, neutralised: int) -> None:
        mode = "train" if self.model.training else "eval"
        is_answer = fused.label_mask & ~is_question
        with torch.no_grad():
            per_kind = [
                torch.stack([-(fused.log_probs * chosen).sum(), (fused.is_top1 & chosen).sum(), chosen.sum()]).float()
                for chosen in (is_question, is_answer)
            ]
            sums = torch.cat([*per_kind, torch.tensor([float(neutralised)], device=per_kind[0].device)])
        self._target_sums[mode] = self._target_sums.get(mode, 0) + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        sums = self._target_sums.pop(mode, None)
        if sums is not None:  # every rank has taken the same steps since the last log
            *sums, neutralised = self.accelerator.reduce(sums, "sum").tolist()
            for kind, (loss, correct, tokens) in {"question": sums[:3], "answer": sums[3:]}.items():
                logs[f"{prefix}{kind}_tokens"] = int(tokens)
                if tokens:
                    logs[f"{prefix}loss_{kind}"] = loss / tokens
                    logs[f"{prefix}{kind}_accuracy"] = correct / tokens
            if neutralised:
                logs[f"{prefix}neutralised_tokens"] = int(neutralised)
            name = next((name for name in logs if name.startswith("eval") and name.endswith("_loss")), None)
            if mode == "eval" and name is not None:
                # The Trainer's own mean over batches counts one whose rows were all set aside as a loss of zero.
                weight, tokens = self.args.question_loss_weight, sums[2] + sums[5]
                logs[name] = (weight * sums[0] + sums[3]) / max(tokens, 1)
        if "learning_rate" in logs:
            logs |= self.learning_rates_to_log()
        super().log(logs, start_time)


def _packing(model: PreTrainedModel, args: SelfQuestioningConfig, train_dataset: Any) -> float | None:
    """The model's [`packing_cost`], or `None` and batches grouped by length, and a line that says why."""
    cost, why = packing_cost(model)
    parallelism = args.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        cost, why = None, "context and sequence parallelism cut rows regardless of documents"
    if "messages" not in next(iter(with_stored_images(train_dataset)), {"messages"}):
        cost, why = None, "prompts with completions go through TRL's collator, which packs no images"
    if cost is None:
        logger.warning(f"pack_sequences: {why}. Batches are padded and grouped by length instead.")
        args.train_sampling_strategy = "group_by_length"
    return cost


def _without_attention_mask(module, args, kwargs):
    kwargs.pop("attention_mask", None)
    return args, kwargs


class _EpochOfDraws(TrainerCallback):
    """Tells the collator the epoch; the Trainer calls this before it iterates the epoch's data loader."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.collator, "set_epoch"):
            self.collator.set_epoch(int((state.epoch or 0) + 1e-6))

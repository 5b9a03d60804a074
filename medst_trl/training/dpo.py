# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Stage 2: TRL's DPOTrainer on image conversations. The reference model is a frozen copy of the initial policy."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_bounds, check_choice, make_lists
from medst_trl.data.conform import conform, missing_columns
from medst_trl.data.overlap import with_image_ids
from medst_trl.policy.adapters import train_in_full_precision
from medst_trl.policy.families import base_of

from .examples import check_has_images
from .losses import LOSSES, TRUE_VIEW, Answers, PairLogProbs, check_losses, is_registered
from .preference_collator import DataCollatorForMultimodalPreference, usable_pairs
from .prefix_sharing import cannot_share, share_prefix
from .reference_log_probs import PrecomputesReference, hash_of_reference, sharing_weights
from .settings import MultimodalDPOSettings
from .trainer import PolicyTrainer, datasets_by_name
from .upstream import complete_reference_adapter, fused_outputs, keep_requires_grad


logger = get_logger(__name__)

SAMPLING_STRATEGIES = ("group_by_length", "random", "sequential")


@dataclass
class MultimodalDPOConfig(MultimodalDPOSettings, DPOConfig):
    """
    Configuration of [`MultimodalDPOTrainer`]: that of TRL's [`~trl.DPOConfig`], and the settings documented in
    [`MultimodalDPOSettings`] and [`TrainerSettings`].

    > [!NOTE]
    > Differs from [`~trl.DPOConfig`]: `learning_rate` defaults to `5e-6` (the paper's), `max_length` to `2048`,
    > `train_sampling_strategy` to `"group_by_length"`, and `bf16` to `False` without an accelerator.
    """

    def __post_init__(self):
        make_lists(self, "loss_type")
        check_losses(self.loss_type, self)  # TRL finds an unknown one only in the first step
        # Not batch_rebalance: it needs a column of lengths, which pairs lack.
        check_choice("train_sampling_strategy", self.train_sampling_strategy, SAMPLING_STRATEGIES)
        check_bounds(self, above={"beta": 0})
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise ValueError("precompute_ref_log_probs needs one reference for all steps; sync_ref_model changes it.")
        super().__post_init__()


class MultimodalDPOTrainer(PrecomputesReference, PolicyTrainer, DPOTrainer):
    """
    Trainer of STLLaVA-Med's second stage (https://huggingface.co/papers/2406.19973): the policy learns to prefer the
    better of its own answers about an image.

    Losses and metrics are those of TRL's [`~trl.DPOTrainer`], and losses registered in `LOSSES`. The reference is the
    policy at the start: a frozen copy of an adapter that is trained further, in all its parts (LoRA, projector,
    `<vusr>` row); the model alone under a new adapter; a copy of the whole model without an adapter. Pairs that cannot
    be used are rejected before the first step: `rejected_records` has the reason of each by id (`eval/ID` in an
    evaluation set, `eval_NAME/ID` in one of several), as has `rejected.jsonl` in `output_dir`. Further metrics are the
    mean answer `lengths/chosen` and `lengths/rejected` in tokens, and `logratios/chosen` and `logratios/rejected`, how
    much more likely the answers are than under the reference, in nats. Below zero, the chosen answers have become less
    likely too (likelihood displacement, https://huggingface.co/papers/2410.08847): the margin may grow while the model
    gets worse.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train: a name for [`load_policy`], or a loaded model or adapter (loaded with
            `is_trainable=True`).
        args ([`MultimodalDPOConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt`, `chosen`, `rejected`, `images` (with empty lists for text alone) and `id`, or pairs in
            another of TRL's forms, see [`conform`].
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*):
            Evaluation data, with the same columns.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Processor, required with a loaded model.
        **kwargs:
            Further arguments of [`~trl.DPOTrainer`], such as `ref_model`, `peft_config`, `callbacks`.

    Example:
    ```python
    >>> model, processor = load_policy("runs/demo/sft", is_trainable=True)
    >>> trainer = MultimodalDPOTrainer(
    ...     model=model,
    ...     args=MultimodalDPOConfig(output_dir="dpo", vision_learning_rate=2e-5, projector_learning_rate=2e-5),
    ...     train_dataset=load_dataset("runs/demo/judge/preferences", split="train"),
    ...     processing_class=processor,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "dpo", "medst_trl", "self-training"]  # noqa: RUF012 (as in TRL)
    _name = "Multimodal DPO"
    extra_columns = ("id", "image_ids", "weight", "probability")

    def __init__(
        self, model, args: MultimodalDPOConfig, *, train_dataset, eval_dataset=None, processing_class=None, **kwargs
    ):
        datasets = datasets_by_name(train_dataset, eval_dataset).items()
        datasets = {name: _as_pairs(dataset, name, args) for name, dataset in datasets}
        if kwargs.get("data_collator") is None:
            check_has_images(train_dataset)
        model, processing_class = self.load_model(model, processing_class, args)
        train_dataset, eval_dataset = self.reject_examples(
            args, datasets, usable_pairs, processing_class, args.max_length
        )
        shares_prefix = args.share_prefix and _can_share_prefix(model)
        collator = kwargs.pop("data_collator", None) or _default_collator(processing_class, args, shares_prefix)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        given = kwargs.pop("ref_model", None)
        precomputes = args.precompute_ref_log_probs
        reference_hash = hash_of_reference(given or model, processing_class, collator, args) if precomputes else None
        args.precompute_ref_log_probs = False  # TRL (1.16) refuses it for images: its columns would copy them
        try:
            super().__init__(
                model=model,
                ref_model=given or _make_reference(model, precomputes, kwargs.get("peft_config")),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                data_collator=collator,
                **kwargs,
            )
        finally:
            args.precompute_ref_log_probs = precomputes
        # Save only the policy's adapter: the reference equals the adapter that training starts from.
        self.prepare_for_training(self.ref_model, selected_adapters=["default"])
        if shares_prefix:
            self._share_prefix()
        self._separate_losses()
        complete_reference_adapter(self.model, trained)
        if precomputes:
            if given is None and hasattr(self.model, "peft_config"):  # the reference shares the policy's weights
                train_in_full_precision(self.ref_model)
            self.precompute_reference(reference_hash)

    def _share_prefix(self) -> None:
        for model in filter(None, (self.model, self.ref_model)):
            base = base_of(self.accelerator.unwrap_model(model))
            share_prefix(base, is_sharded=self.is_fsdp_enabled or self.is_zero_3())

    def _separate_losses(self) -> None:
        """Separate registered losses from TRL's."""
        losses = list(zip(self.loss_types, self.loss_weights, strict=True))
        self.registered_losses = [(LOSSES.get(name), weight) for name, weight in losses if is_registered(name)]
        self.loss_types = [name for name, _ in losses if not is_registered(name)]
        self.loss_weights = [weight for name, weight in losses if not is_registered(name)]

    def _compute_loss(self, model, inputs, return_outputs):
        columns = {name: inputs.pop(name, None) for name in ("weight", "probability")}
        ref = self.model if self.ref_model is None else self.ref_model
        with keep_requires_grad(self.model), fused_outputs(model) as policy_outputs, fused_outputs(ref) as ref_outputs:
            result = super()._compute_loss(model, inputs, return_outputs)
        if self.registered_losses:
            # One model can be both (an adapter): its first output is the policy's, its last the reference's.
            pairs = self._pair_log_probs(inputs, policy_outputs[0], ref_outputs[-1], **columns)
            loss = result[0] if return_outputs else result
            for registered, loss_weight in self.registered_losses:
                values = registered(pairs, self.args)
                loss = loss + (values if pairs.weight is None else values * pairs.weight).mean() * loss_weight
            result = (loss, result[1]) if return_outputs else loss
        metrics = self._metrics["train" if self.model.training else "eval"]
        lengths = self.accelerator.gather(inputs["completion_mask"].sum(1).float().chunk(2))
        for kind, length in zip(("chosen", "rejected"), lengths, strict=True):
            metrics[f"lengths/{kind}"].append(length.mean().item())
            metrics[f"logratios/{kind}"].append(metrics[f"rewards/{kind}"][-1] / self.beta)
        return result

    def _pair_log_probs(self, inputs, policy_output, ref_output, weight, probability) -> PairLogProbs:
        """The input of registered losses, from what policy and reference have returned for a batch."""
        mask = inputs["completion_mask"][:, 1:]

        def answers(outputs) -> Answers:
            return Answers(*outputs.log_probs[:, -mask.shape[1] :].sum(1).chunk(2))

        if self.precompute_ref_logps:
            reference = Answers(inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        else:
            reference = answers(ref_output)
        return PairLogProbs(
            policy={TRUE_VIEW: answers(policy_output)},
            reference={TRUE_VIEW: reference},
            lengths=Answers(*mask.sum(1).chunk(2)),
            weight=weight,
            flip_probability=None if probability is None else 1 - probability,
        )


def _default_collator(processor: Any, args: MultimodalDPOConfig, shares_prefix: bool) -> Any:
    multiple = None if args.pad_to_multiple_of == "auto" else args.pad_to_multiple_of
    return DataCollatorForMultimodalPreference(
        processor, max_length=args.max_length, pad_to_multiple_of=multiple, share_prefix=shares_prefix
    )


def _can_share_prefix(model: Any) -> bool:
    """Whether both answers of a pair can share their prompt. Logs why not."""
    obstacle = cannot_share(base_of(model))
    if obstacle is not None:
        logger.warning(f"share_prefix: the two answers of a pair are read separately, because {obstacle}.")
    return obstacle is None


def _make_reference(model: Any, precomputes: bool, peft_config: Any) -> Any:
    """The reference if none is given; `None` if it is the policy without its adapter or with the adapter `ref`."""
    if precomputes:
        return sharing_weights(model)
    if hasattr(model, "peft_config") or peft_config is not None:
        return None
    # TRL would load it from disk by name, where a row for `<vusr>` may be missing.
    return deepcopy(model).requires_grad_(False).eval()


def _as_pairs(dataset: Any, name: str, args: MultimodalDPOConfig) -> Dataset:
    """
    Convert TRL's other forms of pairs to ours, see [`conform`]. A dataset that lacks columns is left unchanged: a
    custom collator may not need them.
    """
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"{name}_dataset is of type {type(dataset).__name__}. DPO does not support streaming here, because "
            "pairs are checked before training. Give one split as a datasets.Dataset, loaded without streaming."
        )
    if not missing_columns(dataset.features, "preferences"):
        dataset = conform(dataset, "preferences")
    return with_image_ids(dataset) if args.precompute_ref_log_probs else dataset

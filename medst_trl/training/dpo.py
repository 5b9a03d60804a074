# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Stage 2: TRL's DPOTrainer on image conversations, its reference a true copy of the policy it starts from."""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import get_config_model_id

from medst_trl.base.errors import UserError, closest
from medst_trl.pipeline.stages.run_directory import OwnModelCard
from medst_trl.policy.adapters import retie_lm_head, train_in_full_precision
from medst_trl.policy.base_weights import write_base_file
from medst_trl.policy.loading import load_policy, prepare_policy

from .blank_images import encode_blank_images_where_needed
from .displacement import WarnOfDisplacement
from .example_images import check_has_images
from .fsdp_layers import name_fsdp_layers
from .input_pipeline import FeedsImages, InputPipelineArguments
from .learning_rates import LearningRatesByPart
from .length_grouping import GroupsByLength
from .preference_collator import DataCollatorForMultimodalPreference
from .prefix_sharing import PrefixSharing, cannot_share
from .reference_log_probs import (
    REFERENCE_INPUTS,
    DataCollatorWithReference,
    cache_of_reference,
    check_precompute,
    log_probs_of_reference,
    sharing_weights,
    without_precompute,
)
from .resume import LoadsPublishedNames
from .usable_pairs import check_is_dataset, usable_pairs


logger = get_logger(__name__)

# TRL finds an unknown one only in the first step, when the model is loaded.
LOSSES = {
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
}  # fmt: skip
SAMPLING_STRATEGIES = {"group_by_length", "random", "sequential"}


@dataclass
class MultimodalDPOConfig(InputPipelineArguments, DPOConfig):
    """
    Configuration of [`MultimodalDPOTrainer`]: TRL's [`~trl.DPOConfig`] and learning rates by part.

    Args:
        vision_learning_rate (`float`, *optional*):
            Learning rate of the vision tower. Defaults to `learning_rate`. The paper's scripts: 2e-5.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector. Defaults to `learning_rate`. The paper's scripts: 2e-5.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Whether image and prompt of a pair are read once for both answers, see [`PrefixSharing`]. What is learned
            is the same; models that cannot do it read them twice.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether the reference reads all pairs before the first step and is then no longer held in memory. Its
            log-probabilities are kept in a file, see [`ReferenceCache`], and later runs from the same policy take
            them from there. What is learned is the same.
        ref_log_probs_dir (`str`, *optional*):
            Folder of these files. Defaults to `reference_log_probs` in `output_dir`.

    > [!NOTE]
    > Differs from [`~trl.DPOConfig`]: `learning_rate` defaults to `5e-6` (the paper's), `max_length` to `2048`,
    > `train_sampling_strategy` to `"group_by_length"`, and `bf16` to `False` where there is no accelerator.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate (the paper: 5e-6)."})
    max_length: int | None = field(
        default=2048,
        metadata={"help": "Longest sequence in tokens, image tokens included. Longer answers are cut."},
    )
    vision_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the vision tower (the paper: 2e-5). Default: learning_rate."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector (the paper: 2e-5). Default: learning_rate."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Which pairs share a batch: `group_by_length`, pairs of about one length, "
            "`random` or `sequential`."
        },
    )
    share_prefix: bool = field(
        default=True, metadata={"help": "Read image and prompt of a pair once for both answers, where the model can."}
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Have the reference read all pairs before the first step, keep its log-probabilities in a file "
            "for later runs, and do without it in memory."
        },
    )
    ref_log_probs_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the reference's log-probabilities. Default: reference_log_probs in a local dataset's "
            "folder (`medst dpo`), or in output_dir."
        },
    )

    def __post_init__(self):
        if unknown := sorted(set(self.loss_type) - LOSSES):
            raise ValueError(f"loss_type {unknown[0]!r} is not one of {', '.join(sorted(LOSSES))}.")
        if (strategy := self.train_sampling_strategy) not in SAMPLING_STRATEGIES:
            hint = closest(strategy, SAMPLING_STRATEGIES)
            if strategy == "batch_rebalance":
                hint = " It needs a column of lengths, which pairs with images do not have; take group_by_length."
            raise ValueError(
                f"train_sampling_strategy {strategy!r} is not one of {', '.join(sorted(SAMPLING_STRATEGIES))}.{hint}"
            )
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; it has to be above 0.")
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise ValueError("precompute_ref_log_probs takes one reference for all steps; sync_ref_model changes it.")
        if self.bf16 is None and not (torch.cuda.is_available() or torch.xpu.is_available()):
            self.bf16 = False  # TRL's default of True suits accelerators; on a CPU it is slow and less exact
        super().__post_init__()


class MultimodalDPOTrainer(
    GroupsByLength, FeedsImages, LearningRatesByPart, LoadsPublishedNames, OwnModelCard, DPOTrainer
):
    """
    Trainer of STLLaVA-Med's second stage (https://huggingface.co/papers/2406.19973): the policy learns to prefer the
    better of its own answers about an image.

    Losses and metrics are those of TRL's [`~trl.DPOTrainer`]. The reference is the policy as it comes in: a frozen
    copy of a continued adapter in all its parts (LoRA, projector, `<vusr>` row), the bare model under a new adapter,
    a copy of the whole model without an adapter. Pairs that cannot be trained on are set aside before the first step
    (`pairs`). Beside TRL's metrics are logged the mean answer `lengths/chosen` and `lengths/rejected` in tokens,
    and `logratios/chosen` and `logratios/rejected`, how much likelier than under the reference the answers are, in
    nats; a warning says when the chosen answers become less likely, too (likelihood displacement).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train: a name for [`load_policy`], or a loaded model or adapter (loaded with
            `is_trainable=True`).
        args ([`MultimodalDPOConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt`, `chosen`, `rejected`, `images` (with empty lists for text alone) and `id`.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Processor; needed with a loaded model.
        **kwargs:
            Further arguments of [`~trl.DPOTrainer`], such as `ref_model`, `eval_dataset`, `peft_config`, `callbacks`.

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

    _tag_names = ["trl", "dpo", "medst_trl", "self-training"]  # noqa: RUF012 (as TRL has it)
    _name = "Multimodal DPO"

    def __init__(
        self, model, args: MultimodalDPOConfig, *, train_dataset, eval_dataset=None, processing_class=None, **kwargs
    ):
        eval_datasets = _by_name(eval_dataset)
        for name, dataset in {"train_dataset": train_dataset, **eval_datasets}.items():
            check_is_dataset(dataset, name)
        if kwargs.get("data_collator") is None:
            check_has_images(train_dataset)
        if isinstance(model, str):
            kwargs_of_model = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            model, loaded = load_policy(model, is_trainable=True, **kwargs_of_model)
            processing_class = processing_class or loaded
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                get_config_model_id(base.config), trust_remote_code=args.trust_remote_code
            )
        prepare_policy(base, processing_class)
        continues_adapter = hasattr(model, "peft_config") and kwargs.get("ref_model") is None
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if continues_adapter and not trains:
            raise UserError("The adapter is loaded for inference. Load it with load_policy(..., is_trainable=True).")
        if args.precompute_ref_log_probs:
            check_precompute(args)
            reference = kwargs.get("ref_model") or model
            kwargs["ref_model"] = kwargs.get("ref_model") or sharing_weights(model)
            continues_adapter = False
        elif not (continues_adapter or kwargs.get("ref_model") or kwargs.get("peft_config")):
            # TRL would load it from disk by name, where a row for `<vusr>` may be missing.
            kwargs["ref_model"] = deepcopy(model).requires_grad_(False).eval()
        obstacle = cannot_share(base)
        collator = kwargs.pop("data_collator", None) or DataCollatorForMultimodalPreference(
            processing_class,
            max_length=args.max_length,
            pad_to_multiple_of=_multiple(args.pad_to_multiple_of),
            share_prefix=args.share_prefix and obstacle is None,
        )
        self.pairs = usable_pairs(train_dataset, processing_class, args.max_length)
        self.train_lengths = self.pairs.lengths
        eval_pairs = {
            name: usable_pairs(dataset, processing_class, args.max_length) for name, dataset in eval_datasets.items()
        }
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: pairs.dataset for name, pairs in eval_pairs.items()}
        elif eval_pairs:
            eval_dataset = eval_pairs["eval_dataset"].dataset
        if args.precompute_ref_log_probs:
            cache = cache_of_reference(reference, processing_class, collator, args)
        with without_precompute(args):
            super().__init__(
                model=model,
                args=args,
                train_dataset=self.pairs.dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                data_collator=collator,
                **kwargs,
            )
        if hasattr(self.model, "peft_config"):
            retie_lm_head(self.model)
            if not self._is_zero_3():  # TRL keeps one type there: https://github.com/huggingface/trl/issues/6089
                train_in_full_precision(self.model)
                if args.precompute_ref_log_probs and reference is model:
                    train_in_full_precision(self.ref_model)  # its layers run over the same weights
            if continues_adapter:
                _complete_reference(self.model, trains)
            # The reference is what training starts from, so it need not be saved with each checkpoint. And PEFT would
            # store the whole embedding of an enlarged vocabulary; `load_policy` enlarges it again.
            self.model.save_pretrained = partial(
                self.model.save_pretrained, save_embedding_layers=False, selected_adapters=["default"]
            )
        name_fsdp_layers(self)
        encode_blank_images_where_needed(self, self.model, self.ref_model)
        if args.share_prefix:
            self._share_prefix(obstacle)
        self.add_callback(WarnOfDisplacement())
        if args.precompute_ref_log_probs:
            all_pairs = [self.pairs, *eval_pairs.values()]
            lengths = [length for pairs in all_pairs for length in pairs.lengths]
            log_probs = log_probs_of_reference(self, cache, [pairs.dataset for pairs in all_pairs], lengths)
            self.data_collator = DataCollatorWithReference(self.data_collator, log_probs)
            self.precompute_ref_logps, self.ref_model = True, None
            self.accelerator.free_memory()  # which holds the reference, too, and so far nothing else

    def _share_prefix(self, obstacle: str | None) -> None:
        if obstacle is not None:
            logger.warning(f"share_prefix: the two answers of a pair are read separately, because {obstacle}.")
            return
        for model in [self.model] if self.ref_model is None else [self.model, self.ref_model]:
            model = self.accelerator.unwrap_model(model)
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            PrefixSharing(base, is_sharded=self.is_fsdp_enabled or self._is_zero_3())

    def _is_zero_3(self) -> bool:
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "id"]))

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # A pickle that nothing reads again, and that would carry a `hub_token` given as an argument.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.args.should_save:  # every rank comes here under DDP, and the folder may not be there yet
            write_base_file(self.accelerator.unwrap_model(self.model), folder)

    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        for name in REFERENCE_INPUTS & inputs.keys():
            # Under DeepSpeed the Trainer casts what is not an integer to the model's type; in bfloat16 -129.4 is -129.
            prepared[name] = inputs[name].to(self.args.device)
        return prepared

    def _compute_loss(self, model, inputs, return_outputs):
        inputs.pop("neutralised", None)
        # TRL switches to the reference adapter and back, after which PEFT (0.21) lets all of the policy's adapter
        # train: a frozen vision tower would take part in the gradient norm, and gradient checkpointing would fail.
        trains = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        result = super()._compute_loss(model, inputs, return_outputs)
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)
        metrics = self._metrics["train" if self.model.training else "eval"]
        lengths = self.accelerator.gather(inputs["completion_mask"].sum(1).float().chunk(2))
        for kind, length in zip(("chosen", "rejected"), lengths, strict=True):
            metrics[f"lengths/{kind}"].append(length.mean().item())
            metrics[f"logratios/{kind}"].append(metrics[f"rewards/{kind}"][-1] / self.beta)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:
            logs |= self.learning_rates_to_log()
        super().log(logs, start_time)


def _complete_reference(model: torch.nn.Module, trains: set[str]) -> None:
    """
    Makes the adapter `ref` a frozen copy of `default` in all its parts, and lets only what is in `trains` train.

    TRL (1.16) copies parameters with `.default.` in their name, which leaves out the trained token row, whose name
    ends in `.default`: the reference would not be the policy. Adding an adapter also unfreezes all of `default`. To be
    removed once TRL copies those, too.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "default" in parts:
            reference = parameters[".".join("ref" if part == "default" else part for part in parts)]
            reference.data = parameter.data.clone()
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trains)


def _by_name(eval_dataset: Any) -> dict[str, Any]:
    """The evaluation sets, of which there may be none or, as a `dict`, several."""
    if isinstance(eval_dataset, dict):
        return eval_dataset
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def _multiple(pad_to_multiple_of: int | str | None) -> int | None:
    return None if pad_to_multiple_of == "auto" else pad_to_multiple_of

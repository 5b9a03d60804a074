# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Workarounds for TRL, PEFT, transformers and accelerate, each with its issue and what removes it.

"No issue known" means that we found none; the versions are those in which we saw the behavior. Three more are where
they act: what a trainer must not do under ZeRO-3 (https://github.com/huggingface/trl/issues/6089) in `trainer.py`,
PEFT's wrapper of a tied output layer in `policy/adapters.py`, and accelerate's view of DeepSpeed on CPUs in
`base/processes.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import Trainer
    from trl import DPOConfig

# Float inputs that the loss compares with log-probabilities, as TRL calls them.
FULL_PRECISION_INPUTS = frozenset({"ref_chosen_logps", "ref_rejected_logps", "weight", "probability"})


class LoadsPublishedNames:
    """Mixin for a [`~transformers.Trainer`] that resumes a model trained in all its weights."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """
        Translate the weights' names. Checkpoints keep weights under their published names, and the Trainer
        (transformers 5.23) does not translate them back: it warns of missing keys and continues from the weights the
        model came with. To be removed with https://github.com/huggingface/transformers/issues/43701.
        """
        model = model or self.model
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or hasattr(model, "peft_config"):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype).state_dict())


class UpstreamFixes(LoadsPublishedNames):
    """Mixin for TRL's trainers on images."""

    def _prepare_inputs(self, inputs):
        """
        Keep log-probabilities in float32. Under DeepSpeed the Trainer (transformers 5.23) casts what is not an integer
        to the model's type, and in bfloat16 -129.4 is -129. No issue known; to be removed once it casts pixels only.
        """
        prepared = super()._prepare_inputs(inputs)
        for name in FULL_PRECISION_INPUTS & inputs.keys():
            prepared[name] = inputs[name].to(self.args.device)
        return prepared

    def _save(self, output_dir=None, state_dict=None):
        """
        Leave out `training_args.bin`, a pickle that nothing reads again and that would hold a `hub_token` given as an
        argument (transformers 5.23). No issue known.
        """
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args, **kwargs):
        """Write no card: TRL's (1.16) shows a text pipeline. The stages write one for an image model."""


@contextmanager
def fused_outputs(module: "torch.nn.Module") -> Iterator[list[Any]]:
    """
    Collect what TRL's fused LM head returns inside the block, in order. The trainers (TRL 1.16) keep these per-token
    log-probabilities to themselves. No issue known.
    """
    outputs: list[Any] = []

    def note(module, args, output):
        if hasattr(output, "is_top1"):
            outputs.append(output)

    hook = module.register_forward_hook(note)
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def without_precompute(args: "DPOConfig") -> Iterator[None]:
    """
    Switch `precompute_ref_log_probs` off inside the block: TRL (1.16) refuses it for images, because it keeps the
    numbers as columns of a dataset that it would have to copy. To be removed once it accepts it, see
    https://github.com/huggingface/trl/pull/5867.
    """
    asked, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
    try:
        yield
    finally:
        args.precompute_ref_log_probs = asked


def complete_reference_adapter(model: "PeftModel", trains: set[str]) -> None:
    """
    Make the adapter `ref` a frozen copy of `default` in all its parts, and let only the parameters `trains` train.

    TRL (1.16) copies parameters with `.default.` in their name. That leaves out the trained token row, whose name ends
    in `.default`, so that the reference would not be the policy. Adding an adapter also unfreezes all of `default`
    (https://github.com/huggingface/peft/issues/3487, PEFT 0.21). No TRL issue known; to be removed once TRL copies it.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "default" in parts:
            reference = parameters[".".join("ref" if part == "default" else part for part in parts)]
            reference.data = parameter.data.clone()
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trains)


@contextmanager
def keep_requires_grad(model: "torch.nn.Module") -> Iterator[None]:
    """
    Restore after the block which parameters train.

    TRL switches to the reference adapter and back, after which PEFT (0.21) lets all of the policy's adapter train: a
    frozen vision tower would contribute to the gradient norm, and gradient checkpointing would fail. To be removed
    with https://github.com/huggingface/peft/issues/3447.
    """
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, requires_grad in trains:
        parameter.requires_grad_(requires_grad)


def name_fsdp_layers(trainer: "Trainer") -> None:
    """
    Name the layers that FSDP shards one by one, unless the accelerate configuration does, in place.

    accelerate (1.15) takes the model's `_no_split_modules` and fails if the model has no such layer: LLaVA's also name
    the text embeddings of CLIP (transformers 5.23). To be removed with
    https://github.com/huggingface/accelerate/issues/2947.
    """
    if not trainer.is_fsdp_enabled:
        return
    from accelerate.utils.dataclasses import get_module_class_from_name

    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        names = sorted(trainer.model._no_split_modules or ())
        plugin.transformer_cls_names_to_wrap = [n for n in names if get_module_class_from_name(trainer.model, n)]

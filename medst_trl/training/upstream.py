# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Workarounds for TRL, PEFT, transformers and accelerate, each with its issue and what removes it.

"No issue known" means that we found none; the versions are those in which we saw the behavior. Some are elsewhere, at
the one place where they act:

- `dpo.py`: TRL refuses `precompute_ref_log_probs` for images (https://github.com/huggingface/trl/pull/5867)
- `trainer.py`: what a trainer must not do under ZeRO-3 (https://github.com/huggingface/trl/issues/6089)
- `trainer.py`: a sampler that knows its epoch (https://github.com/modelscope/ms-swift/pull/9658)
- `examples.py`: `datasets` decodes the first image of a list twice
- `encoding.py`: Idefics3 makes tensors of replacement offsets
- `policy/adapters.py`: PEFT's wrapper of a tied output layer, and tensors that PEFT leaves out silently
- `policy/loading.py`: transformers 5 forgets the commit of a model
- `pipeline/stages/_training.py`: PEFT needs a CUDA device for trained tokens under ZeRO-3
- `pipeline/stage.py`: warnings about names that transformers has deprecated
- `base/processes.py`: accelerate's view of DeepSpeed on CPUs; gloo's threads at exit
  (https://github.com/pytorch/pytorch/pull/179291); the process group in DeepSpeed's default arguments
- `pipeline/launch.py`: options that accelerate ignores silently
- `cli.py`: bitsandbytes' advice in its log
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from peft import PeftModel
from PIL import Image
from torch.utils._pytree import tree_leaves
from transformers import EarlyStoppingCallback, PreTrainedModel, ProcessorMixin, Trainer, TrainerState

from medst_trl.policy.families import model_parts


BLANK_SIDE = 64  # pixels; processors that resize images need no more

# Float inputs that the loss compares with log-probabilities, as TRL calls them.
FULL_PRECISION_INPUTS = frozenset({"ref_chosen_logps", "ref_rejected_logps", "weight", "probability"})


class ResumesExactly:
    """Mixin for a [`~transformers.Trainer`] whose resumed run ends as an uninterrupted one."""

    def _init_training_state(self, max_steps, *args):
        """
        Replace fractions of the run in `logging_steps`, `eval_steps` and `save_steps` by numbers of steps. The Trainer
        (transformers 5.23) compares fractions with the numbers in a checkpoint and warns. No issue known.
        """
        TrainerState.compute_steps(self.args, self.args, max_steps)
        return super()._init_training_state(max_steps, *args)

    def _run_epoch(self, **kwargs):
        """
        Train no further after the last step. The Trainer (transformers 5.23) looks for the end of training only after
        a step, so a run that was killed after its last checkpoint would take one more. No issue known.
        """
        early = [item for item in self.callback_handler.callbacks if isinstance(item, EarlyStoppingCallback)]
        if self.state.global_step >= self.state.max_steps or any(
            item.early_stopping_patience_counter >= item.early_stopping_patience for item in early
        ):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

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


class UpstreamFixes(ResumesExactly):
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
def fused_outputs(module: torch.nn.Module) -> Iterator[list[Any]]:
    """
    Collect what TRL's fused LM head returns inside the block, in order. The trainers (TRL 1.16) keep these per-token
    log-probabilities to themselves. No issue known.
    """
    outputs: list[Any] = []

    def note(module, args, output):
        if hasattr(output, "is_top1"):
            outputs.append(output)

    with module.register_forward_hook(note):
        yield outputs


def complete_reference_adapter(model: PreTrainedModel | PeftModel, trains: set[str]) -> None:
    """
    Make the adapter `ref`, if there is one, a frozen copy of `default` in all its parts, and let only the parameters
    `trains` train.

    TRL (1.16) copies parameters with `.default.` in their name. That leaves out the trained token row, whose name ends
    in `.default`, so that the reference would not be the policy. Adding an adapter also unfreezes all of `default`
    (https://github.com/huggingface/peft/issues/3487, PEFT 0.21). No TRL issue known; to be removed once TRL copies it.
    """
    if "ref" not in getattr(model, "peft_config", ()):
        return
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "default" in parts:
            reference = parameters[".".join("ref" if part == "default" else part for part in parts)]
            reference.data = parameter.data.clone()
        parameter.requires_grad_(name in trains)


@contextmanager
def keep_requires_grad(model: torch.nn.Module) -> Iterator[None]:
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


def name_fsdp_layers(trainer: Trainer) -> None:
    """
    Name the layers that FSDP shards one by one, unless the accelerate configuration does, in place.

    accelerate (1.15) takes the model's `_no_split_modules` and fails if the model has no such layer: LLaVA's also name
    the text embeddings of CLIP (transformers 5.23). To be removed with
    https://github.com/huggingface/accelerate/issues/2947.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        names = sorted(trainer.model._no_split_modules or ())
        plugin.transformer_cls_names_to_wrap = [n for n in names if get_module_class_from_name(trainer.model, n)]


def encode_blank_images(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """
    Make a model encode a blank image whenever it runs without one, in place. Its outputs stay the same.

    DeepSpeed and FSDP exchange gradients, and ZeRO-3 and FSDP weights, in the order in which layers run. A rank whose
    batch is text alone would skip the vision tower: the ranks then wait for each other forever, or add up gradients of
    different layers (https://github.com/hiyouga/LLaMA-Factory/issues/5616). So that rank encodes a blank image and
    adds nothing of it to its tokens: every trained weight has a gradient, which is zero there.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language model, not wrapped by PEFT. One that reads images by cross-attention, without
            `get_image_features`, is left as it is.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
    """
    backbone = model.base_model
    if not hasattr(backbone, "get_image_features"):
        return
    parts = model_parts(model)
    decoder, tower = model.get_submodule(parts.language_model), model.get_submodule(parts.vision_tower)
    pixels = processor.image_processor(images=[Image.new("RGB", (BLANK_SIDE, BLANK_SIDE))], return_tensors="pt")
    pixels = {name: pixels[name] for name in signature(backbone.get_image_features).parameters if name in pixels}
    runs = []  # of the vision tower since the backbone began

    def add_nothing(module, args, kwargs):
        if runs or kwargs.get("inputs_embeds") is None:
            return None
        embeddings, dtype = kwargs["inputs_embeds"], next(tower.parameters()).dtype
        blank = {
            name: value.to(embeddings.device, dtype if value.is_floating_point() else None)
            for name, value in pixels.items()
        }
        features = backbone.get_image_features(**blank, return_dict=True)
        layers = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
        nothing = sum((rows.float() * 0).sum() for rows in tree_leaves(layers))  # one, or one per image or layer
        return args, {**kwargs, "inputs_embeds": embeddings + nothing.to(embeddings.dtype)}

    backbone.register_forward_pre_hook(lambda module, args: runs.clear())
    tower.register_forward_pre_hook(lambda module, args: runs.append(True))
    # Before the decoder, where images are encoded otherwise, so that every rank runs its layers in one order.
    decoder.register_forward_pre_hook(add_nothing, with_kwargs=True)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches without an image on a rank whose peers have some.

DeepSpeed and FSDP exchange gradients, and ZeRO-3 and FSDP weights, in the order in which layers run. A rank whose
batch is text alone would leave the vision tower out: the ranks then wait for each other for ever, or add up gradients
of different layers (https://github.com/hiyouga/LLaMA-Factory/issues/5616). So that rank encodes a blank image, and
adds nothing of it to its tokens: every trained weight has a gradient, which is zero there.
"""

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from medst_trl.policy.parts import model_parts


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin, Trainer

SIDE = 64  # pixels; processors that resize images need no more


def encode_blank_images_where_needed(trainer: "Trainer", *models: Any) -> None:
    """
    Has models run their vision tower in every batch, if the trainer's ranks would part otherwise, in place.

    DDP that looks for unused parameters (TRL's default with images) is left alone: it exchanges zeros by itself.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer with an accelerator.
        *models ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `None`):
            What it runs: the policy and, where it is a model of its own, the reference.
    """
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if trainer.accelerator.num_processes == 1 or not (sharded or trainer.args.ddp_find_unused_parameters is False):
        return
    for model in models:
        if model is not None:
            model = trainer.accelerator.unwrap_model(model)
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            encode_blank_images(base, trainer.processing_class)


def encode_blank_images(model: "PreTrainedModel", processor: "ProcessorMixin") -> None:
    """
    Has a model encode a blank image whenever it runs without one, in place. Its outputs stay the same.

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
    pixels = processor.image_processor(images=[Image.new("RGB", (SIDE, SIDE))], return_tensors="pt")
    wanted = [name for name in inspect.signature(backbone.get_image_features).parameters if name in pixels]
    has_run = False

    def begin(module, args):
        nonlocal has_run
        has_run = False

    def note(module, args):
        nonlocal has_run
        has_run = True

    def add_nothing(module, args, kwargs):
        if has_run or kwargs.get("inputs_embeds") is None:
            return None
        embeddings, dtype = kwargs["inputs_embeds"], next(tower.parameters()).dtype
        blank = {name: _like(pixels[name], embeddings.device, dtype) for name in wanted}
        features = backbone.get_image_features(**blank, return_dict=True)
        layers = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
        nothing = sum((rows.float() * 0).sum() for rows in _tensors(layers))
        return args, {**kwargs, "inputs_embeds": embeddings + nothing.to(embeddings.dtype)}

    backbone.register_forward_pre_hook(begin)
    tower.register_forward_pre_hook(note)
    # In front of the decoder, where images are encoded otherwise, so that every rank runs its layers in one order.
    decoder.register_forward_pre_hook(add_nothing, with_kwargs=True)


def _like(value: "torch.Tensor", device: "torch.device", dtype: "torch.dtype") -> "torch.Tensor":
    return value.to(device, dtype if value.is_floating_point() else None)


def _tensors(features: Any) -> "Iterator[torch.Tensor]":
    """Families give one tensor, or one for each image or layer."""
    if isinstance(features, list | tuple):
        for item in features:
            yield from _tensors(item)
    else:
        yield features

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
One LoRA adapter for everything stage 1 trains: language model, vision tower, projector and the `<vusr>` embedding.
"""

import re
from typing import TYPE_CHECKING

from .parts import model_parts


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def adapter_config(
    model: "PreTrainedModel",
    *,
    vusr_token_id: int | None = None,
    r: int = 128,
    lora_alpha: int = 256,
    lora_dropout: float = 0.05,
    vision_r: int = 32,
    vision_lora_alpha: int = 64,
) -> "LoraConfig":
    """
    LoRA configuration of STLLaVA-Med (https://huggingface.co/papers/2406.19973) for any vision-language model.

    One adapter holds LoRA on every linear layer of the language model and of the vision tower (at its own rank), the
    projector in full, and the input embedding of `<vusr>`. Vision layers whose output is not read stay untouched:
    LLaVA reads the last but one, so the last would never receive a gradient (trl#1936).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language model to adapt.
        vusr_token_id (`int`, *optional*):
            Token id of `<vusr>`, as [`add_vusr`] returns it. `None` trains no token.
        r (`int`, *optional*, defaults to `128`):
            Rank in the language model; `0` leaves it frozen. With `vision_r=0` and no `vusr_token_id` the projector
            alone trains, LLaVA's alignment step.
        lora_alpha (`int`, *optional*, defaults to `256`):
            Scale in the language model.
        lora_dropout (`float`, *optional*, defaults to `0.05`):
            Dropout before every LoRA layer.
        vision_r (`int`, *optional*, defaults to `32`):
            Rank in the vision tower; `0` leaves it frozen.
        vision_lora_alpha (`int`, *optional*, defaults to `64`):
            Scale in the vision tower.

    Returns:
        [`~peft.LoraConfig`]

    Example:
    ```python
    >>> model, processor = load_policy("llava-hf/llava-1.5-7b-hf")
    >>> config = adapter_config(model, vusr_token_id=add_vusr(processor))
    ```
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES  # PEFT's own name for an adapter without LoRA layers

    parts = model_parts(model)
    towers = ([parts.language_model] if r else []) + ([parts.vision_tower] if vision_r else [])
    targets = _linear_layers(model, towers, parts.projectors) if towers else DUMMY_TARGET_MODULES
    unused = [
        rf"{re.escape(parts.vision_tower)}\..*layers?\.{layer}\..*" for layer in parts.unused_vision_layers if vision_r
    ]
    vision_pattern = rf"{re.escape(parts.vision_tower)}\..*"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r or vision_r or 1,  # of no layer where it is 0, but PEFT takes no 0
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        exclude_modules="|".join(unused) or None,
        rank_pattern={vision_pattern: vision_r} if vision_r else {},
        alpha_pattern={vision_pattern: vision_lora_alpha} if vision_r else {},
        modules_to_save=list(parts.projectors),
        trainable_token_indices=None if vusr_token_id is None else {parts.embedding: [vusr_token_id]},
    )


def _linear_layers(model: "PreTrainedModel", towers: list[str], projectors: tuple[str, ...]) -> str:
    """
    A regular expression over the names of the linear layers in `towers`, layer numbers left open.

    Only layers in a numbered stack count: SigLIP's pooling head stands outside it, and no language model reads its
    output.
    """
    from torch import nn

    names = {
        re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and re.search(r"\.\d+\.", name)
        and any(name.startswith(f"{tower}.") for tower in towers)
        and not any(f"{name}.".startswith(f"{projector}.") for projector in projectors)
    }
    return "|".join(sorted(names))


def train_in_full_precision(model: "PeftModel") -> None:
    """
    Keeps every trained weight of an adapter in float32, in place, whatever the type of the base model.

    PEFT does so for LoRA weights and token rows but not for modules trained in full: a projector in bfloat16 hardly
    moves at a learning rate of 2e-5, since most steps are smaller than the distance to the next bfloat16 number. Its
    inputs are cast, so that it also runs outside of autocast.

    Args:
        model ([`~peft.PeftModel`]):
            Model to train.
    """
    import torch
    from peft.utils.other import ModulesToSaveWrapper

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()

    def as_weights(module, args):
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                module.register_forward_pre_hook(as_weights)


def freeze_vision(model: "PreTrainedModel | PeftModel") -> None:
    """Keeps the vision tower, an adapter's part in it included, from training, in place."""
    parts = model_parts(model.get_base_model() if hasattr(model, "get_base_model") else model)
    for name, parameter in model.named_parameters():
        if parts.part_of(name) == "vision":
            parameter.requires_grad_(False)


def mend_tied_head(model: "PeftModel") -> None:
    """
    Lets TRL's fused LM head read the output layer of a model with tied embeddings and a trained token, in place.

    PEFT then wraps the output layer too, and the wrapper passes on `weight` but not `bias`, which the fused head asks
    for (peft 0.21, `TrainableTokensWrapper`). To be removed once PEFT passes `bias` on.
    """
    from peft.utils.other import TrainableTokensWrapper

    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and not hasattr(head, "bias"):
        head.bias = head.original_module.bias if hasattr(head.original_module, "bias") else None

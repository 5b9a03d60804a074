# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Formulas for the operations of a training step and of generation, from which the floor of a time follows.

A multiplication and an addition are two operations. A weight matrix costs two operations per weight and token, and
attention four per query, key and channel, with all keys, as in dense attention. Norms, softmax and rotations are
ignored. A test compares the formulas with `torch.utils.flop_counter`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medst_trl.policy.families import model_parts


if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Layout:
    """
    Input sizes of a forward pass.

    Args:
        images (`int`): Number of images that the vision tower encodes.
        lengths (`Sequence[int]`): Number of tokens of each sequence of the language model, padding included.
        scored (`int`): Number of tokens for which the output layer is computed.
    """

    images: int
    lengths: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters in the weight matrices of each part: all, and the trained ones."""

    all: dict[str, int]
    trained: dict[str, int]


def weights_of(model: "nn.Module", with_adapter: bool = True) -> Weights:
    """
    Count the weights of a model.

    Args:
        model (`nn.Module`): LLaVA-like vision-language model, or a PEFT model of one.
        with_adapter (`bool`): Whether to count the adapter. A reference with a disabled adapter has none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = model_parts(base)
    all_weights, trained = dict.fromkeys(_PARTS, 0), dict.fromkeys(_PARTS, 0)
    for name, parameter in model.named_parameters():
        saved_twice = ".original_module." in name if with_adapter else ".modules_to_save." in name
        adapter = re.search(r"\.lora_[AB]\.", name)
        table = "embed_tokens" in name or "position_embedding" in name
        if parameter.ndim < 2 or table or saved_twice:
            continue
        if (adapter and not with_adapter) or ".ref." in name:
            continue
        part = "patches" if "patch_embedding" in name else "head" if "lm_head" in name else parts.part_of(name)
        layer = re.search(r"layers\.(\d+)\.", name)
        if part == "vision" and layer and int(layer[1]) in parts.unused_vision_layers:
            part = "unused vision"
        all_weights[part] += parameter.numel()
        trained[part] += parameter.numel() if parameter.requires_grad else 0
    return Weights(all_weights, trained)


_PARTS = ("patches", "vision", "unused vision", "projector", "language", "head")


def _tokens(config, layout: Layout) -> dict[str, int]:
    patches = layout.images * (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return {
        "patches": patches,
        "vision": patches + layout.images,  # with the class token
        "unused vision": patches + layout.images,  # computed, but without a gradient
        "projector": patches,
        "language": sum(layout.lengths),
        "head": layout.scored,
    }


def attention(config, layout: Layout) -> dict[str, int]:
    """Return the operations of attention in a forward pass, by part."""
    vision, text = config.vision_config, config.text_config
    side = (vision.image_size // vision.patch_size) ** 2 + 1
    layer = 4 * vision.hidden_size * layout.images * side**2
    unused = len(_unused_layers(config))
    language = 4 * text.num_hidden_layers * text.hidden_size * sum(length**2 for length in layout.lengths)
    return {
        "vision": (vision.num_hidden_layers - unused) * layer, "unused vision": unused * layer, "language": language
    }  # fmt: skip


def _unused_layers(config) -> range:
    """Return the layers of the vision tower after the one whose features are used."""
    count, read = config.vision_config.num_hidden_layers, config.vision_feature_layer
    return range(read if read >= 0 else count + 1 + read, count)


def forward(config, weights: Weights, layout: Layout) -> int:
    """Return the operations of a forward pass."""
    tokens = _tokens(config, layout)
    return 2 * sum(tokens[part] * weights.all[part] for part in _PARTS) + sum(attention(config, layout).values())


def training(config, weights: Weights, layout: Layout) -> int:
    """
    Return the operations of a forward and backward pass. The backward pass computes the gradients of the inputs and of
    the trained weights, each with as many operations as the forward pass; for attention, it has twice as many.
    """
    tokens, attended = _tokens(config, layout), attention(config, layout)
    # Pixels need no gradient, and unused layers get none.
    through = 2 * sum(tokens[part] * weights.all[part] for part in ("vision", "projector", "language", "head"))
    trained = 2 * sum(tokens[part] * weights.trained[part] for part in _PARTS if part != "unused vision")
    back = through + trained + 2 * (attended["vision"] + attended["language"])
    return forward(config, weights, layout) + back


def recomputed(config, weights: Weights, layout: Layout, gradient_checkpointing: bool) -> int:
    """
    Return the operations that the backward pass recomputes: always the attention scores and the output layer, and all
    layers with gradient checkpointing.
    """
    attended = attention(config, layout)
    scores = (attended["vision"] + attended["language"]) // 2
    head = 2 * layout.scored * weights.all["head"]
    if not gradient_checkpointing:
        return scores + head
    return scores + forward(config, weights, layout)


def fewer_operations(stock_needed: float, stock_executed: float, needed: float, executed: float) -> str:
    """Describe the ratio of stock's operations to those of a variant, which is the speedup at equal rates."""
    return (
        f"operations of stock over these: {stock_needed / needed:.2f} needed, {stock_executed / executed:.2f} executed"
    )


def decoding_bytes(config, weights: Weights, bytes_per_value: int, batch: int, context: int) -> int:
    """Return the bytes that a decoding step reads: the weights of language model and output layer, and the cache."""
    text = config.text_config
    key_value_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * key_value_heads * head_size * context * batch
    return bytes_per_value * (weights.all["language"] + weights.all["head"] + cache)

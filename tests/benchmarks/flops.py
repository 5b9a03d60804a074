# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Operations of a training step and of generation, by formula: the floor under a time.

A multiplication and an addition are two operations. Every weight matrix costs two for each token it reads; attention
costs four for each query, key and channel, all keys counted, as dense attention computes them. The rest (norms,
softmax, rotations) is left out. `torch.utils.flop_counter` counts the same, which a test looks at.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medst_trl.policy.parts import model_parts


if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Layout:
    """
    What goes through the model at once.

    Args:
        images (`int`): Images through the vision tower.
        lengths (`Sequence[int]`): Tokens of each sequence the language model attends over, padding included.
        scored (`int`): Tokens for which the output layer is computed.
    """

    images: int
    lengths: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Weights:
    """Numbers in the weight matrices that a token meets, by part, all and those trained."""

    all: dict[str, int]
    trained: dict[str, int]


def weights_of(model: "nn.Module", with_adapter: bool = True) -> Weights:
    """
    Args:
        model (`nn.Module`): Vision-language model of LLaVA's kind, or a PEFT model of one.
        with_adapter (`bool`): Whether an adapter counts; a reference with its adapter switched off has none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = model_parts(base)
    every, trained = dict.fromkeys(_PARTS, 0), dict.fromkeys(_PARTS, 0)
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
        every[part] += parameter.numel()
        trained[part] += parameter.numel() if parameter.requires_grad else 0
    return Weights(every, trained)


_PARTS = ("patches", "vision", "unused vision", "projector", "language", "head")


def _tokens(config, layout: Layout) -> dict[str, int]:
    patches = layout.images * (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return {
        "patches": patches,
        "vision": patches + layout.images,  # and the class token
        "unused vision": patches + layout.images,  # computed all the same, without a gradient
        "projector": patches,
        "language": sum(layout.lengths),
        "head": layout.scored,
    }


def attention(config, layout: Layout) -> dict[str, int]:
    """Operations of attention, forward, by part."""
    vision, text = config.vision_config, config.text_config
    side = (vision.image_size // vision.patch_size) ** 2 + 1
    layer = 4 * vision.hidden_size * layout.images * side**2
    unused = len(_unused_layers(config))
    language = 4 * text.num_hidden_layers * text.hidden_size * sum(length**2 for length in layout.lengths)
    return {
        "vision": (vision.num_hidden_layers - unused) * layer, "unused vision": unused * layer, "language": language
    }  # fmt: skip


def _unused_layers(config) -> range:
    """Layers of the vision tower behind the one whose features are read."""
    count, read = config.vision_config.num_hidden_layers, config.vision_feature_layer
    return range(read if read >= 0 else count + 1 + read, count)


def forward(config, weights: Weights, layout: Layout) -> int:
    """Operations of a forward pass."""
    tokens = _tokens(config, layout)
    return 2 * sum(tokens[part] * weights.all[part] for part in _PARTS) + sum(attention(config, layout).values())


def training(config, weights: Weights, layout: Layout) -> int:
    """
    Operations of forward and backward: once more for the gradient of each layer's input, and once more for that of
    each weight that is trained. Attention has two products back for each forward.
    """
    tokens, attended = _tokens(config, layout), attention(config, layout)
    # Pixels need no gradient, and what nothing is read from gets none.
    through = 2 * sum(tokens[part] * weights.all[part] for part in ("vision", "projector", "language", "head"))
    trained = 2 * sum(tokens[part] * weights.trained[part] for part in _PARTS if part != "unused vision")
    back = through + trained + 2 * (attended["vision"] + attended["language"])
    return forward(config, weights, layout) + back


def computed_again(config, weights: Weights, layout: Layout, gradient_checkpointing: bool) -> int:
    """
    What is computed a second time for the backward pass: always the scores of attention and the output layer, and
    under gradient checkpointing all layers.
    """
    attended = attention(config, layout)
    scores = (attended["vision"] + attended["language"]) // 2
    head = 2 * layout.scored * weights.all["head"]
    if not gradient_checkpointing:
        return scores + head
    return scores + forward(config, weights, layout)


def fewer_operations(stock_needed: float, stock_executed: float, needed: float, executed: float) -> str:
    """How stock's operations stand to those of a way, in words: the ratio that rates equal for both would give."""
    return (
        f"operations: stock has {stock_needed / needed:.2f} times as many, {stock_executed / executed:.2f} as executed"
    )


def decoding_bytes(config, weights: Weights, bytes_each: int, batch: int, context: int) -> int:
    """Bytes that one decoding step reads: every weight of language model and output layer, and the cache."""
    text = config.text_config
    key_value_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * key_value_heads * head_size * context * batch
    return bytes_each * (weights.all["language"] + weights.all["head"] + cache)

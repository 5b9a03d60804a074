# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the forward pass keeps for the backward pass, by formula.

A transformer layer keeps for each token, with sizes in elements of `b` bytes (2 under bfloat16, else 4):

    norms         2 hidden, always in float32            the input of each
    attention     2 query + 2 key/value                  queries, keys, values, and the output; nothing quadratic
    MLP           3 intermediate (gated), else 2         what goes into the activation and into the product
    inputs        of the linear layers that train        LoRA under autocast or dropout keeps a copy for each layer,
                                                         else layers that read the same share it
    dropout       a mask on each LoRA input              1 byte an element on a GPU

With gradient checkpointing only the input of each layer is kept, and one layer at a time is computed again. A tower in
which nothing trains, and before which nothing trains, keeps nothing. Behind the last layer come the tiles of TRL's
fused output layer, 4,096 tokens by 32,768 words of the vocabulary, instead of all logits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .trainable import Policy


if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_TILE = (4096, 32768)  # trl.kernels.chunked_logprob: tokens, and words of the vocabulary
HEAD_COPIES_ON_CPU = 6  # in float32, where a kernel of Triton needs none
DYNAMIC_IMAGE = 448  # pixels a side that are assumed where a model takes images of any size


@dataclass(frozen=True)
class Precision:
    """
    Bytes of an element.

    Args:
        compute (`int`): In matrix products: 2 under bfloat16 or float16.
        stream (`int`): In what passes from layer to layer: that of the frozen weights.
        autocast (`bool`): Whether products cast their inputs, rather than all weights being of one type.
        on_gpu (`bool`): On a CPU a dropout mask is as large as what it masks, and TRL has no kernel for its tiles.
    """

    compute: int
    stream: int
    autocast: bool
    on_gpu: bool = True


@dataclass(frozen=True)
class Tower:
    """
    A language model or vision tower, as far as its activations depend on it. All sizes are of one layer.

    Args:
        layers (`int`): Number of layers.
        hidden (`int`): Width of what passes from layer to layer.
        intermediate (`int`): Width of the MLP.
        query (`int`): Width of the queries.
        key_value (`int`): Width of the keys, and of the values.
        gated (`bool`): Whether the MLP has a gate.
        heads (`int`): Attention heads.
        eager (`bool`): Whether attention keeps its matrix.
        lora_inputs (`float`): Widths of the inputs of all layers with LoRA, together.
        lora_ranks (`float`): Their ranks, together.
        dropout (`bool`): Whether LoRA layers have dropout.
        in_full (`bool`): Whether the layers' own weights train.
        needs_graph (`bool`): Whether anything in it or before it trains.
    """

    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    gated: bool
    heads: int
    eager: bool
    lora_inputs: float
    lora_ranks: float
    dropout: bool
    in_full: bool
    needs_graph: bool

    def saved_per_token(self, precision: Precision, length: int) -> float:
        """Bytes that one layer keeps for one token of a sequence of this length."""
        b = precision.compute
        elements = 2 * (self.query + self.key_value) + (3 if self.gated else 2) * self.intermediate
        if self.eager:
            elements += 2 * self.heads * length
        inputs = 2 * self.hidden + self.query + self.intermediate
        own_copies = precision.autocast or self.dropout
        if self.in_full:
            elements += inputs + (2 * self.hidden if precision.autocast else 0)
        elif self.lora_inputs:
            elements += self.lora_inputs if own_copies else min(inputs, self.lora_inputs)
            elements += self.lora_ranks
        masks = self.lora_inputs * (1 if precision.on_gpu else 4) if self.dropout else 0
        return elements * b + 2 * self.hidden * 4 + masks

    def saved(self, tokens: int, length: int, precision: Precision, checkpointing: bool) -> float:
        """Bytes kept for so many tokens in sequences of this length."""
        if not self.needs_graph:
            return 0.0
        layer = tokens * self.saved_per_token(precision, length)
        return self.layers * tokens * self.hidden * precision.stream + layer if checkpointing else self.layers * layer

    def working(self, tokens: int, precision: Precision) -> float:
        """Bytes of the gradients on their way back through one MLP."""
        return tokens * (self.hidden + 2 * self.intermediate) * precision.compute if self.needs_graph else 0.0


def activation_bytes(
    policy: Policy, *, sequences: int, length: int, images: int, precision: Precision, checkpointing: bool
) -> float:
    """
    Bytes that one forward pass keeps, and its backward pass needs beside.

    Args:
        policy ([`~medst_trl.pipeline.plan.trainable.Policy`]): What trains.
        sequences (`int`): Sequences read at a time.
        length (`int`): Their tokens, images included.
        images (`int`): Images read at a time.
        precision ([`Precision`]): Bytes of an element.
        checkpointing (`bool`): Whether layers are computed again.
    """
    vision, language = towers(policy)
    config, patches = policy.base_model.config, patches_of(policy.base_model)
    tokens = sequences * length
    saved = vision.saved(images * patches, patches, precision, checkpointing)
    saved += language.saved(tokens, length, precision, checkpointing)
    working = max(vision.working(images * patches, precision), language.working(tokens, precision))
    return saved + working + head_bytes(tokens, language.hidden, config.get_text_config().vocab_size, precision)


def head_bytes(tokens: int, hidden: int, vocabulary: int, precision: Precision) -> float:
    """Bytes of TRL's fused output layer: its input, that one's gradient in float32, and a tile of logits."""
    rows, columns = min(tokens, HEAD_TILE[0]), HEAD_TILE[1]  # of a small vocabulary, too
    tile = rows * columns * precision.compute
    if not precision.on_gpu:
        tile += HEAD_COPIES_ON_CPU * rows * min(vocabulary, columns) * 4
    return tokens * hidden * (precision.compute + 4) + tile


def towers(policy: Policy) -> tuple[Tower, Tower]:
    """Vision tower and language model of a policy."""
    from medst_trl.policy.parts import model_parts

    model = policy.base_model
    parts = model_parts(model)
    trains = {parts.part_of(name) for name, p in policy.model.named_parameters() if p.requires_grad}
    text = model.config.get_text_config()
    return (
        _tower(model, parts.vision_tower, model.get_submodule(parts.vision_tower).config, "vision" in trains),
        _tower(model, parts.language_model, text, bool(trains)),
    )


def _tower(model: "PreTrainedModel", name: str, config, needs_graph: bool) -> Tower:
    from peft.tuners.lora import LoraLayer

    def first(*names: str, default: int | None = None) -> int:
        return next((value for name in names if isinstance(value := getattr(config, name, None), int)), default)

    modules = list(model.get_submodule(name).named_modules())
    adapted = [module for _, module in modules if isinstance(module, LoraLayer) and module.lora_A]
    ranks = [next(iter(module.r.values())) for module in adapted]
    dropouts = [next(iter(module.lora_dropout.values())) for module in adapted]
    in_full = any(
        parameter.requires_grad and parameter.dim() == 2 and "lora_" not in key and ".layers." in f".{key}"
        for key, parameter in model.get_submodule(name).named_parameters()
    )
    layers = first("num_hidden_layers", "depth")
    hidden = first("embed_dim" if not hasattr(config, "hidden_size") else "hidden_size")
    heads = first("num_attention_heads", "num_heads")
    head = first("head_dim", default=hidden // heads)
    return Tower(
        layers=layers,
        hidden=hidden,
        intermediate=first("intermediate_size", default=4 * hidden),
        query=heads * head,
        key_value=first("num_key_value_heads", default=heads) * head,
        gated=any(key.endswith("gate_proj") for key, _ in modules),
        heads=heads,
        eager=getattr(config, "_attn_implementation", None) == "eager",
        lora_inputs=sum(module.in_features for module in adapted) / layers,
        lora_ranks=sum(ranks) / layers,
        dropout=any(getattr(dropout, "p", 0) > 0 for dropout in dropouts),
        in_full=in_full,
        needs_graph=needs_graph,
    )


def patches_of(model: "PreTrainedModel") -> int:
    """Patches of one image in the vision tower, all its tiles together."""
    vision = model.config.vision_config
    sizes = getattr(vision, "image_size", None) or DYNAMIC_IMAGE
    patch = getattr(vision, "patch_size", 14)
    side, patch = (value[0] if isinstance(value, list | tuple) else value for value in (sizes, patch))
    tiles = 5 if getattr(model.config, "image_grid_pinpoints", None) else 1  # LLaVA-NeXT: four and the whole
    return tiles * ((side // patch) ** 2 + 1)

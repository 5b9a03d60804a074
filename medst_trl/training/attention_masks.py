# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which token may look at which, where two answers stand behind one prompt.

One rule in the form FlexAttention takes (`mask_mod`), evaluated to a dense mask for SDPA and eager attention. A mask
of four dimensions, or a dict of them by layer type, goes through transformers' own mask creation as it is.
"""

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig

# A dense mask is faster below about so many tokens and FlexAttention above, see
# https://github.com/KempnerInstitute/KempnerForge/pull/207 (0.72x at 512, 1.31x at 2048, H200).
FLEX_FROM = 1024
FLEX_BLOCK = 128  # lengths are rounded up to its block, so that it is compiled for few of them

_FULL, _SLIDING = "full_attention", "sliding_attention"


def layer_types(config: "PreTrainedConfig") -> set[str]:
    """
    The kinds of attention in a language model's layers.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the text model.

    Returns:
        `set[str]`: `full_attention`, `sliding_attention`, or what else transformers names.
    """
    if getattr(config, "layer_types", None):
        return set(config.layer_types)
    return {_FULL if getattr(config, "sliding_window", None) is None else _SLIDING}


def attention_for(own: str, length: int, device: torch.device) -> str:
    """
    The attention implementation for masks of this length: the model's `own`, but that one loaded with
    `flex_attention` has dense masks where those are faster, and on a CPU, where FlexAttention cannot train.
    """
    if own == "flex_attention" and (device.type == "cpu" or length < FLEX_FROM):
        return "sdpa"
    return own


def branch_masks(
    config: "PreTrainedConfig",
    implementation: str,
    branches: torch.Tensor,
    positions: torch.Tensor,
    blocks: torch.Tensor | None = None,
) -> "torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask]":
    """
    Attention mask under which every branch sees the trunk and itself, and nothing of the other branches.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the text model: its layer types and sliding window.
        implementation (`str`):
            `sdpa`, `eager` or `flex_attention`.
        branches (`torch.Tensor` of shape (batch, length)):
            0 for the trunk, another number for each branch (padding is one).
        positions (`torch.Tensor` of shape (batch, length)):
            Place of each token in the sequence it belongs to, which a sliding window counts by.
        blocks (`torch.Tensor` of shape (batch, length), *optional*):
            Tokens of the same number from 0 on see each other in both directions (Gemma 3's images); -1 elsewhere.

    Returns:
        A mask of shape (batch, 1, length, length), boolean for SDPA and additive for eager attention, or a
        `BlockMask`; where layers differ in type, a dict of them by type.
    """

    def allowed(batch, head, query, key):
        sees = (query >= key) & ((branches[batch, key] == 0) | (branches[batch, key] == branches[batch, query]))
        if blocks is not None:
            sees = sees | ((blocks[batch, query] == blocks[batch, key]) & (blocks[batch, query] >= 0))
        return sees

    def in_window(batch, head, query, key):
        near = positions[batch, query] - positions[batch, key] < config.sliding_window
        return allowed(batch, head, query, key) & near

    rules = {_FULL: allowed, _SLIDING: in_window}
    masks = {
        kind: _evaluate(rules[kind], implementation, *branches.shape, branches.device) for kind in layer_types(config)
    }
    return next(iter(masks.values())) if len(masks) == 1 else masks


def _evaluate(rule, implementation: str, batch: int, length: int, device: torch.device) -> "torch.Tensor | BlockMask":
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(rule, batch, None, length, length, device=device)
    index = torch.arange(length, device=device)
    mask = rule(torch.arange(batch, device=device)[:, None, None, None], 0, index[:, None], index[None, :])
    if implementation == "eager":  # it adds the mask, so a boolean one would be silently wrong
        return torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return mask

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Masks say who may look at whom; every implementation gets the same rule."""

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig

from medst_trl.training.attention_masks import attention_for, branch_masks, layer_types


# two tokens of prompt, then twice a last prompt token with an answer behind it, then padding
BRANCHES = torch.tensor([[0, 0, 1, 1, 2, 2, 2, -1, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 0, 0]])


def seen(mask: torch.Tensor, query: int) -> list[int]:
    return mask[0, 0, query].nonzero().flatten().tolist()


def test_a_branch_sees_the_trunk_and_itself():
    mask = branch_masks(LlamaConfig(), "sdpa", BRANCHES, POSITIONS)
    assert mask.shape == (1, 1, 9, 9) and mask.dtype == torch.bool
    assert [seen(mask, query) for query in (1, 3, 4, 6)] == [[0, 1], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5, 6]]
    assert mask.any(-1).all()  # a token that sees nothing would be NaN


def test_a_window_counts_by_positions_and_not_by_places():
    mask = branch_masks(MistralConfig(sliding_window=3), "sdpa", BRANCHES, POSITIONS)
    assert [seen(mask, query) for query in (3, 4, 5, 6)] == [[1, 2, 3], [0, 1, 4], [1, 4, 5], [4, 5, 6]]


def test_layers_of_two_types_get_a_mask_each_and_blocks_look_both_ways():
    config = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=2
    )
    blocks = torch.tensor([[3, 3, -1, -1, -1, -1, -1, -1, -1]])
    masks = branch_masks(config, "sdpa", BRANCHES, POSITIONS, blocks)
    assert set(masks) == layer_types(config) == {"full_attention", "sliding_attention"}
    assert seen(masks["full_attention"], 0) == seen(masks["sliding_attention"], 0) == [0, 1]
    assert seen(masks["full_attention"], 6) == [0, 1, 4, 5, 6] and seen(masks["sliding_attention"], 6) == [5, 6]


@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig(sliding_window=3)])
def test_eager_and_flex_attention_see_the_same(config):
    from torch.nn.attention.flex_attention import create_mask

    dense = branch_masks(config, "sdpa", BRANCHES, POSITIONS)
    eager = branch_masks(config, "eager", BRANCHES, POSITIONS)
    assert eager.dtype == torch.float32 and torch.equal(eager == 0, dense)
    flex = branch_masks(config, "flex_attention", BRANCHES, POSITIONS)
    assert torch.equal(create_mask(flex.mask_mod, 1, None, 9, 9, device="cpu"), dense)


def test_flex_attention_is_for_long_sequences_on_an_accelerator():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert attention_for("flex_attention", 4096, gpu) == "flex_attention"
    assert attention_for("flex_attention", 512, gpu) == attention_for("flex_attention", 4096, cpu) == "sdpa"
    for own in ("sdpa", "eager"):
        assert attention_for(own, 4096, gpu) == attention_for(own, 512, cpu) == own

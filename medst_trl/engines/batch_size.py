# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How many texts can be written at a time in the memory that an accelerator has left."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

MOST = 256  # more are hardly faster: reading the cache then takes the time, and that grows with the batch
SHARE_OF_FREE = 0.8  # allocators leave gaps, and a layer of the cache is there twice while it grows
# For each token of the vocabulary: scores in float32, warped, sorted, and cumulated in float64.
BYTES_A_SCORE = 64


def largest_batch(model: "PreTrainedModel", prompt_tokens: int, max_new_tokens: int) -> int:
    """
    An estimate; where it is too high, an out-of-memory error tells.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            On an accelerator.
        prompt_tokens (`int`):
            Tokens of the longest prompt.
        max_new_tokens (`int`):
            Most tokens of a text.

    Returns:
        `int`: rows of a batch, from 1 to `MOST`.
    """
    config = model.config.get_text_config(decoder=True)
    deepstack = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    need = bytes_of_a_text(config, model.dtype, prompt_tokens, max_new_tokens, 1 + len(deepstack))
    return max(1, min(MOST, int(SHARE_OF_FREE * free_bytes(model.device)) // need))


def bytes_of_a_text(
    config: "PreTrainedConfig", dtype: "torch.dtype", prompt_tokens: int, max_new_tokens: int, image_layers: int = 1
) -> int:
    """
    What a row of a batch takes at most: its keys and values, the features of its images and what a layer works with
    while the prompt is read, scores.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of the language model.
        dtype (`torch.dtype`): Of the weights.
        prompt_tokens, max_new_tokens (`int`): Length of a row.
        image_layers (`int`, *optional*, defaults to `1`): Layers that get features of images (Qwen3-VL: several).
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cached = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    at_work = (8 + image_layers) * config.hidden_size + 3 * config.intermediate_size
    numbers = cached * (prompt_tokens + max_new_tokens) + at_work * prompt_tokens
    return numbers * dtype.itemsize + BYTES_A_SCORE * config.vocab_size


def free_bytes(device: "torch.device") -> int:
    """What is left on an accelerator, with what PyTorch has reserved there and does not use."""
    import torch

    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)

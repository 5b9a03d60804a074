# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompts that are read once, however many texts are written behind them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medst_trl.policy.families import family_of


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOKENS_AT_ONCE = 32  # few, so that a text that has ended does not stay long; many, as to begin anew takes time too


def shares_prompts(model: "PreTrainedModel") -> bool:
    """
    Whether a model can go on from one reading of a prompt in several ways ([`read_once`]), and can be given features
    of images in the place of pixels ([`ImageMemory`]), with the same outcome.
    """
    # "hybrid" is what Gemma 3 was published with; `generate` takes it for none.
    cache = model.generation_config.cache_implementation
    return family_of(model.config.model_type).shares_prompts and cache in (None, "hybrid")


def read_once(
    model: "PreTrainedModel", inputs: "Mapping[str, Any]", draws: Sequence[int], **settings: Any
) -> "dict[str, torch.Tensor]":
    """
    Read each prompt of a batch once, and repeat what is in the cache for each of its draws.

    All tokens but the last are read: `generate` needs one to go on from. It would repeat the prompts itself
    (`num_return_sequences`), but before they are read.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model that [`shares_prompts`].
        inputs (`Mapping`):
            For `generate`, padded on the left.
        draws (sequence of `int`):
            How many texts are to be written behind each prompt.
        **settings:
            Further settings of `generate`.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` of shape (sum of draws, length), and
        `past_key_values`, for `generate`.
    """
    import torch

    ids = inputs["input_ids"]
    is_read = {
        name: value[:, :-1] if isinstance(value, torch.Tensor) and value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    cache = model.generate(**is_read, **settings, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(torch.tensor(draws, device=ids.device))
    return _rows(model, ids, inputs["attention_mask"], cache, rows)


def write_on(
    model: "PreTrainedModel", inputs: "Mapping[str, Any]", max_new_tokens: int, sampler: Any = None, **settings: Any
) -> "torch.Tensor":
    """
    `generate`, without the texts that have ended: every `TOKENS_AT_ONCE` steps they leave the batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model that [`shares_prompts`].
        inputs (`Mapping`):
            For `generate`, padded on the left.
        max_new_tokens (`int`):
            Where a text that does not end is cut off.
        sampler ([`SeededSampler`], *optional*):
            Chooses the tokens.
        **settings:
            Further settings of `generate`, with `eos_token_id` (a list) and `pad_token_id`.

    Returns:
        `torch.Tensor` of shape (rows, `max_new_tokens`): the new tokens, padded on the right.
    """
    import torch

    ids = inputs["input_ids"]
    left = torch.arange(len(ids), device=ids.device)
    ends = torch.tensor(settings["eos_token_id"], device=ids.device)
    tokens = ids.new_full((len(ids), max_new_tokens), settings["pad_token_id"])
    done = 0
    while True:
        output = model.generate(
            **inputs,
            **settings,
            max_new_tokens=min(TOKENS_AT_ONCE, max_new_tokens - done),
            logits_processor=None if sampler is None else [sampler],
            return_dict_in_generate=True,
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        tokens[left, done : done + new.shape[1]] = new
        done += new.shape[1]
        goes_on = ~torch.isin(new, ends).any(1)
        if done == max_new_tokens or not goes_on.any():
            return tokens
        rows = goes_on.nonzero()[:, 0]
        left = left[rows]
        if sampler is not None:
            sampler.keep(rows)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
        inputs = _rows(model, output.sequences, mask, output.past_key_values, rows)


def _rows(model, ids, mask, cache, rows: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """What `generate` goes on with, for some rows of a batch."""
    cache.batch_select_indices(rows)
    inner = model.base_model
    if getattr(inner, "rope_deltas", None) is not None:  # m-RoPE models keep the shift of positions of each row aside
        inner.rope_deltas = inner.rope_deltas[rows]
    return {"input_ids": ids[rows], "attention_mask": mask[rows], "past_key_values": cache}

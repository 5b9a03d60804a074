# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The conversations of a batch in fewer, fuller rows: the same step without the padding.

A conversation is a document whose positions start at zero. Without an attention mask and without a cache,
transformers takes restarted positions for the border of documents, which then do not see each other. Packing stays
within one batch, so that a step trains on the conversations it would train on anyway.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from medst_trl.policy.families import family_of

from .encoding import TOKEN_INPUTS


if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100


def packing_cost(model: "PreTrainedModel") -> tuple[float | None, str]:
    """
    What long rows cost a model, which decides how batches are packed, see [`rows_of`].

    Args:
        model ([`~transformers.PreTrainedModel`]): The model without adapter.

    Returns:
        `tuple[float or None, str]`: What attending to one token of its row costs a token, in units of the rest of its
        computation: 0 for FlashAttention, which separates documents within one row and computes nothing between them;
        `None` where documents cannot be told apart, with the reason.
    """
    language = model.config.get_text_config()
    kind = model.config.model_type
    if language.model_type not in family_of(kind).packs_with:
        return None, f"documents in one row are not known to stay apart in {kind} with {language.model_type}"
    attention = language._attn_implementation
    if attention in ("sdpa", "eager", "flex_attention"):
        # Under a mask all of the row is computed: 4 x size operations a pair of tokens and layer, beside 24 x size^2
        # for a token's projections. Attention runs at about half the rate of those.
        return 2 * 4 / (24 * language.hidden_size), ""
    if "flash" in attention:
        return 0.0, ""
    return None, f"documents in one row are not known to stay apart under the attention {attention!r}"


def pack(
    batch: dict[str, Any],
    cost: float,
    images: Sequence[int],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> None:
    """
    Packs a padded batch in place.

    The attention mask goes, because beside one restarted positions mean nothing; `position_ids` (rows, length) come,
    as does `token_mask` of the same shape, `False` in what fills up a row. That is a document of its own, without
    labels. The first token of a document is no target, because the last one of its neighbour would have to predict it.

    Args:
        batch (`dict`):
            Inputs padded on the right, with labels.
        cost (`float`):
            That of long rows, see [`packing_cost`].
        images (`Sequence[int]`):
            Number of images of each conversation.
        pad_token_id (`int`):
            What rows are filled up with.
        pad_to_multiple_of (`int`, *optional*):
            If set, the rows' length is a multiple of it.
    """
    lengths = batch.pop("attention_mask").sum(1).tolist()
    width = batch["input_ids"].shape[1]
    rows = rows_of(lengths, cost)
    length = max(sum(lengths[document] for document in row) for row in rows)
    length += -length % (pad_to_multiple_of or 1)

    source = torch.zeros(len(rows), length, dtype=torch.long)  # index into the flat padded batch
    positions = torch.zeros_like(source)
    token_mask = torch.zeros_like(source, dtype=torch.bool)
    for index, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + lengths[document]
            positions[index, start:end] = torch.arange(end - start)
            source[index, start:end] = positions[index, start:end] + document * width
            start = end
        token_mask[index, :start] = True
        positions[index, start:] = torch.arange(length - start)

    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    for name in batch.keys() & set(TOKEN_INPUTS):
        batch[name] = batch[name].flatten()[source].masked_fill(~token_mask, fills.get(name, 0))
    batch["labels"][positions == 0] = IGNORED
    batch["question_mask"][positions == 0] = False
    batch["position_ids"] = positions
    batch["token_mask"] = token_mask
    _reorder_images(batch, [document for row in rows for document in row], images)


def rows_of(lengths: Sequence[int], cost: float) -> list[list[int]]:
    """
    Documents in as many rows as cost least: few long rows have little padding, many short ones little attention.

    Args:
        lengths (`Sequence[int]`): Length of each document.
        cost (`float`): See [`packing_cost`]; with 0 all documents go in one row.

    Returns:
        `list[list[int]]`: The indices of the documents of each row.
    """

    def price(rows: list[list[int]]) -> float:
        length = max(sum(lengths[document] for document in row) for row in rows)
        return len(rows) * length * (1 + cost * length)

    return min((_balanced(lengths, count) for count in range(1, len(lengths) + 1)), key=price)


def _balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows of about equal length: each document, the longest first, goes in the shortest row so far."""
    if count == 1:
        return [list(range(len(lengths)))]
    rows, fills = [[] for _ in range(count)], [0] * count
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = fills.index(min(fills))
        rows[row].append(document)
        fills[row] += lengths[document]
    return rows


def rope_positions(model: "PreTrainedModel", batch: dict[str, Any]) -> torch.Tensor:
    """
    Positions of a packed batch as the model wants them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model without adapter.
        batch (`dict`): A batch packed by [`pack`].

    Returns:
        `torch.Tensor`: The batch's `position_ids` (rows, length); for a model with m-RoPE (4, rows, length): first
        those, which tell the documents, then time, height and width, starting at zero in each document.
    """
    positions = batch["position_ids"]
    count = getattr(model.base_model, "get_rope_index", None)
    if count is None:
        return positions
    if "image_grid_thw" not in batch:
        return positions.expand(4, -1, -1)
    rope, _ = count(batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"])
    # Counted through each row. A document begins with text, at which time, height and width are one number.
    first = torch.arange(positions.shape[1], device=positions.device) - positions
    rope = rope - rope.gather(2, first.expand(3, -1, -1))
    return torch.cat([positions[None], rope])


def _reorder_images(batch: dict[str, Any], order: Sequence[int], images: Sequence[int]) -> None:
    """Brings images into the order in which their conversations now stand; `images` are numbers by conversation."""
    if "pixel_values" not in batch or list(order) == sorted(order):
        return
    if "pixel_attention_mask" in batch:  # Idefics3, SmolVLM: a row of image tiles for each conversation
        for name in ("pixel_values", "pixel_attention_mask"):
            batch[name] = batch[name][list(order)]
        return
    places = torch.arange(sum(images)).split(list(images))
    places = torch.cat([places[document] for document in order])
    if "image_grid_thw" in batch:  # Qwen: the patches of all images in one dimension
        patches = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
        batch["pixel_values"] = torch.cat([patches[place] for place in places])
        batch["image_grid_thw"] = batch["image_grid_thw"][places]
        return
    for name in {"pixel_values", "image_sizes"} & batch.keys():
        batch[name] = batch[name][places]

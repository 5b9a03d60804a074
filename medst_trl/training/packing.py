# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Packing: the conversations of a batch in fewer rows, without padding between them.

Packed, a conversation is a document whose positions start at zero. Without an attention mask and without a cache,
transformers takes restarted positions for the border of documents, which then do not see each other. Packing stays
within one batch, so that a step trains on the same conversations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import pad

from medst_trl.policy.families import family_of

from .encoding import IGNORED, TOKEN_INPUTS


def packing_cost(model: PreTrainedModel) -> tuple[float | None, str]:
    """
    Cost of long rows for a model, which decides how batches are packed, see [`rows_of`].

    Args:
        model ([`~transformers.PreTrainedModel`]): The model without adapter.

    Returns:
        `tuple[float or None, str]`: The cost of attending to one token of its row for a token, in units of the rest of
        its computation: 0 for FlashAttention, which separates documents within one row and computes nothing between
        them; `None` if documents cannot be separated, with the reason.
    """
    language = model.config.get_text_config()
    kind = model.config.model_type
    if language.model_type not in family_of(kind).packs_with:
        return None, f"documents in one row are not known to stay separate in {kind} with {language.model_type}"
    attention = language._attn_implementation
    if attention in ("sdpa", "eager", "flex_attention"):
        # Under a mask all of the row is computed: 4 x size operations per pair of tokens and layer, and 24 x size^2
        # for a token's projections. Attention runs at about half the rate of those.
        return 2 * 4 / (24 * language.hidden_size), ""
    if "flash" in attention:
        return 0.0, ""
    return None, f"documents in one row are not known to stay separate under the attention {attention!r}"


def pack(
    batch: dict[str, Any], cost: float, images: Sequence[int], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> None:
    """
    Pack a padded batch, in place.

    The attention mask is removed, because with one restarted positions mean nothing. Added are `position_ids`
    (rows, length) and `token_mask` of the same shape, `False` in the padding of a row, which is a document of its own
    without labels. The first token of a document is no target, because the last one of its neighbor would predict it.

    Args:
        batch (`dict`):
            Inputs padded on the right, with labels.
        cost (`float`):
            Cost of long rows, see [`packing_cost`].
        images (`Sequence[int]`):
            Number of images of each conversation.
        pad_token_id (`int`):
            Token that pads rows.
        pad_to_multiple_of (`int`, *optional*):
            If set, the rows' length is a multiple of it.
    """
    lengths = batch.pop("attention_mask").sum(1).tolist()
    rows = rows_of(lengths, cost)

    def in_rows(documents: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
        joined = [torch.cat([documents[document] for document in row]) for row in rows]
        return pad(joined, fill, "right", pad_to_multiple_of)

    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    for name in batch.keys() & set(TOKEN_INPUTS):
        documents = [tokens[:length] for tokens, length in zip(batch[name], lengths, strict=True)]
        batch[name] = in_rows(documents, fills.get(name, 0))
    token_mask = in_rows([torch.ones(length, dtype=torch.bool) for length in lengths], False)
    in_padding = torch.arange(token_mask.shape[1]) - token_mask.sum(1, keepdim=True)
    positions = torch.where(token_mask, in_rows([torch.arange(length) for length in lengths], 0), in_padding)
    batch["labels"][positions == 0] = IGNORED
    batch["question_mask"][positions == 0] = False
    batch["position_ids"] = positions
    batch["token_mask"] = token_mask
    _reorder_images(batch, [document for row in rows for document in row], images)


def rows_of(lengths: Sequence[int], cost: float) -> list[list[int]]:
    """
    Divide documents into the cheapest number of rows: few long rows have little padding, many short ones little
    attention.

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
    """`count` rows of about equal length: each document, longest first, joins the shortest row so far."""
    if count == 1:
        return [list(range(len(lengths)))]
    rows, fills = [[] for _ in range(count)], [0] * count
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = fills.index(min(fills))
        rows[row].append(document)
        fills[row] += lengths[document]
    return rows


def rope_positions(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """
    Positions of a packed batch in the form the model takes.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model without adapter.
        batch (`dict`): A batch packed by [`pack`].

    Returns:
        `torch.Tensor`: The batch's `position_ids` (rows, length); for a model with m-RoPE (4, rows, length): first
        those, which separate the documents, then time, height and width, starting at zero in each document.
    """
    positions = batch["position_ids"]
    count = getattr(model.base_model, "get_rope_index", None)
    if count is None:
        return positions
    if "image_grid_thw" not in batch:
        return positions.expand(4, -1, -1)
    rope, _ = count(batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"])
    # Counted along each row. A document begins with text, where time, height and width are one number.
    first = torch.arange(positions.shape[1], device=positions.device) - positions
    rope = rope - rope.gather(2, first.expand(3, -1, -1))
    return torch.cat([positions[None], rope])


def _reorder_images(batch: dict[str, Any], order: Sequence[int], images: Sequence[int]) -> None:
    """Put images in the order of their conversations; `images` is the number of images per conversation."""
    if "pixel_values" not in batch or list(order) == sorted(order):
        return
    names = {"pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw"} & batch.keys()
    places = list(order)  # Idefics3, SmolVLM: a row of image tiles for each conversation
    if "pixel_attention_mask" not in batch:
        of_conversation = torch.arange(sum(images)).split(list(images))
        places = torch.cat([of_conversation[document] for document in order])
    if "image_grid_thw" in batch:  # Qwen: the patches of all images in one dimension
        patches = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
        batch["pixel_values"] = torch.cat([patches[place] for place in places])
        names.remove("pixel_values")
    for name in names:
        batch[name] = batch[name][places]

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which preference pairs can be trained on, found out before the first step.

A pair left out inside a batch would leave ranks with batches of different size, which TRL gathers as if they were
equal. So all are looked at once, at the price of one tokenisation.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.data.schema import text_of
from medst_trl.policy.spans import render_conversation

from .encoding import TokenSpan, encode, tokens_without_images
from .example_images import UnreadableImage, check_image, image_size, images_of, with_images
from .input_pipeline import with_stored_images
from .preference_collator import pair_as_conversation


if TYPE_CHECKING:
    from transformers import ProcessorMixin

REASONS = {
    "chosen_equals_rejected": "both answers say the same, so there is nothing to prefer",
    "malformed": "prompt, answers and images do not make a conversation",
    "unreadable_image": "an image of it is missing, cut short or of an unknown format",
    "too_long": "its prompt and image alone fill max_length={max_length} tokens",
}


@dataclass(frozen=True)
class UsablePairs:
    """
    What became of preference pairs before training.

    Args:
        dataset ([`~datasets.Dataset`]): Those that can be trained on.
        set_aside (`dict[str, str]`): The reason (a key of `REASONS`) of each other, by id (or place).
        truncated (`int`): How many of the dataset have an answer that is cut at `max_length`.
        lengths (`list[int]`): Tokens of each pair of the dataset, its prompt counted once.
    """

    dataset: Dataset
    set_aside: dict[str, str]
    truncated: int
    lengths: list[int]


def check_is_dataset(dataset: Any, name: str) -> None:
    """Raise a [`UserError`] for pairs that cannot all be looked at before the first step."""
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"The dataset {name!r} is of type {type(dataset).__name__}. DPO here supports no streaming, because pairs "
            "are checked before training: give a datasets.Dataset, loaded without streaming, and one split of it."
        )


def usable_pairs(dataset: Dataset, processor: "ProcessorMixin", max_length: int | None) -> UsablePairs:
    """
    Sets aside the pairs that cannot be trained on.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference pairs, see [`DataCollatorForMultimodalPreference`].
        processor ([`~transformers.ProcessorMixin`]):
            Processor prepared by [`add_vusr`].
        max_length (`int` or `None`):
            Longest sequence in tokens, image tokens included.

    Returns:
        [`UsablePairs`]

    Raises:
        UserError: if none is left.
    """
    from tqdm.auto import tqdm

    kept, lengths, reasons, truncated, image_tokens = [], [], {}, 0, {}
    for place, example in enumerate(tqdm(with_stored_images(dataset), "checking pairs", unit="pair", disable=None)):
        reason, answers = _look_at(example, processor, max_length, image_tokens)
        if reason is None:
            kept.append(place)
            ends = [answer.end if max_length is None else min(answer.end, max_length) for answer in answers]
            lengths.append(sum(ends) - answers[0].start)
            truncated += any(end < answer.end for end, answer in zip(ends, answers, strict=True))
        else:
            reasons[str(example.get("id") or place)] = reason
    if not kept:
        counts = {reason: list(reasons.values()).count(reason) for reason in REASONS}
        found = "; ".join(f"{n} because {REASONS[r].format(max_length=max_length)}" for r, n in counts.items() if n)
        raise UserError(f"No preference pair can be trained on: {found or 'the dataset is empty'}.")
    return UsablePairs(dataset.select(kept) if reasons else dataset, reasons, truncated, lengths)


def _look_at(
    example: dict[str, Any], processor: "ProcessorMixin", max_length: int | None, image_tokens: dict[tuple, int]
) -> tuple[str | None, list[TokenSpan]]:
    """What keeps a pair from being trained on, or else where its answers stand in their rows."""
    try:
        for image in images_of(example):
            check_image(image)
        sizes = [image_size(image) for image in images_of(example)]
        pair = [pair_as_conversation(with_images(example, sizes), key) for key in ("chosen", "rejected")]
    except UnreadableImage:
        return "unreadable_image", []
    except (UserError, KeyError, TypeError):
        return "malformed", []
    if len({text_of(conversation.messages[-1]["content"]).strip() for conversation in pair}) == 1:
        return "chosen_equals_rejected", []
    rendered = [render_conversation(processor, conversation.messages) for conversation in pair]
    answers = [answer for _, answer in tokens_without_images(processor, rendered)]
    # What images add before an answer depends on their sizes alone, so blank ones tell it for all of these sizes.
    if (key := tuple(sizes)) not in image_tokens:
        blank = replace(pair[0], images=[Image.new("RGB", size) for size in sizes])
        image_tokens[key] = encode(processor, [blank]).spans[0][-1].start - answers[0].start
    answers = [TokenSpan(*(place + image_tokens[key] for place in answer[:2]), False) for answer in answers]
    if max_length is not None and any(answer.start >= max_length for answer in answers):
        return "too_long", []
    return None, answers

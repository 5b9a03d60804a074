# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which preference pairs can be trained on, found out before the first step.

A pair left out inside a batch would leave ranks with batches of different size, which TRL gathers as if they were
equal. So all are looked at once, at the price of one tokenisation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..policy.spans import render_conversation, text_of
from ..policy.vusr import adds_special_tokens, tokenizer_of
from .encoding import Conversation, encode
from .preference_collator import pair_as_conversation


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

REASONS = {
    "chosen_equals_rejected": "both answers say the same, so there is nothing to prefer",
    "malformed": "prompt, answers and images do not make a conversation",
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
    """

    dataset: "Dataset"
    set_aside: dict[str, str]
    truncated: int


def usable_pairs(dataset: "Dataset", processor: "ProcessorMixin", max_length: int | None) -> UsablePairs:
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

    kept, reasons, truncated, image_tokens = [], {}, 0, {}
    for place, example in enumerate(tqdm(dataset, "checking pairs", unit="pair", disable=None)):
        reason, is_cut = _look_at(example, processor, max_length, image_tokens)
        if reason is None:
            kept.append(place)
            truncated += is_cut
        else:
            reasons[str(example.get("id") or place)] = reason
    if not kept:
        counts = {reason: list(reasons.values()).count(reason) for reason in REASONS}
        found = "; ".join(f"{n} because {REASONS[r].format(max_length=max_length)}" for r, n in counts.items() if n)
        raise UserError(f"No preference pair can be trained on: {found or 'the dataset is empty'}.")
    return UsablePairs(dataset.select(kept) if reasons else dataset, reasons, truncated)


def _look_at(
    example: dict[str, Any], processor: "ProcessorMixin", max_length: int | None, image_tokens: dict[tuple, int]
) -> tuple[str | None, bool]:
    """What keeps a pair from being trained on, and whether one of its answers is cut."""
    try:
        pair = [pair_as_conversation(example, key) for key in ("chosen", "rejected")]
    except (UserError, KeyError, TypeError):
        return "malformed", False
    if len({text_of(conversation.messages[-1]["content"]).strip() for conversation in pair}) == 1:
        return "chosen_equals_rejected", False
    if max_length is None:
        return None, False
    spans = [_answer_span(conversation, processor, image_tokens) for conversation in pair]
    if any(start >= max_length for start, _ in spans):
        return "too_long", False
    return None, any(end > max_length for _, end in spans)


def _answer_span(
    conversation: Conversation, processor: "ProcessorMixin", image_tokens: dict[tuple, int]
) -> tuple[int, int]:
    """
    The tokens of the last answer. What images add before it depends on their sizes alone, so one pair tells it for
    all.
    """
    rendered = render_conversation(processor, conversation.messages)
    offsets = tokenizer_of(processor)(
        rendered.text,
        add_special_tokens=adds_special_tokens(processor, rendered.text),
        return_offsets_mapping=True,
    )["offset_mapping"]
    answer = rendered.spans[-1]
    start = sum(token_end <= answer.start for _, token_end in offsets)
    end = sum(token_start < answer.end for token_start, _ in offsets)
    sizes = tuple(image.size for image in conversation.images)
    if sizes not in image_tokens:
        image_tokens[sizes] = encode(processor, [conversation]).spans[0][-1].start - start
    return start + image_tokens[sizes], end + image_tokens[sizes]

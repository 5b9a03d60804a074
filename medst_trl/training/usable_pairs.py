# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which preference pairs can be trained on, found out before the first step.

A pair left out inside a batch would leave ranks with batches of different size, which TRL gathers as if they were
equal. So all are looked at once, at the price of one tokenisation.
"""

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


def usable_pairs(
    dataset: "Dataset", processor: "ProcessorMixin", max_length: int | None
) -> tuple["Dataset", dict[str, str]]:
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
        `tuple[Dataset, dict[str, str]]`: The others, and the reason (a key of `REASONS`) by id (or place).

    Raises:
        UserError: if none is left.
    """
    from tqdm.auto import tqdm

    kept, reasons, image_tokens = [], {}, {}
    for place, example in enumerate(tqdm(dataset, "checking pairs", unit="pair", disable=None)):
        reason = _problem(example, processor, max_length, image_tokens)
        if reason is None:
            kept.append(place)
        else:
            reasons[str(example.get("id") or place)] = reason
    if not kept:
        counts = {reason: list(reasons.values()).count(reason) for reason in REASONS}
        found = "; ".join(f"{n} because {REASONS[r].format(max_length=max_length)}" for r, n in counts.items() if n)
        raise UserError(f"No preference pair can be trained on: {found or 'the dataset is empty'}.")
    return dataset.select(kept) if reasons else dataset, reasons


def _problem(
    example: dict[str, Any], processor: "ProcessorMixin", max_length: int | None, image_tokens: dict[tuple, int]
) -> str | None:
    try:
        chosen, rejected = (pair_as_conversation(example, key) for key in ("chosen", "rejected"))
    except (UserError, KeyError, TypeError):
        return "malformed"
    if text_of(chosen.messages[-1]["content"]).strip() == text_of(rejected.messages[-1]["content"]).strip():
        return "chosen_equals_rejected"
    if max_length is not None and _prompt_length(chosen, processor, image_tokens) >= max_length:
        return "too_long"
    return None


def _prompt_length(conversation: Conversation, processor: "ProcessorMixin", image_tokens: dict[tuple, int]) -> int:
    """
    Tokens in front of the last answer. What images add depends on their sizes alone, so one pair tells it for all.
    """
    rendered = render_conversation(processor, conversation.messages)
    tokens = tokenizer_of(processor)(
        rendered.text,
        add_special_tokens=adds_special_tokens(processor, rendered.text),
        return_offsets_mapping=True,
    )
    answer = rendered.spans[-1].start
    length = sum(end <= answer for _, end in tokens["offset_mapping"])
    sizes = tuple(image.size for image in conversation.images)
    if sizes not in image_tokens:
        image_tokens[sizes] = encode(processor, [conversation]).spans[0][-1].start - length
    return length + image_tokens[sizes]

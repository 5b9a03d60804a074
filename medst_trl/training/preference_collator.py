# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn preference pairs into batches. Prompts have the same tokens as in stage 1, and images are processed once.

Pairs that cannot be trained on are rejected before the first step, at the cost of one tokenization. Dropping them from
batches, as in stage 1, would leave ranks with batches of different size, which TRL gathers as if they were equal.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import pad

from medst_trl.base.errors import UserError
from medst_trl.data.schema import text_of
from medst_trl.data.source import BadRecord
from medst_trl.policy.vusr import RenderedConversation, Span, add_vusr, render_conversation, tokenizer_of

from .encoding import TOKEN_INPUTS, ImageConversation, as_conversation, encode, tokens_without_images
from .examples import (
    DecodesImages,
    UsableExamples,
    reject_malformed,
    usable_examples,
    with_decoded_images,
    with_images,
)
from .prefix_sharing import with_images_twice


@dataclass
class DataCollatorForMultimodalPreference(DecodesImages, DataCollatorForVisionPreference):
    """
    Data collator for preference pairs about images.

    TRL's own collator tokenizes prompt and completion separately and adds no beginning-of-sequence token: with
    LLaVA-1.5, the model would then score a different text from the one it was trained on and sampled. Here prompt and
    answer are rendered and tokenized together, and control tokens spelled in data are neutralized, as in
    [`DataCollatorForSelfQuestioning`]. The images of a pair are processed once, not twice.

    Each example has `prompt` (messages, the last one a user's), `chosen` and `rejected` (one assistant message each),
    `images` (a list, may be empty, decoded or as `datasets` stores them) and optionally `id`, `weight` and
    `probability`. An answer is truncated at `max_length`.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor; it gets the `<vusr>` token if it has none yet, see [`add_vusr`].
        max_length (`int`, *optional*):
            Longest sequence in tokens, image tokens included. `None` for no limit.
        pad_to_multiple_of (`int`, *optional*):
            If set, sequences are padded to a multiple of it.
        share_prefix (`bool`, *optional*, defaults to `False`):
            Whether the images of each pair are given once, with the lengths that [`PrefixSharing`] needs.

    Returns of a call:
        `dict`: `input_ids`, `attention_mask`, `completion_mask` (1 on the answer and its terminator) of shape
        (2 x batch, length), first all chosen, then all rejected. `pixel_values` and the processor's other outputs, for
        all rows. With `share_prefix`, these are for the chosen rows only, and there are also `prefix_length` of shape
        (batch,), the length of each pair's common prefix, and `shared_length`, the length of the longest pair as one
        sequence. `weight` and `probability`, float32 of shape (batch,), if an example has them; 1 for those that
        have none.

    Raises:
        UserError: if a prompt is too long, or images and placeholders differ in number.
    """

    share_prefix: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        add_vusr(self.processor)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [with_decoded_images(example) for example in examples]
        chosen = [pair_as_conversation(example, "chosen") for example in examples]
        # The images are now in mode RGB and not converted a second time.
        examples = [with_images(example, pair.images) for example, pair in zip(examples, chosen, strict=True)]
        rejected = [pair_as_conversation(example, "rejected") for example in examples]
        encoded = encode(self.processor, chosen)
        rendered = encoded.rendered + [render_conversation(self.processor, pair.messages) for pair in rejected]
        rows, prefix_lengths = self._rows(chosen, encoded.batch, rendered)
        batch = dict(encoded.batch) if self.share_prefix else with_images_twice(encoded.batch)
        for name in rows[0]:
            fill = tokenizer_of(self.processor).pad_token_id if name == "input_ids" else 0
            batch[name] = pad([row[name][: self.max_length] for row in rows], fill, "right", self.pad_to_multiple_of)
        if self.share_prefix:
            batch["prefix_length"] = torch.tensor(prefix_lengths)
            lengths = batch["attention_mask"].sum(1).view(2, -1).sum(0) - batch["prefix_length"]
            batch["shared_length"] = int(lengths.max()) + 1
        for name in ("weight", "probability"):
            values = [example.get(name) for example in examples]
            if values.count(None) < len(values):
                batch[name] = torch.tensor([1.0 if value is None else value for value in values], dtype=torch.float32)
        return batch

    def _rows(
        self, chosen: list[ImageConversation], inputs: BatchFeature, rendered: list[RenderedConversation]
    ) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
        """
        The inputs of all chosen rows, then of all rejected ones, and how many tokens the two rows of each pair begin
        with in common. `inputs` are those of the chosen rows, `rendered` the texts of all. A rejected row needs only
        its text, because it has the same images.
        """
        lengths = inputs["attention_mask"].sum(1).tolist()
        texts = tokens_without_images(self.processor, rendered)
        pairs = zip(texts[: len(chosen)], texts[len(chosen) :], strict=True)
        chosen_rows, rejected_rows, prefix_lengths = [], [], []
        for index, (conversation, (chosen_text, rejected_text)) in enumerate(zip(chosen, pairs)):
            (chosen_ids, chosen_span), (rejected_ids, rejected_span) = chosen_text, rejected_text
            image_tokens = lengths[index] - len(chosen_ids)  # they are before the answers
            common = min(chosen_span.start, rejected_span.start)
            common = next((place for place in range(common) if chosen_ids[place] != rejected_ids[place]), common)
            prefix = common + image_tokens
            if inputs["input_ids"][index, prefix : lengths[index]].tolist() != chosen_ids[common:]:
                raise UserError(
                    f"Record {conversation.id!r}: {type(self.processor).__name__} tokenizes the text after an image "
                    "differently without the image, which is not supported. Remove the images, or train another model."
                )
            start = max(chosen_span.start, rejected_span.start) + image_tokens
            if self.max_length is not None and start >= self.max_length:
                raise UserError(
                    f"Record {conversation.id!r}: its prompt and image take {start} tokens, so no answer fits into "
                    f"max_length={self.max_length}. Raise max_length, or remove the record."
                )
            prompt = {name: inputs[name][index, :prefix] for name in inputs.keys() & set(TOKEN_INPUTS)}
            chosen_rows.append(_row(prompt, chosen_ids[common:], chosen_span, image_tokens))
            rejected_rows.append(_row(prompt, rejected_ids[common:], rejected_span, image_tokens))
            prefix_lengths.append(prefix)
        return chosen_rows + rejected_rows, prefix_lengths


def _row(prefix: dict[str, torch.Tensor], tail: list[int], answer: Span, image_tokens: int) -> dict[str, torch.Tensor]:
    """
    The inputs of one row of a pair.

    Args:
        prefix (`dict[str, torch.Tensor]`): Inputs of the tokens that both rows begin with, by name.
        tail (`list[int]`): The other tokens.
        answer (`Span`): The answer in the row without images.
        image_tokens (`int`): Tokens that images add before the answer.
    """
    row, prefix_length = {}, len(prefix["input_ids"])
    for name, own in prefix.items():
        # the other inputs of the last prompt token (text, not padding) hold for the answer
        of_tail = torch.tensor(tail) if name == "input_ids" else own[-1:].expand(len(tail), *own.shape[1:])
        row[name] = torch.cat([own, of_tail])
    row["completion_mask"] = torch.zeros(prefix_length + len(tail), dtype=torch.long)
    row["completion_mask"][answer.start + image_tokens : answer.end + image_tokens] = 1
    return row


def pair_as_conversation(example: dict[str, Any], key: str) -> ImageConversation:
    """The prompt of a preference pair followed by its answer `key`, `"chosen"` or `"rejected"`."""
    answer = example[key]
    if not answer or answer[-1]["role"] != "assistant" or not example["prompt"]:
        raise UserError(
            f"Record {example.get('id')!r}: `{key}` must end with an assistant message. `prompt` must not be empty."
        )
    return as_conversation(example, [*example["prompt"], *answer])


def usable_pairs(
    dataset: Dataset, processor: ProcessorMixin, max_length: int | None, name: str = "train"
) -> UsableExamples:
    """
    Reject the pairs that cannot be trained on, see [`usable_examples`]: also those with equal answers, and those of
    which less than half of an answer fits into `max_length`.
    """
    image_tokens = {}

    def check(example: dict[str, Any]) -> tuple[int, bool]:
        with reject_malformed():
            pair = [pair_as_conversation(example, key) for key in ("chosen", "rejected")]
        if len({text_of(conversation.messages[-1]["content"]).strip() for conversation in pair}) == 1:
            raise BadRecord("chosen_equals_rejected")
        rendered = [render_conversation(processor, conversation.messages) for conversation in pair]
        answers = [answer for _, answer in tokens_without_images(processor, rendered)]
        # What images add before an answer depends on their sizes alone, so one blank pair is enough for each.
        if (sizes := tuple(pair[0].images)) not in image_tokens:
            blank = replace(pair[0], images=[Image.new("RGB", size) for size in sizes])
            image_tokens[sizes] = encode(processor, [blank]).spans[0][-1].start - answers[0].start
        offset = image_tokens[sizes]
        answers = [Span(answer.start + offset, answer.end + offset, False) for answer in answers]
        # More than half of an answer is beyond the limit.
        if max_length is not None and any(answer.start + answer.end > 2 * max_length for answer in answers):
            raise BadRecord("too_long")
        ends = [answer.end if max_length is None else min(answer.end, max_length) for answer in answers]
        return sum(ends) - answers[0].start, ends != [answer.end for answer in answers]

    return usable_examples(dataset, check, max_length, name)

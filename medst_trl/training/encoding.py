# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn conversations into tokens: each is rendered and tokenized once, and offsets locate its questions and answers.

Both collators use this, so that a prompt has the same tokens in both stages.
"""

import bisect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import to_8_bit
from medst_trl.data.schema import text_of
from medst_trl.policy.families import tested_families
from medst_trl.policy.vusr import RenderedConversation, Span, adds_special_tokens, render_conversation, typed_parts

from .examples import images_of


IGNORED = -100  # label of a token that is no target
# Inputs with one entry per token, truncated together.
TOKEN_INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask", "labels",
    "question_mask", "completion_mask",
)  # fmt: skip


@dataclass(frozen=True)
class ImageConversation:
    """
    A conversation to be put in a batch.

    Args:
        id (`str`): Id of the example.
        messages (`list[dict]`): Messages whose content is a list of typed parts; image parts hold no image.
        images (`list[PIL.Image.Image]`): The images in the order of the image parts, in mode RGB.
        asked (`frozenset[int]`): Indices of the user messages that are `<vusr>` turns.
        prompt_length (`int`): Number of messages at the beginning that are no targets.
    """

    id: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    asked: frozenset[int] = frozenset()
    prompt_length: int = 0


class Encoded(NamedTuple):
    """
    A batch of conversations as tokens.

    Args:
        batch ([`~transformers.BatchFeature`]): As the processor returns it: `input_ids` and `attention_mask` of shape
            (batch, length), `pixel_values`, ...
        spans (`list[list[Span]]`): Tokens of the questions and answers of each row, in order.
        rendered (`list[RenderedConversation]`): Text of each row, image placeholders not expanded.
    """

    batch: BatchFeature
    spans: list[list[Span]]
    rendered: list[RenderedConversation]


def as_conversation(example: dict[str, Any], messages: list[dict[str, Any]] | None = None) -> ImageConversation:
    """
    An example's messages with its `images` (or `image`) and its `id` (a hash of the text if it has none).

    Args:
        example (`dict`):
            The example.
        messages (`list[dict]`, *optional*):
            Default: its `messages`, or `prompt` and `completion`.

    Raises:
        UserError: if images and image parts differ in number.
    """
    prompt = example["prompt"] if messages is None and "messages" not in example else []
    messages = messages or example.get("messages") or [*prompt, *example["completion"]]
    images = [to_8_bit(x).convert("RGB") if getattr(x, "mode", "RGB") != "RGB" else x for x in images_of(example)]
    example_id = id_of(example, messages)
    plain = []
    for message in messages:
        content = message["content"]
        plain.append({**message, "content": content if isinstance(content, str) else typed_parts(content)})
    try:
        prepared = prepare_multimodal_messages(plain, images=images)
    except ValueError as error:
        raise UserError(f"Record {example_id!r} cannot be collated: {error}") from error
    # The images are kept beside the messages: the template needs only their positions.
    bare = [
        {**message, "content": [{"type": "image"} if "image" in part else part for part in message["content"]]}
        for message in prepared
    ]
    return ImageConversation(example_id, bare, images, prompt_length=len(prompt))


def id_of(example: dict[str, Any], messages: list[dict[str, Any]] | None = None) -> str:
    """The id of an example, or a hash of the text of its `messages` if it has none."""
    if example.get("id"):
        return str(example["id"])
    texts = [text_of(message["content"]) for message in messages or example.get("messages") or ()]
    return sha256(repr(texts).encode()).hexdigest()


def encode(
    processor: ProcessorMixin, conversations: Collection[ImageConversation], pad_to_multiple_of: int | None = None
) -> Encoded:
    """
    Render, tokenize and pad (on the right) a batch of conversations.

    Raises:
        UserError: if the template cannot render one, or the processor does not report where it expands images.
    """
    rendered = [render_conversation(processor, c.messages, c.asked) for c in conversations]
    images = [conversation.images for conversation in conversations]
    batch = processor(
        text=[conversation.text for conversation in rendered],
        images=images if any(images) else None,
        padding=True,
        padding_side="right",
        pad_to_multiple_of=pad_to_multiple_of,
        add_special_tokens=adds_special_tokens(processor, rendered[0].text),
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
    )
    offsets = [torch.tensor(row) for row in batch.pop("offset_mapping")]
    replaced = batch.pop("text_replacement_offsets", None) or [[]] * len(rendered)
    # Converted only now: Idefics3 would try to make a tensor of the replacement offsets too.
    batch.convert_to_tensors("pt")
    spans = []
    rows = zip(batch["input_ids"], rendered, offsets, replaced, strict=True)
    for ids, conversation, row_offsets, row_replaced in rows:
        _check_offsets(processor, conversation.text, row_offsets, row_replaced, len(ids))
        spans.append(_token_spans(conversation, row_offsets, row_replaced))
    return Encoded(batch, spans, rendered)


def tokens_without_images(
    processor: ProcessorMixin, rendered: list[RenderedConversation]
) -> list[tuple[list[int], Span]]:
    """The tokens of rendered conversations, each image a placeholder, and the span of their last answers."""
    encoded = processor.tokenizer(
        [conversation.text for conversation in rendered],
        add_special_tokens=adds_special_tokens(processor, rendered[0].text),
        return_offsets_mapping=True,
    )
    rows = zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
    return [(ids, _token_spans(conversation, torch.tensor(offsets), [])[-1]) for ids, offsets, conversation in rows]


def length_counter(processor: ProcessorMixin) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """
    Return a function that counts the tokens of a conversation approximately, at the cost of one tokenization.

    Its argument is an example with the sizes of its images in their place. It returns the number of tokens without
    `<vusr>` tokens, which are drawn later, and a high estimate of it with all image tokens. The first is that of the
    text alone if the processor cannot count image tokens: enough to group by.
    """
    count = getattr(processor, "_get_num_multimodal_tokens", None)

    @cache
    def image_tokens(width: int, height: int) -> int:
        if count is not None:
            return count(image_sizes=[(height, width)])["num_image_tokens"][0]
        message = {"role": "user", "content": [{"type": "image"}]}
        blank = ImageConversation("", [message], [Image.new("RGB", (width, height))])
        return encode(processor, [blank]).batch["input_ids"].shape[1]

    def length_of(example: dict[str, Any]) -> tuple[int, int]:
        conversation = as_conversation(example)
        text = render_conversation(processor, conversation.messages).text
        length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        of_images = sum(image_tokens(*size) for size in conversation.images)
        return length if count is None else length + of_images, int(1.25 * length) + of_images

    return length_of


def _check_offsets(
    processor: ProcessorMixin, text: str, offsets: torch.Tensor, replaced: list[dict[str, Any]], length: int
) -> None:
    """Refuse a processor that makes the text longer without reporting where: labels would land on wrong tokens."""
    gained = replaced[-1]["new_span"][1] - replaced[-1]["span"][1] if replaced else 0
    if len(offsets) != length or int(offsets.max()) > len(text) + gained:
        raise UserError(
            f"{type(processor).__name__} expands image placeholders without reporting where "
            "(`return_text_replacement_offsets`), so questions and answers cannot be located in its tokens. This "
            f"family cannot be trained with the installed transformers. {tested_families()}"
        )


def _token_spans(
    conversation: RenderedConversation, offsets: torch.Tensor, replaced: list[dict[str, Any]]
) -> list[Span]:
    """The tokens of a row's questions and answers after image placeholders are expanded."""
    placeholder_ends = [item["span"][1] for item in replaced]
    gained = [0] + [item["new_span"][1] - item["span"][1] for item in replaced]
    starts, ends = offsets.unbind(-1)
    spans = []
    for span in conversation.spans:
        start, end = (char + gained[bisect.bisect_right(placeholder_ends, char)] for char in span[:2])
        tokens = ((starts < end) & (ends > start)).nonzero()  # padding has width zero and matches nothing
        spans.append(Span(int(tokens[0]), int(tokens[-1]) + 1, span.is_question))
    return spans

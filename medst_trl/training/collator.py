# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""TRL's vision collator, plus the questions: labels on answers and, in `<vusr>` turns, on the questions too."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from medst_trl.base.errors import UserError
from medst_trl.data.source import BadRecord
from medst_trl.policy.vusr import Span, add_vusr, can_be_asked, tokenizer_of

from .encoding import IGNORED, TOKEN_INPUTS, ImageConversation, as_conversation, encode, id_of, length_counter
from .examples import (
    DecodesImages,
    UnreadableImage,
    UsableExamples,
    check_image,
    reject_malformed,
    usable_examples,
    with_decoded_images,
)
from .packing import pack


@dataclass
class DataCollatorForSelfQuestioning(DecodesImages, DataCollatorForVisionLanguageModeling):
    """
    Data collator of self-questioning (STLLaVA-Med, https://huggingface.co/papers/2406.19973).

    In every conversation, some user turns become `<vusr>` turns, in which the question is a training target. They are
    sampled again in each epoch, for each (seed, epoch, example id, turn). Targets are every assistant answer with its
    terminator and, in a `<vusr>` turn, the question with its terminator; never the token itself, role tags, the system
    prompt, image positions or padding. Text from data that spells a control token is neutralized.

    A conversation longer than `max_length` (counted after image placeholders are expanded) ends after the last answer
    that fits. It is rejected if its first answer does not fit, if it has nothing to train, or if an image cannot be
    read or has an aspect ratio that the processor does not take.

    Each example has `messages` (role and content, optionally `vusr: true` on user turns that are always asked),
    `images` (a list, may be empty, decoded or as `datasets` stores them) and `id` (a hash of the text if missing).
    With `prompt` and `completion` instead of `messages`, only the answers of the completion are targets.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor; it gets the `<vusr>` token if it has none yet, see [`add_vusr`].
        max_length (`int`, *optional*):
            Longest sequence in tokens, image tokens included. `None` for no limit.
        sq_ratio (`float`, *optional*, defaults to `0.5`):
            Fraction of the eligible user turns that become `<vusr>` turns. `1.0` is the paper's setting.
        sq_first_turn (`bool`, *optional*, defaults to `True`):
            Whether the first user turn is eligible. The paper: no.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        pad_to_multiple_of (`int`, *optional*):
            If set, sequences are padded to a multiple of it.
        packing (`float`, *optional*):
            If set, conversations of a batch are packed into fewer rows, given the model's [`packing_cost`]:
            `position_ids` and `token_mask` then replace `attention_mask`, see [`pack`].

    Returns of a call:
        `dict`: TRL's `input_ids`, `attention_mask`, `labels` of shape (batch, length), `pixel_values` and the
        processor's other outputs, and `question_mask` (batch, length): `True` where a label belongs to a question. If
        there are any, `rejected` maps the ids of rejected examples to the reason (`too_long`, `nothing_to_train`,
        `unreadable_image`, `extreme_aspect_ratio`).

    Raises:
        UserError: if an example's images and placeholders differ in number, or the template cannot render it.

    Example:
    ```python
    >>> collator = DataCollatorForSelfQuestioning(processor, sq_ratio=1.0)
    >>> batch = collator([{"id": "1", "images": [image], "messages": messages}])
    >>> question_mask = batch.pop("question_mask")
    ```
    """

    sq_ratio: float = field(default=0.5, kw_only=True)
    sq_first_turn: bool = field(default=True, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    packing: float | None = field(default=None, kw_only=True)

    def __post_init__(self):
        if not 0 <= self.sq_ratio <= 1:
            raise UserError(f"sq_ratio is {self.sq_ratio}. It must be between 0 and 1.")
        add_vusr(self.processor)
        # In shared memory, so that persistent workers of a data loader see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sample the `<vusr>` turns of another epoch from now on, in data loader workers too."""
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> "DataCollatorForSelfQuestioning":
        """A padding collator with the same settings that always samples as in epoch 0."""
        # The Trainer weights evaluation batches by their rows, which must be examples.
        return replace(self, packing=None)

    def asked_turns(self, example_id: str, messages: list[dict[str, Any]]) -> frozenset[int]:
        """
        The user messages that are `<vusr>` turns in this epoch.

        Args:
            example_id (`str`):
                Id of the example.
            messages (`list[dict[str, Any]]`):
                Its messages.

        Returns:
            `frozenset[int]`: Their indices.
        """
        asked, epoch = set(), int(self._epoch)
        turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
        for turn, index in enumerate(turns):
            if not can_be_asked(messages[index]):
                continue
            drawn = random.Random(f"{self.seed}/{epoch}/{example_id}/{turn}").random() < self.sq_ratio
            if messages[index].get("vusr") or (drawn and (turn > 0 or self.sq_first_turn)):
                asked.add(index)
        return frozenset(asked)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        readable, rejected = [], {}
        for example in examples:
            try:
                decoded = with_decoded_images(example)
                for image in decoded["images"]:
                    check_image(image)
            except UnreadableImage as error:
                rejected[id_of(example)] = error.reason
            else:
                readable.append(self._conversation(decoded))
        conversations = [conversation for conversation in readable if _targets(conversation)]
        rejected |= {conversation.id: "nothing_to_train" for conversation in readable if not _targets(conversation)}
        batch, spans, fitting = self._encode_fitting(conversations)
        rejected |= {old.id: "too_long" for old, new in zip(conversations, fitting, strict=True) if new is None}
        self._label(batch, spans)
        if self.packing is not None:
            images = [len(conversation.images) for conversation in fitting if conversation is not None]
            pack(batch, self.packing, images, tokenizer_of(self.processor).pad_token_id, self.pad_to_multiple_of)
        if rejected:
            batch["rejected"] = rejected
        return batch

    def _encode_fitting(
        self, conversations: list[ImageConversation | None]
    ) -> tuple[dict[str, Any], list[list[Span]], list[ImageConversation | None]]:
        """Encode each conversation up to the last answer that fits. Those without one become `None`."""
        kept = [conversation for conversation in conversations if conversation is not None]
        if not kept:
            # One token without a label: a rank whose whole batch was rejected still takes part in the step.
            token = torch.tensor([[tokenizer_of(self.processor).eos_token_id]])
            return {"input_ids": token, "attention_mask": torch.ones_like(token)}, [[]], conversations
        batch, spans, _ = encode(self.processor, kept, self.pad_to_multiple_of)
        spans = [row[-len(_targets(conversation)) :] for row, conversation in zip(spans, kept, strict=True)]
        fitted = map(self._fit, kept, spans)
        fitting = [None if conversation is None else next(fitted) for conversation in conversations]
        if fitting == conversations:
            return batch, spans, conversations
        return self._encode_fitting(fitting)  # the batch without what did not fit

    def _conversation(self, example: dict[str, Any]) -> ImageConversation:
        conversation = as_conversation(example)
        if conversation.prompt_length == 0:
            asked = self.asked_turns(conversation.id, conversation.messages)
            conversation = replace(conversation, asked=asked)
        # a last unanswered question trains nothing
        return _until(conversation, max(_targets(conversation), default=-1) + 1)

    def _fit(self, conversation: ImageConversation, targets: list[Span]) -> ImageConversation | None:
        """The conversation up to the last answer that ends within `max_length`; `None` if not even one does."""
        if self.max_length is None or not targets or targets[-1].end <= self.max_length:
            return conversation
        ends = zip(_targets(conversation), targets, strict=True)
        fitting = [index for index, span in ends if span.end <= self.max_length and not span.is_question]
        return _until(conversation, fitting[-1] + 1) if fitting else None

    def _label(self, batch: dict[str, Any], spans_of_rows: list[list[Span]]) -> None:
        """Add `labels` and `question_mask` to a batch, and cut it to `max_length`, in place."""
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        batch["question_mask"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for row, spans in enumerate(spans_of_rows):
            for start, end, is_question in spans:
                batch["labels"][row, start:end] = batch["input_ids"][row, start:end]
                batch["question_mask"][row, start:end] |= is_question
        if self.max_length is not None and batch["attention_mask"].sum(1).max() > self.max_length:
            for name in batch.keys() & set(TOKEN_INPUTS):  # only the template's closing text is after the last target
                batch[name] = batch[name][:, : self.max_length]


def usable_conversations(
    dataset: Any, collator: DataCollatorForSelfQuestioning, name: str = "train"
) -> UsableExamples:
    """
    Reject the conversations that cannot be trained on, see [`usable_examples`]. Each is checked as if every turn that
    can be asked were asked, which makes it longest.
    """
    longest = replace(collator, packing=None, sq_ratio=float(collator.sq_ratio > 0))
    max_length, length_of = collator.max_length, length_counter(collator.processor)

    def check(example: dict[str, Any]) -> tuple[int, bool]:
        with reject_malformed():
            conversation = longest._conversation(example)
        if not _targets(conversation):
            raise BadRecord("nothing_to_train")
        length, estimate = length_of(example)
        # Most conversations are far from the limit. The others are processed with blank images.
        if max_length is None or estimate + 16 * len(conversation.messages) + 100 <= max_length:
            return length, False
        conversation = replace(conversation, images=[Image.new("RGB", size) for size in conversation.images])
        _, _, [fitting] = longest._encode_fitting([conversation])
        if fitting is None:
            raise BadRecord("too_long")
        return min(length, max_length), fitting != conversation

    return usable_examples(dataset, check, max_length, name)


def _targets(conversation: ImageConversation) -> list[int]:
    """Indices of the messages that are training targets, in order."""
    after_prompt = list(enumerate(conversation.messages))[conversation.prompt_length :]
    return [i for i, message in after_prompt if i in conversation.asked or message["role"] == "assistant"]


def _until(conversation: ImageConversation, end: int) -> ImageConversation:
    """The first `end` messages and their images."""
    kept = conversation.messages[:end]
    images = sum(part["type"] == "image" for message in kept for part in message["content"])
    return replace(conversation, messages=kept, images=conversation.images[:images])

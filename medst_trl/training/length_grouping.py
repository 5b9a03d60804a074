# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of examples of about equal length, so that little of a batch is padding.

transformers' own grouping wants a column of lengths. Adding one to a dataset from which rows were selected copies all
its images, so the lengths stay beside it.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from medst_trl.policy.spans import render_conversation
from medst_trl.policy.vusr import tokenizer_of

from .encoding import as_conversation
from .example_images import UnreadableImage, image_size, images_of, with_images
from .input_pipeline import with_stored_images


if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import ProcessorMixin

logger = get_logger(__name__)

UNREADABLE = 224  # side taken for an image without a readable head, in pixels: its example will be left out


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """
    [`~transformers.trainer_pt_utils.LengthGroupedSampler`] whose order follows from seed and epoch alone.

    Without a generator of its own it draws from torch's global one, which may differ between ranks: an example would
    be trained twice and another not at all. It is told the epoch as accelerate's seeded random sampler is.

    Args:
        batch_size (`int`):
            Number of examples to group, that of one optimizer step.
        lengths (`list[int]`):
            Length of each example of the dataset, in tokens.
        seed (`int`):
            Seed of the first epoch's order.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class GroupsByLength:
    """
    Mixin for a [`~transformers.Trainer`] that holds `train_lengths`, the number of tokens of each training example.

    With `train_sampling_strategy="group_by_length"` it trains on batches of examples of about equal length, and in
    random order where the lengths are not those of its dataset. With any other strategy, and on a stream, the
    Trainer's own sampler stays.
    """

    train_lengths: Sequence[int] | None = None
    _length_sampler: SeededLengthGroupedSampler | None = None

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        if self.train_lengths is None or len(self.train_lengths) != len(dataset):
            logger.warning(
                f"group_by_length: the lengths of the {len(dataset):,} training examples are not known, because they "
                "are not those the trainer was made with. They are trained on in random order."
            )
            return RandomSampler(dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # That of a whole optimizer step: ranks do not wait for one with longer examples, and the order is the same for
        # any number of them. The Trainer's own grouping leaves the number of ranks out.
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._length_sampler = SeededLengthGroupedSampler(batch_size, self.train_lengths, seed)
        return self._length_sampler

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        # The Trainer would group these too and ask for their lengths; this is what it does with every other strategy.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_train_dataloader(self) -> "DataLoader":
        self._length_sampler = None  # that of another dataset, maybe
        dataloader = super().get_train_dataloader()
        if self._length_sampler is not None:
            # As accelerate does with its own seeded sampler. Otherwise several ranks that resume within an epoch are
            # not told its number: https://github.com/modelscope/ms-swift/pull/9658
            dataloader.set_sampler(self._length_sampler)
        return dataloader


def conversation_lengths(
    dataset: Dataset, processor: "ProcessorMixin", max_length: int | None = None
) -> list[int] | None:
    """
    About how many tokens each conversation has, at the price of one tokenisation; no image is decoded.

    Args:
        dataset ([`~datasets.Dataset`]):
            Conversations, see [`DataCollatorForSelfQuestioning`].
        processor ([`~transformers.ProcessorMixin`]):
            Processor prepared by [`add_vusr`].
        max_length (`int`, *optional*):
            Where conversations end at the latest.

    Returns:
        `list[int]` or `None`: The lengths, without `<vusr>` tokens, which are drawn later; `None` for what is not a
        dataset with a length.

    Raises:
        UserError: if an example's images and placeholders differ in number, or the template cannot render it.
    """
    if not has_length(dataset) or isinstance(dataset, dict):
        return None

    @cache
    def image_tokens(height: int, width: int) -> int:
        count = getattr(processor, "_get_num_multimodal_tokens", None)
        # Without it, an image is read by cross-attention, or the length is that of the text: good enough to group by.
        return count(image_sizes=[(height, width)])["num_image_tokens"][0] if count is not None else 0

    lengths, tokenizer = [], tokenizer_of(processor)
    for examples in _chunks(with_stored_images(dataset), 256):
        conversations = [as_conversation(_with_sizes(example), _messages(example)) for example in examples]
        texts = [render_conversation(processor, conversation.messages).text for conversation in conversations]
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for ids, conversation in zip(tokens, conversations, strict=True):
            length = len(ids) + sum(image_tokens(*size) for size in conversation.images)
            lengths.append(length if max_length is None else min(length, max_length))
    return lengths


def _messages(example: dict[str, Any]) -> list[dict[str, Any]]:
    return example["messages"] if "messages" in example else [*example["prompt"], *example["completion"]]


def _chunks(examples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    examples = iter(examples)
    while chunk := list(islice(examples, size)):
        yield chunk


def _with_sizes(example: dict[str, Any]) -> dict[str, Any]:
    """An example with (height, width) of its images in their place."""
    sizes = []
    for image in images_of(example):
        try:
            sizes.append(image_size(image)[::-1])
        except UnreadableImage:  # the collator will set its example aside
            sizes.append((UNREADABLE, UNREADABLE))
    return with_images(example, sizes)

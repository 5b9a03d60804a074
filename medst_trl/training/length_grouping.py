# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of examples of about equal length, so that little of a batch is padding.

transformers' own grouping wants a column of lengths. Adding one to a dataset from which rows were selected copies all
its images, so the lengths stay beside it.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler


if TYPE_CHECKING:
    from torch.utils.data import DataLoader


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

    With `train_sampling_strategy="group_by_length"` it trains on batches of examples of about equal length. Without
    lengths, and with any other strategy, the Trainer's own sampler stays.
    """

    train_lengths: Sequence[int] | None = None
    _length_sampler: SeededLengthGroupedSampler | None = None

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length" or self.train_lengths is None:
            return super()._get_train_sampler(train_dataset)
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
        dataloader = super().get_train_dataloader()
        if self._length_sampler is not None:
            # As accelerate does with its own seeded sampler. Otherwise several ranks that resume within an epoch are
            # not told its number: https://github.com/modelscope/ms-swift/pull/9658
            dataloader.set_sampler(self._length_sampler)
        return dataloader

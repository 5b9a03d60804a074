# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import random
from itertools import chain

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from medst_trl.training.length_grouping import GroupsByLength, SeededLengthGroupedSampler


LENGTHS = [random.Random(i).randint(1, 100) for i in range(66)]


class Numbers(Dataset):
    def __init__(self, count=None):
        self.count = count or len(LENGTHS)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": torch.tensor(float(index))}


class Memory(torch.nn.Module):
    """Remembers the examples of each batch it is given."""

    def __init__(self, dies_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.dies_after = dies_after

    def forward(self, x):
        if len(self.seen) == self.dies_after:
            raise KeyboardInterrupt
        self.seen.append(x.int().tolist())
        return {"loss": self.weight * x.mean()}


class GroupingTrainer(GroupsByLength, Trainer):
    train_lengths = LENGTHS


def _trainer(output_dir, model=None, kind=GroupingTrainer, **settings):
    settings = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 4, "num_train_epochs": 3, "report_to": "none",
        "train_sampling_strategy": "group_by_length", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
    } | settings  # fmt: skip
    return kind(model or Memory(), TrainingArguments(**settings), train_dataset=Numbers(), eval_dataset=Numbers())


def _padding(batches):
    return sum(sum(max(LENGTHS[i] for i in batch) - LENGTHS[i] for i in batch) for batch in batches)


def test_every_example_once_an_epoch_with_little_padding(tmp_path):
    grouped, shuffled = _trainer(tmp_path), _trainer(tmp_path, train_sampling_strategy="random")
    for trainer in (grouped, shuffled):
        trainer.train()
    per_epoch = -(-len(LENGTHS) // 4)
    epochs = [grouped.model.seen[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    for epoch in epochs:
        assert sorted(chain(*epoch)) == list(range(len(LENGTHS)))
        assert _padding(epoch) < 0.4 * _padding(shuffled.model.seen[:per_epoch])
    assert epochs[0] != epochs[1] != epochs[2]


def test_one_step_of_several_micro_batches_is_a_group(tmp_path):
    trainer = _trainer(tmp_path, gradient_accumulation_steps=3)
    assert trainer._get_train_sampler().batch_size == 12


def test_the_order_follows_from_the_seed_and_not_from_other_draws(tmp_path):
    def order(**settings):
        trainer = _trainer(tmp_path, num_train_epochs=1, **settings)
        torch.rand(settings["seed"])
        return [batch["x"].tolist() for batch in trainer.get_train_dataloader()]

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) != order(seed=2)


@pytest.mark.parametrize("dies_after", [7, 25], ids=["first epoch", "second epoch"])
def test_a_resumed_run_goes_on_in_the_same_order(tmp_path, dies_after):
    whole = _trainer(tmp_path / "whole")
    whole.train()
    settings = {"save_strategy": "steps", "save_steps": 3}
    killed = _trainer(tmp_path / "killed", Memory(dies_after), **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = _trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    saved = dies_after // 3 * 3
    assert killed.model.seen[:saved] + resumed.model.seen == whole.model.seen


@pytest.mark.parametrize("skipped", [0, 2])
def test_two_ranks_share_each_epoch_and_resume_it(tmp_path, skipped):
    def batches(rank, epoch, skip):
        trainer = _trainer(tmp_path)
        torch.manual_seed(rank)  # what else a rank has drawn must not matter
        prepare = trainer.accelerator.prepare
        trainer.accelerator.prepare = lambda loader: prepare_data_loader(
            loader, num_processes=2, process_index=rank, use_seedable_sampler=True, even_batches=False
        )
        try:
            loader = trainer.get_train_dataloader()
        finally:
            trainer.accelerator.prepare = prepare
        loader = skip_first_batches(loader, skip) if skip else loader
        loader.set_epoch(epoch)
        return [batch["x"].int().tolist() for batch in loader]

    for epoch in (0, 1):
        ranks = [batches(rank, epoch, 0) for rank in (0, 1)]
        assert sorted(chain(*ranks[0], *ranks[1])) == list(range(len(LENGTHS)))
        assert batches(0, epoch, skipped) == ranks[0][skipped:]
    assert batches(0, 0, 0) != batches(0, 1, 0)


def test_evaluation_keeps_its_order_and_other_strategies_their_sampler(tmp_path):
    trainer = _trainer(tmp_path)
    assert [x for b in trainer.get_eval_dataloader() for x in b["x"].int().tolist()] == list(range(len(LENGTHS)))
    for strategy in ("random", "sequential"):
        ours = _trainer(tmp_path, train_sampling_strategy=strategy)._get_train_sampler()
        stock = _trainer(tmp_path, kind=Trainer, train_sampling_strategy=strategy)._get_train_sampler()
        assert type(ours) is type(stock) is not SeededLengthGroupedSampler


@pytest.mark.parametrize("count", [20, 90])
def test_another_dataset_is_trained_on_whole_and_in_the_random_order(tmp_path, caplog, count):
    def trained(settings):
        trainer = _trainer(tmp_path, num_train_epochs=1, **settings)
        list(trainer.get_train_dataloader())  # of the first dataset
        trainer.train_dataset = Numbers(count)
        trainer.train()
        return trainer.model.seen

    seen = trained({})
    assert sorted(chain(*seen)) == list(range(count))
    assert len([r for r in caplog.records if "group_by_length: the lengths" in r.message]) == 1
    assert seen == trained({"train_sampling_strategy": "random"})
    assert list(_trainer(tmp_path)._get_train_sampler(Numbers(count))) != list(range(count))

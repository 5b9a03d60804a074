# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import multiprocessing
import pickle
import random
from collections import Counter
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from datasets.features.image import Image as ImageFeature
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import CLIPImageProcessorPil, Trainer, TrainingArguments

from medst_trl.data.schema import with_stored_images
from medst_trl.training import settings, trainer
from medst_trl.training.collator import DataCollatorForSelfQuestioning, usable_conversations
from medst_trl.training.settings import default_workers
from medst_trl.training.sft import SelfQuestioningConfig
from medst_trl.training.trainer import GroupsByLength, SeededLengthGroupedSampler


class Clock:
    """Clock that the test advances."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        # Not `time.monotonic` itself: workers of an earlier trainer may be ended meanwhile, within some seconds.
        monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: self.now))

    def slowed_down(self, function, seconds):
        def call(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("settings", [{}, {"train_sampling_strategy": "group_by_length"}, {"pack_sequences": True}])
def test_every_image_is_decoded_and_resized_once_per_epoch(tmp_path, monkeypatch, settings):
    rows = [tiny_run.conversation(i, with_image=i % 3 != 1) for i in range(9)]
    counts = Counter()

    def counted(cls, name):
        method = getattr(cls, name)

        def call(self, value, *args, **kwargs):
            counts[name] += len(value) if isinstance(value, list) else 1
            return method(self, value, *args, **kwargs)

        monkeypatch.setattr(cls, name, call)

    trainer = tiny_run.make_trainer(tmp_path, rows=rows, max_steps=-1, num_train_epochs=3, max_length=512, **settings)
    assert trainer.args.dataloader_num_workers == 0
    counted(ImageFeature, "decode_example")
    counted(CLIPImageProcessorPil, "_preprocess")
    trainer.train()
    assert counts == {"decode_example": 3 * 6, "_preprocess": 3 * 6}


def test_stored_and_decoded_images_make_the_same_batch():
    collator = DataCollatorForSelfQuestioning(tiny_run.small_policy()[1])
    dataset = Dataset.from_list([tiny_run.conversation(i, with_image=i != 2) for i in range(4)])
    shuffled = dataset.select([3, 0, 2, 1])
    stored = with_stored_images(shuffled)
    assert isinstance(stored[0]["images"][0], dict) and not isinstance(shuffled[0]["images"][0], dict)
    ours, theirs = (collator(list(rows)) for rows in (stored, shuffled))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one = dataset.select([0]).map(lambda row: {"image": row["images"][0]}, remove_columns="images")
    assert torch.equal(collator(list(with_stored_images(one)))["pixel_values"], collator([dataset[0]])["pixel_values"])


def test_lengths_are_computed_without_decoding_an_image(monkeypatch):
    _, processor = tiny_run.small_policy()
    rows = [tiny_run.conversation(i, turns=1 + i % 4, with_image=i % 3 != 1) for i in range(40)]
    dataset = Dataset.from_list(rows).select(range(39, 2, -1))  # with an indices mapping
    collator, shorter = (DataCollatorForSelfQuestioning(processor, sq_ratio=0.0, max_length=n) for n in (None, 60))
    expected = [collator([dataset[i]])["input_ids"].shape[1] for i in range(len(dataset))]
    monkeypatch.setattr(ImageFeature, "decode_example", lambda *args, **kwargs: pytest.fail("decoded"))
    lengths = usable_conversations(dataset, collator).lengths
    assert all(abs(a - b) <= 2 for a, b in zip(lengths, expected, strict=True))
    assert max(usable_conversations(dataset, shorter).lengths) == 60
    assert usable_conversations(list(rows), collator).lengths[::-1][: len(lengths)] == lengths


def test_an_image_without_a_header_does_not_affect_other_lengths():
    rows = [tiny_run.conversation(number, turns=number) for number in (1, 2, 3)]
    collator = DataCollatorForSelfQuestioning(tiny_run.small_policy()[1])
    expected = usable_conversations(rows, collator).lengths
    rows[1]["images"] = [{"bytes": b"not an image", "path": None}]
    usable = usable_conversations(rows, collator)
    assert usable.lengths == [expected[0], expected[2]] and usable.rejected_records == {"r2": "unreadable_image"}
    assert [row["id"] for row in usable.dataset] == ["r1", "r3"]


@pytest.mark.parametrize(
    ("method", "packing"),
    [("fork", None), ("fork", 0.001), pytest.param("spawn", 0.001, marks=pytest.mark.slow)],
)
def test_workers_make_the_same_batches(method, packing):
    collator = DataCollatorForSelfQuestioning(tiny_run.small_policy()[1], packing=packing)
    dataset = Dataset.from_list([tiny_run.conversation(i, turns=1 + i % 3) for i in range(8)])
    context = multiprocessing.get_context(method)
    in_process, in_workers = (
        list(
            DataLoader(dataset, 4, collate_fn=collator, num_workers=n, multiprocessing_context=context if n else None)
        )
        for n in (0, 2)
    )
    for ours, theirs in zip(in_process, in_workers, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_collator_can_be_pickled():
    collator = DataCollatorForSelfQuestioning(tiny_run.small_policy()[1], sq_ratio=0.5)
    collator.set_epoch(3)
    rows = [tiny_run.conversation(i, turns=3) for i in range(4)]
    ours, theirs = collator(rows), pickle.loads(pickle.dumps(replace(collator)))
    theirs.set_epoch(3)
    assert torch.equal(ours["question_mask"], theirs(rows)["question_mask"])


def test_two_workers_train_the_same_as_none(tmp_path):
    logs = []
    for workers in (0, 2):
        trainer = tiny_run.make_trainer(
            tmp_path, max_steps=5, dataloader_num_workers=workers, train_sampling_strategy="group_by_length",
            dataloader_persistent_workers=workers > 0, lora_dropout=0.0,
        )  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[:-1])
        assert all(0 <= entry["data_wait"] <= 1 for entry in logs[-1])
    for ours, theirs in zip(*logs, strict=True):
        assert {**ours, "data_wait": 0} == {**theirs, "data_wait": 0}


@pytest.mark.parametrize(("accelerator", "use_cpu"), [(True, False), (True, True), (False, False)])
def test_workers_are_used_only_with_an_accelerator(monkeypatch, tmp_path, accelerator, use_cpu):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    args = SelfQuestioningConfig(output_dir=str(tmp_path), report_to="none", use_cpu=use_cpu)
    starts = accelerator and not use_cpu
    assert args.dataloader_num_workers == (8 if starts else 0)
    assert args.dataloader_persistent_workers is starts


def test_processes_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers() == 4


def test_explicit_worker_settings_are_kept(tmp_path):
    args = SelfQuestioningConfig(
        output_dir=str(tmp_path), dataloader_num_workers=3, dataloader_persistent_workers=False, report_to="none"
    )
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (3, False)
    args = SelfQuestioningConfig(output_dir=str(tmp_path), report_to="none")
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (0, False)


def test_data_wait_is_the_fraction_of_time_spent_waiting(tmp_path, monkeypatch):
    clock, own = Clock(monkeypatch), tiny_run.make_trainer(tmp_path)
    own._waited = 0.0
    batches = iter(map(clock.slowed_down(lambda x: x, 3.0), range(3)))
    for waited in (3, 6):
        assert next(own._timed(batches)) is not None
        clock.now += 1.0
        assert own._waited == waited
    assert list(own._timed(batches)) == [2] and list(own._timed(batches)) == []
    assert own._waited == 9


@pytest.mark.parametrize("seconds", [0.5, 0.01])
def test_the_log_has_the_time_spent_waiting_for_data(tmp_path, monkeypatch, seconds):
    clock = Clock(monkeypatch)
    trainer = tiny_run.make_trainer(tmp_path, max_steps=9)
    trainer.data_collator.torch_call = clock.slowed_down(trainer.data_collator.torch_call, seconds)
    trainer.training_step = clock.slowed_down(trainer.training_step, 1.0)
    trainer.train()
    shares = [entry["data_wait"] for entry in trainer.state.log_history[:-1]]
    assert len(shares) == 9 and sum(shares) / 9 == pytest.approx(seconds / (1 + seconds), abs=0.03)


def test_a_resumed_run_keeps_the_examples_that_were_rejected_before(tmp_path):
    rows = [tiny_run.conversation(number) for number in range(8)]
    rows[5] |= {"id": "id with a line\u2028separator", "messages": tiny_run.conversation(5, turns=40)["messages"]}
    rows[5]["messages"][1]["content"] = tiny_run.text("very " * 200)
    for steps in (1, 2):
        trainer = tiny_run.train(
            tmp_path, rows=rows, max_length=100, max_steps=steps, save_strategy="steps", save_steps=1
        )
        rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").open(encoding="utf-8")]
        assert [row["reason"] for row in rejected] == ["too_long"] and trainer.state.global_step == steps


LENGTHS = [random.Random(i).randint(1, 100) for i in range(66)]


class Numbers(TorchDataset):
    def __init__(self, count=None):
        self.count = count or len(LENGTHS)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": torch.tensor(float(index))}


class BatchRecorder(torch.nn.Module):
    """Model that records the examples of each batch."""

    def __init__(self, interrupt_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.interrupt_after = interrupt_after

    def forward(self, x):
        if len(self.seen) == self.interrupt_after:
            raise KeyboardInterrupt
        self.seen.append(x.int().tolist())
        return {"loss": self.weight * x.mean()}


class GroupingTrainer(GroupsByLength, Trainer):
    train_lengths = LENGTHS


def grouping_trainer(output_dir, model=None, trainer_class=GroupingTrainer, **settings):
    settings = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 4, "num_train_epochs": 3, "report_to": "none",
        "train_sampling_strategy": "group_by_length", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
    } | settings  # fmt: skip
    return trainer_class(
        model or BatchRecorder(), TrainingArguments(**settings), train_dataset=Numbers(), eval_dataset=Numbers()
    )


def padding_of(batches):
    return sum(sum(max(LENGTHS[i] for i in batch) - LENGTHS[i] for i in batch) for batch in batches)


def test_every_example_appears_once_per_epoch_with_little_padding(tmp_path):
    grouped, shuffled = grouping_trainer(tmp_path), grouping_trainer(tmp_path, train_sampling_strategy="random")
    for each in (grouped, shuffled):
        each.train()
    per_epoch = -(-len(LENGTHS) // 4)
    epochs = [grouped.model.seen[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    for epoch in epochs:
        assert sorted(chain(*epoch)) == list(range(len(LENGTHS)))
        assert padding_of(epoch) < 0.4 * padding_of(shuffled.model.seen[:per_epoch])
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_micro_batches_of_a_step_form_one_group(tmp_path):
    trainer = grouping_trainer(tmp_path, gradient_accumulation_steps=3)
    assert trainer._get_train_sampler().batch_size == 12


def test_the_order_depends_only_on_the_seed(tmp_path):
    def order(**settings):
        trainer = grouping_trainer(tmp_path, num_train_epochs=1, **settings)
        torch.rand(settings["seed"])
        return [batch["x"].tolist() for batch in trainer.get_train_dataloader()]

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) != order(seed=2)


@pytest.mark.parametrize("interrupt_after", [7, 25], ids=["first epoch", "second epoch"])
def test_a_resumed_run_continues_in_the_same_order(tmp_path, interrupt_after):
    uninterrupted = grouping_trainer(tmp_path / "uninterrupted")
    uninterrupted.train()
    settings = {"save_strategy": "steps", "save_steps": 3}
    interrupted = grouping_trainer(tmp_path / "interrupted", BatchRecorder(interrupt_after), **settings)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = grouping_trainer(tmp_path / "interrupted", **settings)
    resumed.train(resume_from_checkpoint=True)
    saved = interrupt_after // 3 * 3
    assert interrupted.model.seen[:saved] + resumed.model.seen == uninterrupted.model.seen


@pytest.mark.parametrize("skipped", [0, 2])
def test_two_ranks_split_each_epoch_and_resume_it(tmp_path, skipped):
    def batches(rank, epoch, skip):
        trainer = grouping_trainer(tmp_path)
        torch.manual_seed(rank)  # the random state of a rank must not matter
        prepare = trainer.accelerator.prepare
        trainer.accelerator.prepare = lambda loader: prepare_data_loader(
            loader, num_processes=2, process_index=rank, use_seedable_sampler=True, even_batches=False
        )
        try:
            loader = trainer.get_train_dataloader()
        finally:
            trainer.accelerator.prepare = prepare
        loader = skip_first_batches(loader, skip) if skip else loader
        trainer._length_sampler.set_epoch(epoch)  # as an epoch of training does, before the Trainer does this:
        loader.set_epoch(epoch)
        return [batch["x"].int().tolist() for batch in loader]

    for epoch in (0, 1):
        ranks = [batches(rank, epoch, 0) for rank in (0, 1)]
        assert sorted(chain(*ranks[0], *ranks[1])) == list(range(len(LENGTHS)))
        assert batches(0, epoch, skipped) == ranks[0][skipped:]
    assert batches(0, 0, 0) != batches(0, 1, 0)


def test_evaluation_and_other_strategies_keep_their_sampler(tmp_path):
    trainer = grouping_trainer(tmp_path)
    assert [x for b in trainer.get_eval_dataloader() for x in b["x"].int().tolist()] == list(range(len(LENGTHS)))
    for strategy in ("random", "sequential"):
        ours = grouping_trainer(tmp_path, train_sampling_strategy=strategy)._get_train_sampler()
        stock = grouping_trainer(
            tmp_path, trainer_class=Trainer, train_sampling_strategy=strategy
        )._get_train_sampler()
        assert type(ours) is type(stock) is not SeededLengthGroupedSampler


@pytest.mark.parametrize("count", [20, 90])
def test_a_replaced_dataset_is_not_grouped_by_the_lengths_of_the_first(tmp_path, count):
    trainer = grouping_trainer(tmp_path, num_train_epochs=1)
    list(trainer.get_train_dataloader())  # uses the lengths of the first dataset
    trainer.train_dataset = Numbers(count)
    with pytest.raises(ValueError, match="automatically infer lengths"):
        trainer.train()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Planned batches and steps equal those of the real trainer."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_run
from datasets import Dataset

from medst_trl.base.errors import UserError
from medst_trl.pipeline.launch import Batch
from medst_trl.pipeline.options import read_options
from medst_trl.pipeline.plan.steps import RecipeCounts, missing_packages, schedule, stage_arguments, training_examples
from medst_trl.pipeline.recipe import Step, read_recipe
from medst_trl.pipeline.stage import STAGES, Count
from medst_trl.pipeline.stages.judge import pairs_to_judge


def sft(**settings):
    return Step(
        STAGES.get("sft"), "sft", {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"} | settings, "here"
    )


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_effective_batch_size_does_not_depend_on_the_number_of_processes(processes):
    step = sft(effective_batch_size=128, per_device_train_batch_size=8)
    batch = Batch.of(*stage_arguments(step), processes)
    assert batch == Batch(8, 16 // processes, processes) and batch.effective == 128


def test_a_batch_without_an_effective_size_grows_with_the_number_of_processes():
    step = sft(per_device_train_batch_size=8, gradient_accumulation_steps=4)
    batch = Batch.of(*stage_arguments(step), 4)
    assert batch == Batch(8, 4, 4) and batch.effective == 128


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
def test_an_indivisible_effective_batch_size_is_refused(settings):
    step = sft(effective_batch_size=128, per_device_train_batch_size=8, **settings)
    with pytest.raises(UserError, match="^effective_batch_size 128"):
        Batch.of(*stage_arguments(step), 4 if settings else 3)


def test_a_finished_step_needs_no_packages(tmp_path):
    step = sft(report_to=["no_such_service"], output_dir=str(tmp_path))
    (problem,) = missing_packages(step)
    assert problem.startswith("here: report_to no_such_service: ")
    record = {"stage": "sft", "status": "complete", "versions": {}, "inputs": {}, "settings": {}}
    (tmp_path / "stage.json").write_text(json.dumps(record))
    assert missing_packages(step) == []
    assert missing_packages(replace(step, settings=step.settings | {"overwrite": True})) == [problem]


def test_an_incomplete_schedule_is_refused_before_it_runs():
    with pytest.raises(UserError, match="^here: lr_scheduler_type cosine_with_min_lr: One of min_lr"):
        stage_arguments(sft(lr_scheduler_type="cosine_with_min_lr"))
    settings = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-6}'}
    assert stage_arguments(sft(**settings)) and missing_packages(sft(**settings)) == []


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (16, {"num_train_epochs": 1}),
        (17, {"num_train_epochs": 2}),
        (17, {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2}),
        (3, {"num_train_epochs": 2, "gradient_accumulation_steps": 4}),
        (9, {"max_steps": 5}),
    ],
)
def test_the_number_of_steps_matches_the_trainer(rows, settings, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 3} | settings
    trainer = tiny_run.make_trainer(tmp_path, n=rows, learning_rate=0.0, **settings)
    trainer.train()
    batch = Batch(4, settings.get("gradient_accumulation_steps", 1), 1)
    steps, _ = schedule(Count(rows), batch, settings["num_train_epochs"], settings["max_steps"])
    assert steps == trainer.state.global_step


def test_the_number_of_steps_is_unknown_if_the_size_of_the_data_is_unknown():
    batch, unknown = Batch(4, 1, 1), Count(None, depends_on="prepare")
    assert schedule(unknown, batch, 3, -1) == (None, "3 epochs of prepare")
    assert schedule(unknown, batch, 3, 70) == (70, "70")
    assert unknown.capped(100) == Count(100, at_most=True) and Count(50).capped(100, skipped=20) == Count(30)


def steps_of(name, *words):
    steps = read_recipe(name, read_options(words)[1]).steps()
    return {step.label: step for step in steps}, steps


def test_the_rows_of_the_demo_are_known_before_it_runs():
    labels, steps = steps_of("demo")
    directory = labels["prepare"].settings["output_dir"]
    assert RecipeCounts(steps).rows(f"{directory}/instruct", "train") == Count(225)
    assert RecipeCounts(steps).rows(f"{directory}/images", "train") == Count(2000)
    assert pairs_to_judge(labels["judge"].settings, RecipeCounts(steps)) == Count(6000, at_most=True)
    assert RecipeCounts(steps).rows(*labels["dpo"].settings["dataset"], "train") == Count(6000, at_most=True)


def training_args(dataset, max_records=None):
    return SimpleNamespace(
        dataset=dataset, train_split="train", max_records=max_records, dataset_weights=None, oversample=False
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prepare.validation_fraction", "0.2"], 180),
        (["--sft.max_records", "100"], 100),
        (["--prepare.max_records", "60"], 60),
    ],
)
def test_the_number_of_rows_depends_on_settings(words, expected):
    labels, steps = steps_of("demo", *words)
    dataset = labels["sft"].settings["dataset"]
    limit = labels["sft"].settings.get("max_records")
    assert training_examples(training_args(dataset, limit), steps).number == expected


def test_the_number_of_examples_is_unknown_if_a_dataset_is_unknown():
    labels, steps = steps_of("demo")
    (known,) = labels["sft"].settings["dataset"]
    for datasets, unknown in (
        (["a/one", "b/two"], "a/one and b/two"), ([known, "b/two"], "b/two"), (["a/one", known], "a/one"),
    ):  # fmt: skip
        assert training_examples(training_args(datasets), steps) == Count(None, depends_on=unknown)
    assert training_examples(training_args([known, known]), steps) == Count(2 * 225)


def test_the_number_of_examples_of_a_mixture_follows_the_weights(tmp_path):
    for name, rows in (("a", 10), ("b", 90)):
        Dataset.from_dict({"id": range(rows)}).to_parquet(tmp_path / name / "train.parquet")
    args = training_args([str(tmp_path / "a"), str(tmp_path / "b")])
    assert training_examples(args, ()) == Count(100)
    args.dataset_weights = [1, 3]
    assert training_examples(args, ()) == Count(40)
    args.oversample = True
    number = training_examples(args, (), seed=3).number
    assert number == training_examples(args, (), seed=3).number and 100 < number < 150


def test_every_two_answers_make_a_pair():
    labels, steps = steps_of("demo", "--generate.num_answers", "4", "--generate.max_records", "10")
    assert pairs_to_judge(labels["judge"].settings, RecipeCounts(steps)) == Count(10 * 3 * 2, at_most=True)


def test_datasets_on_disk_are_counted(tmp_path):
    from medst_trl.data.schema import instruct_features, write_split

    rows = [{"id": str(n), "images": [], "image_ids": [], "messages": []} for n in range(7)]
    write_split(tmp_path / "instruct", "train", rows, dict, instruct_features(), 3)
    assert RecipeCounts().rows(str(tmp_path / "instruct"), "train") == Count(7)
    assert RecipeCounts().rows(str(tmp_path / "instruct"), "test").number is None

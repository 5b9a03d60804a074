# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Code shared by both training stages: datasets, bounds of settings, continued adapters, logs, and batch sizes."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
from datasets import Dataset, List, Value
from datasets import Image as ImageFeature
from tiny_run import write_instruct

from medst_trl.base.errors import UserError
from medst_trl.pipeline.launch import Batch
from medst_trl.pipeline.stages import _training as training
from medst_trl.pipeline.stages._training import (
    TrainingStageArguments,
    load_splits,
    training_stage,
)
from medst_trl.pipeline.stages.dpo import DpoArguments, end_of_log
from medst_trl.pipeline.stages.sft import SftArguments
from medst_trl.training.dpo import MultimodalDPOConfig
from medst_trl.training.settings import SelfQuestioningSettings
from medst_trl.training.sft import SelfQuestioningConfig


def load(*names, eval_strategy="no", weights=None, oversample=False, seed=0, kind="instruct", **more):
    args = {"train_split": "train", "validation_split": "validation", "max_records": None} | more
    args = SimpleNamespace(dataset=list(names), dataset_weights=weights, oversample=oversample, **args)
    return load_splits(args, SimpleNamespace(eval_strategy=eval_strategy, seed=seed), kind)


def test_several_datasets_are_concatenated_in_order(tmp_path):
    first, second = (
        write_instruct(tmp_path / "a", range(3)),
        write_instruct(tmp_path / "b", range(10, 12), source="elsewhere"),
    )
    joined = load(first, second)["train"]
    assert joined["id"] == ["r0", "r1", "r2", "r10", "r11"]
    for row, number in zip(joined, (0, 1, 2, 10, 11)):
        expected = tiny_run.conversation(number)
        assert row["images"][0].tobytes() == expected["images"][0].tobytes()
        assert row["messages"][0]["content"] == expected["messages"][0]["content"]
        assert row["image_ids"] == [f"{number:064x}"]
    assert load(first, second, max_records=4)["train"]["id"] == ["r0", "r1", "r2", "r10"]


def test_ids_shared_by_two_datasets_are_made_unique(tmp_path):
    first, second = write_instruct(tmp_path / "a", range(2)), write_instruct(tmp_path / "b", range(1, 3))
    assert load(first, second, first)["train"]["id"] == ["r0", "r1", "r1@2", "r2", "r0@3", "r1@3"]
    assert load(first)["train"]["id"] == ["r0", "r1"]


def test_weights_and_oversampling_mix_the_training_data_but_not_the_evaluation(tmp_path):
    paths = [write_instruct(tmp_path / name, numbers) for name, numbers in (("a", range(2)), ("b", range(10, 18)))]
    for path, number in zip(paths, (20, 30)):
        write_instruct(Path(path), range(number, number + 2), split="validation")
    found = load(*paths, weights=[1, 2], eval_strategy="steps")
    assert found["train"]["id"] == ["r0", "r1", "r10", "r11", "r12", "r13"]
    assert found["eval"]["id"] == ["r20", "r21", "r30", "r31"]
    oversampled = load(*paths, weights=[1, 1], oversample=True)["train"]["id"][:]
    assert set(oversampled) == {"r0", "r1", *(f"r{number}" for number in range(10, 18))}
    assert sum(name in ("r0", "r1") for name in oversampled) > 2
    assert load(*paths, weights=[1, 1], oversample=True, seed=1)["train"]["id"][:] != oversampled


def test_joined_pairs_without_a_weight_count_as_one(tmp_path):
    row = {"images": [], "prompt": "q", "chosen": "a", "rejected": "b"}
    for name, extra in (("a", {"weight": 0.5}), ("b", {"probability": 0.75}), ("c", {})):
        dataset = Dataset.from_list([row | extra]).cast_column("images", List(ImageFeature()))
        dataset.to_parquet(tmp_path / name / "train.parquet")
    train = load(*(str(tmp_path / name) for name in "abc"), kind="preferences")["train"]
    assert train["weight"][:] == [0.5, 1.0, 1.0] and train["probability"][:] == [1.0, 0.75, 1.0]
    assert train["id"][:] == ["0", "0@2", "0@3"]


def test_datasets_with_large_strings_can_be_concatenated(tmp_path):
    large = {"id": Value("large_string"), "image_ids": List(Value("large_string"))}
    first, second = (
        write_instruct(tmp_path / "a", range(2)),
        write_instruct(tmp_path / "b", range(5, 7), features=large),
    )
    assert load(first, second)["train"]["id"] == ["r0", "r1", "r5", "r6"]


def test_every_dataset_needs_its_split_and_columns_and_one_of_them_a_split_to_evaluate(tmp_path, capsys):
    first, second = write_instruct(tmp_path / "a", range(2)), write_instruct(tmp_path / "b", range(2))
    with pytest.raises(UserError, match="(?s)a has no split 'validation'.*b has no split 'validation'"):
        load(first, second, eval_strategy="steps")
    write_instruct(tmp_path / "a", range(20, 22), split="validation")
    found = load(first, second, eval_strategy="steps")
    assert found["eval"]["id"] == ["r20", "r21"] and found["train"]["id"] == ["r0", "r1", "r0@2", "r1@2"]
    assert "b has no split 'validation'" in capsys.readouterr().out
    assert load(first, eval_strategy="steps")["eval"]["id"] == ["r20", "r21"]
    with pytest.raises(UserError, match="b has no split 'dev'"):
        load(first, second, train_split="dev")
    bare = tmp_path / "c"
    bare.mkdir()
    Dataset.from_list([{"id": "x"}]).to_parquet(bare / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=f"{bare}: .*lacks the columns images, messages"):
        load(first, str(bare))


def check(**changes):
    args = SftArguments("m", ["d"])
    training_args = SimpleNamespace(
        num_train_epochs=3, max_steps=-1, max_length=None, learning_rate=2e-4, sq_ratio=0.5, deepspeed_plugin=None,
        fsdp=None, resume_from_checkpoint=None, output_dir="o", lr_scheduler_type="linear", lr_scheduler_kwargs=None,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(args if hasattr(args, name) else training_args, name, value)
    args.check(training_args)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_r": -4}, {"vision_lora_r": -1}, {"lora_dropout": 2.0}, {"lora_dropout": -0.1}, {"max_records": 0},
        {"max_length": 0}, {"max_length": -5}, {"sq_ratio": 1.5}, {"learning_rate": float("nan")},
        {"learning_rate": -1e-4}, {"learning_rate": float("inf")}, {"num_train_epochs": 0}, {"num_train_epochs": -1},
        {"dtype": "float8"}, {"vusr_role": "bogus"}, {"seed": -1}, {"label_smoothing": 0.5},
        {"metric_for_best_model": "accuracy"},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_out_of_bounds_is_reported(change):
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=name) as error:
        check(**change)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_weights": [1]}, "has 1 numbers for 2 datasets"),
        ({"dataset_weights": [1, 0]}, "dataset_weights is 0"),
        ({"dataset_weights": [1, float("nan")]}, "dataset_weights is nan"),
        ({"oversample": True}, "oversample needs dataset_weights"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_used_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        check(dataset=["a", "b"], **change)
    check(dataset=["a", "b"], dataset_weights=[1, 2.5], oversample=True)


def test_settings_within_bounds_pass():
    check()
    check(lora_r=0, vision_lora_r=0, lora_dropout=0.0, sq_ratio=1.0, learning_rate=0.0, max_length=1, max_records=1)


@pytest.mark.parametrize("setting", [{"save_strategy": "best"}, {"eval_on_start": True}], ids=str)
def test_settings_that_evaluate_need_evaluations(setting):
    with pytest.raises(UserError, match="set eval_strategy"):
        check(eval_strategy="no", **setting)
    check(eval_strategy="steps", **setting)


def test_the_best_checkpoint_has_the_smallest_loss(tmp_path):
    for metric, greater in (("loss", False), ("eval_loss_answer", False), ("answer_accuracy", True)):
        args = MultimodalDPOConfig(output_dir=str(tmp_path), metric_for_best_model=metric, report_to="none")
        assert args.greater_is_better == greater


def test_every_bound_belongs_to_an_existing_setting():
    known = [set(kind.__dataclass_fields__) for kind in (SftArguments, SelfQuestioningConfig)]
    known += [set(kind.__dataclass_fields__) for kind in (DpoArguments, MultimodalDPOConfig)]
    assert training._AT_LEAST.keys() | training._AT_MOST.keys() <= set().union(*known)


def test_the_end_of_a_log_averages_the_last_steps():
    log = [{"loss": float(number), "rewards/margins": 2.0 * number, "step": number} for number in range(10)]
    log[4:4] = [{"eval_loss": 7.0}]
    end = end_of_log([*log, {"eval_loss": 3.0}, {"train_loss": 4.5}])
    assert (end["loss"], end["rewards/margins"], end["eval_loss"], end["train_loss"]) == (8.5, 17.0, 3.0, 4.5)
    assert end_of_log([]) == {}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("per_device", [1, 4, 16])
def test_a_step_has_the_same_size_on_any_number_of_processes(per_device, processes):
    training_args = SimpleNamespace(per_device_train_batch_size=per_device, gradient_accumulation_steps=1)
    assert Batch.of(SimpleNamespace(effective_batch_size=128), training_args, processes).effective == 128


@pytest.mark.parametrize(
    ("effective", "per_device", "processes"), [(128, 8, 3), (128, 6, 4), (12, 8, 3), (7, 3, 2), (4, 8, 1)]
)
def test_an_indivisible_batch_size_is_refused(effective, per_device, processes):
    training_args = SimpleNamespace(per_device_train_batch_size=per_device, gradient_accumulation_steps=1)
    with pytest.raises(
        UserError, match=f"effective_batch_size {effective} is not a multiple of {per_device * processes}"
    ):
        Batch.of(SimpleNamespace(effective_batch_size=effective), training_args, processes)


def test_accumulation_follows_from_the_arguments_of_a_stage():
    training_args = SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    assert Batch.of(SimpleNamespace(effective_batch_size=None), training_args, 4).accumulation == 1
    batch = Batch.of(SimpleNamespace(effective_batch_size=128), training_args, 4)
    assert batch.accumulation == 4
    assert batch.describe("pairs") == "128 pairs per step: 8 x 4 processes x 4 accumulated"
    training_args.gradient_accumulation_steps = 4
    with pytest.raises(UserError, match="Remove gradient_accumulation_steps"):
        Batch.of(SimpleNamespace(effective_batch_size=128), training_args, 4)


def register(monkeypatch, arguments, **more):
    monkeypatch.setattr(training.STAGES, "register", lambda stage: stage)
    more = {"name": "mine", "summary": "trains"} | more
    return training_stage(arguments, "SelfQuestioningConfig", SelfQuestioningSettings, "instruct", **more)


def test_a_training_stage_needs_a_trainer_and_a_summary():
    @dataclass
    class WithoutSummary(TrainingStageArguments):
        def make_trainer(self, training_args, **inputs):
            raise AssertionError

    with pytest.raises(TypeError, match="summarize"):
        WithoutSummary("m", ["d"])


def test_a_training_stage_is_checked_by_its_arguments_or_its_own_check(monkeypatch, tmp_path):
    args = SftArguments("m", ["d"], lora_r=-1)
    training_args = SelfQuestioningConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(UserError, match="lora_r is -1"):
        register(monkeypatch, SftArguments).check(args, training_args)
    assert register(monkeypatch, SftArguments, check=print).check is print

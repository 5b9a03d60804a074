# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any point and resumed ends with the weights of an uninterrupted run."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny_run
import torch
from commands import launch_script
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from medst_trl.training.resume import newest_complete_checkpoint


# Two epochs with a checkpoint in the middle of each: the choice of `<vusr>` turns changes with the epoch
SETTINGS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    trainer = tiny_run.train(directory, **SETTINGS)
    return directory, tiny_run.trained_weights(trainer), [e["loss"] for e in trainer.state.log_history if "loss" in e]


def _run_until_killed(directory: Path, *kill: str) -> None:
    process = launch_script("tiny_run.py", str(directory), json.dumps(SETTINGS), *kill, ranks=1)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.parametrize(
    "kill, resumed_from",
    [(("--kill_after_step", "5"), 3), (("--kill_while_saving", "6"), 3)],
    ids=["training", "saving"],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, uninterrupted, kill, resumed_from):
    _run_until_killed(tmp_path, *kill)
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{resumed_from}")
    trainer = tiny_run.train(tmp_path, **SETTINGS)
    _, expected, losses = uninterrupted
    weights = tiny_run.trained_weights(trainer)
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) == 0
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == losses


@pytest.fixture
def checkpoints(uninterrupted, tmp_path):
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(uninterrupted[0] / name, tmp_path / name)
    return tmp_path


def test_the_newest_checkpoint_is_used(checkpoints):
    assert newest_complete_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_broken_checkpoint_is_renamed(checkpoints, name, damage):
    path = checkpoints / "checkpoint-6" / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    assert newest_complete_checkpoint(checkpoints) == str(checkpoints / "checkpoint-3")
    assert sorted(p.name for p in checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-6.broken"]


def test_a_second_broken_checkpoint_of_the_same_step_keeps_the_first(checkpoints):
    first = checkpoints / "checkpoint-6.broken"
    first.mkdir()
    (first / "optimizer.pt").write_bytes(b"the first copy")
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    newest_complete_checkpoint(checkpoints)
    assert (checkpoints / "checkpoint-6.broken-2" / "optimizer.pt").stat().st_size > 1000
    assert [path.name for path in first.iterdir()] == ["optimizer.pt"]
    assert (first / "optimizer.pt").read_bytes() == b"the first copy"


def test_a_run_can_resume_with_another_number_of_processes(checkpoints, caplog):
    assert newest_complete_checkpoint(checkpoints, num_processes=2) == str(checkpoints / "checkpoint-6")
    assert "written by 1 processes and is resumed by 2" in caplog.text


def test_a_checkpoint_without_the_random_state_of_a_rank_is_skipped(checkpoints):
    directory = checkpoints / "checkpoint-6"
    (directory / "rng_state.pth").rename(directory / "rng_state_0.pth")  # the state of the first of two ranks
    assert newest_complete_checkpoint(checkpoints, num_processes=2) == str(checkpoints / "checkpoint-3")


def test_an_empty_directory_has_nothing_to_resume(tmp_path):
    assert newest_complete_checkpoint(tmp_path) is None
    assert newest_complete_checkpoint(tmp_path / "missing") is None


def test_checkpoints_contain_no_pickle_of_the_arguments(uninterrupted):
    directory, _, _ = uninterrupted
    assert not list(directory.rglob("training_args.bin"))
    assert torch.load(directory / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]


class _Interrupt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_early_stopping_keeps_its_count_after_resuming(tmp_path):
    rows = [tiny_run.conversation(i) for i in range(8)]
    for message in rows[0]["messages"][1::2]:  # not in the training data: the loss rises with overfitting
        message["content"] = tiny_run.text("zq xv wj zq")
    settings = {
        "rows": rows[1:], "max_steps": 60, "learning_rate": 0.01, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
    }  # fmt: skip

    def run(directory, *callbacks):
        data = Dataset.from_list(rows[:1])
        return tiny_run.train(
            directory, eval_dataset=data, callbacks=[EarlyStoppingCallback(4), *callbacks], **settings
        )

    uninterrupted = run(tmp_path / "uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "interrupted", _Interrupt(uninterrupted.state.best_global_step + 2)
        )  # half of its patience is used up
    resumed = run(tmp_path / "interrupted")
    assert resumed.state.global_step == uninterrupted.state.global_step < 60

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any point and resumed ends with the weights of an uninterrupted run."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_run
import torch
from accelerate import Accelerator
from commands import launch_script
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from medst_trl import MultimodalDPOConfig, SelfQuestioningConfig
from medst_trl.base.errors import UserError
from medst_trl.training.resume import newest_complete_checkpoint, resume_checkpoint


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


def _stop(directory: Path, error: type, *numbers: signal.Signals, step: int = 5, **settings):
    """Train until a signal in the middle of a step ends it."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as stopped:
        tiny_run.train(directory, callbacks=[tiny_run.SignalInStep(step, *numbers)], **{**SETTINGS, **settings})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    return stopped.value


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_a_checkpoint_and_the_resumed_run_equals_an_uninterrupted_one(
    tmp_path, uninterrupted, number, error, capfd
):
    stopped = _stop(tmp_path, error, number)
    assert error is KeyboardInterrupt or stopped.code == 128 + signal.SIGTERM
    printed = capfd.readouterr()
    assert f"Saved {tmp_path / 'checkpoint-5'}, after step 5 of 8." in printed.out
    assert printed.err.count("Stopping with a checkpoint after this step. Another Ctrl-C stops at once.") == 1
    trainer = tiny_run.train(tmp_path, **SETTINGS)
    assert "Resuming after step 5 of 8." in capfd.readouterr().out
    _, expected, losses = uninterrupted
    weights = tiny_run.trained_weights(trainer)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == losses


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_signal_in_any_step_saves_that_step(tmp_path, step):
    _stop(tmp_path, KeyboardInterrupt, signal.SIGINT, step=step, per_device_train_batch_size=2,
          gradient_accumulation_steps=2)  # fmt: skip
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")


@pytest.mark.parametrize("by_signal", [True, False])
def test_a_run_stopped_after_its_last_step_is_complete(tmp_path, uninterrupted, by_signal):
    if by_signal:
        _stop(tmp_path, SystemExit, signal.SIGTERM, step=8)
    else:  # after its last checkpoint, before its result was saved
        shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    trainer = tiny_run.train(tmp_path, **SETTINGS)
    _, expected, losses = uninterrupted
    weights = tiny_run.trained_weights(trainer)
    assert trainer.state.global_step == 8 and not (tmp_path / "checkpoint-9").exists()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == losses
    assert not any("train_loss" in entry for entry in trainer.state.log_history)  # of no step


@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "epoch", "load_best_model_at_end": True},
        {"save_steps": 1, "logging_strategy": "epoch"},
        {"max_steps": 6},  # ends within an epoch
        {"save_strategy": "best", "metric_for_best_model": "loss"},
    ],
    ids=str,
)
def test_a_run_stopped_at_the_end_of_an_epoch_evaluates_it_once(tmp_path, settings):
    settings = {**SETTINGS, **settings, "eval_strategy": "epoch"}
    data = Dataset.from_list([tiny_run.conversation(number) for number in range(20, 23)])

    def result(directory):
        trainer = tiny_run.train(directory, eval_dataset=data, **settings)
        state = trainer.state
        figures = [(e["step"], e[name]) for e in state.log_history for name in ("eval_loss", "loss") if name in e]
        best = Path(state.best_model_checkpoint or "").name
        return tiny_run.trained_weights(trainer), (figures, state.best_metric, state.best_global_step, best)

    expected, facts = result(tmp_path / "uninterrupted")
    assert [step for step, _ in facts[0]].count(4) == 2 and facts[2] in (None, 8)
    for step in (4, settings["max_steps"]):
        directory = tmp_path / f"stopped-{step}"
        _stop(directory, SystemExit, signal.SIGTERM, step=step, eval_dataset=data, **settings)
        weights, found = result(directory)
        assert found == facts
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_fractions_of_a_run_are_not_reported_as_changed_when_it_resumes(tmp_path, capfd):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 0.25, "logging_steps": 0.5}
    _stop(tmp_path, KeyboardInterrupt, signal.SIGINT, **settings)
    trainer = tiny_run.train(tmp_path, **settings)
    assert trainer.state.global_step == 8 and (trainer.state.save_steps, trainer.state.logging_steps) == (2, 4)
    assert "do not match" not in capfd.readouterr().err


def test_a_second_interrupt_stops_at_once(tmp_path):
    _stop(tmp_path, KeyboardInterrupt, signal.SIGINT, signal.SIGINT)
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_repeated_sigterm_of_a_launcher_still_saves(tmp_path):
    _stop(tmp_path, SystemExit, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_without_checkpoints_a_signal_stops_at_once(tmp_path):
    _stop(tmp_path, KeyboardInterrupt, signal.SIGINT, save_strategy="no")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_enable_jit_checkpoint_changes_nothing(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    callbacks = [tiny_run.SignalInStep(2, signal.SIGTERM)]
    settings = {"enable_jit_checkpoint": True, "save_strategy": "steps", "max_steps": 3}
    try:
        with pytest.raises(SystemExit):
            tiny_run.train(tmp_path, callbacks=callbacks, **settings)
        assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        signal.signal(signal.SIGTERM, before)
        tiny_run.train(tmp_path, **settings)
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_in_a_thread_takes_no_signals(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert (
            pool.submit(tiny_run.train, tmp_path, max_steps=1, save_strategy="steps").result().state.global_step == 1
        )


def test_workers_of_data_loaders_survive_a_signal_to_their_group(tmp_path, uninterrupted):
    settings = json.dumps(SETTINGS | {"dataloader_num_workers": 2})
    process = launch_script("tiny_run.py", str(tmp_path), settings, "--term_in_step", "2", ranks=1)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "Traceback" not in process.stderr and "worker" not in process.stderr


def test_a_closed_terminal_saves_a_checkpoint(tmp_path):
    """Like an ssh session that breaks: the process gets SIGHUP, and cannot write to its terminal any more."""
    leader, terminal = os.openpty()
    settings = json.dumps(SETTINGS | {"max_steps": 300, "save_steps": 300})
    process = subprocess.Popen(
        [sys.executable, tiny_run.__file__, str(tmp_path), settings], stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    printed = b""
    while b"'loss'" not in printed:
        printed += os.read(leader, 1000)
    os.close(leader)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP, printed
    assert newest_complete_checkpoint(tmp_path)


@pytest.mark.slow
def test_ranks_agree_on_the_step_after_a_signal_to_one_of_them(tmp_path):
    settings = json.dumps(SETTINGS | {"per_device_train_batch_size": 2})
    for name in ("uninterrupted", "interrupted"):
        (tmp_path / name).mkdir()
    stopped = launch_script("tiny_run.py", str(tmp_path / "interrupted"), settings, "--term_in_step", "4")
    assert stopped.returncode != 0 and "checkpoint-4, after step 4 of 8" in stopped.stdout, stopped.stderr
    assert newest_complete_checkpoint(tmp_path / "interrupted") == str(tmp_path / "interrupted" / "checkpoint-4")
    for name in ("uninterrupted", "interrupted"):
        assert launch_script("tiny_run.py", str(tmp_path / name), settings).returncode == 0
    weights, expected = (torch.load(tmp_path / name / "weights.pt") for name in ("interrupted", "uninterrupted"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_checkpoints_are_a_tenth_of_the_run_apart_and_few_are_kept(tmp_path):
    trainer = tiny_run.train(tmp_path, save_strategy="steps", max_steps=20, logging_steps=20)
    assert trainer.state.save_steps == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-20"]
    assert SelfQuestioningConfig(output_dir=str(tmp_path), save_steps=5).save_total_limit is None
    assert SelfQuestioningConfig(output_dir=str(tmp_path), save_total_limit=0).save_total_limit == 0
    best = {"load_best_model_at_end": True, "eval_strategy": "steps"}
    epochs = SelfQuestioningConfig(output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="epoch")
    assert epochs.save_strategy == "epoch"
    for given, steps in ({"eval_steps": 7}, 7), ({"logging_steps": 3}, 3), ({"eval_steps": 0.25}, 0.25):
        assert MultimodalDPOConfig(output_dir=str(tmp_path), **best, **given).save_steps == steps


def test_a_resumed_run_saves_as_often_as_it_is_told(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny_run.train(tmp_path, callbacks=[_Interrupt(4)], max_steps=8, save_strategy="steps", save_steps=4)
    trainer = tiny_run.train(tmp_path, max_steps=8, save_strategy="steps", save_steps=1)
    assert trainer.state.save_steps == 1 and (tmp_path / "checkpoint-5").exists()


@pytest.mark.parametrize("given", [None, "true", "True"])
def test_the_newest_checkpoint_is_resumed_by_default(checkpoints, given):
    assert resume_checkpoint(checkpoints, Accelerator(cpu=True), given) == str(checkpoints / "checkpoint-6")


def test_resume_from_checkpoint_selects_a_checkpoint(checkpoints, tmp_path_factory):
    accelerator, empty = Accelerator(cpu=True), tmp_path_factory.mktemp("empty")
    assert resume_checkpoint(checkpoints, accelerator, "False") is None
    assert resume_checkpoint(checkpoints, accelerator, f"{checkpoints}/checkpoint-3") == f"{checkpoints}/checkpoint-3"
    assert resume_checkpoint(empty, accelerator, "false") is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        resume_checkpoint(empty, accelerator, "true")
    with pytest.raises(UserError, match="checkpoint-4: trainer_state.json is missing"):
        resume_checkpoint(checkpoints, accelerator, f"{checkpoints}/checkpoint-4")
    (checkpoints / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-3: optimizer.pt is missing"):
        resume_checkpoint(checkpoints, accelerator, f"{checkpoints}/checkpoint-3")
    assert (checkpoints / "checkpoint-3").exists()


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


def test_a_second_broken_checkpoint_of_the_same_step_replaces_the_first(checkpoints):
    (checkpoints / "checkpoint-6.broken").mkdir()
    (checkpoints / "checkpoint-6.broken" / "first").touch()
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    assert newest_complete_checkpoint(checkpoints) == str(checkpoints / "checkpoint-3")
    names = {path.name for path in (checkpoints / "checkpoint-6.broken").iterdir()}
    assert "optimizer.pt" in names and "first" not in names


def test_a_checkpoint_without_the_random_state_of_a_rank_is_skipped(checkpoints):
    directory = checkpoints / "checkpoint-6"
    (directory / "rng_state.pth").rename(directory / "rng_state_0.pth")  # the state of the first of two ranks
    assert newest_complete_checkpoint(checkpoints) == str(checkpoints / "checkpoint-3")


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
    again = run(tmp_path / "interrupted")  # as if it had been killed after the last checkpoint
    assert again.state.global_step == uninterrupted.state.global_step
    weights, expected = tiny_run.trained_weights(again), tiny_run.trained_weights(uninterrupted)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

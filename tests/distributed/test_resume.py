# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several ranks are resumed to the same weights, and refused if they cannot be read."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny_run
import torch
from accelerate.utils import DistributedType
from commands import launch_script

from medst_trl.base.errors import UserError
from medst_trl.training.resume import resume_checkpoint


def make_accelerator(kind: DistributedType, num_processes: int) -> SimpleNamespace:
    return SimpleNamespace(is_main_process=True, num_processes=num_processes, distributed_type=kind)


@pytest.fixture
def checkpoints(tmp_path):
    tiny_run.train(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    return tmp_path


def test_an_optimizer_of_deepspeed_needs_deepspeed(checkpoints):
    parts = checkpoints / "checkpoint-1" / "global_step1"
    parts.mkdir()
    for rank in range(2):
        (parts / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    checkpoint = resume_checkpoint(checkpoints, make_accelerator(DistributedType.DEEPSPEED, 2))
    assert checkpoint == str(checkpoints / "checkpoint-1")
    with pytest.raises(UserError, match="with DeepSpeed.* same accelerate_config"):
        resume_checkpoint(checkpoints, make_accelerator(DistributedType.MULTI_GPU, 2))


def test_deepspeed_cannot_resume_another_optimizer(checkpoints):
    with pytest.raises(UserError, match="without DeepSpeed"):
        resume_checkpoint(checkpoints, make_accelerator(DistributedType.DEEPSPEED, 1))
    assert resume_checkpoint(checkpoints, make_accelerator(DistributedType.MULTI_GPU, 2)) is not None


def test_every_error_of_the_main_process_reaches_the_other_ranks(checkpoints, monkeypatch):
    (checkpoints / "checkpoint-1" / "scheduler.pt").unlink()  # so that the checkpoint is renamed
    monkeypatch.setattr(Path, "rename", Mock(side_effect=PermissionError("read-only")))
    sent = []
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", sent.extend)
    with pytest.raises(PermissionError):
        resume_checkpoint(checkpoints, make_accelerator(DistributedType.MULTI_GPU, 2))
    assert isinstance(sent[0], PermissionError)


@pytest.mark.slow
def test_two_killed_ranks_resume_to_the_same_weights_with_zero_2(tmp_path):
    pytest.importorskip("deepspeed")
    settings = {
        "max_steps": 5, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2,
        "ddp_backend": "gloo",
    }  # fmt: skip

    def run(directory, *kill):
        directory.mkdir(exist_ok=True)
        return launch_script("tiny_run.py", str(directory), json.dumps(settings), *kill, kind="zero2")

    uninterrupted = run(tmp_path / "uninterrupted")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert run(tmp_path / "interrupted", "--kill_after_step", "3").returncode != 0
    assert not (tmp_path / "interrupted" / "weights.pt").exists()
    resumed = run(tmp_path / "interrupted")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "interrupted" / "run.json").read_text())["kind"].endswith("DEEPSPEED")
    ours, theirs = (
        torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("interrupted", "uninterrupted")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on CPUs: the same steps as one process, and a complete saved adapter."""

import json

import pytest
import tiny_dpo
import tiny_run
import torch
from commands import launch_script
from peft import get_peft_model_state_dict
from safetensors.torch import load_file


DESCENT = {
    "max_steps": 3, "optim": "sgd", "learning_rate": 1e-2, "vision_learning_rate": 1e-1,
    "train_sampling_strategy": "sequential",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "settings"), [(tiny_run, {"lora_dropout": 0.0, "n": 12}), (tiny_dpo, {})], ids=["sft", "dpo"]
)
def test_two_ranks_take_the_same_steps_as_one(tmp_path, module, settings):
    settings = DESCENT | settings
    overrides = json.dumps(settings | {"per_device_train_batch_size": 1})
    process = launch_script("fsdp_on_cpus.py", module.__name__, str(tmp_path), overrides, kind="fsdp2")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["kind"].endswith("FSDP")

    trainer = module.make_trainer(tmp_path / "one", per_device_train_batch_size=2, **settings)
    trainer.train()
    for ours, theirs in zip(result["log"][:3], trainer.state.log_history[:3], strict=True):
        names = ("loss", "grad_norm", "learning_rate", "learning_rate_vision")
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, abs=2e-5)
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    assert saved.keys() == expected.keys()
    assert all(torch.allclose(saved[name], expected[name], atol=1e-5) for name in expected)

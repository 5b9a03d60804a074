# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Every setting that needs a package, an accelerator or a launcher is refused before a model is loaded."""

from types import SimpleNamespace

import pytest
import tiny_run
import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from medst_trl import MultimodalDPOConfig, SelfQuestioningConfig
from medst_trl.training import machine
from medst_trl.training.machine import unsupported_settings


CPU = torch.device("cpu")


def config(tmp_path, **settings) -> SelfQuestioningConfig:
    return SelfQuestioningConfig(output_dir=str(tmp_path), report_to=settings.pop("report_to", "none"), **settings)


@pytest.mark.parametrize("kind", [SelfQuestioningConfig, MultimodalDPOConfig])
def test_defaults_work_everywhere_and_draw_no_random_numbers(tmp_path, kind):
    args = kind(output_dir=str(tmp_path))
    before = torch.get_rng_state()
    assert unsupported_settings(args, CPU) == unsupported_settings(args) == []
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_an_optimizer_is_refused_or_trains(tmp_path, name):
    settings = {"optim_target_modules": ["q_proj"]} if "galore" in name or "apollo" in name else {}
    trainer = tiny_run.make_trainer(tmp_path, max_steps=1, optim=name, **settings)
    if found := unsupported_settings(trainer.args, CPU):
        assert len(found) == 1 and found[0].startswith(f"optim {name}: ")
        with pytest.raises((ImportError, ValueError, KeyError, AssertionError)):
            trainer.train()
    else:
        trainer.train()


@pytest.mark.parametrize("name", [*INTEGRATION_TO_CALLBACK, "no_such_service"])
def test_a_logger_is_refused_or_starts(tmp_path, name):
    args = config(tmp_path, report_to=name)
    try:
        tiny_run.make_trainer(tmp_path, report_to=name)
    except (ImportError, RuntimeError, ValueError):
        for device in (CPU, None):
            (problem,) = unsupported_settings(args, device)
            assert problem.startswith(f"report_to {name}: ")
    else:
        assert unsupported_settings(args, CPU) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"activation_offloading": True}, "activation_offloading True: it needs a GPU"),
        ({"activation_checkpointing_kwargs": {"offload": True}}, "it needs a GPU"),
        ({"torch_compile_backend": "no_such"}, "Invalid backend: 'no_such'"),
        ({"torch_compile_mode": "no_such"}, "Unrecognized mode=no_such"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr: One of min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type warmup_stable_decay: "),
        ({"lr_scheduler_kwargs": {"unknown": 1}}, "lr_scheduler_type linear: "),
        ({"dataloader_multiprocessing_context": "spawn"}, "num_workers > 0"),
        ({"fsdp": True}, "fsdp True: it needs a launcher"),
        ({"optim": "galore_adamw"}, "optim galore_adamw: "),
        ({"optim": "lomo"}, "backward pass"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_here_is_refused(tmp_path, settings, message, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    (problem,) = unsupported_settings(config(tmp_path, use_cpu=True, **settings), CPU)
    assert message in problem


def test_a_plan_looks_for_packages_only(tmp_path, monkeypatch):
    args = config(tmp_path, activation_offloading=True, fsdp=True, torch_compile_backend="no_such")
    assert unsupported_settings(args) == []
    monkeypatch.setattr(machine, "is_liger_kernel_available", lambda: False)
    args.use_liger_kernel = True
    (problem,) = unsupported_settings(args)
    assert problem == "use_liger_kernel True: liger-kernel is not installed (pip install liger-kernel)."
    monkeypatch.setattr(machine, "is_liger_kernel_available", lambda: True)
    assert unsupported_settings(args) == []
    assert any("use_liger_kernel True: it needs a GPU" in problem for problem in unsupported_settings(args, CPU))


def test_all_problems_are_named_at_once(tmp_path):
    args = SimpleNamespace(**vars(config(tmp_path, use_cpu=True, optim="lomo", activation_offloading=True)))
    assert [problem.split()[0] for problem in unsupported_settings(args, CPU)] == ["activation_offloading", "optim"]

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What settings of a trainer need and this machine lacks: packages, an accelerator, a compiler, a launcher.

Libraries know this best, so each setting is tried out before anything is loaded. Trainers would find out later.
"""

import os
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available


_ON_CPU = "it needs a GPU, and this runs on the CPU. Remove it."
_NO_LAUNCHER = "it needs a launcher. Set --accelerate_config zero2, zero3 or fsdp2 instead."
_NO_LIGER = "liger-kernel is not installed (pip install liger-kernel)."
_NOT_PYTHON = "it can be set only from Python, to a ParallelismConfig of accelerate. Remove it."


def lacking(args: Any, device: torch.device | None = None) -> list[str]:
    """
    Find settings that cannot work on this machine.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The settings, or an object with the same attributes.
        device (`torch.device`, *optional*):
            The device of the run. By default only packages are looked for, because another machine may run it.

    Returns:
        `list[str]`: Each such setting with its value and the reason.
    """
    is_run = device is not None
    on_cpu = is_run and device.type == "cpu"
    offloads = on_cpu and (args.activation_checkpointing_kwargs or {}).get("offload")
    is_alone = is_run and "LOCAL_RANK" not in os.environ
    problems = [
        ("use_liger_kernel", not is_liger_kernel_available(), _NO_LIGER),
        ("use_liger_kernel", on_cpu, _ON_CPU),
        ("activation_offloading", on_cpu, _ON_CPU),
        ("activation_checkpointing_kwargs", offloads, _ON_CPU),
        ("deepspeed", is_alone, _NO_LAUNCHER),
        ("fsdp", is_alone, _NO_LAUNCHER),
        ("parallelism_config", isinstance(args.parallelism_config, dict | str), _NOT_PYTHON),
    ]
    found = [(name, problem) for name, lacks, problem in problems if lacks and getattr(args, name)]
    attempts = {"report_to": _report, "optim": _optimize}
    for name, attempt in (attempts | _WITH_DEVICE if is_run else attempts).items():
        try:
            attempt(args, device)
        except Exception as error:  # of any library
            found.append((name, error))
    return [f"{name} {_shown(getattr(args, name))}: {' '.join(str(problem).split())}" for name, problem in found]


def _shown(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else getattr(value, "value", value)


def _report(args: Any, device: Any) -> None:
    for callback in get_reporting_integration_callbacks(args.report_to):
        callback()


def _optimize(args: Any, device: torch.device | None) -> None:
    """Take a step on a layer of zeros, which draws no random numbers."""
    name = OptimizerNames(args.optim).value
    if "layerwise" in name or "lomo" in name:
        raise ValueError(
            "it updates weights in the backward pass, without learning rates by part. Choose another one."
        )
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 128, 64, device=device)
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, layer)
    except ValueError as error:
        if not str(error).startswith("No target modules found"):  # of the real model there may be some
            raise
        return
    if device is None:
        return
    for parameter in layer.parameters():
        parameter.data.zero_()
        parameter.grad = torch.zeros_like(parameter)
    optimizer = optimizer_class(kwargs.pop("params", layer.parameters()), **kwargs)
    get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    getattr(optimizer, "train", lambda: None)()
    optimizer.step()


def _compile(args: Any, device: torch.device) -> None:
    if args.torch_compile:
        compiled = torch.compile(torch.sin, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        compiled(torch.zeros(1, device=device))


def _load_data(args: Any, device: Any) -> None:
    names = ("num_workers", "multiprocessing_context", "prefetch_factor", "persistent_workers")
    DataLoader([0], **{name: getattr(args, f"dataloader_{name}") for name in names})


_WITH_DEVICE = {"torch_compile": _compile, "dataloader_num_workers": _load_data}

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Check before a model is loaded that this machine supports the training settings: packages, an accelerator, a compiler,
a launcher.

Each check calls the library that would fail later.
"""

import json
import os
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from medst_trl.base.errors import UserError


_ON_CPU = "it needs a GPU, and this runs on the CPU. Remove it."
_NO_LAUNCHER = "it needs a launcher. Set --accelerate_config zero2, zero3 or fsdp2 instead."
_NO_LIGER = "liger-kernel is not installed (pip install liger-kernel)."
_PYTHON_ONLY = "it can be set only from Python, to a ParallelismConfig of accelerate. Remove it."


def unsupported_settings(args: Any, device: torch.device | None = None) -> list[str]:
    """
    List the settings that this machine does not support.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The settings, or an object with the same attributes.
        device (`torch.device`, *optional*):
            The device of the run. By default only packages and the schedule are checked, because another machine may
            run it.

    Returns:
        `list[str]`: Each such setting with its value and the reason.
    """
    is_run = device is not None
    on_cpu = is_run and device.type == "cpu"
    offloads = on_cpu and (args.activation_checkpointing_kwargs or {}).get("offload")
    has_no_launcher = is_run and "LOCAL_RANK" not in os.environ
    rules = [  # setting, whether it is unsupported here, reason
        ("use_liger_kernel", not is_liger_kernel_available(), _NO_LIGER),
        ("use_liger_kernel", on_cpu, _ON_CPU),
        ("activation_offloading", on_cpu, _ON_CPU),
        ("activation_checkpointing_kwargs", offloads, _ON_CPU),
        ("deepspeed", has_no_launcher, _NO_LAUNCHER),
        ("fsdp", has_no_launcher, _NO_LAUNCHER),
        ("parallelism_config", isinstance(args.parallelism_config, dict | str), _PYTHON_ONLY),
    ]
    found = [_describe(args, name, why) for name, unsupported, why in rules if unsupported and getattr(args, name)]
    trials = {"report_to": _report, "lr_scheduler_type": _schedule, "optim": _optimize}
    if is_run:
        trials |= {"torch_compile": _compile, "dataloader_num_workers": _load_data}
    for name, trial in trials.items():
        try:
            trial(args, device)
        except Exception as error:  # of any library
            found.append(_describe(args, name, error))
    return found


def check_schedule(args: Any) -> None:
    """Raise a [`UserError`] if the settings of the learning rate's schedule are incomplete, on whatever machine."""
    try:
        _schedule(args)
    except Exception as error:  # of transformers or torch
        raise UserError(_describe(args, "lr_scheduler_type", error)) from error


def _describe(args: Any, name: str, problem: object) -> str:
    value = getattr(args, name)
    value = " ".join(value) if isinstance(value, list) else getattr(value, "value", value)
    return f"{name} {value}: {' '.join(str(problem).split())}"


def _report(args: Any, device: Any) -> None:
    for callback in get_reporting_integration_callbacks(args.report_to):
        callback()


def _schedule(args: Any, device: Any = None) -> None:
    kwargs = args.lr_scheduler_kwargs
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs  # of a recipe, as on the command line
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=kwargs)


def _optimize(args: Any, device: torch.device | None) -> None:
    """Take a step on a layer of zeros, which draws no random numbers."""
    name = OptimizerNames(args.optim).value
    if "layerwise" in name or "lomo" in name:
        raise ValueError("it updates weights in the backward pass, without learning rates by part. Choose another.")
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
    getattr(optimizer, "train", lambda: None)()
    optimizer.step()


def _compile(args: Any, device: torch.device) -> None:
    if args.torch_compile:
        compiled = torch.compile(torch.sin, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        compiled(torch.zeros(1, device=device))


def _load_data(args: Any, device: Any) -> None:
    names = ("num_workers", "multiprocessing_context", "prefetch_factor", "persistent_workers")
    DataLoader([0], **{name: getattr(args, f"dataloader_{name}") for name in names})

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What settings of a trainer need and this machine lacks: packages, an accelerator, a compiler, a launcher.

Libraries know this best, so each setting is tried out before anything is loaded. Trainers would find out later.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from medst_trl.base.errors import UserError


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
    found = []
    for name, attempt in _ATTEMPTS.items():
        if device is not None or name in _PACKAGES:
            try:
                attempt(args, device)
            except Exception as error:  # of any library
                value = getattr(args, name)
                shown = " ".join(value) if isinstance(value, list) else getattr(value, "value", value)
                found.append(f"{name} {shown}: {' '.join(str(error).split())}")
    return found


def check_machine(args: Any, device: torch.device | None = None) -> None:
    """
    Refuse settings that cannot work on this machine, see [`lacking`].

    Raises:
        UserError: with all of them.
    """
    if found := lacking(args, device):
        raise UserError("\n".join(found))


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


def _use_kernels(args: Any, device: torch.device | None) -> None:
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("liger-kernel is not installed (pip install liger-kernel). Remove it.")
    if args.use_liger_kernel and device is not None:
        _need_accelerator(device)


def _offload(args: Any, device: torch.device) -> None:
    if args.activation_offloading or (args.activation_checkpointing_kwargs or {}).get("offload"):
        _need_accelerator(device)


def _need_accelerator(device: torch.device) -> None:
    if device.type == "cpu":
        raise ValueError("it needs a GPU, and this runs on the CPU. Remove it.")


def _compile(args: Any, device: torch.device) -> None:
    if args.torch_compile:
        compiled = torch.compile(torch.sin, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        compiled(torch.zeros(1, device=device))


def _load_data(args: Any, device: Any) -> None:
    DataLoader(
        [0],
        num_workers=args.dataloader_num_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
    )


def _need_launcher(is_used: Any) -> None:
    if is_used and "LOCAL_RANK" not in os.environ:
        raise ValueError("it needs a launcher. Set --accelerate_config zero2, zero3 or fsdp2 instead.")


def _parallelize(args: Any, device: Any) -> None:
    if isinstance(args.parallelism_config, dict | str):
        raise ValueError("it can be set only from Python, to a ParallelismConfig of accelerate. Remove it.")


_ATTEMPTS: dict[str, Callable[[Any, Any], None]] = {
    "report_to": _report,
    "optim": _optimize,
    "use_liger_kernel": _use_kernels,
    "activation_offloading": _offload,
    "torch_compile": _compile,
    "dataloader_num_workers": _load_data,
    "deepspeed": lambda args, device: _need_launcher(args.deepspeed),
    "fsdp": lambda args, device: _need_launcher(args.fsdp),
    "parallelism_config": _parallelize,
}
_PACKAGES = ("report_to", "optim", "use_liger_kernel", "parallelism_config")

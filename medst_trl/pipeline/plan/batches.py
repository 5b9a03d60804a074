# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How many examples one optimizer step sees, and how they are divided."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stages.batch_size import set_accumulation

from .settings import stage_arguments


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Step


@dataclass(frozen=True)
class Batch:
    """
    The examples of one optimizer step.

    Args:
        per_device (`int`): Examples that a process reads at a time.
        accumulation (`int`): How often it does so before a step.
        processes (`int`): Number of processes.
        effective (`int`): Examples of a step in all, the product of these.
    """

    per_device: int
    accumulation: int
    processes: int
    effective: int


def effective_batch(step: "Step", num_processes: int) -> Batch:
    """
    The batch of a training step on so many processes.

    Raises:
        UserError: if its `effective_batch_size` cannot be met on them.
    """
    return batch_of(stage_arguments(step), num_processes, step.where)


def batch_of(arguments: tuple[Any, ...], num_processes: int, where: str) -> Batch:
    """The same of arguments that are made already."""
    args, training = arguments
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    division = SimpleNamespace(world_size=num_processes, **{key: getattr(training, key) for key in keys})
    try:
        set_accumulation(args, division)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    per_device, accumulation = division.per_device_train_batch_size, division.gradient_accumulation_steps
    return Batch(per_device, accumulation, num_processes, per_device * accumulation * num_processes)

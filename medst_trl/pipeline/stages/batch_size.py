# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One batch size for any number of processes: what is learned depends on the examples of an optimizer step."""

from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError


if TYPE_CHECKING:
    from transformers import TrainingArguments

# With a fixed `effective_batch_size` these two only say how a step is divided (see tests/distributed).
DIVISION_SETTINGS = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def accumulation_steps(effective: int, per_device: int, processes: int) -> int:
    """
    Number of batches that each process takes per optimizer step.

    Args:
        effective (`int`): Examples per step, over all processes.
        per_device (`int`): Examples per batch of one process.
        processes (`int`): Number of processes.

    Returns:
        `int`: `effective / (per_device * processes)`.

    Raises:
        UserError: if that is not a whole number, naming sizes and numbers of processes that divide it.

    Example:
    ```python
    >>> accumulation_steps(128, per_device=8, processes=4)
    4
    ```
    """
    if min(effective, per_device, processes) < 1:
        raise UserError(
            f"effective_batch_size {effective}, per_device_train_batch_size {per_device} and the number of processes "
            f"{processes} must be 1 or more."
        )
    if effective % (per_device * processes) == 0:
        return effective // (per_device * processes)
    options = []
    if effective % processes == 0:
        sizes = _divisors(effective // processes, near=per_device)
        options.append(f"per_device_train_batch_size {_either(sizes)} on {_processes(processes)}")
    if effective % per_device == 0:
        counts = _divisors(effective // per_device, near=processes)
        options.append(
            f"{_either(counts)} process{'es' * (counts != [1])} with per_device_train_batch_size {per_device}"
        )
    if not options:
        options.append(f"an effective_batch_size that is a multiple of {per_device * processes}")
    raise UserError(
        f"effective_batch_size {effective} cannot be divided into batches of {per_device} on {_processes(processes)}: "
        f"{per_device * processes} does not divide it. These work: {'; or '.join(options)}."
    )


def set_accumulation(args: Any, training_args: "TrainingArguments") -> None:
    """
    Set `gradient_accumulation_steps` from a stage's `effective_batch_size`, if it has one, in place.

    Call it before there is a trainer, because DeepSpeed then takes the number from the arguments.

    Raises:
        UserError: if the size cannot be met, or both are given.
    """
    if args.effective_batch_size is None:
        return
    if training_args.gradient_accumulation_steps != 1:
        raise UserError(
            f"effective_batch_size {args.effective_batch_size} determines gradient_accumulation_steps. Remove "
            f"gradient_accumulation_steps ({training_args.gradient_accumulation_steps})."
        )
    training_args.gradient_accumulation_steps = accumulation_steps(
        args.effective_batch_size, training_args.per_device_train_batch_size, training_args.world_size
    )


def division_of(training_args: "TrainingArguments", examples: str) -> str:
    """Describe how a step is divided: `128 conversations per step: 8 x 4 processes x 4 accumulated.`"""
    per_device, processes = training_args.per_device_train_batch_size, training_args.world_size
    accumulated = training_args.gradient_accumulation_steps
    return (
        f"{per_device * processes * accumulated} {examples} per step: {per_device} x {_processes(processes)} x "
        f"{accumulated} accumulated."
    )


def _divisors(number: int, near: int) -> list[int]:
    """The eight divisors nearest to `near`, in ascending order."""
    divisors = [divisor for divisor in range(1, min(number, 2**16) + 1) if number % divisor == 0]
    return sorted(sorted(divisors, key=lambda divisor: abs(divisor - near))[:8])


def _either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One batch size for a recipe, on any number of processes: what is learned goes by the examples of a step."""

from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError


if TYPE_CHECKING:
    from transformers import TrainingArguments

# Beside `effective_batch_size` they say how a step is computed, and may differ when a run is continued: a step has the
# same examples whichever way they are divided (see tests/distributed).
HOW_A_STEP_IS_DIVIDED = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def accumulation_steps(effective: int, per_device: int, processes: int) -> int:
    """
    How many batches each process has to take before a step of the optimizer.

    Args:
        effective (`int`): Examples of a step, over all processes.
        per_device (`int`): Examples that a process takes at once.
        processes (`int`): Number of processes.

    Returns:
        `int`: `effective / (per_device * processes)`.

    Raises:
        UserError: if that is no whole number, naming the sizes and the numbers of processes that would do.

    Example:
    ```python
    >>> accumulation_steps(128, per_device=8, processes=4)
    4
    ```
    """
    if min(effective, per_device, processes) < 1:
        raise UserError(
            f"effective_batch_size {effective}, per_device_train_batch_size {per_device} and {processes} processes "
            "have to be 1 or more."
        )
    if effective % (per_device * processes) == 0:
        return effective // (per_device * processes)
    ways = []
    if effective % processes == 0:
        sizes = _divisors(effective // processes, near=per_device)
        ways.append(f"per_device_train_batch_size {_either(sizes)} on {_processes(processes)}")
    if effective % per_device == 0:
        counts = _divisors(effective // per_device, near=processes)
        ways.append(f"{_either(counts)} process{'es' * (counts != [1])} with per_device_train_batch_size {per_device}")
    if not ways:
        ways.append(f"an effective_batch_size that is a multiple of {per_device * processes}")
    raise UserError(
        f"effective_batch_size {effective} cannot be made of batches of {per_device} on {_processes(processes)}: "
        f"{per_device * processes} does not divide it. These would do: {'; or '.join(ways)}."
    )


def set_accumulation(args: Any, training_args: "TrainingArguments") -> None:
    """
    Sets `gradient_accumulation_steps` by a stage's `effective_batch_size`, if it has one, in place. To be called
    before there is a trainer: DeepSpeed takes the number from the arguments then.

    Raises:
        UserError: if it cannot be met, or both are given.
    """
    if args.effective_batch_size is None:
        return
    if training_args.gradient_accumulation_steps != 1:
        raise UserError(
            f"effective_batch_size {args.effective_batch_size} says how many batches are accumulated. Leave out "
            f"gradient_accumulation_steps ({training_args.gradient_accumulation_steps})."
        )
    training_args.gradient_accumulation_steps = accumulation_steps(
        args.effective_batch_size, training_args.per_device_train_batch_size, training_args.world_size
    )


def division_of(training_args: "TrainingArguments", examples: str) -> str:
    """What a step is made of, for people: `128 conversations a step: 8 x 4 processes x 4 accumulated`."""
    per_device, processes = training_args.per_device_train_batch_size, training_args.world_size
    accumulated = training_args.gradient_accumulation_steps
    return (
        f"{per_device * processes * accumulated} {examples} a step: {per_device} x {_processes(processes)} x "
        f"{accumulated} accumulated."
    )


def _divisors(number: int, near: int) -> list[int]:
    """Those that somebody who wanted `near` may take instead."""
    smaller = [divisor for divisor in range(1, min(number, 2**16) + 1) if number % divisor == 0]
    return sorted(sorted(smaller, key=lambda divisor: abs(divisor - near))[:8])


def _either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"

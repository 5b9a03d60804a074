# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The examples of an optimizer step, on any number of processes: what is learned depends on their number alone."""

from dataclasses import dataclass
from typing import Any

from medst_trl.base.errors import UserError, number_of


@dataclass(frozen=True)
class Batch:
    """
    How the examples of an optimizer step are divided.

    Args:
        per_device (`int`): Examples per batch of one process.
        accumulation (`int`): Batches of each process per step.
        processes (`int`): Number of processes.
    """

    per_device: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, args: Any, training_args: Any, processes: int) -> "Batch":
        """
        The batch of a training stage on a number of processes.

        Args:
            args ([`TrainingStageArguments`]): Its arguments. If `effective_batch_size` is set, accumulation follows.
            training_args ([`~transformers.TrainingArguments`]): Those of its trainer.
            processes (`int`): Number of processes.

        Raises:
            UserError: if `effective_batch_size` cannot be met, or accumulation is given too.
        """
        per_device, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
        if args.effective_batch_size is None:
            return cls(per_device, accumulation, processes)
        if accumulation != 1:
            raise UserError(
                f"effective_batch_size {args.effective_batch_size} determines gradient_accumulation_steps. Remove "
                f"gradient_accumulation_steps ({accumulation})."
            )
        return cls(per_device, accumulation_steps(args.effective_batch_size, per_device, processes), processes)

    @property
    def effective(self) -> int:
        """Examples per step."""
        return self.per_device * self.accumulation * self.processes

    def text(self, examples: str) -> str:
        """Describe how a step is divided: `128 conversations per step: 8 x 4 processes x 4 accumulated.`"""
        return (
            f"{self.effective} {examples} per step: {self.per_device} x {number_of(self.processes, 'process')} x "
            f"{self.accumulation} accumulated."
        )


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
        UserError: if that is not a whole number; the message lists sizes and numbers of processes that work.

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
    divided, rest = divmod(effective, per_device * processes)
    if not rest:
        return divided
    options = []
    if effective % processes == 0:
        sizes = _divisors(effective // processes, near=per_device)
        options.append(f"per_device_train_batch_size {sizes} on {number_of(processes, 'process')}")
    if effective % per_device == 0:
        counts = _divisors(effective // per_device, near=processes)
        options.append(f"{number_of(counts, 'process')} with per_device_train_batch_size {per_device}")
    if not options:
        options.append(f"an effective_batch_size that is a multiple of {per_device * processes}")
    raise UserError(
        f"effective_batch_size {effective} cannot be divided into batches of {per_device} on "
        f"{number_of(processes, 'process')}: it is not a multiple of {per_device * processes}. These work: "
        f"{'; or '.join(options)}."
    )


def _divisors(number: int, near: int) -> str:
    """The eight divisors nearest to `near`, in ascending order: `"1, 2 or 4"`."""
    divisors = [divisor for divisor in range(1, min(number, 2**16) + 1) if number % divisor == 0]
    nearest = sorted(sorted(divisors, key=lambda divisor: abs(divisor - near))[:8])
    return " or ".join(", ".join(map(str, nearest)).rsplit(", ", 1))

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
            UserError: if `effective_batch_size` is not a multiple of the examples of all processes, or accumulation is
                given too.
        """
        per_device, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
        if args.effective_batch_size is None:
            return cls(per_device, accumulation, processes)
        if accumulation != 1:
            raise UserError(
                f"effective_batch_size {args.effective_batch_size} determines gradient_accumulation_steps. Remove "
                f"gradient_accumulation_steps ({accumulation})."
            )
        accumulation, rest = divmod(args.effective_batch_size, per_device * processes)
        if rest:
            raise UserError(
                f"effective_batch_size {args.effective_batch_size} is not a multiple of {per_device * processes}: "
                f"{per_device} (per_device_train_batch_size) x {number_of(processes, 'process')}. Change one of them."
            )
        return cls(per_device, accumulation, processes)

    @property
    def effective(self) -> int:
        """Examples per step."""
        return self.per_device * self.accumulation * self.processes

    def text(self, examples: str) -> str:
        """Describe how a step is divided: `128 conversations per step: 8 x 4 processes x 4 accumulated`"""
        return (
            f"{self.effective} {examples} per step: {self.per_device} x {number_of(self.processes, 'process')} x "
            f"{self.accumulation} accumulated"
        )

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How many examples a step reads and writes, and how many optimizer steps that makes, as far as it can be known."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stage import Count

from .batches import Batch


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Step
    from medst_trl.pipeline.stage import Output


@dataclass(frozen=True)
class Schedule:
    """
    The optimizer steps of a training.

    Args:
        steps (`int`, *optional*): In all; None where the number of examples is not known.
        per_epoch (`int`, *optional*): Steps of one epoch.
        epochs (`float`, *optional*): Epochs, not whole where `max_steps` decides.
        at_most (`bool`): Whether there may be fewer.
    """

    steps: int | None
    per_epoch: int | None
    epochs: float | None
    at_most: bool = False


def schedule(examples: Count, batch: Batch, num_train_epochs: float, max_steps: int) -> Schedule:
    """
    Steps and epochs as [`~transformers.Trainer`] counts them: the last batches of an epoch may be smaller.

    Args:
        examples ([`Count`]): Examples of an epoch.
        batch ([`~medst_trl.pipeline.plan.batches.Batch`]): Those of a step.
        num_train_epochs (`float`): Epochs to train.
        max_steps (`int`): Steps to train instead, where it is above 0.
    """
    if examples.number is None:
        return Schedule(max_steps if max_steps > 0 else None, None, None if max_steps > 0 else num_train_epochs)
    loads = math.ceil(examples.number / (batch.per_device * batch.processes))
    per_epoch = max(1, math.ceil(loads / batch.accumulation))
    if max_steps > 0:
        return Schedule(max_steps, per_epoch, max_steps / per_epoch)
    return Schedule(math.ceil(num_train_epochs * per_epoch), per_epoch, num_train_epochs, examples.at_most)


def training_examples(args: Any, steps: Sequence["Step"]) -> Count:
    """Conversations of `sft` or pairs of `dpo`, by their stage's arguments."""
    names = [args.dataset] if isinstance(args.dataset, str) else args.dataset
    counts = [Rows(steps).rows(name, args.train_split) for name in names]
    if unknown := [count.depends_on for count in counts if count.number is None]:
        return Count(None, depends_on=" and ".join(unknown)).capped(args.max_records)
    total = Count(sum(count.number for count in counts), any(count.at_most for count in counts))
    return total.capped(args.max_records)


class Rows:
    """Counts rows for a plan: of datasets on disk, and of those that a step of the recipe will make."""

    def __init__(self, steps: Sequence["Step"] = (), throughput: float | None = None):
        self.steps = steps
        self.throughput = throughput

    def rows(self, directory: str, split: str) -> Count:
        """See [`~medst_trl.pipeline.stage.Counter`]."""
        if (rows := _parquet_rows(Path(directory), split)) is not None:
            return Count(rows)
        step, output = self._maker(directory)
        if output is not None and output.count is not None:
            known = output.count(step.settings, split, self)
            return replace(known, depends_on=step.label) if known.number is None else known
        return Count(None, depends_on=directory)

    def settings_behind(self, directory: str) -> Mapping[str, Any]:
        """See [`~medst_trl.pipeline.stage.Counter`]."""
        step, _ = self._maker(directory)
        return {} if step is None else step.settings

    def time(self, number: int | None, unit: str) -> Iterator[tuple[str, str]]:
        """See [`~medst_trl.pipeline.stage.Counter`]."""
        if self.throughput is None:
            return
        if number is None:
            yield "time", f"unknown: the number of {unit} is not known yet"
        else:
            yield "time", f"{_duration(number / self.throughput)} at {self.throughput:g} {unit} per second"

    def _maker(self, directory: str) -> "tuple[Step, Output] | tuple[None, None]":
        for step in self.steps:
            for output in step.stage.outputs:
                if Path(directory) == Path(step.settings["output_dir"], output.directory):
                    return step, output
        return None, None


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _parquet_rows(folder: Path, split: str) -> int | None:
    from pyarrow import parquet

    files = _shards(folder, split)
    return None if files is None else sum(parquet.read_metadata(path).num_rows for path in files)


def _shards(folder: Path, split: str) -> list[Path] | None:
    from medst_trl.data.schema import complete_shards

    try:
        return complete_shards(folder, split) if folder.is_dir() else None
    except UserError:
        return None

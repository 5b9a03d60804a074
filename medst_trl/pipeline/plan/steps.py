# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is known about a stage before it runs: its arguments, hardware, rows, batch and optimizer steps.

The machine that plans need not be the one that runs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset

from medst_trl.base.errors import Problems, UserError, located, number_of
from medst_trl.base.processes import NOT_DISTRIBUTED
from medst_trl.data.loading import columns_and_rows, mix
from medst_trl.hub import HubArguments, check_push
from medst_trl.pipeline.batch import Batch
from medst_trl.pipeline.launch import Hardware, default_config, gpu_count, has_deepspeed, read_config
from medst_trl.pipeline.options import parse
from medst_trl.pipeline.recipe import Step
from medst_trl.pipeline.stage import Count, Output


# TrainingArguments refuses these on a machine without a GPU, and imports DeepSpeed for the last.
_MACHINE_SETTINGS = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "deepspeed")


# Arguments


def stage_arguments(step: Step, on_gpu: bool = True) -> tuple[Any, ...]:
    """
    Fill the dataclasses of a stage and check them as the stage does before its work, on a machine without its GPUs.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            The step.
        on_gpu (`bool`, *optional*, defaults to `True`):
            Whether it will run on GPUs, where training defaults to bfloat16.

    Raises:
        UserError: for what the stage would refuse.
    """
    trains, settings = step.stage.trains, step.settings
    if trains:
        settings = {key: value for key, value in settings.items() if key not in _MACHINE_SETTINGS} | {"bf16": False}
    arguments = parse(step.stage.make_parser(), settings, step.where)
    if trains:
        training, bf16 = arguments[-1], step.settings.get("bf16")
        for name in ("tf32", "bf16_full_eval", "fp16_full_eval"):
            setattr(training, name, step.settings.get(name, getattr(training, name)))
        training.fp16 = bool(step.settings.get("fp16"))
        training.bf16 = on_gpu and not training.fp16 if bf16 is None else bool(bf16)
        if training.bf16 and training.fp16:
            raise UserError(f"{step.where}: bf16 and fp16 cannot both be true.")
    own, checks, problems = [item for item in arguments if not isinstance(item, HubArguments)], [], Problems()
    if step.stage.check is not None:
        checks.append((step.stage.check, own))
    if trains:
        from medst_trl.training.machine import check_schedule

        checks.append((check_schedule, own[-1:]))
    checks += [(check_push, [item]) for item in arguments if getattr(item, "push_to_hub", False)]
    for check, checked in checks:
        with problems.collect(), located(step.where):
            check(*checked)
    problems.report()
    return arguments


def missing_packages(step: Step) -> list[str]:
    """What the settings of a step that trains need, and this machine lacks. A finished step needs nothing."""
    from medst_trl.training.machine import unsupported_settings

    if not step.stage.trains or step.is_finished:
        return []
    defaults = {item.name: item.default for kind in step.stage.arguments() for item in fields(kind)}
    problems = unsupported_settings(SimpleNamespace(**defaults | step.settings))
    return [f"{step.where}: {problem}" for problem in problems]


# Hardware


def hardware_of(step: Step) -> Hardware:
    """
    What a step will run on: by its settings, else by its accelerate configuration, else what this machine has.

    Raises:
        UserError: for a configuration that cannot start that number of processes.
    """
    gpus = gpu_count()
    if not step.stage.distributed:
        return Hardware("one process", NOT_DISTRIBUTED, 1, gpus > 0)
    hardware = read_config(step.accelerate_config or default_config(step.num_processes), step.num_processes)
    processes, shortages = hardware.processes or max(1, gpus) * hardware.machines, []
    if hardware.on_gpu and gpus < processes // hardware.machines:
        here = number_of(gpus, "GPU") if gpus else "none"
        shortages.append(f"planned for {number_of(processes, 'GPU')}, and this machine has {here}")
        if hardware.processes is None:
            shortages.append("--num_processes N plans for N GPUs")
    if hardware.is_deepspeed and not has_deepspeed():
        shortages.append('DeepSpeed is not installed here: pip install "medst_trl[deepspeed]"')
    shortages += [problem.removesuffix(".") for problem in missing_packages(step)]
    return replace(hardware, processes=processes, shortages=tuple(shortages))


# Optimizer steps


def schedule(examples: Count, batch: Batch, num_train_epochs: float, max_steps: int) -> tuple[int | None, str]:
    """
    Count optimizer steps as [`~transformers.Trainer`] does: the last batches of an epoch may be smaller.

    Args:
        examples ([`~medst_trl.pipeline.stage.Count`]): Examples of an epoch.
        batch ([`Batch`]): Those of a step.
        num_train_epochs (`float`): Number of epochs.
        max_steps (`int`): Number of steps, if above 0; it takes precedence.

    Returns:
        `tuple[int | None, str]`: The number of steps, None if that of examples is unknown, and both in words.
    """
    if examples.number is None:
        of_unknown = f"{number_of(f'{num_train_epochs:g}', 'epoch')} of {examples.depends_on}"
        return (max_steps, f"{max_steps:,}") if max_steps > 0 else (None, of_unknown)
    batches = math.ceil(examples.number / (batch.per_device * batch.processes))
    per_epoch = max(1, math.ceil(batches / batch.accumulation))
    steps = max_steps if max_steps > 0 else math.ceil(num_train_epochs * per_epoch)
    epochs = max_steps / per_epoch if max_steps > 0 else num_train_epochs
    most = "at most " if examples.at_most and max_steps <= 0 else ""
    return steps, f"{most}{steps:,}: {number_of(f'{epochs:.3g}', 'epoch')} of {per_epoch:,}"


# Rows


def training_examples(args: Any, steps: Sequence[Step], seed: int = 0) -> Count:
    """The number of examples that the arguments of a training stage name, for the seed that mixes datasets."""
    counts = [RecipeCounts(steps).rows(name, args.train_split) for name in args.dataset]
    if unknown := [count.depends_on for count in counts if count.number is None]:
        return Count(None, depends_on=" and ".join(unknown)).capped(args.max_records)
    numbers = [Dataset.from_dict({"row": range(count.number)}) for count in counts]
    mixture = mix(numbers, args.dataset_weights, args.oversample, seed)
    total = Count(len(mixture), any(count.at_most for count in counts))
    return total.capped(args.max_records)


class RecipeCounts:
    """
    Tells a stage about the other steps of the recipe; see [`~medst_trl.pipeline.stage.RowCounter`].

    Args:
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`], *optional*): The steps of the recipe.
        throughput (`float`, *optional*): Units per second of the stage that asks.
    """

    def __init__(self, steps: Sequence[Step] = (), throughput: float | None = None):
        self.steps = steps
        self.throughput = throughput

    def rows(self, directory: str, split: str) -> Count:
        with suppress(UserError, OSError):  # no files, not all of them, or no such directory
            return Count(columns_and_rows(Path(directory), split)[1])
        step, output = maker_of(directory, self.steps)
        if output is not None and output.count is not None:
            count = output.count(step.settings, split, self)
            return replace(count, depends_on=step.label) if count.number is None else count
        return Count(None, depends_on=directory)

    def settings_behind(self, directory: str) -> Mapping[str, Any]:
        step, _ = maker_of(directory, self.steps)
        return {} if step is None else step.settings

    def time(self, number: int | None, unit: str) -> Iterator[tuple[str, str]]:
        if self.throughput is not None and number is None:
            yield "time", f"unknown: the number of {unit} is not known yet"
        elif self.throughput is not None:
            yield "time", f"{_duration(number / self.throughput)} at {self.throughput:g} {unit} per second"


def maker_of(path: str, steps: Sequence[Step]) -> tuple[Step | None, Output | None]:
    """The step that makes a path, and which of its outputs the path is; None if there is no such step or output."""
    makers = [step for step in steps if Path(path).is_relative_to(step.settings["output_dir"])]
    if not makers:
        return None, None
    step = max(makers, key=lambda step: len(Path(step.settings["output_dir"]).parts))
    return step, step.stage.output(Path(path).relative_to(step.settings["output_dir"]).as_posix())


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"

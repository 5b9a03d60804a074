# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is known about a stage before it runs: its arguments, hardware, rows, batch and optimizer steps.

The machine that plans need not be the one that runs.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset

from medst_trl.base.errors import Problems, UserError, located, number_of
from medst_trl.base.hub_ids import is_only_on_hub
from medst_trl.base.processes import NOT_DISTRIBUTED
from medst_trl.data.conform import check_missing
from medst_trl.data.loading import columns_and_rows, mix
from medst_trl.engines.engine import loads_model
from medst_trl.hub import HubArguments, check_push
from medst_trl.pipeline.launch import Batch, Hardware, default_config, gpu_count, has_deepspeed, read_config
from medst_trl.pipeline.options import parse
from medst_trl.pipeline.recipe import Step
from medst_trl.pipeline.stage import ANY, FILE, MODEL, RUN, Count, Input, Output


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
    own = [item for item in arguments if not isinstance(item, HubArguments)]
    with located(step.where):
        if step.stage.check is not None:
            step.stage.check(*own)
        for item in arguments:
            if getattr(item, "push_to_hub", False):
                check_push(item)
    return arguments


def missing_packages(step: Step) -> list[str]:
    """What the settings of a step that trains need, and this machine lacks. A finished step needs nothing."""
    from medst_trl.training.machine import unsupported_settings

    if not step.stage.trains or step.is_finished:
        return []
    defaults = {item.name: item.default for kind in step.stage.arguments() for item in fields(kind)}
    problems = unsupported_settings(SimpleNamespace(**defaults | step.settings))
    return [f"{step.where}: {problem}" for problem in problems]


# Inputs


def check_inputs(step: Step, before: Sequence[Step], after: Sequence[Step], planned: Collection[str]) -> list[str]:
    """
    Check that the inputs of a step exist or can exist, and that a policy on this machine has a usable processor.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            The step.
        before, after (sequence of [`~medst_trl.pipeline.recipe.Step`]):
            The other steps of the recipe.
        planned (collection of `str`):
            Labels of the steps that will run. What others make must exist already, or is named as missing.

    Returns:
        `list[str]`: Where the inputs come from.

    Raises:
        UserError: for each input that is missing or of another kind, and for a processor that its model cannot use.
    """
    sources, problems, settings = [], Problems(), step.settings
    registries = step.stage.registries.items()
    chosen = [registry.get(settings[key]) for key, registry in registries if isinstance(settings.get(key), str)]
    files = [Input(name, FILE) for item in chosen for name in getattr(item, "files", ())]  # of a source
    for item in (*step.stage.inputs, *files):
        for value in item.names(step.settings) if item.kind != RUN else ():
            with problems.collect(), located(f"{step.where}: {item.key}"):
                source = _source(step, item, value, before, after)
                others = {maker.label for maker in before}.difference(planned)
                is_missing = source in others and not Path(value).exists()
                sources.append(f"{source} (not on disk yet: run it first)" if is_missing else source)
    problems.report()
    _check_processor(step)
    return list(dict.fromkeys(sources))


def _source(step: Step, item: Input, value: str, before: Sequence[Step], after: Sequence[Step]) -> str:
    """Where an input comes from: an earlier step, this machine or the Hub. Refuse one of another kind."""
    maker, output = maker_of(value, before)
    if maker is not None:
        made = output and output.kind
        if item.kind == MODEL and made != MODEL:
            raise UserError(f"{value} is not a model: {maker.label} makes none there.")
        if item.is_dataset and item.kind != ANY and made not in item.kinds:
            makes = ", ".join(output.directory for output in maker.stage.outputs if output.directory) or "no dataset"
            kinds = " or ".join(item.kinds)
            raise UserError(f"{value} is not {item.kind} data: {maker.label} makes {makes}, and this reads {kinds}.")
        return maker.label
    if Path(value).exists():
        _check_on_disk(item, Path(value), item.split_in(step.settings))
        return value
    if (later := maker_of(value, after)[0]) is not None:
        raise UserError(f"{value} is made by {later.label}, which runs later.")
    if item.kind == FILE or not is_only_on_hub(value):
        raise UserError(f"{value} does not exist, and no section before {step.label} makes it.")
    return f"{value} (Hub)"


def _check_on_disk(item: Input, path: Path, split: str) -> None:
    """Check that a model has a configuration, and a dataset its split and columns, from the head of one file."""
    if item.kind == MODEL and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{path} contains no model (config.json) and no adapter.")
    if not item.is_dataset or item.kind == ANY:
        return
    with located(str(path)):
        check_missing(columns_and_rows(path, split, item.kind)[0], item.kind)


def _check_processor(step: Step) -> None:
    """Refuse a policy on this machine whose processor cannot be used, as its stage does before it loads weights."""
    from medst_trl.policy.adapters import read_adapter_config
    from medst_trl.policy.loading import load_processor

    names = ("model_name_or_path", "base_model_name_or_path", "trust_remote_code")
    name, base, trusts = map(step.settings.get, names)
    if name and any(Path(name).glob("tokenizer*")) and loads_model(step.settings):
        with located(f"{step.where}: model_name_or_path"):
            adapter = read_adapter_config(name, None)
            if Path(base or (adapter.base_model_name_or_path if adapter else name) or "").is_dir():
                load_processor(name, base, None, bool(trusts))


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
        shortages.append(f"planned for {number_of(processes, 'GPU')}, and this machine has {gpus}")
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
        `tuple[int | None, str]`: The number of steps, None if that of examples is unknown, and a
        description with the number of epochs.
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
    """

    def __init__(self, steps: Sequence[Step] = ()):
        self.steps = steps

    def rows(self, directory: str, split: str) -> Count:
        with suppress(UserError, OSError):  # no files, not all of them, or no such directory
            return Count(columns_and_rows(Path(directory), split)[1])
        step, output = maker_of(directory, self.steps)
        if output is not None and output.count is not None:
            count = output.count(step.settings, split, self)
            return replace(count, depends_on=step.label) if count.number is None else count
        return Count(None, depends_on=directory)

    def settings_of_maker(self, directory: str) -> Mapping[str, Any]:
        step, _ = maker_of(directory, self.steps)
        return {} if step is None else step.settings


def maker_of(path: str, steps: Sequence[Step]) -> tuple[Step | None, Output | None]:
    """The step that makes a path, and which of its outputs the path is; None if there is no such step or output."""
    makers = [step for step in steps if Path(path).is_relative_to(step.settings["output_dir"])]
    if not makers:
        return None, None
    step = max(makers, key=lambda step: len(Path(step.settings["output_dir"]).parts))
    return step, step.stage.output(Path(path).relative_to(step.settings["output_dir"]).as_posix())

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`medst recipes validate`: whether a recipe can run, checked without a GPU, the Hub or weights."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from medst_trl.base.errors import Problems, UserError, located
from medst_trl.base.hub_ids import is_only_on_hub
from medst_trl.base.processes import NOT_DISTRIBUTED
from medst_trl.data.conform import check_missing
from medst_trl.data.loading import columns_and_rows
from medst_trl.engines.engine import loads_model
from medst_trl.pipeline.batch import Batch
from medst_trl.pipeline.recipe import Recipe, Step
from medst_trl.pipeline.stage import ANY, FILE, MODEL, RUN, Input
from medst_trl.policy.adapters import read_adapter_config
from medst_trl.policy.loading import load_processor
from medst_trl.training.settings import check_sharding

from .steps import hardware_of, maker_of, missing_packages, stage_arguments


PROCESSES = (1, 4, 8)  # checked if no number is given


def validate(recipe: Recipe, which: str | None = None) -> list[str]:
    """
    Check a recipe as far as possible without running it.

    Checked are keys, types and required settings; what each stage refuses before it opens anything; that inputs exist,
    are made by an earlier section or can be repositories of the Hub; columns and splits of datasets on disk; that
    accelerate configurations exist, and that batches can be met on the number of processes.

    Args:
        recipe ([`~medst_trl.pipeline.recipe.Recipe`]): The recipe, with the options of the command line.
        which (`str`, *optional*): The steps to check, as for `recipe.steps`; all by default.

    Returns:
        `list[str]`: One line per step.

    Raises:
        UserError: with every problem and its place. Inputs are checked if all keys and types are valid.
    """
    chosen: dict[str, tuple[Any, ...] | None] = {}  # the arguments of each step, None if they are refused

    def check(step: Step) -> None:
        chosen[step.label] = None
        with problems.collect():
            chosen[step.label] = stage_arguments(step)

    steps, lines, problems = [], [], Problems()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of libraries
        with problems.collect():
            recipe.steps(which, check=check)
            steps = recipe.steps(complete=False)
        for number, step in enumerate(steps):
            if step.label not in chosen:
                continue
            with problems.collect():
                results = check_inputs(step, steps[:number], steps[number:], chosen)
                check_processor(step)
                if (arguments := chosen[step.label]) is not None:
                    results += [*_launch(step, arguments), *step.stage.ignored(arguments, step.given)]
                    results += [f"on this machine, {problem}" for problem in missing_packages(step)]
                lines.append(f"{step.label:<{max(map(len, chosen)) + 2}}{'; '.join(results) or 'ready'}")
    problems.report()
    return lines


def check_processor(step: Step) -> None:
    """
    Refuse a policy on this machine whose processor cannot be used, as its stage does before it loads weights.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            A step.
    """
    names = ("model_name_or_path", "base_model_name_or_path", "trust_remote_code")
    name, base, trusts = map(step.settings.get, names)
    if name and any(Path(name).glob("tokenizer*")) and loads_model(step.settings):
        with located(f"{step.where}: model_name_or_path"):
            adapter = read_adapter_config(name, None)
            if Path(base or (adapter.base_model_name_or_path if adapter else name) or "").is_dir():
                load_processor(name, base, None, bool(trusts))


def check_inputs(step: Step, before: Sequence[Step], after: Sequence[Step], planned: Collection[str]) -> list[str]:
    """
    Check that the inputs of a step exist or can exist.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            The step.
        before, after (sequence of [`~medst_trl.pipeline.recipe.Step`]):
            The other steps of the recipe.
        planned (collection of `str`):
            Labels of the steps that will run. What others make must exist already, or is named as missing.

    Returns:
        `list[str]`: A line that says where the inputs come from, if there are any.

    Raises:
        UserError: for each input that is missing or of another kind.
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
    return ["from " + ", ".join(dict.fromkeys(sources))] if sources else []


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


def _launch(step: Step, arguments: tuple[Any, ...]) -> Iterator[str]:
    """The launcher's configuration, and the batch of a step that trains."""
    if not step.stage.distributed:
        return
    hardware = hardware_of(step)
    yield step.accelerate_config or "the default launcher"
    if not step.stage.trains:
        return
    is_single = hardware.kind == NOT_DISTRIBUTED and step.accelerate_config is not None
    numbers = [step.num_processes] if step.num_processes else [1] if is_single else PROCESSES
    batches, errors = [], []
    with located(step.where):
        check_sharding(hardware.kind, *arguments)
        for number in numbers:
            try:
                batch = Batch.of(*arguments, number)
                batches.append(f"{batch.effective} on {number} ({batch.per_device} x {batch.accumulation})")
            except UserError as error:
                batches.append(f"cannot be met on {number}")
                errors.append(error)
        if len(errors) == len(numbers):  # only some of several numbers must be possible
            raise errors[0]
    yield "batch " + ", ".join(batches)

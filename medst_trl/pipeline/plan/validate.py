# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`medst recipes validate`: whether a recipe can run, checked without a GPU, the Hub or weights."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from medst_trl.base.errors import Problems, UserError, located
from medst_trl.base.hub_ids import is_hub_id
from medst_trl.base.processes import NOT_DISTRIBUTED
from medst_trl.pipeline.batch import Batch
from medst_trl.pipeline.recipe import Recipe, Step
from medst_trl.pipeline.stage import ANY, FILE, MODEL, RUN, Input, Output
from medst_trl.training.settings import check_sharding

from .steps import hardware_of, maker_of, stage_arguments


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
        UserError: with every problem and its place.
    """
    chosen = {step.label for step in recipe.steps(which, check=stage_arguments)}
    steps = recipe.steps(complete=False)
    lines, problems, width = [], Problems(), max(map(len, chosen)) + 2
    for number, step in enumerate(steps):
        if step.label not in chosen:
            continue
        with problems.collect(), warnings.catch_warnings(action="ignore", category=FutureWarning):  # of libraries
            arguments, results = stage_arguments(step), _inputs(step, steps[:number], steps[number:])
            results += [*_launch(step, arguments), *step.stage.ignored(arguments, step.given)]
            lines.append(f"{step.label:<{width}}{'; '.join(results) or 'ready'}")
    problems.report()
    return lines


def _inputs(step: Step, before: list[Step], after: list[Step]) -> list[str]:
    """Where the inputs come from."""
    missing, sources = [], []
    names = [(item, name) for item in step.stage.inputs if item.kind != RUN for name in item.names(step.settings)]
    for item, value in names:
        maker, output = maker_of(value, before)
        if maker is not None:
            _check_output(step, item, value, maker, output)
            sources.append(maker.label)
        elif Path(value).exists():
            _check_on_disk(step, item, Path(value))
            sources.append(value)
        elif (later := maker_of(value, after)[0]) is not None:
            missing.append(f"{item.key}: {value} is made by {later.label}, which runs later")
        elif item.kind != FILE and is_hub_id(value) and not Path(Path(value).parts[0]).is_dir():
            sources.append(f"{value} (Hub)")
        else:
            missing.append(f"{item.key}: {value} does not exist, and no section before {step.label} makes it")
    if missing:
        raise UserError("\n".join(f"{step.where}: {problem}." for problem in missing))
    return ["from " + ", ".join(dict.fromkeys(sources))] if sources else []


def _check_output(step: Step, item: Input, value: str, maker: Step, made: Output | None) -> None:
    """Refuse an output of an earlier step that is not of the input's kind."""
    if item.is_dataset and item.kind != ANY and (made is None or made.kind not in item.kinds):
        datasets = ", ".join(output.directory for output in maker.stage.outputs if output.directory) or "no dataset"
        raise UserError(
            f"{step.where}: {item.key}: {value} is not {item.kind} data: {maker.label} makes {datasets}, and "
            f"this reads {' or '.join(item.kinds)}."
        )
    if item.kind == MODEL and (made is None or made.kind != MODEL):
        raise UserError(f"{step.where}: {item.key}: {value} is not a model: {maker.label} makes none there.")


def _check_on_disk(step: Step, item: Input, path: Path) -> None:
    """Check that a model has a configuration, and a dataset its split and columns, from the head of one file."""
    if item.kind == MODEL and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{step.where}: {item.key}: {path} contains no model (config.json) and no adapter.")
    if not item.is_dataset or item.kind == ANY:
        return
    from datasets import Features
    from pyarrow.parquet import read_schema

    from medst_trl.data.schema import check_columns, complete_shards

    try:
        shard = complete_shards(path, item.split_in(step.settings))[0]
        check_columns(SimpleNamespace(features=Features.from_arrow_schema(read_schema(shard))), item.kind)
    except (UserError, NotADirectoryError) as error:
        raise UserError(f"{step.where}: {item.key}: {path}: {error}") from None


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

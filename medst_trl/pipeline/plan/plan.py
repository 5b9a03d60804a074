# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan of a recipe, step by step, as text: what to read before GPUs are booked."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError, located, number_of
from medst_trl.base.hub_ids import cached_repository, hub_answers, is_hub_id
from medst_trl.base.settings import settings_among
from medst_trl.engines.engine import ENGINES
from medst_trl.pipeline.batch import Batch
from medst_trl.pipeline.options import Option
from medst_trl.pipeline.recipe import Recipe, Step, read_recipe
from medst_trl.pipeline.record import is_complete
from medst_trl.pipeline.stage import FILE, RUN, Count
from medst_trl.training.settings import check_sharding

from .memory import GIB, Memory, training_memory
from .policies import NotKnownYet, Policy, model_at, policy_of, trained_parameters
from .steps import (
    Hardware,
    RecipeCounts,
    effective_batch,
    hardware_of,
    maker_of,
    schedule,
    stage_arguments,
    training_examples,
    without_hub,
)


_Row = tuple[str, str]  # a label and a text; rows of the same label are shown as one
LABEL = 12  # width of the labels
_WEIGHTS = (".safetensors", ".bin")  # transformers downloads the first of these that a repository has


def print_plan(source: str, options: Sequence[Option], which: str | None = None) -> None:
    """Print the plan of a recipe, for `medst run RECIPE --dry_run`. See [`plan_recipe`]."""
    throughput, options = read_throughput(options)
    print(plan_recipe(read_recipe(source, options), which, throughput))


def read_throughput(options: Sequence[Option]) -> tuple[dict[str | None, float], list[Option]]:
    """
    Separate `--throughput N` and `--sft.throughput N` from the other options.

    Raises:
        UserError: if one is not a number above 0.
    """
    rates = {}
    for option in options:
        if option.key == "throughput":
            try:
                rate = 0.0 if option.value is True else float(option.value)  # True is `--throughput` without a value
            except (TypeError, ValueError):
                rate = 0.0
            if not 0 < rate < float("inf"):
                raise UserError(f"throughput: {option.value!r} is not a number of examples per second.")
            rates[option.target] = rate
    return rates, [option for option in options if option.key != "throughput"]


def plan_recipe(recipe: Recipe, which: str | None = None, throughput: Mapping[str | None, float] | None = None) -> str:
    """
    Plan the steps of a recipe. Nothing is run.

    Args:
        recipe ([`~medst_trl.pipeline.recipe.Recipe`]):
            The recipe, with the options of the command line.
        which (`str`, *optional*):
            The steps to plan, as for `recipe.steps`.
        throughput (mapping, *optional*):
            Examples per second, by stage or label; under None for every step that trains.

    Returns:
        `str`: the plan.

    Raises:
        UserError: if the recipe could not run.
    """
    chosen, steps = recipe.steps(which), recipe.steps(complete=False)
    for target in throughput or ():
        if target is not None and not any(target in (step.label, step.stage.name) for step in steps):
            raise UserError(f"--{target}.throughput: {recipe.path} has no section {target!r}.")
    plan = _Plan(steps, throughput or {})
    lines = [f"Plan of {recipe.path}. Nothing is run, downloaded or uploaded.", f"Results go to {recipe.output_dir}."]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of libraries about each other
        for step in chosen:
            lines += ["", *plan.lines(step)]
    return "\n".join([*lines, "", *plan.notes()])


class _Plan:
    """
    Plans one step after another: what an earlier one downloads, a later one has.

    Args:
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`]):
            All steps of the recipe.
        throughput (mapping):
            As for [`plan_recipe`].
    """

    def __init__(self, steps: Sequence[Step], throughput: Mapping[str | None, float]):
        self.steps = steps
        self.throughput = throughput
        self.downloaded: set[str] = set()
        self.shortages: list[str] = []
        self.labels: set[str] = set()
        self.weight_bytes = cache(self._weight_bytes)  # of a 7B model within seconds, and several steps may run it

    def lines(self, step: Step) -> Iterator[str]:
        """Heading and rows of a step."""
        hardware = hardware_of(step)
        arguments = stage_arguments(step, on_gpu=hardware.on_gpu)
        self.shortages += hardware.shortages
        if is_complete(step.settings["output_dir"]) and not step.settings.get("overwrite"):
            yield f"{step.label}: already finished; skipped unless its settings have changed"
            return
        yield step.label + (f" ({Path(hardware.config).stem}, {hardware.devices})" if step.stage.distributed else "")
        before = ""
        for label, text in self._rows(step, arguments, hardware, self._counts_for(step)):
            yield f"  {label if label != before else '':<{LABEL}}{text}"
            before = label
            self.labels.add(label)

    def _counts_for(self, step: Step) -> RecipeCounts:
        for_all = self.throughput.get(None) if step.stage.trains else None
        by_stage = self.throughput.get(step.stage.name, for_all)
        return RecipeCounts(self.steps, self.throughput.get(step.label, by_stage))

    def _rows(self, step: Step, arguments: tuple, hardware: Hardware, counts: RecipeCounts) -> Iterator[_Row]:
        if step.stage.trains:
            yield from self._training(step, arguments, hardware, counts)
        else:
            yield from self._model(step, arguments[0])
        if step.stage.plan is not None:
            yield from (row for row in step.stage.plan(counts, *without_hub(arguments)) if row[1])
        yield from _downloads(step, self.steps, self.downloaded)
        yield from _prompts(arguments)
        yield from _uploads(step, arguments)

    def notes(self) -> Iterator[str]:
        """The lines below all steps."""
        if "memory" in self.labels:
            yield "Memory is an estimate for the longest examples; fragmentation adds 5 to 15%."
        if "batch" in self.labels and "time" not in self.labels:
            yield "Time: --throughput N (examples per second over all processes), --sft.throughput N for one stage."
        for shortage in dict.fromkeys(self.shortages):
            yield f"Note: {shortage}."

    # A step that runs a model

    def _model(self, step: Step, args: Any) -> Iterator[_Row]:
        name, model = getattr(args, "model_name_or_path", None), step.stage.input("model_name_or_path")
        if name is not None and not (model and model.is_remote(step.settings)):
            size = self.weight_bytes(name, step.settings.get("dtype", "auto")) if hasattr(args, "engine") else None
            yield "model", name + (f", {_size(size)} of weights" if size else "")

    def _weight_bytes(self, name: str, dtype: str) -> int | None:
        """Bytes of a model in the type it is loaded in; None if that is not known."""
        try:
            policy = model_at(name, self.steps)
        except NotKnownYet:
            return None
        own = policy.base_model.config.dtype if dtype == "auto" else dtype
        is_half = str(own).removeprefix("torch.") in ("bfloat16", "float16")
        return policy.model.num_parameters() * (2 if is_half else 4)

    # A step that trains

    def _training(self, step: Step, arguments: tuple, hardware: Hardware, counts: RecipeCounts) -> Iterator[_Row]:
        args, training = arguments
        with located(step.where):
            check_sharding(hardware.kind, *arguments)
        batch = effective_batch(step, hardware.processes, arguments)
        examples = training_examples(args, self.steps)
        planned = schedule(examples, batch, training.num_train_epochs, training.max_steps)
        memory = []
        try:
            policy = policy_of(step, self.steps, arguments)
        except NotKnownYet as reason:
            yield "model", str(reason)
        else:
            yield from _policy(step, policy, arguments)
            longest = training_memory(policy, arguments, batch, hardware)
            memory = [longest, training_memory(policy, arguments, batch, hardware, longest.length // 2)]
        if hasattr(training, "beta"):
            yield "loss", f"{' + '.join(training.loss_type)}, beta {training.beta:g}{_reference(training, memory)}"
        yield "batch", _batch(batch, hardware)
        yield "data", examples.of(step.stage.trains)
        yield "steps", f"{_steps(planned, examples)}; {_scheduler(training)}"
        if memory:
            yield from _memory(memory, training, hardware)
        yield from counts.time(None if planned.steps is None else planned.steps * batch.effective, "examples")


def _policy(step: Step, policy: Policy, arguments: tuple[Any, ...]) -> Iterator[_Row]:
    """The model and what of it trains."""
    args, training = arguments
    trained = trained_parameters(policy)
    if not trained:
        raise UserError(f"{step.where}: no parameter would train. Change the settings that freeze the model.")
    total = sum(item.count for item in trained)
    parameters = policy.model.num_parameters() - (total if policy.is_adapter else 0)
    name = args.model_name_or_path
    base = policy.base if Path(policy.base) == Path(name) else f"{name} on {policy.base}"
    dtype = "4-bit" if args.load_in_4bit else args.weights_dtype(training)
    yield "model", f"{base}, {_short(parameters)} parameters, {dtype}"
    rates = {"vision": training.vision_learning_rate, "projector": training.projector_learning_rate}
    width = max(len(item.how) for item in trained)
    for item in trained:
        rate = training.learning_rate if rates.get(item.part) is None else rates[item.part]
        yield "trains", f"{item.part:<11}{item.how:<{width}}{item.count:>16,}   learning rate {_rate(rate)}"
    yield "trains", f"{'total':<11}{'':<{width}}{total:>16,}   {total / parameters:.1%} of the model"


def _reference(training: Any, memory: list[Memory]) -> str:
    if training.precompute_ref_log_probs:
        return ", reference computed before the first step"
    if not memory:
        return ""
    return f", reference {'a copy in memory' if 'reference' in memory[0].parts else 'the model without the adapter'}"


def _batch(batch: Batch, hardware: Hardware) -> str:
    accumulated = f"{batch.accumulation} accumulated x " if batch.accumulation > 1 else ""
    return f"{batch.per_device} per {hardware.device} x {accumulated}{hardware.devices} = {batch.effective}"


def _steps(planned: Any, examples: Count) -> str:
    if planned.steps is None:
        return f"{number_of(f'{planned.epochs:g}', 'epoch')} of {examples.depends_on}"
    if planned.per_epoch is None:
        return f"{planned.steps:,}"
    most = "at most " if planned.at_most else ""
    return f"{most}{planned.steps:,}: {number_of(f'{planned.epochs:.3g}', 'epoch')} of {planned.per_epoch:,}"


def _scheduler(training: Any) -> str:
    name, warm_up = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type), training.warmup_steps
    if not warm_up:
        return name
    return f"{name}, warm-up {f'{warm_up:.0%}' if warm_up < 1 else f'{warm_up:g} steps'}"


def _memory(memory: list[Memory], training: Any, hardware: Hardware) -> Iterator[_Row]:
    longest, half = memory
    where = f" on each {hardware.device}" if hardware.processes > 1 else ""
    yield (
        "memory",
        f"about {_size(longest.total)}{where} at {longest.length:,} tokens per example, {_size(half.total)} at "
        f"{half.length:,}; {'with' if training.gradient_checkpointing else 'without'} gradient checkpointing",
    )
    yield "memory", ", ".join(f"{name} {_size(size)}" for name, size in longest.parts.items())


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,}"


def _rate(rate: float) -> str:
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size > 0.1 * GIB else f"{size / 2**20:.1f} MiB"


# Transfers: quickly, with and without a network


def _downloads(step: Step, steps: Sequence[Step], known: set[str]) -> Iterator[_Row]:
    """What a step downloads from the Hub, without what earlier steps do (`known`), to which it is added."""
    for item in step.stage.inputs:
        for source in item.names(step.settings) if item.kind not in (FILE, RUN) else ():
            if is_hub_id(source) and source not in known and maker_of(source, steps)[0] is None:
                known.add(source)
                kind = "dataset" if item.is_dataset else "model"
                yield "downloads", f"{kind} {source} ({_download(source, kind)})"


def _prompts(arguments: tuple[Any, ...]) -> Iterator[_Row]:
    """The server to which the engine of a step sends its prompts, if it is not in the same process."""
    if hasattr(arguments[0], "engine"):
        kind = ENGINES.get(arguments[0].engine)
        if address := kind.address(settings_among(arguments, kind.settings)):
            yield "prompts", f"{address}, model {arguments[0].model_name_or_path}"


def _uploads(step: Step, arguments: tuple[Any, ...]) -> Iterator[_Row]:
    """The repositories to which a step pushes its outputs."""
    for settings in arguments:
        if getattr(settings, "push_to_hub", False):
            repo_id = getattr(settings, "hub_dataset_id", None) or getattr(settings, "hub_model_id", None)
            private = "PUBLIC" if settings.hub_private_repo is False else "private"
            if len(step.stage.published) == 1:
                yield "uploads", f"{repo_id}, {private}"
            else:
                for directory in step.stage.published:
                    yield "uploads", f"{repo_id}-{directory}, {private}, if it is made"


def _download(source: str, kind: str) -> str:
    if _is_cached(source, kind):
        return "in the cache"
    size = _download_size(source, kind)
    if size is not None:
        return f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"
    return "size unknown" if hub_answers() else "size unknown: the Hub cannot be reached"


def _is_cached(hub_id: str, kind: str) -> bool:
    """Whether the local cache has the large files of a repository, so that little or nothing is downloaded."""
    files = cached_repository(hub_id, kind).glob("snapshots/*/**/*")
    return any(path.suffix in (*_WEIGHTS, ".parquet") for path in files)


def _download_size(hub_id: str, kind: str) -> int | None:
    """
    Bytes of a repository that are downloaded, those of a model's weights or of a whole dataset. None if the Hub cannot
    be reached or does not say.
    """
    if not hub_answers():
        return None
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = hub_id.partition("@")
    try:
        tree = HfApi().list_repo_tree(name, recursive=True, repo_type=kind, revision=revision or None)
        sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    except (OSError, HfHubHTTPError):
        return None
    weights = next((end for end in _WEIGHTS if any(path.endswith(end) for path in sizes)), "")
    return sum(size for path, size in sizes.items() if kind == "dataset" or path.endswith(weights))

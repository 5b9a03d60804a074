# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan of a recipe, step by step, as text: what to read before GPUs are booked."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoFile

from medst_trl.base.errors import Problems, UserError, located
from medst_trl.base.hub_ids import cached_repository, hub_answers, is_hub_id, split_revision
from medst_trl.base.redaction import hide_secrets
from medst_trl.base.settings import settings_among
from medst_trl.engines.calls import CallSettings
from medst_trl.engines.engine import ENGINES
from medst_trl.hub import HubArguments, check_push
from medst_trl.pipeline.batch import Batch
from medst_trl.pipeline.launch import Hardware
from medst_trl.pipeline.options import Option
from medst_trl.pipeline.recipe import Step, read_recipe
from medst_trl.pipeline.record import changes_of
from medst_trl.pipeline.stage import FILE, RUN
from medst_trl.policy.families import trained_parameters
from medst_trl.training.settings import check_sharding

from .memory import DEFAULT_LENGTH, GIB, training_memory
from .policies import NotKnownYet, Policy, model_at, policy_of
from .steps import RecipeCounts, hardware_of, maker_of, schedule, stage_arguments, training_examples
from .validate import check_inputs, check_processor


_Row = tuple[str, str]  # a label and a text; rows of the same label are shown as one
LABEL = 12  # width of the labels
_WEIGHTS = (".safetensors", ".bin")  # transformers downloads the first of these that a repository has


def print_plan(source: str, options: Sequence[Option], which: str | None = None) -> None:
    """
    Print the plan of a recipe, for `medst run RECIPE --dry_run`. Nothing is run.

    Args:
        source (`str`):
            The recipe.
        options (sequence of [`~medst_trl.pipeline.options.Option`]):
            The options of the command line; with `--throughput N`, the plan shows how long a step takes.
        which (`str`, *optional*):
            The steps to plan, as for `recipe.steps`.

    Raises:
        UserError: if the recipe could not run.
    """
    recipe = read_recipe(source, [option for option in options if option.key != "throughput"])
    chosen, steps = recipe.steps(which, check=stage_arguments), recipe.steps(complete=False)
    plan = _Plan(steps, [step.label for step in chosen], _read_throughput(options, recipe.path, steps))
    lines = [f"Plan of {recipe.path}. Nothing is run, downloaded or uploaded.", f"Results go to {recipe.output_dir}."]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of libraries about each other
        for step in chosen:
            check_processor(step)
            lines += ["", *plan.lines(step)]
    notes = [f"Note: {note}" for note in recipe.unused_options(chosen)]
    print(*map(hide_secrets, lines), "", *plan.notes(), *notes, sep="\n")


def _read_throughput(options: Sequence[Option], path: str, steps: Sequence[Step]) -> dict[str | None, float]:
    """Return the values of `--throughput N` (under None) and `--sft.throughput N`."""
    rates = {option.target: option.value for option in options if option.key == "throughput"}
    for target, value in rates.items():
        if target is not None and not any(target in (step.label, step.stage.name) for step in steps):
            raise UserError(f"--{target}.throughput: {path} has no section {target!r}.")
        try:
            rates[target] = float(str(value))  # a flag without a value is True
        except ValueError:
            rates[target] = 0.0
        if not 0 < rates[target] < math.inf:
            raise UserError(f"throughput: {value!r} is not a number of examples per second.")
    return rates


class _Plan:
    """
    Plans one step after another: what an earlier one downloads, a later one has.

    Args:
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`]):
            All steps of the recipe.
        chosen (sequence of `str`):
            Labels of those that are planned.
        throughput (mapping):
            Examples per second, by stage or label; under None for every step that trains.
    """

    def __init__(self, steps: Sequence[Step], chosen: Sequence[str], throughput: Mapping[str | None, float]):
        self.steps = steps
        self.chosen = chosen
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
        without_hub = [item for item in arguments if not isinstance(item, HubArguments)]
        if changes := changes_of(step.stage, *without_hub):
            yield f"{step.label}: would be refused: {'; '.join(changes)}"
            return
        if step.is_finished:
            yield f"{step.label}: already finished; skipped unless its inputs have changed"
            return
        yield step.label + (f" ({Path(hardware.config).stem}, {hardware.devices})" if step.stage.distributed else "")
        before = ""
        for label, text in self._rows(step, arguments, without_hub, hardware):
            yield f"  {label if label != before else '':<{LABEL}}{text}"
            before = label
            self.labels.add(label)

    def _rows(self, step: Step, arguments: tuple, without_hub: Sequence[Any], hardware: Hardware) -> Iterator[_Row]:
        rate = self.throughput.get(None) if step.stage.trains else None
        rate = self.throughput.get(step.label, self.throughput.get(step.stage.name, rate))
        counts = RecipeCounts(self.steps, rate)
        if step.stage.trains:
            yield from self._training(step, arguments, hardware, counts)
        else:
            yield from self._model(step, arguments)
        if step.stage.plan is not None:
            yield from (row for row in step.stage.plan(counts, *without_hub) if row[1])
        if step.replaces_results:
            yield "replaces", f"the results in {step.settings['output_dir']}"
        yield from (("note", note) for note in step.stage.ignored(arguments, step.given))
        problems, place = Problems(), [other.label for other in self.steps].index(step.label)
        with problems.collect():
            check_inputs(step, self.steps[:place], self.steps[place:], self.chosen)
        yield from (("problem", message.removeprefix(f"{step.where}: ")) for message in problems.messages)
        yield from _downloads(step, self.steps, self.downloaded)
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

    def _model(self, step: Step, arguments: tuple) -> Iterator[_Row]:
        """The model that a step loads, or the server to which its engine sends prompts, and what that may cost."""
        name, engine = (getattr(arguments[0], key, None) for key in ("model_name_or_path", "engine"))
        if name is None:
            return
        kind = ENGINES.get(engine) if engine else None
        settings = settings_among(arguments, kind.settings) if kind else None
        if kind and (address := kind.address(settings)):
            yield "prompts", f"{address}, model {name}"
            if isinstance(settings, CallSettings):
                yield "prompts", settings.budget_note
        elif kind is None or kind.loads_model:
            size = self.weight_bytes(name, step.settings.get("dtype", "auto")) if kind else None
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
            batch = Batch.of(*arguments, hardware.processes)
        examples = training_examples(args, self.steps, training.seed)
        steps, in_words = schedule(examples, batch, training.num_train_epochs, training.max_steps)
        length, memory = training.max_length or DEFAULT_LENGTH, []
        try:
            policy = policy_of(step, self.steps, arguments)
        except NotKnownYet as reason:
            yield "model", str(reason)
        else:
            yield from _policy(step, policy, arguments)
            memory = [training_memory(policy, arguments, batch, hardware, size) for size in (length, length // 2)]
        if hasattr(training, "beta"):
            yield "loss", f"{' + '.join(training.loss_type)}, beta {training.beta:g}{_reference(training, memory)}"
        accumulated = f"{batch.accumulation} accumulated x " if batch.accumulation > 1 else ""
        divided = f"{batch.per_device} per {hardware.device} x {accumulated}{hardware.devices}"
        yield "batch", f"{divided} = {batch.effective}"
        yield "data", examples.of(step.stage.trains)
        yield "steps", f"{in_words}; {_scheduler(training)}"
        if memory:
            longest, half = (_size(sum(parts.values())) for parts in memory)
            where = f" on each {hardware.device}" if hardware.processes > 1 else ""
            checkpointing = f"{'with' if training.gradient_checkpointing else 'without'} gradient checkpointing"
            lengths = f"at {length:,} tokens per example, {half} at {length // 2:,}"
            yield "memory", f"about {longest}{where} {lengths}; {checkpointing}"
            yield "memory", ", ".join(f"{name} {_size(size)}" for name, size in memory[0].items())
        yield from counts.time(None if steps is None else steps * batch.effective, "examples")


def _policy(step: Step, policy: Policy, arguments: tuple[Any, ...]) -> Iterator[_Row]:
    """The model and what of it trains."""
    args, training = arguments
    trained = trained_parameters(policy.model)
    if not trained:
        raise UserError(f"{step.where}: no parameter would train. Change the settings that freeze the model.")
    total = sum(trained.values())
    parameters = policy.model.num_parameters() - (total if policy.is_adapter else 0)
    name = args.model_name_or_path
    base = policy.base if Path(policy.base) == Path(name) else f"{name} on {policy.base}"
    dtype = "4-bit" if args.load_in_4bit else args.weights_dtype(training)
    yield "model", f"{base}, {_short(parameters)} parameters, {dtype}"
    rates = {"vision": training.vision_learning_rate, "projector": training.projector_learning_rate}
    width = max(len(how) for _, how in trained)
    for (part, how), count in trained.items():
        rate = training.learning_rate if rates.get(part) is None else rates[part]
        yield "trains", f"{part:<11}{how:<{width}}{count:>16,}   learning rate {_rate(rate)}"
    yield "trains", f"{'total':<11}{'':<{width}}{total:>16,}   {total / parameters:.1%} of the model"


def _reference(training: Any, memory: list[dict[str, float]]) -> str:
    if training.precompute_ref_log_probs:
        return ", reference computed before the first step"
    if not memory:
        return ""
    return f", reference {'a copy in memory' if 'reference' in memory[0] else 'the model without the adapter'}"


def _scheduler(training: Any) -> str:
    name, warm_up = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type), training.warmup_steps
    if not warm_up:
        return name
    return f"{name}, warm-up {f'{warm_up:.0%}' if warm_up < 1 else f'{warm_up:g} steps'}"


def _short(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number:,}"


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
                yield "downloads", f"{kind} {source} ({_download_size(source, kind)})"


def _uploads(step: Step, arguments: tuple[Any, ...]) -> Iterator[_Row]:
    """The repositories to which a step pushes its outputs."""
    for settings in arguments:
        if getattr(settings, "push_to_hub", False):
            private = "PUBLIC" if settings.hub_private_repo is False else "private"
            for directory in step.stage.published:
                is_alone = len(step.stage.published) == 1
                name = f", {private}" if is_alone else f"-{directory}, {private}, if it is made"
                yield "uploads", check_push(settings) + name


def _download_size(source: str, kind: str) -> str:
    """Describe the size of what is downloaded of a repository: the weights of a model, or a whole dataset."""
    cached = cached_repository(source, kind).glob("snapshots/*/**/*")
    if any(path.suffix in (*_WEIGHTS, ".parquet") for path in cached):  # little is missing, or nothing
        return "in the cache"
    if not hub_answers():
        return "size unknown: the Hub cannot be reached"
    name, revision = split_revision(source)
    try:
        tree = HfApi().list_repo_tree(name, recursive=True, repo_type=kind, revision=revision)
        sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    except OSError:  # also of huggingface_hub
        return "size unknown"
    weights = next((end for end in _WEIGHTS if any(path.endswith(end) for path in sizes)), "")
    size = sum(size for path, size in sizes.items() if kind == "dataset" or path.endswith(weights))
    return f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"

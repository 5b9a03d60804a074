# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan of a recipe, step by step, as text: what to read before GPUs are booked."""

import warnings
from collections.abc import Iterator, Sequence
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
from medst_trl.pipeline.launch import Batch, Hardware
from medst_trl.pipeline.options import Options
from medst_trl.pipeline.recipe import Step, read_recipe
from medst_trl.pipeline.record import changes_of
from medst_trl.pipeline.stage import FILE, RUN
from medst_trl.policy.families import trained_parameters
from medst_trl.training.settings import check_sharding

from .memory import DEFAULT_LENGTH, GIB, NotKnownYet, Policy, policy_of, training_memory
from .steps import RecipeCounts, check_inputs, hardware_of, maker_of, schedule, stage_arguments, training_examples


_Row = tuple[str, str]  # a label and a text; rows of the same label are shown as one
LABEL = 12  # width of the labels
_WEIGHTS = (".safetensors", ".bin")  # transformers downloads the first of these that a repository has


def print_plan(source: str, options: Options, which: str | None = None, with_models: bool = True) -> None:
    """
    Print the plan of a recipe, for `medst run RECIPE --dry_run` and `medst recipes validate`. Nothing is run.

    Checked are keys, types and required settings; what each stage refuses before it opens anything; that inputs exist,
    are made by an earlier section or can be repositories of the Hub; columns and splits of datasets on disk, and
    processors of models on disk; accelerate configurations and batches.

    Args:
        source (`str`):
            The recipe.
        options ([`~medst_trl.pipeline.options.Options`]):
            The options of the command line.
        which (`str`, *optional*):
            The steps to plan, as for `recipe.steps`.
        with_models (`bool`, *optional*, defaults to `True`):
            Whether to plan what depends on earlier results, models and the Hub. Without them, every step is checked,
            also a finished one.

    Raises:
        UserError: after the plan, with every problem and its place. Inputs are checked if all keys and types are
            valid.
    """
    recipe, problems = read_recipe(source, options), Problems()

    def check(step: Step) -> None:
        with problems.collect():
            stage_arguments(step)

    lines = [f"Plan of {recipe.path}. Nothing is run, downloaded or uploaded.", f"Results go to {recipe.output_dir}."]
    chosen, steps = [], []
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of libraries about each other
        with problems.collect():
            chosen, steps = recipe.steps(which, check=check), recipe.steps(complete=False)
        plan = _Plan(steps, [step.label for step in chosen], problems, with_models)
        for step in chosen:
            lines += ["", *plan.lines(step)]
    if chosen:
        notes = [f"Note: {note}." for note in dict.fromkeys(plan.shortages)]
        notes += [f"Note: {note}" for note in recipe.unused_options(chosen)]
        print(*map(hide_secrets, lines), "", *notes, sep="\n")
    problems.report()
    if not with_models:
        print(f"{recipe.path} is valid.")


class _Plan:
    """
    Plans one step after another: what an earlier one downloads, a later one has.

    Args:
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`]):
            All steps of the recipe.
        chosen (sequence of `str`):
            Labels of those that are planned.
        problems ([`~medst_trl.base.errors.Problems`]):
            Collects what is wrong with a step, so that the next one is planned, too.
        with_models (`bool`):
            As for [`print_plan`].
    """

    def __init__(self, steps: Sequence[Step], chosen: Sequence[str], problems: Problems, with_models: bool):
        self.steps = steps
        self.chosen = chosen
        self.problems = problems
        self.with_models = with_models
        self.downloaded: set[str] = set()
        self.shortages: list[str] = []

    def lines(self, step: Step) -> Iterator[str]:
        """Heading and rows of a step."""
        place, sources = [other.label for other in self.steps].index(step.label), []
        with self.problems.collect():
            sources = check_inputs(step, self.steps[:place], self.steps[place:], self.chosen)
        with self.problems.collect():
            hardware = hardware_of(step)
            arguments = stage_arguments(step, on_gpu=hardware.on_gpu)
            self.shortages += hardware.shortages
            without_hub = [item for item in arguments if not isinstance(item, HubArguments)]
            if self.with_models and (changes := changes_of(step.stage, *without_hub)):
                yield f"{step.label}: would be refused: {'; '.join(changes)}"
                return
            if self.with_models and step.is_finished:
                yield f"{step.label}: already finished; skipped unless its inputs have changed"
                return
            launcher = f" ({Path(hardware.config).stem}, {hardware.devices})" if step.stage.distributed else ""
            yield f"{step.label}{launcher}"
            before = ""
            for label, text in self._rows(step, arguments, without_hub, hardware, sources):
                yield f"  {label if label != before else '':<{LABEL}}{text}"
                before = label

    def _rows(
        self, step: Step, arguments: tuple, without_hub: Sequence[Any], hardware: Hardware, sources: Sequence[str]
    ) -> Iterator[_Row]:
        if sources:
            yield "reads", ", ".join(sources)
        if step.stage.trains:
            yield from self._training(step, arguments, hardware)
        elif self.with_models:
            yield from _model(arguments)
        yield from (("note", note) for note in step.stage.ignored(arguments, step.given))
        if not self.with_models:
            return
        if step.stage.plan is not None:
            yield from (row for row in step.stage.plan(RecipeCounts(self.steps), *without_hub) if row[1])
        if step.replaces_results:
            yield "replaces", f"the results in {step.settings['output_dir']}"
        yield from _downloads(step, self.steps, self.downloaded)
        yield from _uploads(step, arguments)

    def _training(self, step: Step, arguments: tuple, hardware: Hardware) -> Iterator[_Row]:
        """The rows of a step that trains."""
        args, training = arguments
        with located(step.where):
            check_sharding(hardware.kind, *arguments)
            batch = Batch.of(*arguments, hardware.processes)
        memory = []
        if self.with_models:
            try:
                policy = policy_of(step, self.steps, arguments)
            except NotKnownYet as reason:
                yield "model", str(reason)
            else:
                yield from _policy(step, policy, arguments)
                memory = _memory(policy, arguments, batch, hardware)
        if hasattr(training, "beta"):
            yield "loss", f"{' + '.join(training.loss_type)}, beta {training.beta:g}"
        yield "batch", batch.describe(step.stage.trains)
        examples = training_examples(args, self.steps, training.seed)
        yield "data", examples.describe(step.stage.trains)
        _, steps = schedule(examples, batch, training.num_train_epochs, training.max_steps)
        yield "steps", f"{steps}; {training.lr_scheduler_type.value}, warmup_steps {training.warmup_steps:g}"
        yield from memory


def _model(arguments: tuple[Any, ...]) -> Iterator[_Row]:
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
        yield "model", name


# A step that trains


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
    yield "model", f"{base}, {format_count(parameters)} parameters, {dtype}"
    rates = {"vision": training.vision_learning_rate, "projector": training.projector_learning_rate}
    width = max(len(how) for _, how in trained)
    for (part, how), count in trained.items():
        rate = training.learning_rate if rates.get(part) is None else rates[part]
        yield "trains", f"{part:<11}{how:<{width}}{count:>16,}   learning rate {rate:g}"
    yield "trains", f"{'total':<11}{'':<{width}}{total:>16,}   {total / parameters:.1%} of the model"


def _memory(policy: Policy, arguments: tuple[Any, ...], batch: Batch, hardware: Hardware) -> list[_Row]:
    """The memory of a training step, for the longest examples and for half of their length."""
    training = arguments[1]
    length = training.max_length or DEFAULT_LENGTH
    parts, half = (training_memory(policy, arguments, batch, hardware, size) for size in (length, length // 2))
    where = f" on each {hardware.device}" if hardware.processes > 1 else ""
    lengths = f"at {length:,} tokens per example, {format_size(sum(half.values()))} at {length // 2:,}"
    checkpointing = f"{'with' if training.gradient_checkpointing else 'without'} gradient checkpointing"
    estimate = f"about {format_size(sum(parts.values()))}{where} {lengths}; {checkpointing}"
    return [
        ("memory", f"{estimate}; an estimate, fragmentation adds 5 to 15%"),
        ("memory", ", ".join(f"{name} {format_size(size)}" for name, size in parts.items())),
    ]


def format_count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number:,}"


def format_size(size: float) -> str:
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

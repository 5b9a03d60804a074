# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan of a recipe: each step with all that can be said of it before it runs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.pipeline.record import is_complete
from medst_trl.pipeline.settings import Option
from medst_trl.pipeline.stage import Count

from .batches import Batch, batch_of
from .hardware import Hardware, hardware_of
from .memory import Memory, training_memory
from .meta import NotKnownYet
from .settings import stage_arguments
from .steps import Schedule, schedule, training_examples
from .trainable import Trained, model_at, policy_of, trained_parameters
from .transfers import downloads, requests, uploads


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Recipe, Step


@dataclass(frozen=True)
class Training:
    """
    What is known of a step that trains.

    Args:
        examples ([`Count`]): Examples of an epoch.
        batch ([`Batch`]): Examples of a step.
        schedule ([`Schedule`]): Steps and epochs.
        base (`str`, *optional*): The model, or the one under the adapter.
        parameters (`int`, *optional*): Its parameters, without the adapter.
        trained (`list` of [`Trained`]): What trains.
        rates (`dict[str, float]`): Learning rate of each part.
        memory (`list` of [`Memory`]): For the longest sequences, and for half of that.
        unknown (`str`, *optional*): Why what follows the schedule is not known.
    """

    examples: Count
    batch: Batch
    schedule: Schedule
    base: str | None = None
    parameters: int | None = None
    trained: list[Trained] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    unknown: str | None = None


@dataclass(frozen=True)
class StepPlan:
    """
    What is known of a step.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]): The step.
        arguments (`tuple`): Its stage's dataclasses.
        hardware ([`Hardware`]): What it runs on.
        is_done (`bool`): Whether its folder holds what an earlier run finished.
        training ([`Training`], *optional*): For steps that train.
        weights (`float`, *optional*): Bytes of the model it runs, where it does not train.
        throughput (`float`, *optional*): Examples a second, as given.
        downloads, requests, uploads (`list[str]`): Lines on what leaves and enters this machine.
    """

    step: "Step"
    arguments: tuple[Any, ...]
    hardware: Hardware
    is_done: bool
    training: Training | None
    weights: float | None
    throughput: float | None
    downloads: list[str]
    requests: list[str]
    uploads: list[str]


def plan_recipe(
    recipe: "Recipe", which: str | None = None, throughput: Mapping[str | None, float] | None = None
) -> tuple[list[StepPlan], list["Step"]]:
    """
    Plans the steps of a recipe and runs nothing.

    Args:
        recipe ([`~medst_trl.pipeline.recipe.Recipe`]):
            The recipe, with the options of the command line.
        which (`str`, *optional*):
            The steps to plan, as for `recipe.steps`.
        throughput (mapping, *optional*):
            Examples a second, by stage or label; under None for every step that trains.

    Returns:
        The plans, and all steps of the recipe.

    Raises:
        UserError: where the recipe could not run.
    """
    chosen, steps = recipe.steps(which), recipe.steps(complete=False)
    throughput = throughput or {}
    for target in throughput:
        if target is not None and not any(target in (step.label, step.stage.name) for step in steps):
            raise UserError(f"--{target}.throughput: {recipe.path} has no section {target!r}.")
    planner = _Planner(steps, throughput)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other; the run itself shows them
        return [planner.plan(step) for step in chosen], steps


def read_throughput(options: Sequence[Option]) -> tuple[dict[str | None, float], list[Option]]:
    """
    Divide `--throughput N` and `--sft.throughput N` from the other options.

    Raises:
        UserError: for what is no number above 0.
    """
    rates = {}
    for option in options:
        if option.key == "throughput":
            try:
                rates[option.target] = 0.0 if option.value is True else float(option.value)  # `--throughput` alone
            except (TypeError, ValueError):
                rates[option.target] = 0.0
            if not 0 < rates[option.target] < float("inf"):
                raise UserError(f"throughput: {option.value!r} is not a number of examples a second.")
    return rates, [option for option in options if option.key != "throughput"]


class _Planner:
    """Plans one step after another; what an earlier one fetches, a later one has."""

    def __init__(self, steps: Sequence["Step"], throughput: Mapping[str | None, float]):
        self.steps = steps
        self.throughput = throughput
        self.fetched: set[str] = set()
        self.weights: dict[tuple[str, str], float | None] = {}

    def plan(self, step: "Step") -> StepPlan:
        hardware = hardware_of(step)
        arguments = stage_arguments(step, on_gpu=hardware.on_gpu)
        name, is_done = (
            step.stage.name,
            is_complete(step.settings["output_dir"]) and not step.settings.get("overwrite"),
        )
        trains, answers = step.stage.trains, hasattr(arguments[0], "engine")
        for_all = self.throughput.get(None) if trains else None
        return StepPlan(
            step,
            arguments,
            hardware,
            is_done,
            training=self._training(step, arguments, hardware) if trains and not is_done else None,
            weights=self._weights(step) if answers and not is_done else None,
            throughput=self.throughput.get(step.label, self.throughput.get(name, for_all)),
            downloads=[] if is_done else downloads(step, self.steps, self.fetched),
            requests=[] if is_done else requests(arguments),
            uploads=uploads(step, arguments),
        )

    def _training(self, step: "Step", arguments: tuple[Any, ...], hardware: Hardware) -> Training:
        args, training = arguments
        check_sharding(step, arguments, hardware)
        batch = batch_of(arguments, hardware.processes, step.where)
        examples = training_examples(args, self.steps)
        known = examples, batch, schedule(examples, batch, training.num_train_epochs, training.max_steps)
        try:
            policy = policy_of(step, self.steps, arguments)
        except NotKnownYet as reason:
            return Training(*known, unknown=str(reason))
        trained = trained_parameters(policy)
        if not trained:
            raise UserError(f"{step.where}: nothing would train.")
        longest = training_memory(policy, arguments, batch, hardware)
        half = training_memory(policy, arguments, batch, hardware, length=longest.length // 2)
        of_part = {"vision": training.vision_learning_rate, "projector": training.projector_learning_rate}
        rates = {item.part: of_part.get(item.part) or training.learning_rate for item in trained}
        adapter = sum(item.count for item in trained) if policy.is_adapter else 0
        parameters = sum(p.numel() for p in policy.model.parameters()) - adapter
        return Training(*known, policy.base, parameters, trained, rates, [longest, half])

    def _weights(self, step: "Step") -> float | None:
        """Bytes of the model that a step runs, in the type it is loaded in; None where that is not known."""
        name, dtype = step.settings.get("model_name_or_path"), step.settings.get("dtype", "auto")
        model = step.stage.input("model_name_or_path")
        if name is None or model.is_remote(step.settings):
            return None
        if (name, dtype) not in self.weights:
            self.weights[name, dtype] = self._weights_of(name, dtype)
        return self.weights[name, dtype]

    def _weights_of(self, name: str, dtype: str) -> float | None:
        try:
            policy = model_at(name, self.steps)
        except NotKnownYet:
            return None
        own = policy.base_model.config.dtype if dtype == "auto" else dtype
        element = 2 if str(own).removeprefix("torch.") in ("bfloat16", "float16") else 4
        return float(sum(p.numel() for p in policy.model.parameters()) * element)


def check_sharding(step: "Step", arguments: tuple[Any, ...], hardware: Hardware) -> None:
    """What the stages refuse when they find themselves under a launcher that divides the weights."""
    args, training = arguments
    for setting in (args, training):
        for name in ("load_in_4bit", "precompute_ref_log_probs"):
            if hardware.shards_weights and getattr(setting, name, False):
                raise UserError(
                    f"{step.where}: {name} does not go with {hardware.kind}, which divides the weights. "
                    "Use zero2 or multi_gpu, or leave it out."
                )

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A plan as text: what somebody wants to have read before the GPUs are booked."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.pipeline.recipe import read_recipe

from .memory import GIB
from .plan import StepPlan, Training, plan_recipe, read_throughput
from .steps import Rows


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Recipe, Step
    from medst_trl.pipeline.settings import Option

LABEL = 12  # width of the words on the left


def render(recipe: "Recipe", plans: Sequence[StepPlan], steps: Sequence["Step"]) -> str:
    """
    The plan of a recipe.

    Args:
        recipe ([`~medst_trl.pipeline.recipe.Recipe`]): The recipe.
        plans (sequence of [`~medst_trl.pipeline.plan.plan.StepPlan`]): The steps that are planned.
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`]): All of its steps.
    """
    lines = [f"Plan of {recipe.path}. Nothing is run, downloaded or uploaded.", f"Results go to {recipe.output_dir}."]
    for plan in plans:
        lines += ["", _heading(plan)]
        if not plan.is_done:
            before = ""
            for label, text in _rows(plan, steps):
                lines.append(f"  {label if label != before else '':<{LABEL}}{text}")
                before = label
    return "\n".join([*lines, "", *_footer(plans)])


def print_plan(source: str, options: Sequence["Option"], which: str | None = None) -> None:
    """Print the plan of a recipe, for `medst run RECIPE --dry_run`; see [`plan_recipe`]."""
    throughput, options = read_throughput(options)
    recipe = read_recipe(source, options)
    print(render(recipe, *plan_recipe(recipe, which, throughput)))


def _heading(plan: StepPlan) -> str:
    if plan.is_done:
        return f"{plan.step.label}: finished before, skipped unless its settings have changed"
    if not plan.step.stage.distributed:
        return plan.step.label
    return f"{plan.step.label} ({Path(plan.hardware.config).stem}, {_devices(plan)})"


def _rows(plan: StepPlan, steps: Sequence["Step"]) -> Iterator[tuple[str, str]]:
    from medst_trl.hub.push import HubArguments

    stage, name = plan.step.stage, getattr(plan.arguments[0], "model_name_or_path", None)
    model = stage.input("model_name_or_path")
    if plan.training is not None:
        yield from _training_rows(plan, plan.training)
    elif name is not None and not (model and model.is_remote(plan.step.settings)):
        size = f", {_size(plan.weights)} of weights" if plan.weights else ""
        yield "model", f"{name}{size}"
    if stage.plan is not None:
        arguments = (item for item in plan.arguments if not isinstance(item, HubArguments))
        yield from stage.plan(Rows(steps, plan.throughput), *arguments)
    for label, texts in (("downloads", plan.downloads), ("asks", plan.requests), ("uploads", plan.uploads)):
        for text in texts:
            yield label, text


def _training_rows(plan: StepPlan, training: Training) -> Iterator[tuple[str, str]]:
    args, settings = plan.arguments
    if training.unknown:
        yield "model", training.unknown
    else:
        dtype = args.dtype or ("bfloat16" if settings.bf16 and args.use_lora else "float32")
        kind = "4-bit" if getattr(args, "load_in_4bit", False) else dtype
        start = "" if Path(training.base) == Path(args.model_name_or_path) else f"{args.model_name_or_path} on "
        yield "model", f"{start}{training.base}, {_short(training.parameters)} parameters, {kind}"
        width = max(len(item.how) for item in training.trained)
        for item in training.trained:
            rate = _rate(training.rates[item.part])
            yield "trains", f"{item.part:<11}{item.how:<{width}}{item.count:>16,}   learning rate {rate}"
        total = sum(item.count for item in training.trained)
        yield "trains", f"{'in all':<11}{'':<{width}}{total:>16,}   {total / training.parameters:.1%} of the model"
    if hasattr(settings, "beta"):
        yield "loss", f"{' + '.join(settings.loss_type)}, beta {settings.beta:g}{_reference(plan)}"
    batch = training.batch
    where = "GPU" if plan.hardware.on_gpu else "process"
    accumulated = f"{batch.accumulation} accumulated x " if batch.accumulation > 1 else ""
    yield "batch", f"{batch.per_device} a {where} x {accumulated}{_devices(plan)} = {batch.effective}"
    yield "data", training.examples.of(plan.step.stage.trains)
    yield "steps", _steps(training) + _warm_up(settings)
    if training.memory:
        yield from _memory_rows(plan, training)
    steps = training.schedule.steps
    yield from Rows((), plan.throughput).time(None if steps is None else steps * batch.effective, "examples")


def _reference(plan: StepPlan) -> str:
    if plan.arguments[1].precompute_ref_log_probs:
        return ", reference computed before the first step"
    if not plan.training.memory:
        return ""
    is_copy = "reference" in plan.training.memory[0].parts
    return f", reference {'a copy in memory' if is_copy else 'the model without the adapter'}"


def _steps(training: Training) -> str:
    schedule = training.schedule
    if schedule.steps is None:
        return f"{schedule.epochs:g} epoch{'' if schedule.epochs == 1 else 's'} of {training.examples.depends_on}"
    if schedule.per_epoch is None:
        return f"{schedule.steps:,}"
    most = "at most " if schedule.at_most else ""
    epochs = f"{schedule.epochs:.3g} epoch{'' if schedule.epochs == 1 else 's'}"
    return f"{most}{schedule.steps:,}: {epochs} of {schedule.per_epoch:,}"


def _warm_up(settings) -> str:
    scheduler = getattr(settings.lr_scheduler_type, "value", settings.lr_scheduler_type)
    warm_up = settings.warmup_steps or 0
    if not warm_up:
        return f"; {scheduler}"
    return f"; {scheduler}, warm-up {f'{warm_up:.0%}' if warm_up < 1 else f'{warm_up:g} steps'}"


def _memory_rows(plan: StepPlan, training: Training) -> Iterator[tuple[str, str]]:
    longest, half = training.memory
    saving = "with" if plan.arguments[1].gradient_checkpointing else "without"
    each = f"on each {'GPU' if plan.hardware.on_gpu else 'process'}" if plan.hardware.processes > 1 else "in all"
    yield (
        "memory",
        f"about {_size(longest.total)} {each} at {longest.length:,} tokens an example, {_size(half.total)} at "
        f"{half.length:,}; {saving} gradient checkpointing",
    )
    yield "memory", ", ".join(f"{name} {_size(size)}" for name, size in longest.parts.items())


def _footer(plans: Sequence[StepPlan]) -> Iterator[str]:
    trainings = [plan for plan in plans if plan.training is not None]
    if any(plan.training.memory for plan in trainings):
        yield "Memory is an estimate for the longest examples; the allocator takes 5 to 15% more."
    if trainings and not any(plan.throughput for plan in plans):
        yield "Time: --throughput N (examples a second, all processes together), --sft.throughput N for one stage."
    for shortage in dict.fromkeys(shortage for plan in plans for shortage in plan.hardware.shortages):
        yield f"Note: {shortage}."


def _devices(plan: StepPlan) -> str:
    what = "GPU" if plan.hardware.on_gpu else "process"
    n = plan.hardware.processes
    return f"{n} {what}" if n == 1 else f"{n} {what}{'s' if plan.hardware.on_gpu else 'es'}"


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,}"


def _rate(rate: float) -> str:
    mantissa, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size > 0.1 * GIB else f"{size / 2**20:.1f} MiB"

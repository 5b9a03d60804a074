# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The command `medst`. Nothing heavy is imported before a stage needs it.

usage: medst COMMAND [options]

Self-questioning and preference training for medical vision-language models.

Run all stages of a recipe:
  run RECIPE            run every stage of a recipe and skip finished ones (medst run --help)
  recipes ls            list the packaged recipes; also: show, cp, validate

Run one stage (medst STAGE --help lists its settings, --help all includes all of TRL's and transformers'):
{stages}

Every stage takes --config FILE, a recipe or a flat YAML file with its settings. --no_x turns off a flag x that is on
by default, like --x false. Stages that can use several processes take --accelerate_config (cpu, single_gpu, multi_gpu,
zero2, zero3, fsdp2, or a path) and --num_processes. Without them, they run in this process.

Every command takes --plugins FILE (repeatable): a Python file that registers your own stages, sources, judge prompts,
engines, model families, metrics or losses. The environment variable MEDST_PLUGINS does the same.

Examples:
  medst run demo                                     the whole loop on synthetic scans: minutes, no GPU
  medst recipes cp demo && medst run demo.yaml       copy a recipe, change it and run it
  medst run demo.yaml --stage sft --sft.learning_rate 1e-4 --overwrite
  medst sft --config demo.yaml --learning_rate 1e-4  one stage in this process
  medst sft --config demo.yaml --accelerate_config multi_gpu --num_processes 4
"""

import inspect
import logging
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medst_trl.base.errors import Interrupted, UserError, closest
from medst_trl.base.files import is_full_disk
from medst_trl.base.processes import NOT_DISTRIBUTED, launched_kind, leave_peers, rank, world_size
from medst_trl.base.registry import add_plugins
from medst_trl.pipeline import launch
from medst_trl.pipeline.options import Options, as_count, convert, parse, read_options, take
from medst_trl.pipeline.recipe import Step, read_recipe, step_of_file
from medst_trl.pipeline.recipe_files import find_recipe, packaged_recipes, summary
from medst_trl.pipeline.record import RUN_VARIABLE
from medst_trl.pipeline.stage import STAGES, Stage

from . import __version__


RESUME = "To resume, run the same command again, without --overwrite."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `medst`; returns the exit code."""
    return guarded(_dispatch, sys.argv[1:] if argv is None else argv)


def guarded(function: Callable[..., int | None], *arguments) -> int:
    """Run a command. An error that the user can fix is printed as one message, without a traceback."""
    # It recommends a package that is not needed (bitsandbytes 0.50).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return function(*arguments) or 0
    except UserError as error:
        # Without --stage, `medst run` would overwrite the results of every stage.
        again = f"--stage {os.environ[RUN_VARIABLE]} --overwrite" if RUN_VARIABLE in os.environ else "--overwrite"
        return _complain(str(error).replace("--overwrite", again), 2)
    except (KeyboardInterrupt, Interrupted) as stop:
        code = stop.code if isinstance(stop, Interrupted) else 128 + signal.SIGINT
        hint = "" if RUN_VARIABLE in os.environ else f" {RESUME}"  # `medst run` prints it for its stages
        return code if rank() else _complain(f"interrupted.{hint}", code)
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not output.poll(0):  # the output has a reader: another pipe is broken
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the output that is flushed at exit
        return 128 + signal.SIGPIPE  # like any command whose output goes to `head`
    except Exception as error:
        if not is_full_disk(error):
            raise
        return _complain("the disk is full. Finished work is kept: make room and run the same command again.", 2)


def _complain(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"error on rank {rank()}: {message}" if rank() else f"error: {message}", file=sys.stderr, flush=True)
    return code


def _dispatch(words: Sequence[str]) -> int | None:
    command, *argv = add_plugins(words) or ["--help"]
    if command in ("-h", "--help", "help"):
        width = max(map(len, STAGES)) + 2
        stages = "\n".join(f"  {stage.name:<{width}}{stage.summary}" for stage in STAGES.values())
        print(help_in(sys.modules[__name__]).replace("{stages}", stages))
    elif command in ("-V", "--version"):
        print(f"medst {__version__}")
    elif command == "run":
        return run_recipe(argv)
    elif command == "recipes":
        return _recipes(argv)
    elif command in STAGES:
        return _stage(STAGES.get(command), argv)
    else:
        near = closest(command, ["run", "recipes", *STAGES])
        raise UserError(f"Unknown command {command!r}.{near} `medst --help` lists them.")


def help_in(item: Any) -> str:
    """The part of a docstring after its first line: the help text."""
    return inspect.getdoc(item).partition("\n\n")[2]


# medst run


def run_recipe(argv: list[str]) -> int | None:
    """
    Run the stages of a recipe, each in its own process.

    usage: medst run RECIPE [--stage STAGE] [--overwrite] [--accelerate_config CONFIG] [--key value ...]

    Runs the stages of a recipe one after another, each in its own process. A finished stage is skipped. An interrupted
    stage resumes. A stage whose settings have changed is refused.

      RECIPE                     a YAML file, or the name of a packaged recipe (medst recipes ls)
      --stage STAGE              run only this stage, item or round: sft, prepare/slake, round_2, round_2/dpo
      --rounds N                 generate, judge and dpo N times; each round uses the policy of the previous round
      --overwrite                delete the results of the selected stages, and start again
      --accelerate_config CONFIG cpu, single_gpu, multi_gpu, zero2, zero3, fsdp2, or a path (default: automatic)
      --num_processes N          number of processes for the stages that can use several
      --dry_run                  print what the stages would train, download, prompt and upload, and run nothing
      --plugins FILE             a Python file that registers your own stages, sources, ... (medst --help)
      --key value                a setting for every stage that has it; --output_dir is the run directory
      --STAGE.key value          a setting for one stage: --sft.learning_rate 1e-4, or sft.learning_rate=1e-4

    Examples:
      medst run demo
      medst run recipes/vqa_rad_tiny.yaml --output_dir /scratch/vqa_rad --seed 1
      medst run my.yaml --stage sft --accelerate_config zero2 --sft.num_train_epochs 1 --overwrite
      medst run my.yaml --dry_run --accelerate_config zero2 --num_processes 8
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(help_in(run_recipe))
        return 0
    source, which, options = _read_command("medst run", argv)
    if launch.is_launched():
        raise UserError(f"medst run starts the launcher itself. Under one: accelerate launch -m medst_trl {source}")
    if options[""].pop("dry_run", None) is not None:
        from medst_trl.pipeline.plan.plan import print_plan

        return print_plan(source, options, which)
    recipe = read_recipe(source, options)
    steps = recipe.steps(which, check=_check)
    for note in recipe.unused_options(steps):
        print(f"Note: {note}", file=sys.stderr)
    if which is None and "overwrite" in options[""]:
        _confirm_overwrite(steps)
    code = _run_steps(steps, [_command(recipe.path, step, argv[1:]) for step in steps])
    if code == 0:
        print(f"\nDone. Everything is in {recipe.output_dir}:")
        width = max(len(step.label) for step in steps) + 2
        print(*(f"  {step.label:<{width}}{step.settings['output_dir']}" for step in steps), sep="\n")
    return code


def _read_command(command: str, argv: Sequence[str]) -> tuple[str, str | None, Options]:
    """The recipe, the stage and the other options of a command line."""
    words, options = read_options(argv)
    if len(words) != 1:
        raise UserError(f"{command} takes one recipe, not {len(words)}. See `{command} --help`.")
    return words[0], take(options, "stage"), options


def _check(step: Step) -> None:
    """Check a step before the first stage starts, so that no later stage fails on its settings."""
    from medst_trl.pipeline.plan.steps import missing_packages, stage_arguments

    # Creating TrainingArguments initializes a GPU and sets environment variables that the launchers would inherit.
    if not step.stage.trains:
        stage_arguments(step)
    elif missing := missing_packages(step):
        raise UserError("\n".join(missing))


def _confirm_overwrite(steps: Sequence[Step]) -> None:
    """On a terminal, ask before the results of several stages are deleted."""
    replaced = [step.settings["output_dir"] for step in steps if step.replaces_results]
    if replaced and sys.stdin.isatty():
        print("--overwrite deletes these results:", *replaced, sep="\n  ")
        print("Delete them and start again? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("Nothing was deleted. To start one stage again: --stage NAME --overwrite.")


def _command(path: str, step: Step, options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """
    The command that runs a step in its own process, and its environment. Ours comes after the user's --stage, and the
    last one wins.
    """
    program = ["medst_trl", path, *options, "--stage", step.label]
    if step.stage.distributed:
        return launch.launch_command(program, step.accelerate_config, step.num_processes)
    return [sys.executable, "-m", *program], dict(os.environ)


def _run_steps(steps: Sequence[Step], commands: Sequence[tuple[list[str], dict[str, str]]]) -> int:
    """Run steps one after another until one fails. Returns its exit code."""
    for number, (step, (command, environment)) in enumerate(zip(steps, commands, strict=True), 1):
        print(f"\n=== {step.label} ({number} of {len(steps)}) -> {step.settings['output_dir']}", flush=True)
        code = launch.run(command, environment | {"PYTHONUNBUFFERED": "1", RUN_VARIABLE: step.label})
        if code != 0:
            hint = f"Correct the error above. {RESUME}" if code == 2 else RESUME
            print(f"\nStopped in {step.label}. Finished work is kept. {hint}", file=sys.stderr)
            return code
    return 0


# Under the user's own launcher


def run_launched(argv: list[str]) -> int | None:
    """
    The command `python -m medst_trl`.

    Run a stage of a recipe under your own launcher:

      accelerate launch -m medst_trl recipes/demo.yaml --stage sft --sft.learning_rate 1e-4
      accelerate launch --no_python recipes/demo.yaml --stage sft     # a recipe is executable
      python -m medst_trl recipes/demo.yaml                           # without a launcher: all stages in this process

    Options are those of `medst run`. `python -m medst_trl COMMAND` is the same as `medst COMMAND`.
    """
    argv = add_plugins(argv)
    if argv[:1] and argv[0] in ("run", "recipes", *STAGES):
        return _dispatch(argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(help_in(run_launched), help_in(run_recipe).partition("\n")[2], sep="\n")
        return 0
    source, which, options = _read_command("python -m medst_trl", argv)
    if "dry_run" in options[""]:
        raise UserError(f"--dry_run does not run under a launcher. Use `medst run {source} --dry_run`.")
    steps = read_recipe(source, options).steps(which)
    _check_launch(steps, source)
    for step in steps:
        _run(step)
    leave_peers()
    return 0


def _check_launch(steps: Sequence[Step], path: str) -> None:
    """
    Refuse several stages in one launch, and a stage for a single process in a launch of several.

    A training ends the process group. If a second group is created in the same launch, DeepSpeed (0.19) fails, and
    torch (2.13) may connect to the addresses of the first group, and fail hours later. accelerate makes a group for
    one process, too, if there are a GPU and LOCAL_RANK.
    """
    has_group = launch.is_launched() or "LOCAL_RANK" in os.environ or launched_kind() != NOT_DISTRIBUTED
    if has_group and (len(steps) > 1 or (world_size() > 1 and not steps[0].stage.distributed)):
        labels = ", ".join(step.label for step in steps)
        raise UserError(
            f"{path}: a launcher can run only one stage, and with several processes only one that supports them. "
            f"This command selects {labels}. Select one such stage with --stage, or use `medst run {path}`, which "
            "starts each stage in a launcher or process of its own."
        )


# medst STAGE


def _stage(stage: Stage, argv: list[str]) -> int | None:
    name = f"medst {stage.name}"
    if {"-h", "--help"} & set(argv):
        stage.make_parser(is_listing="all" not in argv).print_help()
        return 0
    words, options = read_options(argv)
    if words:
        raise UserError(f"{name}: unknown option {words[0]!r}. See `{name} --help`.")
    file = take(options, "config")
    step = step_of_file(stage, file) if file else Step(stage, stage.name, {}, name)
    config = take(options, "accelerate_config") or step.accelerate_config
    num_processes = as_count(take(options, "num_processes"), "num_processes", name) or step.num_processes
    own = {f"{target}.{key}".removeprefix("."): value for target in options for key, value in options[target].items()}
    own = convert(stage.make_parser(), own, name)
    if (config or num_processes) and not stage.distributed:
        raise UserError(f"{name} runs in a single process and takes neither accelerate_config nor num_processes.")
    if (config or num_processes) and not launch.is_launched():
        return launch.run(*launch.launch_command(["medst_trl.cli", stage.name, *argv], config, num_processes))
    _run(Step(stage, step.label, step.settings | own, name, config, num_processes, step.given.union(own)))
    leave_peers()
    return 0


# Run a stage in this process


def _run(step: Step) -> None:
    launch.check_launched(step.accelerate_config, step.num_processes, step.where)
    launch.use_one_gpu()
    arguments = parse(step.stage.make_parser(), step.settings, step.where)
    for note in step.stage.ignored(arguments, step.given):
        if rank() == 0:
            print(f"Note: {step.where}: {note}.", file=sys.stderr)
    run_stage(step.stage, arguments)


def run_stage(stage: Stage, arguments: Sequence[Any]) -> None:
    """Run a stage, and publish its results, of this run or an earlier one, if its settings say so."""
    from medst_trl.hub import HubArguments
    from medst_trl.hub.push import PushAfterStage

    push = PushAfterStage(stage.published, arguments)
    stage.main(*(item for item in arguments if not isinstance(item, HubArguments)))
    push.run()


# medst recipes


def _recipes(argv: list[str]) -> None:
    """
    List, show, copy or validate recipes.

    usage: medst recipes ls | show NAME | cp NAME [FILE]
           medst recipes validate RECIPE [--stage STAGE] [--num_processes N] [--key value ...]

    Lists the packaged recipes, prints one, or copies one, by default into the current directory.

    `validate` checks a file or a packaged recipe and accepts the options of `medst run`. It checks keys and types,
    that inputs exist or are made by an earlier section, the columns of datasets, accelerate configurations, and the
    batch size on the given number of processes. It needs no GPU, no Hub and no weights, and prints the part of
    `medst run RECIPE --dry_run` that needs none of these.
    """
    match argv:
        case [] | [*_, "-h" | "--help"]:
            print(help_in(_recipes))
        case ["ls"]:
            recipes = packaged_recipes()
            width = max(map(len, recipes), default=0) + 2
            print("".join(f"{name:<{width}}{summary(path)}\n" for name, path in recipes.items()), end="")
        case ["show", name]:
            print(find_recipe(name).read_text(encoding="utf-8"), end="")
        case ["cp", name, *target] if len(target) < 2:
            source = find_recipe(name)
            copy = Path(target[0] if target else source.name)
            copy = copy / source.name if copy.is_dir() else copy
            if copy.exists():
                raise UserError(f"{copy} already exists. Choose another file: medst recipes cp {name} FILE")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)  # with its executable bit
            print(f"Copied to {copy}. Edit it, then run `medst run {copy}`.")
        case ["validate", *words]:
            from medst_trl.pipeline.plan.plan import print_plan

            recipe, which, options = _read_command("medst recipes validate", words)
            print_plan(recipe, options, which, with_models=False)
        case _:
            raise UserError(f"Unknown command: medst recipes {' '.join(argv)}. See `medst recipes --help`.")


if __name__ == "__main__":
    sys.exit(main())

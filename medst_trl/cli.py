# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `medst`. Nothing heavy is imported before a stage needs it."""

import os
import select
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import is_full_disk
from medst_trl.base.registry import add_plugins, plugin_files
from medst_trl.pipeline.stage import STAGES, Stage


HELP = """\
usage: medst COMMAND [options]

Self-questioning and preference training for medical vision-language models.

A whole run, stage by stage, as a recipe describes it:
  run RECIPE            run every stage of a recipe, skipping what is done (medst run --help)
  recipes ls            list the recipes that come with the package; also: show, cp, validate

One stage (medst STAGE --help lists its settings):
{stages}
Every command takes --plugins FILE (repeatable): a Python file that registers stages, sources, judge prompts, engines,
model families, metrics or losses of your own. MEDST_PLUGINS in the environment does the same.

Examples:
  medst run demo                                     the whole way on drawn images: minutes, no GPU
  medst recipes cp demo && medst run demo.yaml       a copy of your own to change
  medst run demo.yaml --stage sft --sft.learning_rate 1e-4 --overwrite
  medst sft --config demo.yaml --learning_rate 1e-4  one stage in this process
  medst sft --config demo.yaml --accelerate_config multi_gpu --num_processes 4
"""

RUN_HELP = """\
usage: medst run RECIPE [--stage STAGE] [--overwrite] [--accelerate_config CONFIG] [--key value ...]

Runs the stages of a recipe one after another, each in a process of its own. A stage that is finished is skipped, one
that was cut short continues, one whose settings have changed is refused.

  RECIPE                     a YAML file, or the name of a packaged recipe (medst recipes ls)
  --stage STAGE              only this stage, or one item of it: sft, prepare/slake, round_2, round_2/dpo
  --rounds N                 ask, judge and align N times, each round with the policy of the one before
  --overwrite                delete the results of the stages that run, and make them anew
  --accelerate_config CONFIG cpu, single_gpu, multi_gpu, zero2, zero3, fsdp2, or a path (default: what the machine has)
  --num_processes N          processes of the stages that can use several
  --dry_run                  print what the stages would train, take, download and upload, and run nothing
  --throughput N             with --dry_run: examples a second, for the time it takes; --sft.throughput N for one stage
  --key value                a setting for every stage that knows it; --output_dir is the folder of the whole run
  --STAGE.key value          a setting for one stage: --sft.learning_rate 1e-4, or sft.learning_rate=1e-4

Examples:
  medst run demo
  medst run recipes/vqa_rad_tiny.yaml --output_dir /scratch/vqa_rad --seed 1
  medst run my.yaml --stage sft --accelerate_config zero2 --sft.num_train_epochs 1 --overwrite
  medst run my.yaml --dry_run --accelerate_config zero2 --num_processes 8
"""

RECIPES_HELP = """\
usage: medst recipes ls | show NAME | cp NAME [FILE]
       medst recipes validate RECIPE [--stage STAGE] [--num_processes N] [--key value ...]

The recipes that come with the package: list them, print one, or copy one to change it (by default into this folder).

`validate` checks a file or a recipe of that name, with the options that `medst run` is to get: keys and types, that
inputs exist or are made by an earlier section, columns of datasets, accelerate configurations, and the batch on 1, 4
and 8 processes or the number given. It needs no GPU, no Hub and no weights.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `medst`; returns the exit code."""
    return guarded(_dispatch, sys.argv[1:] if argv is None else argv)


def guarded(function: Callable[..., int | None], *arguments) -> int:
    """Run a command; what the user can put right ends in one message instead of a traceback."""
    try:
        return function(*arguments) or 0
    except UserError as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 128 + signal.SIGPIPE  # as any command before `| head` that has seen enough
    except Exception as error:
        if not is_full_disk(error):
            raise
        return _complain("the disk is full. What was finished is kept: make room and run the same command again.", 2)


def _reader_is_gone() -> bool:
    """Whether what this prints goes into a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    is_gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
    return is_gone


def _complain(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    sys.stdout.flush()
    print(f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    return code


def _dispatch(words: Sequence[str]) -> int | None:
    command, *argv = add_plugins(words) or ["--help"]
    commands = {"run": _run, "recipes": _recipes} | {
        stage.name: lambda argv, stage=stage: _stage(stage, argv) for stage in STAGES.values()
    }
    if command in ("-h", "--help", "help"):
        width = max(map(len, STAGES.names())) + 2
        print(HELP.format(stages="".join(f"  {s.name:<{width}}{s.summary}\n" for s in STAGES.values())), end="")
    elif command in ("-V", "--version"):
        from . import __version__

        print(f"medst {__version__}")
    elif command in commands:
        return commands[command](argv)
    else:
        from medst_trl.base.errors import closest

        raise UserError(f"unknown command {command!r}.{closest(command, commands)} `medst --help` lists them.")


def _run(argv: list[str]) -> int | None:
    if not argv or {"-h", "--help"} & set(argv):
        print(RUN_HELP, end="")
        return 0
    from medst_trl.pipeline.launch import is_launched, launch_command, run
    from medst_trl.pipeline.options import read_options, take, take_flag
    from medst_trl.pipeline.recipe import read_recipe

    words, options = read_options(argv)
    which, options = take(options, "stage")
    is_plan, options = take_flag(options, "dry_run")
    if len(words) != 1:
        raise UserError(f"medst run takes one recipe, not {len(words)}. See `medst run --help`.")
    if is_launched():
        raise UserError(f"medst run starts the launcher itself. Under one: accelerate launch -m medst_trl {words[0]}")

    if is_plan:
        from medst_trl.pipeline.plan.text import print_plan

        return print_plan(words[0], options, which)
    begun = time.monotonic()
    recipe = read_recipe(words[0], options)
    steps = recipe.steps(which)
    settings = [word for option in options for word in option.as_words()]
    commands = []  # all of them before the first runs: a machine without GPUs shows itself here
    for step in steps:
        program = ["medst_trl", recipe.path, "--stage", step.label, *settings]
        if step.stage.distributed:
            commands.append(launch_command(program, step.accelerate_config, step.num_processes))
        else:
            commands.append(([sys.executable, "-m", *program], dict(os.environ)))
    for number, (step, (command, environment)) in enumerate(zip(steps, commands), 1):
        print(f"\n=== {step.label} ({number} of {len(steps)}) -> {step.settings['output_dir']}", flush=True)
        code = run(command, environment | {"PYTHONUNBUFFERED": "1"})
        if code != 0:
            plugins = [word for path in plugin_files() for word in ("--plugins", path)]
            again = shlex.join(["medst", "run", *(word for word in argv if word != "--overwrite"), *plugins])
            print(f"\nStopped in {step.label}. What is done is kept; continue with:\n  {again}", file=sys.stderr)
            return code if code > 0 else 128 - code
    print(f"\nDone in {_duration(time.monotonic() - begun)}. Everything is in {recipe.output_dir}:")
    width = max(len(step.label) for step in steps) + 2
    for step in steps:
        print(f"  {step.label:<{width}}{step.settings['output_dir']}")


def _stage(stage: Stage, argv: list[str]) -> int | None:
    from medst_trl.pipeline.arguments import parse
    from medst_trl.pipeline.launch import check_launched, is_launched, launch_command, leave_peers, run, use_one_gpu
    from medst_trl.pipeline.options import refuse_secrets, take_word
    from medst_trl.pipeline.recipe import as_count, step_of_file

    options = [word for word in argv if word.startswith("--")]
    refuse_secrets(option.removeprefix("--").partition("=")[0].replace("-", "_") for option in options)
    parser = stage.make_parser(f"medst {stage.name}")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    file, given = take_word(argv, "--config")
    config, given = take_word(given, "--accelerate_config")
    num_processes, given = take_word(given, "--num_processes")
    num_processes = as_count(num_processes, f"medst {stage.name}")
    if file is not None:
        step = step_of_file(stage, file)
        config, num_processes = config or step.accelerate_config, num_processes or step.num_processes
        parser.set_defaults_with_config(**step.settings)
    given, launch_options = _divide(stage, parser, given)
    if (config or num_processes or launch_options) and not stage.distributed:
        raise UserError(f"medst {stage.name} runs in a single process and takes no options of accelerate launch.")

    if is_launched():
        check_launched(config, num_processes, f"medst {stage.name}")
    elif config or num_processes or launch_options:
        return run(*launch_command(["medst_trl.cli", stage.name, *argv], config, num_processes, launch_options))
    use_one_gpu()
    run_stage(stage, parse(parser, {}, f"medst {stage.name}", given))
    leave_peers()
    return 0


def run_stage(stage: Stage, arguments: Sequence[Any]) -> None:
    """Run a stage, and publish what it has made, now or in an earlier run, if its settings say so."""
    from medst_trl.hub.after_stage import HubArguments, PushAfterStage

    push = PushAfterStage(stage.published, arguments)
    stage.main(*(item for item in arguments if not isinstance(item, HubArguments)))
    push.run()


def _divide(stage: Stage, parser, argv: list[str]) -> tuple[list[str], list[str]]:
    """What is the stage's, and what it does not know and `accelerate launch` does."""
    required = [action for action in parser._actions if action.required]
    for action in required:  # a misspelt option first, then what is missing for want of it
        action.required = False
    rest = parser.parse_known_args(argv)[1]
    for action in required:
        action.required = True
    if not rest:
        return argv, []
    from medst_trl.base.errors import closest
    from medst_trl.pipeline.arguments import keys_of

    known = {f"--{key}" for key in keys_of(parser)}
    if stage.distributed:
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser()._option_string_actions
        known |= set(options)
    else:
        options = ()
    for word in rest:
        name = word.partition("=")[0]
        if (word.startswith("-") and name not in options) or (word is rest[0] and not word.startswith("-")):
            raise UserError(f"medst {stage.name}: unknown option {name!r}.{closest(name, known)}")
    left = iter(rest)
    waiting = next(left, None)
    own = []
    for word in argv:
        if word == waiting:
            waiting = next(left, None)
        else:
            own.append(word)
    return own, rest


def _recipes(argv: list[str]) -> int | None:
    from medst_trl.pipeline.recipe_files import find_recipe, packaged_recipes, summary

    match argv:
        case ["ls"]:
            recipes = packaged_recipes()
            width = max(map(len, recipes), default=0) + 2
            for name, path in recipes.items():
                print(f"{name:<{width}}{summary(path)}")
        case ["show", name]:
            print(find_recipe(name).read_text(encoding="utf-8"), end="")
        case ["cp", name, *target] if len(target) < 2:
            source = find_recipe(name)
            copy = Path(target[0] if target else source.name)
            copy = copy / source.name if copy.is_dir() else copy
            if copy.exists():
                raise UserError(f"{copy} exists already: medst recipes cp {name} ANOTHER_FILE")
            shutil.copy(source, copy)  # with its run bit
            print(f"{copy}: change it, then `medst run {copy}`.")
        case ["show" | "cp" | "validate"]:
            raise UserError(f"medst recipes {argv[0]} takes a recipe. `medst recipes ls` lists those there are.")
        case ["validate", source, *options]:
            _validate(source, options)
        case [] | ["-h" | "--help"]:
            print(RECIPES_HELP, end="")
        case _:
            raise UserError(f"medst recipes does not know {' '.join(argv)!r}. See `medst recipes --help`.")


def _validate(source: str, argv: list[str]) -> None:
    from medst_trl.pipeline.options import read_options, take
    from medst_trl.pipeline.plan.validate import validate
    from medst_trl.pipeline.recipe import read_recipe

    words, options = read_options([source, *argv])
    which, options = take(options, "stage")
    if len(words) != 1:
        raise UserError(f"medst recipes validate takes one recipe, not {len(words)}.")
    recipe = read_recipe(source, options)
    lines = validate(recipe, which)
    print(*lines, f"{recipe.path} is valid.", sep="\n")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


if __name__ == "__main__":
    sys.exit(main())

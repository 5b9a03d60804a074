# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Run recipes under your own launcher:

```bash
accelerate launch -m medst_trl recipes/demo.yaml --stage sft --sft.learning_rate 1e-4
accelerate launch --no_python recipes/demo.yaml --stage sft     # a recipe is executable
python -m medst_trl recipes/demo.yaml                           # without a launcher: all stages in this process
```

Options are those of `medst run`. Stages that use a single process run on rank 0, while the other ranks wait.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta

from medst_trl.base.errors import UserError
from medst_trl.base.processes import NOT_DISTRIBUTED, launched_kind, leave_peers, world_size
from medst_trl.base.registry import add_plugins
from medst_trl.cli import guarded, help_in, run_recipe, run_stage
from medst_trl.pipeline.launch import check_launched, use_one_gpu, without_launcher
from medst_trl.pipeline.options import Option, parse, read_options, take
from medst_trl.pipeline.recipe import Step, read_recipe


def main(argv: list[str]) -> None:
    argv = add_plugins(argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip(), help_in(run_recipe).partition("\n")[2], sep="\n")
        return
    paths, options = read_options(argv)
    which, options = take(options, "stage")
    if take(options, "dry_run", is_flag=True)[0]:
        raise UserError(f"--dry_run does not run under a launcher. Use `medst run {' '.join(paths)} --dry_run`.")
    if not paths:
        raise UserError("Give a recipe, for example: accelerate launch -m medst_trl recipes/demo.yaml")
    for path in paths:
        recipe = read_recipe(path, options)
        steps = recipe.steps(which)
        _check_together(steps, path)
        for number, step in enumerate(steps):
            if step.stage.distributed or world_size() == 1:
                _run(step)
            else:
                _run_on_rank_0(step, ["medst_trl", path, "--stage", step.label], options, number)
    leave_peers()


def _check_together(steps: Sequence[Step], path: str) -> None:
    """
    Refuse several distributed stages in one launch if one of them trains, because it ends the process group.

    If a second group is created in the same launch, DeepSpeed (0.19) fails, and torch (2.13) may connect to the
    addresses of the first group, and fail hours later. accelerate makes a group for one process, too, if there are a
    GPU and LOCAL_RANK.
    """
    shared = [step.label for step in steps if step.stage.distributed]
    trains = any(step.stage.trains for step in steps)
    if trains and len(shared) > 1 and ("LOCAL_RANK" in os.environ or launched_kind() != NOT_DISTRIBUTED):
        raise UserError(
            f"{path}: a launch with a process group can run only one distributed stage if there is training, and "
            f"{', '.join(shared)} would share this one. Launch them one by one (--stage {shared[0]}), or let "
            f"`medst run {path}` do so."
        )


def _run(step: Step) -> None:
    check_launched(step.accelerate_config, step.num_processes, step.where)
    use_one_gpu()
    parser = step.stage.make_parser(f"medst {step.stage.name}")
    run_stage(step.stage, parse(parser, step.settings, step.where))


def _run_on_rank_0(step: Step, program: list[str], options: list[Option], number: int) -> None:
    """Run a step in a process outside the launcher. Inside it, libraries would wait for the other ranks."""
    import torch.distributed

    # Wait on the launcher's store, not at a barrier: it does not time out and creates no process group.
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(days=30)
    )
    done = f"medst_trl/{program[1]}/{number}"
    if os.environ["RANK"] != "0":
        store.wait([done])
        return
    words = [word for option in options for word in option.as_words()]
    code = subprocess.call([sys.executable, "-m", *program, *words], env=without_launcher(os.environ))
    if code != 0:
        sys.exit(code)
    store.set(done, "done")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))

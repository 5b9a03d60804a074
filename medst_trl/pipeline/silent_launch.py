# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Launches that do something else than they were asked for and say nothing, noticed in the process they have started.

`accelerate launch` (1.15) starts one process, whatever `--num_processes` says, unless its kind is one of several
GPUs, DeepSpeed or FSDP: with `--cpu`, with a configuration of kind `NO` or `MULTI_CPU`, and by default on a machine
with less than two GPUs. And several processes on CPUs lose DeepSpeed or FSDP. Training would run, and exit with 0.
"""

import os
import re
import shlex
import sys

from medst_trl.base.errors import UserError


_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # set where mpirun has started the peers


def refuse_silent_launch(where: str) -> None:
    """
    Raises:
        UserError: if this process was to have peers and has none, or was to run under DeepSpeed or FSDP and does not.
    """
    # accelerate names a meeting point for several processes, and then gives this one no place among them.
    alone = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "WORLD_SIZE" not in os.environ
    if alone and "MASTER_PORT" in os.environ and all(os.environ.get(name, "1") == "1" for name in _OF_MPI):
        launcher = _launcher()
        if launcher is None or "MASTER_PORT" not in launcher[1]:  # of its own accord, rather than handed down
            asked = _asked_for(launcher[0] if launcher else [])
            raise UserError(
                f"{where}: {asked or 'several'} processes are asked for, but accelerate has started one. Start it "
                f"with\n  {_command(asked or 2)}\nor ask for one process."
            )
    kind = "DeepSpeed" if _is_true("ACCELERATE_USE_DEEPSPEED") else "FSDP" if _is_true("ACCELERATE_USE_FSDP") else None
    if kind and _is_true("ACCELERATE_USE_CPU"):
        remedy = "DS_ACCELERATOR=cpu instead" if kind == "DeepSpeed" else "FSDP needs GPUs"
        raise UserError(
            f"{where}: accelerate leaves {kind} out where ACCELERATE_USE_CPU is set, and says nothing. Unset it "
            f"({remedy}), or choose multi_gpu (DDP)."
        )


def _launcher() -> tuple[list[str], dict[str, str]] | None:
    """Command line and environment of the `accelerate launch` above this process, where the system tells them."""
    import psutil

    try:
        for process in psutil.Process().parents():
            environment = process.environ()
            if "ACCELERATE_DYNAMO_BACKEND" not in environment:
                return process.cmdline(), environment
    except psutil.Error:
        pass
    return None


def _asked_for(command: list[str]) -> int | None:
    """The number of processes on a launcher's command line; `None` where its configuration file has it."""
    found = re.search(r"--num[_-]processes[= ](\d+)", " ".join(command))
    return int(found[1]) if found else None


def _command(num_processes: int) -> str:
    import torch

    on_cpus = "" if torch.cuda.device_count() else "ACCELERATE_USE_CPU=true "
    program = shlex.join(sys.orig_argv[1:])
    return f"{on_cpus}accelerate launch --multi_gpu --num_processes {num_processes} {program}"


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "y", "on")

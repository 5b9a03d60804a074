# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the command line of medst_trl, or a script, in separate processes."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from medst_trl.pipeline.launch import find_config


TESTS = Path(__file__).parent
# Options of `accelerate launch` and environment variables, by the kind of a launch on CPUs
LAUNCHES = {
    "ddp": (["--multi_gpu"], {"ACCELERATE_USE_CPU": "true"}),
    # accelerate silently ignores DeepSpeed if ACCELERATE_USE_CPU is set
    "zero2": (["--use_deepspeed", "--zero_stage", "2"], {"DS_ACCELERATOR": "cpu"}),
    "fsdp2": (["--config_file", str(find_config("fsdp2"))], {}),
}

# What launchers set for their processes
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "MASTER_", "GROUP_", "ROLE_")


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the launcher's variables, for an independent process."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def run_medst(directory: Path, *arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run `medst` in a directory, without the plugins of this process.

    Args:
        code: The expected exit code.
        variables: Additional environment variables.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MEDST_PLUGINS"}
    environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "medst_trl.cli", *arguments]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    return result


def launch_script(
    script: str | Path, *arguments: str, ranks: int = 2, kind: str = "ddp"
) -> subprocess.CompletedProcess:
    """Run a script on CPUs, in one process or with `accelerate launch` in several.

    Args:
        script: Path of the script, absolute or relative to `tests/`.
        kind: A key of `LAUNCHES`.
    """
    options, variables = LAUNCHES[kind]
    environment = without_launcher(os.environ) | variables | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    launcher = [
        "-m", "accelerate.commands.launch", *options, "--num_processes", str(ranks), "--mixed_precision", "no",
        "--main_process_port", "0",
    ]  # fmt: skip
    command = [sys.executable, *(launcher if ranks > 1 else []), str(TESTS / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

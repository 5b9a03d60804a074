# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Starts stages under `accelerate launch`, and tells under which launcher this process runs."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError, closest
from medst_trl.base.processes import NOT_DISTRIBUTED, launched_kind, world_size

from .silent_launch import refuse_silent_launch


CONFIGS = Path(__file__).parents[1] / "accelerate_configs"

# What launchers tell their processes. Whatever runs outside them must not believe it has peers to wait for.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "MASTER_", "GROUP_", "ROLE_")


def find_config(name_or_path: str) -> Path:
    """
    Resolve the name of a packaged accelerate configuration (`"zero2"`), or a path to one.

    Raises:
        UserError: if it is neither.
    """
    packaged = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    if name_or_path in packaged:
        return packaged[name_or_path]
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    raise UserError(
        f"accelerate_config {name_or_path!r} is neither a file nor one of {', '.join(sorted(packaged))}."
        f"{closest(name_or_path, packaged)}"
    )


def default_config(num_processes: int | None = None) -> str:
    """What a stage is started with when nothing else is said: one process, on a GPU where there is one."""
    if gpu_count():
        return "single_gpu" if (num_processes or 1) == 1 else "multi_gpu"
    return "cpu"


def launch_command(
    program: Sequence[str], config: str | None, num_processes: int | None = None, options: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """
    The command and environment that run a Python module under accelerate.

    Args:
        program (sequence of `str`):
            Module and arguments, as after `python -m`.
        config (`str` or `None`):
            Name or path of the accelerate configuration; by default the one that suits the machine.
        num_processes (`int`, *optional*):
            Number of processes. By default the configuration's, or one for each GPU.
        options (sequence of `str`, *optional*):
            Further options of `accelerate launch`.

    Raises:
        UserError: if the machine has not the GPUs or the packages for it.
    """
    config = config or default_config(num_processes)
    asked = read_config(config)
    kind, machines = asked["kind"], _number(options, "--num_machines") or asked["num_machines"]
    environment = dict(os.environ)
    num_processes = num_processes or asked["num_processes"] or _one_for_each_gpu(config, kind) * machines
    if kind == NOT_DISTRIBUTED and num_processes > 1:
        # accelerate would start one process and say nothing
        if not asked["use_cpu"]:
            raise UserError(f"accelerate_config {config} is for one process, not for {num_processes}: use multi_gpu.")
        config, kind = "multi_gpu", "DDP"
    _check_packages(config, kind)
    if kind != NOT_DISTRIBUTED and (asked["use_cpu"] or not gpu_count()):
        environment |= _on_cpus(config, kind, environment)
        options = ["--mixed_precision", "no", *options]
    if "OMP_NUM_THREADS" not in environment:  # accelerate's own default is a single thread
        here = max(1, num_processes // machines)
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // here))
    has_port = asked["has_port"] or any(option.startswith("--main_process_port") for option in options)
    if machines == 1 and not has_port:
        options = ["--main_process_port", "0", *options]  # a free one, so that two runs can share a machine
    command = [sys.executable, "-m", "medst_trl.pipeline.launch", "--config_file", str(find_config(config))]
    return [*command, "--num_processes", str(num_processes), *options, "-m", *program], environment


def _check_packages(config: str, kind: str) -> None:
    if kind.startswith("DeepSpeed") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f'accelerate_config {config} needs DeepSpeed, which is not installed: pip install "medst_trl[deepspeed]"'
        )


def _on_cpus(config: str, kind: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What processes without a GPU have to be told, beside having to be asked for by number."""
    if kind.startswith("FSDP"):
        raise UserError(
            f"accelerate_config {config} divides the weights among GPUs, and this machine has none: accelerate would "
            "leave FSDP out. Use cpu, or zero2."
        )
    if kind.startswith("DeepSpeed"):
        # With ACCELERATE_USE_CPU, which may be in the environment, accelerate would leave DeepSpeed out.
        return {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    return {"ACCELERATE_USE_CPU": "true"}


def _number(options: Sequence[str], name: str) -> int | None:
    """What an option of `accelerate launch` says, given as two words or as one."""
    words = [word for option in options for word in option.split("=", 1)]
    return int(words[words.index(name) + 1]) if name in words[:-1] else None


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """
    Run a command to its end and return its exit code. What ends this process ends the command and its children too.
    """

    def on_termination(number, frame):
        raise SystemExit(128 + number)

    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = signal.signal(signal.SIGTERM, on_termination)
    try:
        return process.wait()
    except KeyboardInterrupt:
        _end(process, signal.SIGINT)
        raise
    except SystemExit:
        _end(process, signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen, number: int) -> None:
    """Ask the whole tree to stop, and make it stop if it has not after half a minute."""
    try:
        os.killpg(process.pid, number)
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it was quicker
        pass


def is_launched() -> bool:
    """Whether this process was started by `accelerate launch` or torchrun."""
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def check_launched(config: str | None, num_processes: int | None, where: str) -> None:
    """
    Compare the launcher that was asked for with the one this process runs under.

    A wrong launch would train on, and exit with 0: on one process of eight, or without ZeRO.

    Raises:
        UserError: if they differ.
    """
    refuse_silent_launch(where)
    running = f"{world_size()} process{'es' * (world_size() > 1)}, {launched_kind()}"
    hint = "Use `medst run`, or start it with the launcher it asks for."
    if config is not None:
        asked = read_config(config)
        num_processes = num_processes or asked["num_processes"]
        kind = "DDP" if asked["kind"] == NOT_DISTRIBUTED and (num_processes or 1) > 1 else asked["kind"]
        if kind != launched_kind():
            raise UserError(f"{where}: accelerate_config {config} asks for {kind}, but this runs as {running}. {hint}")
    if num_processes is not None and num_processes != world_size():
        raise UserError(f"{where}: {num_processes} processes are asked for, but this runs as {running}. {hint}")


def leave_peers() -> None:
    """Part from the other ranks before the process ends: gloo's threads now and then abort it otherwise."""
    if world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process of its own, started from within a launched one."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def use_one_gpu() -> None:
    """Give a process that has no peers the first visible GPU alone: on several, Trainer resorts to DataParallel."""
    if world_size() == 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]


def read_config(name_or_path: str) -> dict[str, Any]:
    from .recipe_files import read_yaml

    content = read_yaml(find_config(name_or_path))
    kind = str(content.get("distributed_type", "NO"))
    on_cpus = bool(content.get("use_cpu")) or kind == "MULTI_CPU"
    if kind in ("NO", "MULTI_CPU"):  # accelerate starts a single process for either
        kind = NOT_DISTRIBUTED
    elif kind.startswith("MULTI_"):
        kind = "DDP"
    elif kind == "DEEPSPEED":
        kind = f"DeepSpeed ZeRO-{(content.get('deepspeed_config') or {}).get('zero_stage', 2)}"
    elif kind == "FSDP":
        kind = f"FSDP{(content.get('fsdp_config') or {}).get('fsdp_version', 1)}"
    return {
        "kind": kind,
        "num_processes": content.get("num_processes"),
        "use_cpu": on_cpus,
        "num_machines": content.get("num_machines") or 1,
        "has_port": bool(content.get("main_process_port")),
    }


def _one_for_each_gpu(config: str, kind: str) -> int:
    gpus = gpu_count()
    if gpus == 0 or (kind == "DDP" and gpus == 1):
        raise UserError(
            f"accelerate_config {config} divides the work among GPUs, and this machine has {gpus or 'none'}. "
            f"Use {default_config()}, or say how many processes to start: --num_processes 2."
        )
    return gpus


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def main() -> None:
    """`accelerate launch`, but a failure below it ends with the stage's exit code instead of a second traceback."""
    from accelerate.commands.launch import launch_command as accelerate_launch
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        accelerate_launch(launch_command_parser().parse_args())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
    except (ImportError, ValueError) as error:  # what accelerate says of its own options and of missing packages
        sys.exit(f"accelerate launch: {error}")


if __name__ == "__main__":
    main()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Start stages under `accelerate launch`, and find out under which launcher this process runs.

`accelerate launch` (1.15) sometimes does something else than it was asked for without a word. It starts one process,
whatever `--num_processes` says, unless its kind is one of several GPUs, DeepSpeed or FSDP: with `--cpu`, with a
configuration of kind `NO` or `MULTI_CPU`, and by default on a machine with fewer than two GPUs. And several processes
on CPUs lose DeepSpeed or FSDP. Training would run, and exit with 0. [`check_launched`] notices both.
"""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medst_trl.base.errors import UserError, closest
from medst_trl.base.processes import NOT_DISTRIBUTED, cores, launched_kind, world_size

from .recipe import read_yaml


CONFIGS = Path(__file__).parents[1] / "accelerate_configs"

# What launchers tell their processes. A process outside them must not believe that it has peers to wait for.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "MASTER_", "GROUP_", "ROLE_")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # set if mpirun has started the peers


# Configurations of accelerate


@dataclass(frozen=True)
class AccelerateConfig:
    """
    What an accelerate configuration asks for.

    Args:
        name (`str`): Its name or path, as given.
        kind (`str`): How processes share the work, as in [`launched_kind`].
        num_processes (`int`, *optional*): Number of processes.
        use_cpu (`bool`): Whether it runs on CPUs.
        num_machines (`int`): Number of machines.
        has_port (`bool`): Whether it names the port at which processes meet.
    """

    name: str
    kind: str
    num_processes: int | None = None
    use_cpu: bool = False
    num_machines: int = 1
    has_port: bool = False

    def kind_on(self, num_processes: int | None) -> str:
        """
        How that number of processes shares the work.

        Raises:
            UserError: if the configuration is for one process and accelerate would start one without a word.
        """
        if self.kind != NOT_DISTRIBUTED or (num_processes or 1) == 1:
            return self.kind
        if not self.use_cpu:
            raise UserError(
                f"accelerate_config {self.name} is for one process, not for {num_processes}: use multi_gpu."
            )
        return "DDP"


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
    """The configuration if none is given: one process, on a GPU if there is one."""
    if gpu_count():
        return "single_gpu" if (num_processes or 1) == 1 else "multi_gpu"
    return "cpu"


def read_config(name_or_path: str) -> AccelerateConfig:
    """Read an accelerate configuration; see [`find_config`]."""
    content = read_yaml(find_config(name_or_path))
    kind = given = str(content.get("distributed_type", "NO"))
    if given in ("NO", "MULTI_CPU"):  # accelerate starts a single process for either
        kind = NOT_DISTRIBUTED
    elif given.startswith("MULTI_"):
        kind = "DDP"
    elif given == "DEEPSPEED":
        kind = f"DeepSpeed ZeRO-{(content.get('deepspeed_config') or {}).get('zero_stage', 2)}"
    elif given == "FSDP":
        kind = f"FSDP{(content.get('fsdp_config') or {}).get('fsdp_version', 1)}"
    return AccelerateConfig(
        name_or_path,
        kind,
        content.get("num_processes"),
        bool(content.get("use_cpu")) or given == "MULTI_CPU",
        content.get("num_machines") or 1,
        bool(content.get("main_process_port")),
    )


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


# Starting a launcher


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
        UserError: if the machine lacks the GPUs or the packages for it.
    """
    asked = read_config(config or default_config(num_processes))
    machines = _number(options, "--num_machines") or asked.num_machines
    num_processes = num_processes or asked.num_processes or _one_for_each_gpu(asked) * machines
    if asked.kind_on(num_processes) != asked.kind:  # one process that is to be several on CPUs
        asked = AccelerateConfig("multi_gpu", "DDP", use_cpu=True, has_port=asked.has_port)
    _check_packages(asked.name, asked.kind)
    environment = dict(os.environ)
    if asked.kind != NOT_DISTRIBUTED and (asked.use_cpu or not gpu_count()):
        environment |= _on_cpus(asked)
        options = ["--mixed_precision", "no", *options]
    # accelerate's own default is a single thread
    cores_each = cores() // max(1, num_processes // machines)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores_each)))
    has_port = asked.has_port or any(option.startswith("--main_process_port") for option in options)
    if machines == 1 and not has_port:
        options = ["--main_process_port", "0", *options]  # a free one, so that two runs can share a machine
    command = [sys.executable, "-m", "medst_trl.pipeline.launch", "--config_file", str(find_config(asked.name))]
    return [*command, "--num_processes", str(num_processes), *options, "-m", *program], environment


def _number(options: Sequence[str], name: str) -> int | None:
    """The value of an option of `accelerate launch`, given as two words or as one."""
    words = [word for option in options for word in option.split("=", 1)]
    return int(words[words.index(name) + 1]) if name in words[:-1] else None


def _one_for_each_gpu(config: AccelerateConfig) -> int:
    gpus = gpu_count()
    if gpus == 0 or (config.kind == "DDP" and gpus == 1):
        raise UserError(
            f"accelerate_config {config.name} divides the work among GPUs, and this machine has {gpus or 'none'}. "
            f"Use {default_config()}, or give the number of processes: --num_processes 2."
        )
    return gpus


def _check_packages(config: str, kind: str) -> None:
    if kind.startswith("DeepSpeed") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f'accelerate_config {config} needs DeepSpeed, which is not installed: pip install "medst_trl[deepspeed]"'
        )


def _on_cpus(config: AccelerateConfig) -> dict[str, str]:
    """Environment variables that processes without a GPU need."""
    if config.kind.startswith("FSDP"):
        raise UserError(
            f"accelerate_config {config.name} divides the weights among GPUs, and this machine has none: accelerate "
            "would leave FSDP out. Use cpu, or zero2."
        )
    if config.kind.startswith("DeepSpeed"):
        # With ACCELERATE_USE_CPU, which may be in the environment, accelerate would leave DeepSpeed out.
        return {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    return {"ACCELERATE_USE_CPU": "true"}


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command and return its exit code. What ends this process ends the command and its children too."""

    def on_termination(number, frame):
        raise SystemExit(128 + number)

    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = signal.signal(signal.SIGTERM, on_termination)
    try:
        return process.wait()
    except (KeyboardInterrupt, SystemExit) as reason:
        _end(process, signal.SIGINT if isinstance(reason, KeyboardInterrupt) else signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen, number: int) -> None:
    """Ask the whole process tree to stop, and kill it if it has not stopped after half a minute."""
    try:
        os.killpg(process.pid, number)
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it was quicker
        pass


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
    except (ImportError, ValueError) as error:  # what accelerate says about its own options and missing packages
        sys.exit(f"accelerate launch: {error}")


# Under a launcher


def is_launched() -> bool:
    """Whether this process was started by `accelerate launch` or torchrun."""
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def check_launched(config: str | None, num_processes: int | None, where: str) -> None:
    """
    Compare the launcher that is asked for with the one this process runs under.

    A wrong launch would train, and exit with 0: on one process instead of eight, or without ZeRO.

    Raises:
        UserError: if they differ, or if accelerate itself did something else than it was asked for.
    """
    _check_peers(where)
    _check_sharding(where)
    running = f"{world_size()} process{'es' * (world_size() > 1)}, {launched_kind()}"
    hint = "Use `medst run`, or start it with the launcher it asks for."
    if config is not None:
        asked = read_config(config)
        num_processes = num_processes or asked.num_processes
        kind = asked.kind_on(num_processes)
        if kind != launched_kind():
            raise UserError(f"{where}: accelerate_config {config} asks for {kind}, but this runs as {running}. {hint}")
    if num_processes is not None and num_processes != world_size():
        raise UserError(f"{where}: {num_processes} processes are asked for, but this runs as {running}. {hint}")


def _check_peers(where: str) -> None:
    """Refuse to be the only process where several were asked for."""
    # accelerate names a meeting point for several processes, and then gives this one no place among them.
    is_alone = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "WORLD_SIZE" not in os.environ
    if not is_alone or "MASTER_PORT" not in os.environ or any(os.environ.get(name, "1") != "1" for name in _MPI_SIZES):
        return
    command, environment = _launcher()
    if "MASTER_PORT" in environment:  # handed down from further above
        return
    found = re.search(r"--num[_-]processes[= ](\d+)", " ".join(command))  # else it is in a configuration file
    on_cpus = "" if gpu_count() else "ACCELERATE_USE_CPU=true "
    raise UserError(
        f"{where}: {found[1] if found else 'several'} processes are asked for, but accelerate has started one. Start "
        f"it with\n  {on_cpus}accelerate launch --multi_gpu --num_processes {found[1] if found else 2} "
        f"{shlex.join(sys.orig_argv[1:])}\nor ask for one process."
    )


def _launcher() -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the `accelerate launch` above this process; empty if the system hides them."""
    import psutil

    try:
        for process in psutil.Process().parents():
            environment = process.environ()
            if "ACCELERATE_DYNAMO_BACKEND" not in environment:
                return process.cmdline(), environment
    except psutil.Error:
        pass
    return [], {}


def _check_sharding(where: str) -> None:
    """Refuse to run without DeepSpeed or FSDP if they were asked for."""

    def is_on(variable: str) -> bool:
        return os.environ.get(variable, "").lower() in ("true", "1", "yes", "y", "on")

    for kind, remedy in {"DeepSpeed": "DS_ACCELERATOR=cpu instead", "FSDP": "FSDP needs GPUs"}.items():
        if is_on(f"ACCELERATE_USE_{kind.upper()}") and is_on("ACCELERATE_USE_CPU"):
            raise UserError(
                f"{where}: accelerate leaves {kind} out if ACCELERATE_USE_CPU is set, and says nothing. Unset it "
                f"({remedy}), or choose multi_gpu (DDP)."
            )


def use_one_gpu() -> None:
    """Give a process without peers only the first visible GPU: on several, Trainer would use DataParallel."""
    if world_size() == 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for an independent process that is started from within a launched one."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


if __name__ == "__main__":
    main()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Run stages on several processes: start them under `accelerate launch`, divide the examples of a step among them, and
check the launcher of this process.

`accelerate launch` (1.15) silently ignores some of its options. With `--cpu`, with a configuration of kind `NO` or
`MULTI_CPU`, and by default on a machine with fewer than two GPUs, it ignores `--num_processes` and starts one process.
With several processes on CPUs, it ignores DeepSpeed and FSDP. Training would run to its end on the wrong setup.
[`check_launched`] detects both cases.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError, located, number_of
from medst_trl.base.processes import NOT_DISTRIBUTED, SHARDED, cores, launched_kind, stop_signals, world_size

from .recipe_files import find_yaml, read_yaml


CONFIGS = Path(__file__).parents[1] / "accelerate_configs"

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # set if mpirun has started the peers


# Configurations of accelerate


@dataclass(frozen=True)
class Hardware:
    """
    What a stage runs on, by its accelerate configuration.

    Args:
        config (`str`): Name or path of the configuration.
        kind (`str`): How the processes share the work, as in [`launched_kind`].
        processes (`int`, *optional*): Number of processes, each with a GPU if `on_gpu`; None: one for each GPU.
        on_gpu (`bool`): Whether it runs on GPUs.
        machines (`int`): Number of machines.
        has_port (`bool`): Whether the configuration sets the port at which processes meet.
        shortages (`tuple[str, ...]`): What this machine lacks for it, in a plan.
    """

    config: str
    kind: str
    processes: int | None
    on_gpu: bool
    machines: int = 1
    has_port: bool = False
    shortages: tuple[str, ...] = ()

    @property
    def is_deepspeed(self) -> bool:
        return self.kind.startswith("DeepSpeed")

    @property
    def shards_weights(self) -> bool:
        """Whether the weights themselves are sharded, not only gradients and optimizer."""
        return self.kind.startswith(SHARDED)

    @property
    def device(self) -> str:
        return "GPU" if self.on_gpu else "process"

    @property
    def devices(self) -> str:
        """Number and name of the devices, for example `4 GPUs`."""
        return number_of(self.processes, self.device)


def find_config(name_or_path: str) -> Path:
    """Find an accelerate configuration by its path or, for a packaged one, by its name (`"zero2"`)."""
    return find_yaml(name_or_path, CONFIGS, "accelerate_config")


def default_config(num_processes: int | None = None) -> str:
    """The configuration if none is given: by default one process, on a GPU if there is one."""
    if gpu_count():
        return "single_gpu" if (num_processes or 1) == 1 else "multi_gpu"
    return "cpu"


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def read_config(name_or_path: str, num_processes: int | None = None) -> Hardware:
    """
    Read an accelerate configuration, by default for its own number of processes; see [`find_config`].

    Raises:
        UserError: for several processes and a configuration for one, because accelerate would silently start one.
    """
    content = read_yaml(find_config(name_or_path))
    kind = str(content.get("distributed_type", "NO"))
    processes = num_processes or content.get("num_processes")
    on_gpu = not content.get("use_cpu") and kind != "MULTI_CPU"
    if kind in ("NO", "MULTI_CPU"):  # for MULTI_CPU, too, accelerate starts a single process
        kind, processes = NOT_DISTRIBUTED, processes or 1
        if processes > 1 and on_gpu:
            raise UserError(
                f"accelerate_config {name_or_path} is for one process, not for {processes}: use multi_gpu."
            )
        if processes > 1:
            name_or_path, kind = "multi_gpu", "DDP"
    elif kind == "DEEPSPEED":
        kind = f"DeepSpeed ZeRO-{(content.get('deepspeed_config') or {}).get('zero_stage', 2)}"
    elif kind == "FSDP":
        kind = f"FSDP{(content.get('fsdp_config') or {}).get('fsdp_version', 1)}"
    elif kind.startswith("MULTI_"):
        kind = "DDP"
    machines, has_port = content.get("num_machines") or 1, bool(content.get("main_process_port"))
    return Hardware(name_or_path, kind, processes, on_gpu, machines, has_port)


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


# How the examples of an optimizer step are divided among processes


@dataclass(frozen=True)
class Batch:
    """
    How the examples of an optimizer step are divided.

    Args:
        per_device (`int`): Examples per batch of one process.
        accumulation (`int`): Batches of each process per step.
        processes (`int`): Number of processes.
    """

    per_device: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, args: Any, training_args: Any, processes: int) -> "Batch":
        """
        Compute the batch of a training stage on a number of processes.

        Args:
            args ([`TrainingStageArguments`]): Its arguments. If `effective_batch_size` is set, accumulation follows.
            training_args ([`~transformers.TrainingArguments`]): Those of its trainer.
            processes (`int`): Number of processes.

        Raises:
            UserError: if `effective_batch_size` is not a multiple of the examples of all processes, or accumulation is
                given too.
        """
        per_device, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
        if args.effective_batch_size is None:
            return cls(per_device, accumulation, processes)
        if accumulation != 1:
            raise UserError(
                f"effective_batch_size {args.effective_batch_size} determines gradient_accumulation_steps. Remove "
                f"gradient_accumulation_steps ({accumulation})."
            )
        accumulation, rest = divmod(args.effective_batch_size, per_device * processes)
        if rest:
            raise UserError(
                f"effective_batch_size {args.effective_batch_size} is not a multiple of {per_device * processes}: "
                f"{per_device} (per_device_train_batch_size) x {number_of(processes, 'process')}. Change one of them."
            )
        return cls(per_device, accumulation, processes)

    @property
    def effective(self) -> int:
        """Examples per step."""
        return self.per_device * self.accumulation * self.processes

    def describe(self, noun: str) -> str:
        """Describe how a step is divided: `128 conversations per step: 8 x 4 processes x 4 accumulated`"""
        return (
            f"{self.effective} {noun} per step: {self.per_device} x {number_of(self.processes, 'process')} x "
            f"{self.accumulation} accumulated"
        )


# Starting a launcher


def launch_command(
    program: Sequence[str], config: str | None, num_processes: int | None = None
) -> tuple[list[str], dict[str, str]]:
    """
    Return the command and environment that run a Python module under accelerate.

    Args:
        program (sequence of `str`):
            Module and arguments, as after `python -m`.
        config (`str` or `None`):
            Name or path of the accelerate configuration; None to choose one for this machine.
        num_processes (`int`, *optional*):
            Number of processes. By default the configuration's, or one for each GPU.

    Raises:
        UserError: if the machine lacks the GPUs or packages that it needs.
    """
    hardware = read_config(config or default_config(num_processes), num_processes)
    processes = hardware.processes or _one_for_each_gpu(hardware) * hardware.machines
    if hardware.is_deepspeed and not has_deepspeed():
        raise UserError(f'accelerate_config {hardware.config} needs DeepSpeed: pip install "medst_trl[deepspeed]"')
    environment, options = dict(os.environ), ["--num_processes", str(processes)]
    if hardware.kind == NOT_DISTRIBUTED:
        environment.pop("MASTER_PORT", None)  # may be left over from another program; see `check_launched`
    elif not (hardware.on_gpu and gpu_count()):
        environment |= _on_cpus(hardware)
        options += ["--mixed_precision", "no"]
    cores_each = cores() // max(1, processes // hardware.machines)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores_each)))  # accelerate's own default is 1
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save a checkpoint after a signal
    if hardware.machines == 1 and not hardware.has_port:
        options += ["--main_process_port", "0"]  # a free one, so that two runs can share a machine
    command = [sys.executable, "-m", "medst_trl.pipeline.launch", "--config_file", str(find_config(hardware.config))]
    return [*command, *options, "-m", *program], environment


def _one_for_each_gpu(hardware: Hardware) -> int:
    gpus = gpu_count()
    if gpus == 0 or (hardware.kind == "DDP" and gpus == 1):
        raise UserError(
            f"accelerate_config {hardware.config} divides the work among GPUs, and this machine has {gpus or 'none'}. "
            f"Use {default_config()}, or give the number of processes: --num_processes 2."
        )
    return gpus


def _on_cpus(hardware: Hardware) -> dict[str, str]:
    """Environment variables that processes without a GPU need."""
    if hardware.kind.startswith("FSDP"):
        raise UserError(
            f"accelerate_config {hardware.config} divides the weights among GPUs, and this machine has none: "
            "accelerate would silently ignore FSDP. Use cpu, or zero2."
        )
    if hardware.is_deepspeed:
        # With ACCELERATE_USE_CPU, which the user may have set, accelerate would ignore DeepSpeed.
        return {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    return {"ACCELERATE_USE_CPU": "true"}


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """
    Run a command and return its exit code, 128 + N for signal N.

    Signals to stop (see [`stop_signals`]) are passed on to the command and its children, which may save their work
    first. The third of one kind kills them: a logout may send several kinds.
    """
    process, received = None, []

    def pass_on(number, frame):
        received.append(number)
        if process is not None:
            with suppress(ProcessLookupError):  # it has already ended
                os.killpg(process.pid, number if received.count(number) < 3 else signal.SIGKILL)

    # Before the command starts: a signal in between would end this process and leave the command running.
    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        for number in tuple(received):  # while the command was being started
            os.killpg(process.pid, number)
        return _exit_code(process.wait())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code  # as a shell does for a signal


def main() -> None:
    """Run `accelerate launch`. If the stage fails, exit with its exit code instead of a second traceback."""
    from accelerate.commands.launch import launch_command as accelerate_launch
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in stop_signals():  # ignore the signal: the stage has received it too, and may be saving its work
        signal.signal(number, lambda *_: None)
    try:
        accelerate_launch(launch_command_parser().parse_args())
    except SignalException as error:  # raised after all of several processes have ended
        sys.exit(_exit_code(-error.sigval))
    except subprocess.CalledProcessError as error:
        sys.exit(_exit_code(error.returncode))
    except ChildFailedError as error:
        sys.exit(_exit_code(error.get_first_failure()[1].exitcode))
    except (ImportError, ValueError) as error:  # accelerate's errors about its options and missing packages
        sys.exit(f"accelerate launch: {error}")


# Under a launcher


def is_launched() -> bool:
    """Whether this process was started by `accelerate launch` or torchrun."""
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def check_launched(config: str | None, num_processes: int | None, where: str) -> None:
    """
    Compare the requested launcher with the launcher of this process.

    Without this check, training could run to its end on one process instead of eight, or without ZeRO.

    Raises:
        UserError: if they differ, or if accelerate has ignored one of its own options.
    """
    # accelerate sets MASTER_PORT for several processes, but if it starts only one of them, not WORLD_SIZE.
    is_alone = is_launched() and "WORLD_SIZE" not in os.environ
    if is_alone and "MASTER_PORT" in os.environ and all(os.environ.get(name, "1") == "1" for name in _MPI_SIZES):
        raise UserError(
            f"{where}: several processes were requested, but accelerate has started one. On GPUs, use `accelerate "
            "launch --multi_gpu`. On CPUs, set ACCELERATE_USE_CPU=true. If you want one process, unset MASTER_PORT."
        )
    on_cpus = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes", "y", "on")
    if on_cpus and launched_kind().startswith(("DeepSpeed", "FSDP")):
        raise UserError(
            f"{where}: accelerate silently ignores {launched_kind()} if ACCELERATE_USE_CPU is set. Unset it (for "
            "DeepSpeed without GPUs: DS_ACCELERATOR=cpu), or choose multi_gpu (DDP)."
        )
    running = f"{number_of(world_size(), 'process')}, {launched_kind()}"
    hint = "Use `medst run`, or the requested launcher."
    if config is not None:
        with located(where):
            requested = read_config(config, num_processes)
        kind, num_processes = requested.kind, requested.processes
        if kind != launched_kind():
            raise UserError(f"{where}: accelerate_config {config} is for {kind}, but this runs as {running}. {hint}")
    if num_processes is not None and num_processes != world_size():
        raise UserError(f"{where}: {num_processes} processes were requested, but this runs as {running}. {hint}")


def use_one_gpu() -> None:
    """Let a single process see only the first visible GPU. With several, the Trainer would use DataParallel."""
    if world_size() == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


if __name__ == "__main__":
    main()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""This process among those of a launch: its rank, its CPU cores and threads, and how the processes are connected."""

import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from accelerate import PartialState

_T = TypeVar("_T")

NOT_DISTRIBUTED = "not distributed"
SHARDED = ("DeepSpeed ZeRO-3", "FSDP")  # how kinds begin that shard the weights themselves


def rank() -> int:
    """The number of this process, also before there is a process group."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes of the launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def launched_kind() -> str:
    """How the processes share their work: `"DDP"`, `"DeepSpeed ZeRO-2"`, `"FSDP2"` or `"not distributed"`."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"DeepSpeed ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return f"FSDP{os.environ.get('FSDP_VERSION', 1)}"
    return "DDP" if world_size() > 1 else NOT_DISTRIBUTED


def leave_peers() -> None:
    """
    End the process group, and with it gloo's threads, before the interpreter ends.

    A thread that releases a tensor while the interpreter ends aborts the process ("terminate called without an active
    exception", https://github.com/pytorch/pytorch/pull/179291). `destroy_process_group` only drops torch's own
    references: the threads end with the last reference, so delete every other reference first, such as a
    trainer.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    gc.collect()  # a model that DDP wraps is part of a reference cycle
    _release_group_in_deepspeed()
    distributed.destroy_process_group()


def _release_group_in_deepspeed() -> None:
    """
    Drop DeepSpeed's reference to the group. accelerate imports DeepSpeed (0.19) wherever it is installed, and
    DeepSpeed takes the group as a default argument.
    """
    backend = getattr(sys.modules.get("deepspeed.comm.torch"), "TorchBackend", None)
    for name in ("barrier", "monitored_barrier"):
        function = getattr(backend, name, None)
        if function is not None and function.__defaults__:  # None, as if it had been imported before there was a group
            world = sys.modules["torch.distributed"].group.WORLD
            function.__defaults__ = tuple(None if value is world else value for value in function.__defaults__)


def process_state() -> "PartialState":
    """accelerate's state of this process, created so that processes on CPUs also see each other."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if (backend := backend_on_cpus()) is not None:
        return PartialState(backend=backend)
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def stop_signals() -> list[signal.Signals]:
    """Signals that ask this process to stop: Ctrl-C, SIGTERM and, for a closed terminal, SIGHUP (not under nohup)."""
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [signal.SIGINT, signal.SIGTERM, *hang_up]


def on_main_process(function: Callable[[], _T]) -> _T:
    """
    Run a function on the main process alone. Every rank returns its result, or raises its error and leaves the group:
    a rank that waited for another would wait forever.
    """
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None]
    if process_state().is_main_process:
        try:
            result = [function()]
        except Exception as error:
            result = [error]
    broadcast_object_list(result)
    if isinstance(result[0], Exception):
        leave_peers()
        raise result[0]
    return result[0]


def backend_on_cpus() -> str | None:
    """
    The backend that connects DeepSpeed's processes on a machine without GPUs; None anywhere else.

    DeepSpeed finds it itself, but accelerate (1.15) treats each process as the only one if no backend is given.
    """
    import torch

    is_alone = world_size() == 1 or torch.accelerator.is_available()
    return None if is_alone or not launched_kind().startswith("DeepSpeed") else "gloo"


def ordered_map(
    function: Callable[[Any], Any], items: Iterable[Any], num_workers: int, ahead: int | None = None
) -> Iterator[Any]:
    """
    Map a function over items on several threads, and yield the results in order. This helps for work that leaves
    Python: decoding and hashing release its global lock.

    Unlike `Executor.map` it looks only a few items ahead, so that memory stays small and an error ends it soon.
    (`buffersize` of Python 3.14's `Executor.map` does the same.)

    Args:
        function (`Callable`): Called for each item.
        items (iterable): The items.
        num_workers (`int`): Number of threads.
        ahead (`int`, *optional*): Number of items that are begun before their results are needed; 4 per thread.
    """
    ahead = 4 * num_workers if ahead is None else ahead
    pending = deque()
    with ThreadPoolExecutor(num_workers) as executor:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""On how many processes of what kind a step will run. The machine that plans need not be the one that runs."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError
from medst_trl.pipeline.launch import NOT_DISTRIBUTED, default_config, gpu_count, read_config


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Step


@dataclass(frozen=True)
class Hardware:
    """
    What a step runs on.

    Args:
        config (`str`): Name or path of the accelerate configuration.
        kind (`str`): `"not distributed"`, `"DDP"`, `"DeepSpeed ZeRO-2"`, `"DeepSpeed ZeRO-3"`, `"FSDP2"`.
        processes (`int`): Number of processes, each with a GPU where `on_gpu`.
        on_gpu (`bool`): Whether it runs on GPUs.
        shortages (`tuple[str, ...]`): What this machine lacks for it.
    """

    config: str
    kind: str
    processes: int
    on_gpu: bool
    shortages: tuple[str, ...] = ()

    @property
    def is_deepspeed(self) -> bool:
        return self.kind.startswith("DeepSpeed")

    @property
    def shards_weights(self) -> bool:
        """Whether the weights themselves are divided, not only what training adds to them."""
        return self.kind == "DeepSpeed ZeRO-3" or self.kind.startswith("FSDP")


def hardware_of(step: "Step") -> Hardware:
    """
    What a step will run on: as its settings say, else as its accelerate configuration, else on what is here.

    Raises:
        UserError: for a configuration that cannot start so many processes.
    """
    gpus = gpu_count()
    if not step.stage.distributed:
        return Hardware("one process", NOT_DISTRIBUTED, 1, gpus > 0)
    config = step.accelerate_config or default_config(step.num_processes)
    asked = read_config(config)
    on_gpu = not asked.use_cpu
    processes = step.num_processes or asked.num_processes or max(1, gpus) * asked.num_machines
    try:
        kind = asked.kind_on(processes)
    except UserError as error:
        raise UserError(f"{step.where}: {error}") from None
    shortages = []
    if on_gpu and gpus < processes // asked.num_machines:
        had = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "none"
        shortages.append(f"planned for {processes} GPU{'s' if processes > 1 else ''}, and this machine has {had}")
        if step.num_processes is None and asked.num_processes is None and kind != NOT_DISTRIBUTED:
            shortages.append("--num_processes N plans for N GPUs")
    if kind.startswith("DeepSpeed") and find_spec("deepspeed") is None:
        shortages.append('DeepSpeed is not installed here: pip install "medst_trl[deepspeed]"')
    return Hardware(config, kind, processes, on_gpu, tuple(shortages))

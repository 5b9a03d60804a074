# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Resuming a run from its newest complete checkpoint.

The Trainer writes `checkpoint-N` in place, `trainer_state.json` last, and its own `get_last_checkpoint` takes the
largest number, complete or not. A run killed while it wrote one would not start again, or start from half a state.
"""

import json
import logging
import os
import zipfile
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from medst_trl.base.errors import UserError, number_of
from medst_trl.base.processes import on_main_process


logger = logging.getLogger(__name__)


def resume_checkpoint(output_dir: str | Path, accelerator: Accelerator) -> str | None:
    """
    [`newest_complete_checkpoint`], as the main process finds it, on every rank.

    Raises:
        UserError: if this launch cannot read the optimizer's state in it.
    """

    def find() -> str | None:
        found = newest_complete_checkpoint(output_dir, accelerator.num_processes)
        if found is not None:
            _check_optimizer(Path(found), accelerator)
        return found

    return on_main_process(find)


def _check_optimizer(checkpoint: Path, accelerator: Accelerator) -> None:
    """
    Refuse a checkpoint whose optimizer this launch cannot read. DeepSpeed would fail, and the Trainer would start with
    a new optimizer.
    """
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    parts = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    if parts == (accelerator.num_processes if uses_deepspeed else 0):
        return
    processes, launch = "processes without DeepSpeed", "--accelerate_config multi_gpu"
    if parts:
        processes = f"{number_of(parts, 'process')} of DeepSpeed"
        launch = f"--num_processes {parts} and the same accelerate_config, zero2 or zero3"
    raise UserError(
        f"{checkpoint} was written by {processes}, and only such processes can read its optimizer. Resume with "
        f"{processes} ({launch}), or start again with --overwrite."
    )


def newest_complete_checkpoint(output_dir: str | Path, num_processes: int = 1) -> str | None:
    """
    Find the checkpoint to resume from, and rename broken ones to `checkpoint-N.broken`.

    A checkpoint that another number of processes wrote is complete: the run resumes from it, with a warning, but each
    process has drawn other random numbers, so the result is not exactly that of an uninterrupted run.

    Args:
        output_dir (`str` or `Path`):
            The run directory.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of ranks that will resume.

    Returns:
        `str` or `None`: The newest complete checkpoint, `None` if there is none.
    """
    while os.path.isdir(output_dir) and (found := get_last_checkpoint(output_dir)):
        path = Path(found)
        problem = _incomplete(path)
        if problem is None:
            writers = len(list(path.glob("rng_state*.pth")))
            if writers != num_processes:
                logger.warning(
                    f"{path} was written by {writers} processes and is resumed by {num_processes}: random draws will "
                    "differ from those of an uninterrupted run."
                )
            return found
        broken = path.with_name(f"{path.name}.broken")
        number = 2
        while broken.exists():
            broken, number = path.with_name(f"{path.name}.broken-{number}"), number + 1
        path.rename(broken)
        logger.warning(f"Renamed the checkpoint {path} to {broken.name}: {problem}.")
    return None


def _incomplete(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed; `None` if it can."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json is missing or truncated ({error})"
    if checkpoint.name != f"checkpoint-{state.get('global_step')}":
        return f"trainer_state.json is of step {state.get('global_step')}"
    states, weights = sorted(checkpoint.glob("rng_state*.pth")), list(checkpoint.glob("*.safetensors"))
    # One process writes rng_state.pth, several rng_state_0.pth and so on, each its own.
    if [path.name for path in states] in ([], ["rng_state_0.pth"]):
        return "the random state of a process is missing"
    # DeepSpeed and FSDP write weights and optimizer in files of their own.
    if not any(any(checkpoint.glob(pattern)) for pattern in ("global_step*", "optimizer_*", "optimizer.bin")):
        if not weights:
            return "it holds no weights"
        states += [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    for path in states:
        if not path.is_file():
            return f"{path.name} is missing"
        if not zipfile.is_zipfile(path):  # as torch.save writes them; their directory is at the end
            return f"{path.name} is truncated"
    for path in weights:
        try:
            with safe_open(path, framework="numpy"):  # checks the header against the file's length
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is truncated ({error})"
    return None

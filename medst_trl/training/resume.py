# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The newest complete checkpoint of a run.

The Trainer writes `checkpoint-N` in place, `trainer_state.json` last, and its own look-up takes the largest number
whether complete or not. A run killed while it wrote would not start again, or start from half a state.
"""

import json
import logging
import re
import zipfile
from pathlib import Path


logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def newest_complete_checkpoint(output_dir: str | Path, num_processes: int = 1) -> str | None:
    """
    Finds the checkpoint to resume from and sets broken ones aside, as `checkpoint-N.broken`.

    Args:
        output_dir (`str` or `Path`):
            The run's folder.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of ranks, each of which writes its own random state.

    Returns:
        `str` or `None`: The newest complete checkpoint, `None` if there is none.
    """
    found = [
        (match, path) for path in Path(output_dir).glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    for _, path in sorted(found, key=lambda item: int(item[0][1]), reverse=True):
        problem = _incomplete(path, num_processes)
        if problem is None:
            return str(path)
        broken = path.with_name(f"{path.name}.broken")
        for number in range(2, 1000):
            if not broken.exists():
                break
            broken = path.with_name(f"{path.name}.broken-{number}")
        path.rename(broken)
        logger.warning("Set the checkpoint %s aside as %s: %s.", path, broken.name, problem)
    return None


def _incomplete(checkpoint: Path, num_processes: int) -> str | None:
    """What keeps a checkpoint from being resumed, in words; `None` if nothing does."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json is missing or cut short ({error})"
    if checkpoint.name != f"checkpoint-{state.get('global_step')}":
        return f"trainer_state.json is of step {state.get('global_step')}"
    states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]
    weights = list(checkpoint.glob("*.safetensors"))
    if not any(checkpoint.glob("global_step*")):  # DeepSpeed keeps weights and optimizer in a folder of its own
        states += ["optimizer.pt", "scheduler.pt"]
        if not weights:
            return "it holds no weights"
    for name in states:
        if not (checkpoint / name).is_file():
            return f"{name} is missing" + (
                " (was it written by another number of processes?)" if "rng" in name else ""
            )
        if not zipfile.is_zipfile(checkpoint / name):  # what torch.save writes; its directory stands at the end
            return f"{name} is cut short"
    return next((problem for path in weights if (problem := _unreadable(path))), None)


def _unreadable(weights: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as file:  # checks the header against the file's length
            file.keys()
    except (SafetensorError, OSError) as error:
        return f"{weights.name} is cut short ({error})"
    return None

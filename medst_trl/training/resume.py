# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Resuming a run: from its newest complete checkpoint, with all its weights.

The Trainer writes `checkpoint-N` in place, `trainer_state.json` last, and its own look-up takes the largest number
whether complete or not. A run killed while it wrote would not start again, or start from half a state.
"""

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType, broadcast_object_list

from medst_trl.base.errors import UserError
from medst_trl.base.processes import leave_peers


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def resume_checkpoint(output_dir: str | Path, accelerator: "Accelerator") -> str | None:
    """
    [`newest_complete_checkpoint`] for every rank: the main process looks and sets aside, the others are told.

    Raises:
        UserError: if this launch cannot read the optimizer's state in it.
    """
    news = [None]
    if accelerator.is_main_process:
        try:
            news = [newest_complete_checkpoint(output_dir, accelerator.num_processes)]
            if news[0] is not None:
                _check_optimizer(Path(news[0]), accelerator)
        except UserError as error:  # the other ranks would wait for ever
            news = [error]
    broadcast_object_list(news)
    if isinstance(news[0], UserError):
        leave_peers()  # on all ranks alike, so the group can be left in order
        raise news[0]
    return news[0]


def _check_optimizer(checkpoint: Path, accelerator: "Accelerator") -> None:
    """DeepSpeed fails on a checkpoint of another launch with a traceback; the Trainer forgets the optimizer."""
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    parts = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    if not parts and not uses_deepspeed:
        return
    if parts and uses_deepspeed and parts == accelerator.num_processes:
        return
    way = f"{parts} process{'es' * (parts > 1)} of DeepSpeed" if parts else "processes without DeepSpeed"
    remedy = f"with as many (--num_processes {parts})" if parts else "without it (--accelerate_config multi_gpu)"
    raise UserError(
        f"{checkpoint} was written by {way}, and its optimizer can be read by no others. Go on {remedy}, or start "
        "again with --overwrite."
    )


def newest_complete_checkpoint(output_dir: str | Path, num_processes: int = 1) -> str | None:
    """
    Finds the checkpoint to resume from and sets broken ones aside, as `checkpoint-N.broken`.

    A checkpoint that another number of processes wrote is complete: the run goes on from it, but each process has
    drawn other random numbers, so the result is no longer exactly that of the run that was not interrupted. A warning
    says so.

    Args:
        output_dir (`str` or `Path`):
            The run's folder.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of ranks that will resume.

    Returns:
        `str` or `None`: The newest complete checkpoint, `None` if there is none.
    """
    numbered = [(_CHECKPOINT.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    found = [(int(match[1]), path) for match, path in numbered if match]
    for _, path in sorted(found, reverse=True):
        problem = _incomplete(path)
        if problem is None:
            writers = len(list(path.glob("rng_state*.pth")))
            if writers != num_processes:
                logger.warning(
                    "%s was written by %d processes and is resumed by %d: random draws will differ from those of an "
                    "uninterrupted run.",
                    path,
                    writers,
                    num_processes,
                )
            return str(path)
        broken = path.with_name(f"{path.name}.broken")
        number = 2
        while broken.exists():
            broken, number = path.with_name(f"{path.name}.broken-{number}"), number + 1
        path.rename(broken)
        logger.warning("Set the checkpoint %s aside as %s: %s.", path, broken.name, problem)
    return None


class LoadsPublishedNames:
    """
    Mixin for a [`~transformers.Trainer`] that resumes a model trained in all its weights.

    Checkpoints keep a model's weights under their published names. Trainer does not translate them back (transformers
    5.23): it warns of missing keys and goes on from the weights the model came with. To be removed once it does.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = model or self.model
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or hasattr(model, "peft_config"):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype).state_dict())


def _incomplete(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being resumed, in words; `None` if nothing does."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json is missing or cut short ({error})"
    if checkpoint.name != f"checkpoint-{state.get('global_step')}":
        return f"trainer_state.json is of step {state.get('global_step')}"
    random_states = sorted(path.name for path in checkpoint.glob("rng_state*.pth"))
    # One process writes rng_state.pth, several rng_state_0.pth and so on, each its own.
    if not random_states or random_states == ["rng_state_0.pth"]:
        return "the random state of a process is missing"
    states = [checkpoint / name for name in random_states]
    weights = list(checkpoint.glob("*.safetensors"))
    if not _sharded(checkpoint):
        if not weights:
            return "it holds no weights"
        states += [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    for path in states:
        if not path.is_file():
            return f"{path.name} is missing"
        if not zipfile.is_zipfile(path):  # what torch.save writes; its directory stands at the end
            return f"{path.name} is cut short"
    return next((problem for path in weights if (problem := _unreadable(path))), None)


def _sharded(checkpoint: Path) -> bool:
    """Whether DeepSpeed or FSDP wrote weights and optimizer, each in files of its own."""
    return any(any(checkpoint.glob(pattern)) for pattern in ("global_step*", "optimizer_*", "optimizer.bin"))


def _unreadable(weights: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as file:  # checks the header against the file's length
            file.keys()
    except (SafetensorError, OSError) as error:
        return f"{weights.name} is cut short ({error})"
    return None

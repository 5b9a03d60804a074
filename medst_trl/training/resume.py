# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Interrupting a run with a checkpoint, and resuming it from its newest complete one.

The Trainer writes `checkpoint-N` in place, `trainer_state.json` last, and its own `get_last_checkpoint` takes the
largest number, complete or not. A run killed while it wrote one would not start again, or start from half a state.
"""

import json
import logging
import os
import shutil
import signal
import stat
import threading
import time
import weakref
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from medst_trl.base.errors import Interrupted, UserError
from medst_trl.base.processes import on_main_process, rank, stop_signals, world_size


logger = logging.getLogger(__name__)

DUPLICATE_SECONDS = 2  # within which a signal may be the same one, passed on by a launcher


class StopSignals(TrainerCallback):
    """
    Context manager around training: after a signal to stop (Ctrl-C, SIGTERM, SIGHUP), training ends with a checkpoint
    of the step in progress, on all ranks. A second signal ends it at once, as does the first without checkpoints
    (`save_strategy="no"`).

    `enable_jit_checkpoint` of transformers (5.23) saves after SIGTERM, too. It does so between the gradients and the
    step as well, so that a resumed run differs, and each rank decides alone, so that ranks wait for each other.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = weakref.proxy(trainer)  # no cycle: a trainer that is no longer used ends its workers at once
        self.is_active = torch.zeros((), dtype=torch.bool).share_memory_()  # workers of data loaders read it

    def __enter__(self) -> None:
        self.signal_number: int | None = None
        self.is_stopping = False  # on all ranks
        saves = self.trainer.args.save_strategy != "no" and threading.current_thread() is threading.main_thread()
        numbers = stop_signals() if saves else ()
        self.trainer.add_callback(self)  # the last one, because it ends training
        self.is_active.fill_(saves)
        self.previous_handlers = {number: signal.signal(number, self._receive) for number in numbers}

    def __exit__(self, *error) -> None:
        for number, handler in self.previous_handlers.items():
            if signal.getsignal(number) == self._receive:  # transformers may have restored its own
                signal.signal(number, handler)
        self.is_active.fill_(False)
        self.trainer.remove_callback(self)

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal_number is None:
            self.signal_number, self.begun = number, time.monotonic()
            if number == signal.SIGHUP:
                _leave_terminal()
            elif rank() == 0:  # not by print, which the signal may have interrupted
                os.write(2, b"\nStopping with a checkpoint after this step. Another Ctrl-C stops at once.\n")
        # Processes of a launcher receive a signal themselves and from the launcher.
        elif time.monotonic() - self.begun > DUPLICATE_SECONDS or (number == signal.SIGINT and world_size() == 1):
            _stop(number)

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a resumed run has loaded the intervals of its checkpoint
        if state.global_step:
            self.trainer.accelerator.print(f"Resuming after step {state.global_step} of {state.max_steps}.")

    def on_step_end(self, args, state, control, **kwargs):
        self.is_stopping = self.signal_number is not None
        if self.previous_handlers and self.trainer.accelerator.num_processes > 1:
            if self.is_stopping:
                self.trainer.accelerator.set_trigger()
            self.is_stopping = self.trainer.accelerator.check_trigger()
        saves = control.should_save or self.is_stopping
        # At the end of an epoch, save after its evaluation, which a resumed run would skip.
        self.saves_epoch = saves and (control.should_training_stop or float(state.epoch).is_integer())
        control.should_save = saves and not self.saves_epoch

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.saves_epoch

    def on_save(self, args, state, control, **kwargs):
        if self.is_stopping:
            self.trainer.accelerator.wait_for_everyone()  # a launcher ends all ranks when one has ended
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.trainer.accelerator.print(f"Saved {checkpoint}, after step {state.global_step} of {state.max_steps}.")
            _stop(self.signal_number or signal.SIGTERM)

    def protect_workers(self, dataloader: DataLoader) -> DataLoader:
        """Let the workers of a data loader ignore, during training, the signals that their process group receives."""
        base = getattr(dataloader, "base_dataloader", dataloader)  # accelerate's loaders have one
        base.worker_init_fn = partial(_protect_worker, self.is_active, base.worker_init_fn)
        return dataloader


def _protect_worker(is_active: torch.Tensor, init: Callable[[int], None] | None, worker_id: int) -> None:
    for number in stop_signals():
        signal.signal(number, lambda number, frame: None if is_active else os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    if init is not None:
        init(worker_id)


def _leave_terminal() -> None:
    """Discard further output to a terminal or pipe, which is gone: writing there would end training."""
    for descriptor in (1, 2):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _stop(number: int) -> NoReturn:
    """End training as the signal would."""
    raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(128 + number)


def checkpoint_named(output_dir: str | Path, given: str | None) -> Path | None:
    """
    Resolve `resume_from_checkpoint` (`given`): a checkpoint in `output_dir`; `None` for "true", "false" and no value.

    Raises:
        UserError: for a path outside `output_dir`.
    """
    if str(given or "").lower() in ("", "true", "false"):
        return None
    inside = Path(output_dir, given)
    path = inside if inside.exists() else Path(given)
    if path.resolve().parent != Path(output_dir).resolve():
        advice = f" To start a new run from these weights, set model_name_or_path to {given}." if path.exists() else ""
        raise UserError(
            f"resume_from_checkpoint {given} is not a checkpoint in output_dir {output_dir}. A run resumes from its "
            f"own checkpoints.{advice}"
        )
    return path


def resume_checkpoint(output_dir: str | Path, state: PartialState, given: str | None = None) -> str | None:
    """
    Return the checkpoint to resume from, chosen on the main process for every rank.

    Args:
        output_dir (`str` or `Path`):
            The run directory.
        state ([`~accelerate.PartialState`] or [`~accelerate.Accelerator`]):
            Of the ranks that will resume.
        given (`str`, *optional*):
            `resume_from_checkpoint`: a checkpoint in `output_dir`, "true" for the newest one, "false" for none. By
            default the newest one, if there is any.

    Returns:
        `str` or `None`: The checkpoint; `None` to start at the first step.

    Raises:
        UserError: if the given one is missing or not complete, or this launch cannot read its optimizer's state.
    """

    def find() -> str | None:
        word = str(given or "").lower()
        if word == "false":
            return None
        named = checkpoint_named(output_dir, given)
        if named and (problem := _incomplete(named)):
            raise UserError(f"resume_from_checkpoint {named}: {problem}.")
        checkpoint = named or newest_complete_checkpoint(output_dir)
        if checkpoint:
            _check_optimizer(Path(checkpoint), state)
        elif word == "true":
            raise UserError(
                f"resume_from_checkpoint is true, but {output_dir} has no complete checkpoint. Remove "
                "resume_from_checkpoint to start at the first step."
            )
        return str(checkpoint) if checkpoint else None

    return on_main_process(find)


def _check_optimizer(checkpoint: Path, state: PartialState) -> None:
    """Refuse a checkpoint whose optimizer this launch cannot read: the Trainer would start with a new optimizer."""
    kept_by_deepspeed = any(checkpoint.glob("global_step*"))
    if kept_by_deepspeed != (state.distributed_type == DistributedType.DEEPSPEED):
        raise UserError(
            f"{checkpoint} was written {'with' if kept_by_deepspeed else 'without'} DeepSpeed, and its optimizer "
            "cannot be read otherwise. Resume with the same accelerate_config, or start again with --overwrite."
        )


def newest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Find the checkpoint to resume from, and rename broken ones to `checkpoint-N.broken`.

    A checkpoint that another number of processes wrote is complete: the run resumes from it, but each process then
    draws other random numbers, so the result is not exactly that of an uninterrupted run.

    Args:
        output_dir (`str` or `Path`):
            The run directory.

    Returns:
        `str` or `None`: The newest complete checkpoint, `None` if there is none.
    """
    while os.path.isdir(output_dir) and (found := get_last_checkpoint(output_dir)):
        path = Path(found)
        problem = _incomplete(path)
        if problem is None:
            return found
        broken = path.with_name(f"{path.name}.broken")
        shutil.rmtree(broken, ignore_errors=True)  # of an earlier attempt at the same step
        path.rename(broken)
        logger.warning(f"Renamed the checkpoint {path} to {broken.name}: {problem}.")
    return None


def _incomplete(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed; `None` if it can."""
    path = checkpoint / "trainer_state.json"
    try:
        step = json.loads(path.read_text(encoding="utf-8")).get("global_step")
        if checkpoint.name != f"checkpoint-{step}":
            return f"trainer_state.json is of step {step}"
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
            zipfile.ZipFile(path).close()  # as torch.save writes them; their directory is at the end
        for path in weights:
            with safe_open(path, framework="numpy"):  # checks the header against the file's length
                pass
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        return f"{path.name} is missing or truncated ({error})"
    return None

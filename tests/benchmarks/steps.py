# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Training as the trainers do it: their own `train()`, timed from the begin of an epoch to its end.

So data loader, collator, length-grouped sampler, forward, backward, clipping, optimizer and metrics all count, and
setting up a run does not.
"""

import copy
import gc
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from measure import PeakMemory, Run, synchronise
from transformers import PrinterCallback, TrainerCallback


if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


def common_arguments(batch_size: int, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool) -> dict:
    """What both trainers are told, alike."""
    workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    return {
        "output_dir": tempfile.gettempdir(), "per_device_train_batch_size": batch_size, "num_train_epochs": 1,
        "learning_rate": 1e-6, "gradient_checkpointing": gradient_checkpointing, "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "seed": 0,
        # On a GPU data is prepared beside the work, as anyone would have it.
        "dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0,
    }  # fmt: skip


def twin(model: "PreTrainedModel", share_weights: bool) -> "PreTrainedModel":
    """A copy of a model; with `share_weights` of its modules alone, for adapters: they leave the weights alone."""
    memo = {id(parameter): parameter for parameter in model.parameters()} if share_weights else {}
    return copy.deepcopy(model, memo)


def nudge(model: "PreTrainedModel") -> None:
    """
    Moves all trained weights a little, by their names: two models stay equal, and a policy leaves its reference.

    Otherwise DPO's loss would be ln 2 whatever is computed.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.005 * noise.to(parameter.device, parameter.dtype)


def copy_trained(source: "PreTrainedModel", target: "PreTrainedModel") -> None:
    """
    Gives one model the trained weights of another: adapters are drawn at random.

    Raises:
        ValueError: if the two do not train the same weights.
    """
    weights = {name: parameter for name, parameter in source.named_parameters() if parameter.requires_grad}
    others = {name: parameter for name, parameter in target.named_parameters() if parameter.requires_grad}
    if weights.keys() != others.keys():
        raise ValueError(f"Only one of the two trains {sorted(weights.keys() ^ others.keys())[:4]}.")
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(weights[name])


class Epoch:
    """
    One epoch of a trainer, again and again: a way for [`alternate`].

    With workers, a run has two epochs and the second is timed: starting them is no part of training.

    Args:
        trainer ([`~transformers.Trainer`]): Trainer, its dataset as many batches as shall be timed.
        device (`torch.device`): Where it trains.
    """

    def __init__(self, trainer: "Trainer", device: torch.device):
        self.trainer = trainer
        self.device = device
        self.clock = _Clock(device)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.clock)
        get_batch_samples = trainer.get_batch_samples

        def timed(*args, **kwargs):
            # Copying a batch to the device waits for the step before, which is not waiting for data.
            synchronise(device)
            begun = time.perf_counter()
            batch = get_batch_samples(*args, **kwargs)
            self.clock.waited += time.perf_counter() - begun
            return batch

        trainer.get_batch_samples = timed

    def warm_up(self) -> None:
        """One optimizer step, not timed; on a GPU an epoch, so that what is compiled for certain lengths is there."""
        self.trainer.args.max_steps = 1 if self.device.type == "cpu" else -1
        self.trainer.train()
        self.trainer.args.max_steps = -1

    def __call__(self) -> Run:
        self.trainer.args.num_train_epochs = 2 if self.trainer.args.dataloader_num_workers else 1
        with PeakMemory(self.device, lambda: tensors_of(self.trainer)) as memory:
            self.trainer.train()
        return Run(self.clock.seconds, len(self.trainer.train_dataset), self.clock.waited, memory.peak_bytes)


class _Clock(TrainerCallback):
    """Times the last epoch."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = self.waited = 0.0

    def on_epoch_begin(self, args, state, control, **kwargs):
        synchronise(self.device)
        self.waited, self._begun = 0.0, time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        synchronise(self.device)
        self.seconds = time.perf_counter() - self._begun


def batches_of(trainer: "Trainer") -> list[dict]:
    """The batches of an epoch, without pixels: what is in them is counted."""
    kept = []
    for batch in trainer.get_train_dataloader():
        images = len(batch.pop("pixel_values"))
        kept.append({"images": images} | {k: v.cpu() if torch.is_tensor(v) else v for k, v in batch.items()})
    return kept


def scored_positions(device: torch.device, labelled: int, all_positions: int) -> int:
    """For how many positions TRL (1.16) computes the output layer: on a GPU those with a label, on a CPU all."""
    return labelled if device.type == "cuda" else all_positions


def largest_that_fits(what: str, batch_size: int, work: Callable[[int], list]) -> list:
    """What `work` gives for the batch size, halved until it fits into the GPU's memory for every way."""
    while True:
        try:
            return work(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
        # Outside of `except`: the error holds on to what takes the memory.
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{what}: not enough memory, going on with batches of {batch_size}.", flush=True)


def tensors_of(trainer: "Trainer") -> list[torch.Tensor]:
    """What a trainer holds between two steps: weights, reference and the state of its optimizer."""
    models = [trainer.model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) is not None else [])]
    held = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else []
    return held + [value for state in states for value in state.values() if torch.is_tensor(value)]


def evaluated(trainer: "Trainer", rows: list[dict]) -> float:
    """The trainer's own loss of some rows, nothing trained and nothing dropped."""
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        loss = float(trainer.compute_loss(trainer.model, inputs))
    trainer.model.train()
    return loss


def check_equal(losses: dict[str, float], dtype: torch.dtype) -> str:
    """
    What the losses of all ways on the same rows are, in words.

    Raises:
        ValueError: if they differ by more than rounding: then what is timed is not the same training.
    """
    allowed = 2e-5 if dtype == torch.float32 else 3e-2
    difference = max(losses.values()) - min(losses.values())
    said = ", ".join(f"{name} {loss:.7f}" for name, loss in losses.items())
    if not (all(map(math.isfinite, losses.values())) and difference <= allowed * max(1.0, *losses.values())):
        raise ValueError(f"The losses differ by {difference:.2g}, more than {allowed:g}: {said}.")
    return f"same loss within {difference:.1e} ({said})"

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Timing of an epoch of a trainer's own `train()`.

The time includes data loader, collator, length-grouped sampler, forward, backward, clipping, optimizer and metrics,
but not the setup of the run.
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
from measure import PeakMemory, Run, synchronize
from transformers import PrinterCallback, TrainerCallback


if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


def common_arguments(batch_size: int, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool) -> dict:
    """Return the training arguments that all trainers share."""
    workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    return {
        "output_dir": tempfile.gettempdir(), "per_device_train_batch_size": batch_size, "num_train_epochs": 1,
        "learning_rate": 1e-6, "gradient_checkpointing": gradient_checkpointing, "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "seed": 0,
        # On a GPU, workers prepare the data in parallel, as users do.
        "dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0,
    }  # fmt: skip


def copy_model(model: "PreTrainedModel", share_weights: bool) -> "PreTrainedModel":
    """Copy a model. `share_weights` copies only the modules, for adapters, which do not change the base weights."""
    memo = {id(parameter): parameter for parameter in model.parameters()} if share_weights else {}
    return copy.deepcopy(model, memo)


def perturb(model: "PreTrainedModel") -> None:
    """
    Add noise to all trained weights. The seed is the name, so equal models stay equal but differ from the reference.

    Without it, the DPO loss would be ln 2, independent of the log-probabilities.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.005 * noise.to(parameter.device, parameter.dtype)


def copy_trained(source: "PreTrainedModel", target: "PreTrainedModel") -> None:
    """
    Copy the trained weights of one model to another, because adapters are initialized at random.

    Raises:
        ValueError: If the two do not train the same weights.
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
    Repeatable epoch of a trainer: a variant for [`alternate`].

    With workers, a run has two epochs and the second is timed, so that the start of the workers is not included.

    Args:
        trainer ([`~transformers.Trainer`]): Trainer whose dataset has as many batches as are timed.
        device (`torch.device`): Device of the training.
    """

    def __init__(self, trainer: "Trainer", device: torch.device):
        self.trainer = trainer
        self.device = device
        self.clock = _Clock(device)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.clock)
        get_batch_samples = trainer.get_batch_samples

        def timed(*args, **kwargs):
            # Copying a batch to the device waits for the previous step, which does not count as waiting for data.
            synchronize(device)
            start = time.perf_counter()
            batch = get_batch_samples(*args, **kwargs)
            self.clock.waited += time.perf_counter() - start
            return batch

        trainer.get_batch_samples = timed

    def warm_up(self) -> None:
        """Train one untimed step, or one epoch on a GPU, so that kernels are compiled for all lengths."""
        self.trainer.args.max_steps = 1 if self.device.type == "cpu" else -1
        self.trainer.train()
        self.trainer.args.max_steps = -1

    def __call__(self) -> Run:
        self.trainer.args.num_train_epochs = 2 if self.trainer.args.dataloader_num_workers else 1
        with PeakMemory(self.device, lambda: tensors_of(self.trainer)) as memory:
            self.trainer.train()
        return Run(self.clock.seconds, len(self.trainer.train_dataset), self.clock.waited, memory.peak_bytes)


class _Clock(TrainerCallback):
    """Callback that times the last epoch."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = self.waited = 0.0

    def on_epoch_begin(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.waited, self._start = 0.0, time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.seconds = time.perf_counter() - self._start


def batches_of(trainer: "Trainer") -> list[dict]:
    """Return the batches of an epoch without their pixels, but with the number of images."""
    batches = []
    for batch in trainer.get_train_dataloader():
        images = len(batch.pop("pixel_values"))
        batches.append({"images": images} | {k: v.cpu() if torch.is_tensor(v) else v for k, v in batch.items()})
    return batches


def scored_positions(device: torch.device, labeled: int, all_positions: int) -> int:
    """Return for how many positions TRL 1.16 computes the output layer: on a GPU the labeled ones, on a CPU all."""
    return labeled if device.type == "cuda" else all_positions


def largest_that_fits(what: str, batch_size: int, work: Callable[[int], list]) -> list:
    """Call `work` with the batch size, halved until all variants fit into the GPU's memory."""
    while True:
        try:
            return work(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
        # Outside of `except`, because the error keeps a reference to the tensors.
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{what}: not enough memory, continuing with batches of {batch_size}.", flush=True)


def tensors_of(trainer: "Trainer") -> list[torch.Tensor]:
    """Return the tensors that a trainer keeps between steps: weights, reference and optimizer state."""
    models = [trainer.model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) is not None else [])]
    held = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else []
    return held + [value for state in states for value in state.values() if torch.is_tensor(value)]


def evaluation_loss(trainer: "Trainer", rows: list[dict]) -> float:
    """Return the trainer's loss on the rows, in evaluation mode and without training."""
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        loss = float(trainer.compute_loss(trainer.model, inputs))
    trainer.model.train()
    return loss


def check_equal(losses: dict[str, float], dtype: torch.dtype) -> str:
    """
    Describe the losses of all variants on the same rows.

    Raises:
        ValueError: If they differ by more than rounding, because then the variants do not train the same.
    """
    allowed = 2e-5 if dtype == torch.float32 else 3e-2
    difference = max(losses.values()) - min(losses.values())
    listed = ", ".join(f"{name} {loss:.7f}" for name, loss in losses.items())
    if not (all(map(math.isfinite, losses.values())) and difference <= allowed * max(1.0, *losses.values())):
        raise ValueError(f"The losses differ by {difference:.2g}, more than {allowed:g}: {listed}.")
    return f"same loss within {difference:.1e} ({listed})"

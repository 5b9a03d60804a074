# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Images decoded and resized ahead of the step, in workers, and a figure that says whether the step waits for them."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, Features, Image, List

from medst_trl.base.processes import backend_on_cpus


logger = get_logger(__name__)

MOST_WORKERS = 8  # beyond, decoding is faster than any model here trains, and each worker holds batches in memory
LONG_WAIT = 0.1  # share of the time above which the step waits too long for data
PATIENCE = 3  # logs in a row; the first ones may have workers starting in them


def default_workers() -> int:
    """The number of data loader workers beside an accelerator: this process's share of the CPU cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass
class InputPipelineArguments:
    """Mixin for [`~transformers.TrainingArguments`] whose data loader suits the machine it runs on."""

    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that decode and resize images ahead of the step. Default: this process's share of the "
            "CPU cores, at most 8, beside an accelerator; 0 without one."
        },
    )
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Whether workers outlive an epoch. Default: beside an accelerator."}
    )

    def __post_init__(self):
        # Without one, workers would take the cores from the model. And starting them draws from the random numbers
        # of a CPU's dropout: a resumed run, which starts them anew, would go on with others if they were to persist.
        has_accelerator = torch.accelerator.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers() if has_accelerator else 0
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = has_accelerator and self.dataloader_num_workers > 0
        if not has_accelerator:
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch says so for every loader
        if self.ddp_backend is None:
            self.ddp_backend = backend_on_cpus()
        super().__post_init__()


class TakesStoredImages:
    """
    Mixin for TRL's data collators: takes images as a dataset stores them, or decoded, and decodes each once. Left to
    `datasets`, the first image of every list is decoded twice (its `decode_nested_example` tries one to see whether
    the list has to be decoded).
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call([with_decoded_images(example) for example in examples])


def with_stored_images(dataset: Any) -> Any:
    """The same rows with images as they are stored (`bytes` and `path`); anything but a plain dataset as it is."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] is not None:
        return dataset
    dataset = dataset.with_format(None)  # a copy of what describes the rows, not of the rows
    # Not by casting a column, which would write all images anew.
    dataset.info.features = Features({name: _stored(feature) for name, feature in dataset.features.items()})
    return dataset


def _stored(feature: Any) -> Any:
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return List(Image(decode=False))
    return Image(decode=False) if isinstance(feature, Image) else feature


def with_decoded_images(example: dict[str, Any]) -> dict[str, Any]:
    """An example with each of its images decoded, if it is not yet."""
    decode = Image().decode_example
    if isinstance(example.get("image"), dict):
        example = {**example, "image": decode(example["image"])}
    if any(isinstance(image, dict) for image in example.get("images") or []):
        images = [decode(image) if isinstance(image, dict) else image for image in example["images"]]
        example = {**example, "images": images}
    return example


class DataWait:
    """
    Measures how long a training loop waits for its batches.

    Args:
        waits_for_device (`bool`, *optional*, defaults to `False`):
            Whether a batch is copied to an accelerator before it is handed out. The copy waits for all work given to
            the accelerator before, which is not waiting for data, so that work is awaited first.
    """

    def __init__(self, waits_for_device: bool = False):
        self.waits_for_device = waits_for_device
        self.waited = 0.0
        self.since = time.monotonic()
        self.long_waits = 0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, the wait for each of them noted."""
        while True:
            if self.waits_for_device:
                torch.accelerator.synchronize()
            begun = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.monotonic() - begun
            yield batch

    def share(self) -> float:
        """Share of the time since the last call, or the start, that was spent waiting; from 0 to 1."""
        now = time.monotonic()
        share = self.waited / max(now - self.since, 1e-9)
        self.waited, self.since = 0.0, now
        self.long_waits = self.long_waits + 1 if share > LONG_WAIT else 0
        return min(share, 1.0)


class FeedsImages:
    """
    Mixin for a [`~transformers.Trainer`] on images, whose collator decodes them if it is a [`TakesStoredImages`].

    Logs `data_wait`, the share (0 to 1) of the time since the last log in which the main process waited for data, and
    says once what to do when it stays above a tenth.
    """

    def train(self, *args, **kwargs):
        # Copies that do not block wait for nothing, and there is no need to wait for the device either.
        blocking = not self.accelerator.non_blocking
        self._data_wait = DataWait(self.args.device.type not in ("cpu", "meta") and blocking)
        self._has_hinted = False
        return super().train(*args, **kwargs)

    def _get_dataloader(self, dataset, *args, **kwargs):
        if isinstance(self.data_collator, TakesStoredImages):
            dataset = with_stored_images(dataset)
        if self.args.dataloader_num_workers:
            # tokenizers warns in each process forked after it has used threads. Batches need none of them.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return super()._get_dataloader(dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self._data_wait.timed(epoch_iterator), num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:  # a log of training steps
            logs["data_wait"] = self._data_wait.share()
            if self._data_wait.long_waits >= PATIENCE and not self._has_hinted:
                self._has_hinted = True
                workers = self.args.dataloader_num_workers
                logger.warning(
                    f"Training has waited for data {100 * logs['data_wait']:.0f}% of the time since the last log, and "
                    f"above {100 * LONG_WAIT:.0f}% for {PATIENCE} logs. Raise dataloader_num_workers (now {workers}), "
                    "or store the images at the size the model reads."
                )
        super().log(logs, start_time)

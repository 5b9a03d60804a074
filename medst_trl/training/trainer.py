# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The base of both trainers, without losses: loading, saving, learning rates by part, batches of similar length, images.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoProcessor, ProcessorMixin, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.trainer.utils import get_config_model_id

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_jsonl
from medst_trl.data.schema import with_stored_images
from medst_trl.policy.adapters import retie_lm_head, train_in_full_precision, write_base_file
from medst_trl.policy.families import base_of, model_parts, trained_parameters
from medst_trl.policy.image_tokens import fit_processor
from medst_trl.policy.loading import load_policy, prepare_policy

from .examples import DecodesImages, UsableExamples
from .resume import StopSignals
from .settings import check_sharding, sharding_kind
from .upstream import UpstreamFixes, encode_blank_images, name_fsdp_layers


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """
    [`~transformers.trainer_pt_utils.LengthGroupedSampler`] whose order depends on seed and epoch alone.

    Without its own generator it draws from torch's global one, which may differ between ranks: one example would be
    trained on twice and another not at all. It receives the epoch like accelerate's seeded random sampler.

    Args:
        batch_size (`int`):
            Number of examples to group, that of one optimizer step.
        lengths (`list[int]`):
            Length of each example of the dataset, in tokens.
        seed (`int`):
            Seed of the first epoch's order.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class GroupsByLength:
    """
    Mixin for a [`~transformers.Trainer`] that holds `train_lengths`, the number of tokens of each training example.
    Grouping by length in transformers needs a column of them. Adding one to a dataset from which rows were selected
    copies all its images.

    With `train_sampling_strategy="group_by_length"` it trains on batches of examples of similar length. With any other
    strategy, on a stream, and on a dataset that is not the one it was created with, the Trainer's own sampler is used.
    """

    train_lengths: Sequence[int] = ()
    _length_sampler: SeededLengthGroupedSampler | None = None

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        groups = self.args.train_sampling_strategy == "group_by_length" and self.train_lengths
        if not groups or len(self.train_lengths) != len(dataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # Group the examples of a whole optimizer step, so that no rank waits for one with longer examples, and the
        # order is the same for any number of ranks. The Trainer's own grouping ignores the number of ranks.
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._length_sampler = SeededLengthGroupedSampler(batch_size, self.train_lengths, seed)
        return self._length_sampler

    def _run_epoch(self, *, epoch: int, **kwargs):
        # accelerate sets the epoch of its own seeded sampler only. On several ranks, its data loader does not find
        # this one:
        # https://github.com/modelscope/ms-swift/pull/9658
        if self._length_sampler is not None:
            self._length_sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _get_eval_sampler(self, eval_dataset) -> Sampler:
        return SequentialSampler(eval_dataset)  # the Trainer would group these too and need their lengths


def datasets_by_name(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The datasets by name: `train`, and `eval` or `eval_NAME` for each of several in a `dict`."""
    if isinstance(eval_dataset, dict):
        return {"train": train_dataset} | {f"eval_{name}": dataset for name, dataset in eval_dataset.items()}
    return {"train": train_dataset} | ({} if eval_dataset is None else {"eval": eval_dataset})


class PolicyTrainer(GroupsByLength, UpstreamFixes):
    """
    Mixin for TRL's trainers that train a policy on images, whose arguments are [`TrainerSettings`].

    Weights that train are kept in float32, each part of the model trains at its own learning rate, and a checkpoint
    holds an adapter without PEFT's copy of the embedding and with the fingerprint of its base. Logs have the learning
    rate of each part and `data_wait`, the fraction (0 to 1) of the time since the last log in which the main process
    waited for data. Above a tenth, raise `dataloader_num_workers`, or store the images at the size the model reads.
    """

    extra_columns: tuple[str, ...] = ("id",)  # what the collators read besides TRL's columns

    @staticmethod
    def load_model(
        model: Any, processing_class: ProcessorMixin | None, args: TrainingArguments
    ) -> tuple[torch.nn.Module, ProcessorMixin]:
        """The model and its processor, loaded if they are given by name, with `<vusr>` token and template."""
        check_sharding(sharding_kind(args), args)
        if isinstance(model, str):
            model_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            model, loaded = load_policy(model, is_trainable=True, **model_kwargs)
            processing_class = processing_class or loaded
        if processing_class is None:
            name = get_config_model_id(base_of(model).config)
            processing_class = AutoProcessor.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        fit_processor(processing_class, base_of(model).config, get_config_model_id(base_of(model).config))
        prepare_policy(base_of(model), processing_class)
        if hasattr(model, "peft_config") and not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError("The adapter is loaded for inference. Load it with load_policy(..., is_trainable=True).")
        return model, processing_class

    def reject_examples(
        self, args: Any, datasets: Mapping[str, Any], find_usable: Callable[..., UsableExamples], *usable_args: Any
    ) -> tuple[Any, Any]:
        """
        Leave out the examples that cannot be trained on, and list them in `rejected.jsonl` of `output_dir`.

        Args:
            args ([`~transformers.TrainingArguments`]):
                Configuration.
            datasets (`dict`):
                See [`datasets_by_name`].
            find_usable (`Callable`):
                Finds the usable examples of a dataset, given the dataset, `usable_args` and its name for messages.
            *usable_args:
                Further arguments of `find_usable`, between the dataset and its name.

        Returns:
            `tuple`: The arguments `train_dataset` and `eval_dataset` without them. The trainer has `usable`, the
            [`UsableExamples`] by name, and `rejected_records`, the reasons by id (`eval/ID`).
        """
        self.usable = {name: find_usable(dataset, *usable_args, name) for name, dataset in datasets.items()}
        self.rejected_records = {
            record if name == "train" else f"{name}/{record}": reason
            for name, usable in self.usable.items()
            for record, reason in usable.rejected_records.items()
        }
        if args.should_save and self.rejected_records:
            os.makedirs(args.output_dir, exist_ok=True)
            values = {"too_long": f"max_length={args.max_length}"}
            reasons = self.rejected_records.items()
            rows = ({"id": name, "reason": reason, "value": values.get(reason, "")} for name, reason in reasons)
            write_jsonl(Path(args.output_dir, "rejected.jsonl"), rows)
        self.train_lengths = self.usable["train"].lengths
        kept = {name: usable.dataset for name, usable in self.usable.items()}
        several = {name.removeprefix("eval_"): dataset for name, dataset in kept.items() if name.startswith("eval_")}
        return kept["train"], several or kept.get("eval")

    def prepare_for_training(self, *others: torch.nn.Module | None, **kwargs: Any) -> None:
        """
        Prepare the model after TRL, in place.

        Args:
            *others ([`~transformers.PreTrainedModel`] or `None`):
                Other models that the trainer runs, such as the reference.
            **kwargs:
                Arguments of the adapter's `save_pretrained`.
        """
        if hasattr(self.model, "peft_config"):
            retie_lm_head(self.model)
            if not self.is_zero_3():  # TRL keeps one type there: https://github.com/huggingface/trl/issues/6089
                train_in_full_precision(self.model)
            # PEFT would store the whole embedding of an enlarged vocabulary; `load_policy` enlarges it again.
            self.model.save_pretrained = partial(self.model.save_pretrained, save_embedding_layers=False, **kwargs)
        name_fsdp_layers(self)
        self.stop_signals = StopSignals(self)
        # A rank whose batch has no images would skip the vision tower while the others run it. DDP that looks for
        # unused parameters (TRL's default with images) handles this; DeepSpeed, FSDP and other DDP do not.
        is_ddp = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        needs_blank_images = not is_ddp or self.args.ddp_find_unused_parameters is False
        if self.accelerator.num_processes > 1 and needs_blank_images:
            for model in filter(None, (self.model, *others)):
                encode_blank_images(base_of(self.accelerator.unwrap_model(model)), self.processing_class)

    def is_zero_3(self) -> bool:
        """Whether DeepSpeed shards the weights."""
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    def trainable_parameters(self) -> dict[str, int]:
        """Number of trained parameters of each part."""
        counts = Counter()
        for (part, _), count in trained_parameters(self.accelerator.unwrap_model(self.model)).items():
            counts[part] += count
        return dict(counts)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's optimizer with its groups split by part; a group's `part` names it."""
        # Here for both trainers, because TRL's DPOTrainer takes no `optimizer_cls_and_kwargs`. Schedulers scale each
        # group's own rate, and the groups pass through DDP and DeepSpeed like any others.
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        parts = model_parts(self.accelerator.unwrap_model(self.model))
        rates = {"vision": self.args.vision_learning_rate, "projector": self.args.projector_learning_rate}
        names = {id(p): name.removeprefix("module.") for name, p in (model or self.model).named_parameters()}
        groups = {}
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = names[id(parameter)]
                # PEFT stores trained token rows whole, so decay would pull them towards zero.
                is_token_row = "trainable_tokens" in name
                part = parts.part_of(name)
                key = (index, is_token_row, part)
                if key not in groups:
                    rate = group["lr"] if rates.get(part) is None else rates[part]
                    decay = 0.0 if is_token_row else group["weight_decay"]
                    groups[key] = {**group, "params": [], "part": part, "lr": rate, "weight_decay": decay}
                groups[key]["params"].append(parameter)
        # The language model first: the Trainer logs the first group's rate as `learning_rate`.
        optimizer.param_groups = sorted(groups.values(), key=lambda group: group["part"] != "language")
        return optimizer

    def _get_learning_rate(self):
        # The Trainer reads the rate before the scheduler's step and logs it later. Keep the other parts' rates of the
        # same step.
        groups = self.optimizer.param_groups
        self._rates_of_step = {group["part"]: group["lr"] for group in groups if "part" in group}
        return super()._get_learning_rate()

    def train(self, *args, **kwargs):
        self._waited, self._waited_since = 0.0, time.monotonic()
        with self.stop_signals:
            return super().train(*args, **kwargs)

    def _get_dataloader(self, dataset, *args, **kwargs):
        if isinstance(self.data_collator, DecodesImages):
            dataset = with_stored_images(dataset)
        if self.args.dataloader_num_workers:
            # tokenizers warns in each process forked after it has used threads. Batches need none of them.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return self.stop_signals.protect_workers(super()._get_dataloader(dataset, *args, **kwargs))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches, and measure the wait for each."""
        # A blocking copy to an accelerator waits for all work queued there, which is not a wait for data.
        waits_for_device = self.args.device.type not in ("cpu", "meta") and not self.accelerator.non_blocking
        while True:
            if waits_for_device:
                torch.accelerator.synchronize()
            begun = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - begun
            if batch is None:
                return
            yield batch

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.extra_columns]))

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # every rank comes here under DDP, and the directory may not exist yet
            write_base_file(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.state.global_step == getattr(self, "_initial_global_step", None):
            logs.pop("train_loss", None)  # training resumed after its last step and ran none, so there is no loss
        if "learning_rate" in logs:  # a log of training steps
            logs |= {f"learning_rate_{part}": rate for part, rate in self._rates_of_step.items() if part != "language"}
            now = time.monotonic()
            logs["data_wait"] = min(self._waited / max(now - self._waited_since, 1e-9), 1.0)
            self._waited, self._waited_since = 0.0, now
        super().log(logs, start_time)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
`precompute_ref_log_probs` for images: log-probabilities of all pairs under the reference model are computed before the
first step, and the reference is then removed from memory.

TRL (1.16) refuses the option for images, because it keeps the numbers as columns of a dataset that it would have to
copy. Here they are in files of JSON lines beside the dataset, which later runs and other users can reuse safely: the
name of a file begins with the hash of the reference and its settings, and the id of a row is the hash of a pair. If
anything changes, the hash is not found and the numbers are computed again. The collator adds them to each batch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from trl import DPOConfig
from trl.trainer.utils import hash_module

from medst_trl.base.errors import UserError
from medst_trl.base.files import fill_rows, read_jsonl
from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.base.processes import on_main_process
from medst_trl.data.schema import with_stored_images
from medst_trl.policy.adapters import retie_lm_head
from medst_trl.policy.families import base_of
from medst_trl.policy.vusr import tokenizer_of

from .examples import DecodesImages, with_decoded_images


FORMAT = 2  # to be raised when the numbers of earlier files must no longer be used
KEY_COLUMNS = ["prompt", "chosen", "rejected", "image_ids"]
# Entries of a model's configuration that say where it came from or how it is run, not what it computes.
_NOT_COMPUTED = {
    "_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "id2label", "label2id",
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout", "init_lora_weights",
}  # fmt: skip


def pair_key(example: Mapping[str, Any]) -> str:
    """Identify a preference pair by its content: the SHA-256, in hexadecimal, of its messages and image ids."""
    return sha256_of([example.get(name) for name in KEY_COLUMNS])


def sha256_of(content: Any) -> str:
    """SHA-256, in hexadecimal, of anything JSON can hold, regardless of the order of keys and of sets."""
    text = json.dumps(content, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
    return hashlib.sha256(text.encode()).hexdigest()


def sharing_weights(model: torch.nn.Module) -> PreTrainedModel:
    """
    A second model with the same weights, in evaluation mode: the policy as it is now, before anything is added to it.

    For an adapter it is the base model with the adapter's layers inside. It takes no memory, and TRL makes no other
    reference. It must be dropped before the weights are trained.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The policy.

    Raises:
        UserError: for an adapter that is not part of the layers (prompt or prefix tuning).
    """
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise UserError("precompute_ref_log_probs needs an adapter inside the layers (LoRA). Remove the option.")
        retie_lm_head(model)
        model = model.get_base_model()
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return deepcopy(model, shared).eval()


def hash_of_reference(model: torch.nn.Module, processor: ProcessorMixin, collator: Any, args: DPOConfig) -> str:
    """
    Hash everything that affects the log-probabilities of a pair except the pair.

    Call it on every rank, before the model is changed.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The reference.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        collator: Collator of its batches.
        args ([`~trl.DPOConfig`]): Configuration.
    """
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    base = base_of(model)
    tokenizer = json.loads(tokenizer_of(processor).backend_tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]  # left over from the last call
    settings = {
        "format": FORMAT,
        "weights": on_main_process(lambda: hash_module(base)),
        "model": _without(base.config.to_dict()),
        "adapters": _without(adapters),
        "chat_template": processor.chat_template,
        "tokenizer": tokenizer,
        "processor": processor.to_dict(),
        "collator": type(collator).__qualname__,
        "max_length": args.max_length,
        "ld_alpha": args.ld_alpha,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "deepspeed": args.deepspeed_plugin is not None,  # it rounds the weights
    }
    return sha256_of(settings)[:32]


def _without(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {name: _without(value) for name, value in config.items() if name not in _NOT_COMPUTED}
    return [_without(item) for item in config] if isinstance(config, list | tuple) else config


@dataclass
class DataCollatorWithReference(DecodesImages):
    """
    Collator that adds the reference's log-probabilities to each batch of another collator.

    Args:
        collator (`Callable`): Collator of preference pairs.
        log_probs (`dict[str, tuple[float, float]]`): Those of the chosen and the rejected answer given the prompt, in
            nats, by [`pair_key`].

    Returns of a call:
        `dict`: The collator's batch with `ref_chosen_logps` and `ref_rejected_logps`, float32 of shape (batch,).

    Raises:
        UserError: for a pair without them.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    log_probs: Mapping[str, tuple[float, float]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        log_probs = [self.log_probs.get(pair_key(example)) for example in examples]
        if None in log_probs:
            raise UserError(
                f"Record {examples[log_probs.index(None)].get('id')!r} has no log-probabilities under the reference, "
                "which reads the training and the evaluation set before the first step. Pass its dataset as "
                "eval_dataset when you create the trainer, or remove precompute_ref_log_probs."
            )
        batch = _collate_decoded(self.collator, examples)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = torch.tensor(log_probs, dtype=torch.float32).unbind(1)
        return batch


def _collate_decoded(collator: Callable, examples: list[dict[str, Any]]) -> dict[str, Any]:
    return collator([with_decoded_images(example) for example in examples])


class PrecomputesReference:
    """
    Mixin for a [`~trl.DPOTrainer`] whose reference reads all pairs before the first step. The trainer has `usable`:
    the [`UsableExamples`] of each dataset by name, with a column `image_ids`.
    """

    def precompute_reference(self, reference: str) -> None:
        """
        Precompute log-probabilities of all pairs under `ref_model`, or read those in `ref_log_probs_dir`. The data
        collator then adds them to each batch, and the reference is removed from memory.

        Call it on every rank. Each computes a share, and all get everything. A run that is interrupted loses one batch
        of each rank.

        Args:
            reference (`str`):
                Hash of the reference, see [`hash_of_reference`].

        Raises:
            UserError: if a log-probability is not finite.
        """
        keys = [pair_key(row) for part in self.usable.values() for row in part.dataset.select_columns(KEY_COLUMNS)]
        unique = list(dict.fromkeys(keys))
        directory = Path(self.args.ref_log_probs_dir or Path(self.args.output_dir, REFERENCE_FOLDER))
        path = directory / f"{reference}-{sha256_of(sorted(unique))[:16]}.jsonl"

        def read_known() -> dict[str, dict[str, Any]]:
            files = sorted(directory.glob(f"{reference}-*"))  # also of other sets of pairs, and of interrupted runs
            known = {row["id"]: row for file in files for row in read_jsonl(file)}
            if path in files and not {row["id"] for row in read_jsonl(path)} >= set(unique):
                path.unlink()  # damaged; what other files know of it is not lost
            return known

        known = on_main_process(read_known)
        missing = {key: place for place, key in reversed(list(enumerate(keys))) if key not in known}
        self.accelerator.print(
            f"Reference log-probabilities: {len(unique) - len(missing):,} of {len(unique):,} pairs are known in "
            f"{directory}, {len(missing):,} are computed."
        )

        def rows_of_this_rank(done: set[str]) -> Iterator[dict[str, Any]]:
            if self.accelerator.is_main_process:
                yield from (known[key] for key in unique if key in known and key not in done)
            for place, chosen, rejected in self._compute_reference(missing.values()):
                yield {"id": keys[place], "chosen": chosen, "rejected": rejected}

        fill_rows(path, unique, rows_of_this_rank)
        log_probs = {row["id"]: (row["chosen"], row["rejected"]) for row in read_jsonl(path)}
        self.data_collator = DataCollatorWithReference(self.data_collator, log_probs)
        self.precompute_ref_logps, self.ref_model = True, None
        self.accelerator.free_memory()  # which holds the reference too, and so far nothing else

    def _compute_reference(self, places: Iterable[int]) -> Iterator[tuple[int, float, float]]:
        """Yield the places of this rank's share of the pairs, with the log-probabilities of both answers."""
        # With the columns that the collator gets in training.
        datasets = [self._remove_unused_columns(part.dataset) for part in self.usable.values()]
        pairs = ConcatDataset([with_stored_images(dataset) for dataset in datasets])
        lengths = [length for part in self.usable.values() for length in part.lengths]
        longest_first = sorted(places, key=lambda place: -lengths[place])  # if memory is too small, fail at once
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        batches = [longest_first[start : start + size] for start in range(0, len(longest_first), size)]
        batches = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        collate = partial(_collate_decoded, self.data_collator)
        loader = DataLoader(
            pairs, batch_sampler=batches, collate_fn=collate, num_workers=self.args.dataloader_num_workers
        )
        is_quiet = self.args.disable_tqdm or not self.accelerator.is_main_process
        for batch, inputs in zip(batches, tqdm(loader, "reference log-probabilities", unit="batch", disable=is_quiet)):
            for name in ("weight", "probability"):
                inputs.pop(name, None)
            log_probs = self.compute_ref_log_probs(self.ref_model, self._prepare_inputs(inputs))
            for place, *numbers in zip(batch, *(answers.float().tolist() for answers in log_probs), strict=True):
                if not all(map(math.isfinite, numbers)):
                    raise UserError(
                        f"Record {pairs[place].get('id')!r}: its log-probabilities under the reference are "
                        f"{numbers[0]} (chosen) and {numbers[1]} (rejected). Compute in float32 or bf16, or remove "
                        "the record."
                    )
                yield place, *numbers

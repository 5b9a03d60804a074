# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`precompute_ref_log_probs` for images: the reference reads each pair once and is then no longer held in memory.

TRL (1.16) refuses the option for images, because it keeps the numbers as columns of a dataset that it would have to
copy. Here they stay beside the dataset, in a [`ReferenceCache`], and the collator adds them to each batch.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch.utils.data import ConcatDataset, DataLoader

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.pipeline.record import package_versions
from medst_trl.policy.adapters import retie_lm_head
from medst_trl.policy.vusr import tokenizer_of

from .input_pipeline import TakesStoredImages, with_decoded_images, with_stored_images
from .reference_cache import ReferenceCache, ReferenceLogProbs, pair_key, sha256_of


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin
    from trl import DPOConfig, DPOTrainer

REFERENCE_INPUTS = {"ref_chosen_logps", "ref_rejected_logps"}  # of a batch, as TRL calls them
# Of a model's configuration, what says where it came from or how it is run, not what it computes.
_NOT_COMPUTED = {
    "_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "id2label", "label2id",
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout", "init_lora_weights",
}  # fmt: skip


def check_precompute(args: "DPOConfig") -> None:
    """Raise a [`UserError`] where the reference cannot be computed before training."""
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if zero3 or args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError(
            f"precompute_ref_log_probs does not go with {'ZeRO-3' if zero3 else 'FSDP'}, which cuts the weights up. "
            "Leave the option out, or train with ZeRO-2 or on one GPU."
        )


def sharing_weights(model: torch.nn.Module) -> "PreTrainedModel":
    """
    A second model over the same weights, in evaluation mode: the policy as it is now, before anything is added to it.

    For an adapter it is the base model with the adapter's layers inside. It takes no memory of its own, and TRL makes
    no reference beside it; it has to be dropped before the weights are trained.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The policy.

    Raises:
        UserError: for a kind of adapter that is not part of the layers (prompt or prefix tuning).
    """
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise UserError(
                "precompute_ref_log_probs knows adapters inside the layers only, such as LoRA. Leave it out."
            )
        retie_lm_head(model)
        model = model.get_base_model()
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return deepcopy(model, shared).eval()


def cache_of_reference(
    model: torch.nn.Module, processor: "ProcessorMixin", collator: Any, args: "DPOConfig"
) -> ReferenceCache:
    """
    The cache of a reference, in `args.ref_log_probs_dir` or `output_dir`.

    To be called on every rank, before anything is done to the model: its weights are what the cache goes by.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The reference.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        collator: Collator of the batches it reads.
        args ([`~trl.DPOConfig`]): Configuration.
    """
    settings = [settings_of_reference(model, processor, collator, args) if args.process_index == 0 else None]
    folder = args.ref_log_probs_dir or Path(args.output_dir) / REFERENCE_FOLDER
    return ReferenceCache(folder, broadcast_object_list(settings)[0], about_reference(model))


def settings_of_reference(
    model: torch.nn.Module, processor: "ProcessorMixin", collator: Any, args: "DPOConfig"
) -> dict[str, Any]:
    """All that the log-probabilities of a pair hang on beside the pair itself, as JSON can hold it."""
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    base = model.get_base_model() if adapters else model
    tokenizer = json.loads(tokenizer_of(processor).backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the last call
        tokenizer.pop(state)
    return {
        "weights": hash_weights(base),
        "model": sha256_of(_without(base.config.to_dict())),
        "adapters": sha256_of(_without(adapters)),
        "chat_template": sha256_of(processor.chat_template),
        "tokenizer": sha256_of(tokenizer),
        "processor": sha256_of(processor.to_dict()),
        "collator": type(collator).__qualname__,
        "max_length": args.max_length,
        "ld_alpha": args.ld_alpha,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "deepspeed": args.deepspeed_plugin is not None,  # which rounds the weights, too
    }


def about_reference(model: torch.nn.Module) -> dict[str, Any]:
    """For people: what the reference is called, and what computed it. No paths."""
    from medst_trl.hub.provenance import looks_local

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = base.config._name_or_path or ""
    name = Path(name).name if looks_local(name) or os.path.exists(name) else name
    return {
        "base_model": name or type(base).__name__,
        "adapter": hasattr(model, "get_base_model"),
        "versions": package_versions(),
    }


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256, in hexadecimal, of names, types, shapes and values; tensors are read on several threads."""

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        return hashlib.sha256(head + hashlib.sha256(values).digest()).digest()

    tensors = [(name, value) for name, value in sorted(model.state_dict().items()) if torch.is_tensor(value)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return hashlib.sha256(b"".join(threads.map(digest, tensors))).hexdigest()


@contextmanager
def without_precompute(args: "DPOConfig") -> Iterator[None]:
    """`precompute_ref_log_probs` is off inside: TRL (1.16) refuses it for images. To be removed once it does not."""
    asked, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
    try:
        yield
    finally:
        args.precompute_ref_log_probs = asked


@dataclass
class DataCollatorWithReference(TakesStoredImages):
    """
    Adds the reference's log-probabilities to each batch of another collator.

    Args:
        collator (`Callable`): Collator of preference pairs.
        log_probs (`dict[str, ReferenceLogProbs]`): Those of each pair, by [`pair_key`].

    Returns of a call:
        `dict`: The collator's batch with `ref_chosen_logps` and `ref_rejected_logps`, float32 of shape (batch,).

    Raises:
        UserError: for a pair that the reference has not read.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    log_probs: Mapping[str, ReferenceLogProbs]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [with_decoded_images(example) for example in examples]
        rows = [self._look_up(example) for example in examples]
        batch = self.collator(examples)
        batch["ref_chosen_logps"] = torch.tensor([row.chosen for row in rows], dtype=torch.float32)
        batch["ref_rejected_logps"] = torch.tensor([row.rejected for row in rows], dtype=torch.float32)
        return batch

    def _look_up(self, example: dict[str, Any]) -> ReferenceLogProbs:
        try:
            return self.log_probs[pair_key(example)]
        except KeyError:
            raise UserError(
                f"Record {example.get('id')!r} has no log-probabilities under the reference, which reads the training "
                "and the evaluation set before the first step. Give the trainer its dataset as eval_dataset when it "
                "is made, or leave precompute_ref_log_probs out."
            ) from None


def log_probs_of_reference(
    trainer: "DPOTrainer", cache: ReferenceCache, datasets: "Sequence[Dataset]", lengths: Sequence[int]
) -> dict[str, ReferenceLogProbs]:
    """
    What `trainer.ref_model` says of each pair, read from the cache where it is known, else computed and kept there.

    To be called on every rank, before the first step. Each rank computes a share, all get all. A run that is cut
    short loses one batch of each rank.

    Args:
        trainer ([`~trl.DPOTrainer`]): Its `ref_model` is the reference, its `data_collator` makes the batches.
        cache ([`ReferenceCache`]): What is known and where to keep the rest.
        datasets (sequence of [`~datasets.Dataset`]): Preference pairs.
        lengths (sequence of `int`): About how long the pairs of all datasets are, to keep padding small.

    Returns:
        `dict[str, ReferenceLogProbs]`: By [`pair_key`].

    Raises:
        UserError: if a log-probability is not finite.
    """
    accelerator = trainer.accelerator
    pairs = ConcatDataset([with_stored_images(dataset) for dataset in datasets])
    keys = _keys_of(pairs, trainer)
    known = [cache.read() if accelerator.is_main_process else None]
    known = broadcast_object_list(known)[0]
    missing = {key: place for place, key in reversed(list(enumerate(keys))) if key not in known}
    unique = dict.fromkeys(keys)
    accelerator.print(
        f"Reference log-probabilities: {len(unique) - len(missing):,} of {len(unique):,} pairs are known in "
        f"{cache.path}, " + (f"{len(missing):,} are computed." if missing else "nothing is computed.")
    )
    if missing:
        places = sorted(missing.values(), key=lambda place: -lengths[place])  # the longest first: it must fit
        size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        known |= dict(gather_object(list(_compute(trainer, cache, pairs, keys, mine).items())))
    if accelerator.is_main_process and (missing or cache.parts()):
        cache.write({key: known[key] for key in unique})
    return {key: known[key] for key in unique}


def _keys_of(pairs: ConcatDataset, trainer: "DPOTrainer") -> list[str]:
    """The key of each pair; images are decoded in the workers of the data loader."""
    from tqdm.auto import tqdm

    accelerator = trainer.accelerator
    mine = range(accelerator.process_index, len(pairs), accelerator.num_processes)
    loader = DataLoader(
        pairs, batch_size=16, sampler=mine, collate_fn=_pair_keys, num_workers=trainer.args.dataloader_num_workers
    )
    found = chain.from_iterable(tqdm(loader, "looking pairs up", unit="batch", disable=_quiet(trainer)))
    return [key for _, key in sorted(gather_object(list(zip(mine, found, strict=True))))]


def _pair_keys(examples: list[dict[str, Any]]) -> list[str]:
    return [pair_key(with_decoded_images(example)) for example in examples]


def _compute(
    trainer: "DPOTrainer", cache: ReferenceCache, pairs: ConcatDataset, keys: list[str], batches: list[list[int]]
) -> dict[str, ReferenceLogProbs]:
    """This rank's share."""
    from tqdm.auto import tqdm

    computed = {}
    collate = partial(_with_ids, trainer.data_collator)
    workers = trainer.args.dataloader_num_workers
    loader = DataLoader(pairs, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    progress = tqdm(loader, "reference log-probabilities", unit="batch", disable=_quiet(trainer))
    with cache.append() as file:
        for places, (ids, batch) in zip(batches, progress, strict=True):
            batch.pop("neutralised", None)
            batch = trainer._prepare_inputs(batch)
            log_probs = (part.float().tolist() for part in trainer.compute_ref_log_probs(trainer.ref_model, batch))
            rows = {}
            for place, *row in zip(places, ids, *log_probs, strict=True):
                rows[keys[place]] = ReferenceLogProbs(*row)
                if not all(math.isfinite(number) for number in row[1:]):
                    raise UserError(
                        f"Record {row[0]!r}: its log-probabilities under the reference are {row[1]} (chosen) and "
                        f"{row[2]} (rejected). Compute in float32 or bf16, or leave the record out."
                    )
            cache.write_lines(file, rows)
            computed |= rows
    return computed


def _with_ids(collator: Callable, examples: list[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    ids = [str(example.get("id") or "") for example in examples]
    return ids, collator([with_decoded_images(example) for example in examples])


def _quiet(trainer: "DPOTrainer") -> bool:
    return trainer.args.disable_tqdm or not trainer.accelerator.is_main_process


def _without(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {name: _without(value) for name, value in config.items() if name not in _NOT_COMPUTED}
    return [_without(item) for item in config] if isinstance(config, list | tuple) else config

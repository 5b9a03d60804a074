# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`precompute_ref_log_probs` for images: the reference reads each pair once and is then removed from memory.

TRL (1.16) refuses the option for images, because it keeps the numbers as columns of a dataset that it would have to
copy. Here they are in a file beside the dataset, which later runs and other users can reuse safely: the name of the
file is the hash of the reference and its settings, and the key of a row is the hash of messages and pixels. If
anything changes, the key is not found and the numbers are computed again. The collator adds them to each batch.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from torch.utils.data import ConcatDataset, DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from trl import DPOConfig

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import REFERENCE_FOLDER, package_versions
from medst_trl.base.hub_ids import public_name
from medst_trl.base.processes import cores, on_main_process
from medst_trl.data.images import image_id
from medst_trl.data.schema import with_stored_images
from medst_trl.policy.adapters import retie_lm_head
from medst_trl.policy.families import base_of
from medst_trl.policy.vusr import tokenizer_of

from .images import DecodesImages, images_of, with_decoded_images


logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised when the numbers of earlier files must no longer be used
_METADATA = b"medst_trl"
_COLUMNS = pa.schema({"pair": pa.string(), "id": pa.string(), "chosen": pa.float32(), "rejected": pa.float32()})
_WHAT = (
    "Log-probabilities of preference pairs under a reference model, in nats, summed over the answer. A pair's key is "
    "the SHA-256 of its messages and pixels (medst_trl pair_key); the file is named by the SHA-256 of `settings`."
)
# Entries of a model's configuration that say where it came from or how it is run, not what it computes.
_NOT_COMPUTED = {
    "_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "id2label", "label2id",
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout", "init_lora_weights",
}  # fmt: skip


class ReferenceLogProbs(NamedTuple):
    """
    Log-probabilities of a pair under the reference.

    Args:
        id (`str`): Its id when they were computed, for readers; pairs are looked up by [`pair_key`].
        chosen, rejected (`float`): Log-probability of each answer given the prompt, in nats.
    """

    id: str
    chosen: float
    rejected: float


def pair_key(example: Mapping[str, Any]) -> str:
    """
    Identify a preference pair by its content: SHA-256, in hexadecimal, of its messages and decoded pixels.

    Args:
        example (`dict`):
            `prompt`, `chosen`, `rejected` (messages) and `images` or `image` (PIL), as a dataset gives them.
    """
    images = [image_id(image) for image in images_of(example)]
    return sha256_of([example["prompt"], example["chosen"], example["rejected"], images])


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
            raise UserError("precompute_ref_log_probs supports only adapters inside the layers (LoRA). Remove it.")
        retie_lm_head(model)
        model = model.get_base_model()
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return deepcopy(model, shared).eval()


def cache_of_reference(
    model: torch.nn.Module, processor: ProcessorMixin, collator: Any, args: DPOConfig
) -> "ReferenceCache":
    """
    The cache of a reference, in `args.ref_log_probs_dir` or `output_dir`.

    Call it on every rank, before the model is changed: its weights identify the cache.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The reference.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        collator: Collator of the batches it reads.
        args ([`~trl.DPOConfig`]): Configuration.
    """
    base = base_of(model)
    about = {  # for readers: what the reference is called, and what computed it. No paths.
        "base_model": public_name(base.config._name_or_path or "") or type(base).__name__,
        "adapter": hasattr(model, "get_base_model"),
        "versions": package_versions(),
    }
    settings = on_main_process(lambda: _settings_of(model, processor, collator, args))
    return ReferenceCache(args.ref_log_probs_dir or Path(args.output_dir) / REFERENCE_FOLDER, settings, about)


def _settings_of(model: torch.nn.Module, processor: ProcessorMixin, collator: Any, args: DPOConfig) -> dict[str, Any]:
    """Everything that affects the log-probabilities of a pair except the pair, in a form that JSON can hold."""
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    base = base_of(model)
    tokenizer = json.loads(tokenizer_of(processor).backend_tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]  # of the last call
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
        "deepspeed": args.deepspeed_plugin is not None,  # which rounds the weights too
    }


def _without(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {name: _without(value) for name, value in config.items() if name not in _NOT_COMPUTED}
    return [_without(item) for item in config] if isinstance(config, list | tuple) else config


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256, in hexadecimal, of names, types, shapes and values. Tensors are read on several threads."""

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        return hashlib.sha256(head + hashlib.sha256(values).digest()).digest()

    tensors = [(name, value) for name, value in sorted(model.state_dict().items()) if torch.is_tensor(value)]
    with ThreadPoolExecutor(min(8, cores())) as threads:
        return hashlib.sha256(b"".join(threads.map(digest, tensors))).hexdigest()


@dataclass
class DataCollatorWithReference(DecodesImages):
    """
    Collator that adds the reference's log-probabilities to each batch of another collator.

    Args:
        collator (`Callable`): Collator of preference pairs.
        log_probs (`dict[str, ReferenceLogProbs]`): Log-probabilities of each pair, by [`pair_key`].

    Returns of a call:
        `dict`: The collator's batch with `ref_chosen_logps` and `ref_rejected_logps`, float32 of shape (batch,).

    Raises:
        UserError: for a pair that the reference has not read.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    log_probs: Mapping[str, ReferenceLogProbs]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [with_decoded_images(example) for example in examples]
        rows = [self.log_probs.get(pair_key(example)) for example in examples]
        if None in rows:
            raise UserError(
                f"Record {examples[rows.index(None)].get('id')!r} has no log-probabilities under the reference, which "
                "reads the training and the evaluation set before the first step. Pass its dataset as eval_dataset "
                "when you create the trainer, or remove precompute_ref_log_probs."
            )
        batch = self.collator(examples)
        batch["ref_chosen_logps"] = torch.tensor([row.chosen for row in rows], dtype=torch.float32)
        batch["ref_rejected_logps"] = torch.tensor([row.rejected for row in rows], dtype=torch.float32)
        return batch


class PrecomputesReference:
    """
    Mixin for a [`~trl.DPOTrainer`] whose reference reads all pairs before the first step. The trainer has `usable`:
    the [`UsableExamples`] of each dataset by name.
    """

    def precompute_reference(self, cache: "ReferenceCache") -> None:
        """
        Read the log-probabilities of each pair under `ref_model` from the cache, or else compute and keep them there.
        The data collator then adds them to each batch, and the reference is removed from memory.

        Call it on every rank. Each computes a share, and all get everything. A run that is interrupted loses one batch
        of each rank.

        Args:
            cache ([`ReferenceCache`]): Known numbers, and where the others are kept.

        Raises:
            UserError: if a log-probability is not finite.
        """
        datasets = [of_set.dataset for of_set in self.usable.values()]
        lengths = [length for of_set in self.usable.values() for length in of_set.lengths]
        # With the columns that the collator gets in training.
        pairs = ConcatDataset([with_stored_images(self._remove_unused_columns(dataset)) for dataset in datasets])
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(pairs), ranks)
        batches = self._pair_loader("looking up pairs", pairs, collate_fn=_keys_and_ids, sampler=mine, batch_size=16)
        found = sorted(gather_object(list(zip(mine, chain.from_iterable(batches), strict=True))))
        names = [name for _, name in found]
        known = on_main_process(cache.read)
        unique = dict.fromkeys(key for key, _ in names)
        missing = {key: place for place, (key, _) in reversed(found) if key not in known}
        self.accelerator.print(
            f"Reference log-probabilities: {len(unique) - len(missing):,} of {len(unique):,} pairs are known in "
            f"{cache.path}, " + (f"{len(missing):,} are computed." if missing else "nothing is computed.")
        )
        if missing:
            places = sorted(missing.values(), key=lambda place: -lengths[place])  # the longest first: it must fit
            size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
            batches = [places[start : start + size] for start in range(0, len(places), size)]
            computed = self._compute_reference(cache, pairs, names, batches[rank::ranks])
            known |= dict(gather_object(list(computed.items())))
        log_probs = {key: known[key] for key in unique}
        if self.accelerator.is_main_process and (missing or cache.parts()):
            cache.write(log_probs)
        self.data_collator = DataCollatorWithReference(self.data_collator, log_probs)
        self.precompute_ref_logps, self.ref_model = True, None
        self.accelerator.free_memory()  # which holds the reference too, and so far nothing else

    def _compute_reference(self, cache, pairs, names: list[tuple[str, str]], batches) -> dict[str, ReferenceLogProbs]:
        """Compute this rank's batches, lists of places. `names` are the key and the id of each pair."""
        computed, collate = {}, partial(_collate_decoded, self.data_collator)
        collated = self._pair_loader("reference log-probabilities", pairs, collate_fn=collate, batch_sampler=batches)
        for places, batch in zip(batches, collated, strict=True):
            for name in ("neutralised", "weight", "probability"):
                batch.pop(name, None)
            log_probs = self.compute_ref_log_probs(self.ref_model, self._prepare_inputs(batch))
            rows = {}
            for place, *numbers in zip(places, *(answers.float().tolist() for answers in log_probs), strict=True):
                key, example_id = names[place]
                rows[key] = row = ReferenceLogProbs(example_id, *numbers)
                if not _is_valid(key, row):
                    raise UserError(
                        f"Record {row.id!r}: its log-probabilities under the reference are {row.chosen} (chosen) and "
                        f"{row.rejected} (rejected). Compute in float32 or bf16, or remove the record."
                    )
            cache.append(rows)
            computed |= rows
        return computed

    def _pair_loader(self, title: str, pairs: ConcatDataset, **how: Any) -> Iterable[Any]:
        """This rank's batches, which the data loader's workers prepare, with a progress bar on the main process."""
        loader = DataLoader(pairs, num_workers=self.args.dataloader_num_workers, **how)
        is_quiet = self.args.disable_tqdm or not self.accelerator.is_main_process
        return tqdm(loader, title, unit="batch", disable=is_quiet)


def _collate_decoded(collator: Callable, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of a collator, which gets decoded `images`, as it does from [`DataCollatorWithReference`]."""
    return collator([with_decoded_images(example) for example in examples])


def _keys_and_ids(examples: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The key and the id of each pair. Images are decoded here, in the workers of the data loader."""
    return [(pair_key(with_decoded_images(example)), str(example.get("id") or "")) for example in examples]


class ReferenceCache:
    """
    The file of one reference.

    Args:
        directory (`str` or `os.PathLike`):
            Directory of the files of all references, created when something is written.
        settings (`dict`):
            Everything that affects the numbers except the pair: the reference's weights, template, length, ...
        about (`dict`, *optional*):
            Information for readers. Not compared.

    Attributes:
        path (`pathlib.Path`): The file. It appears complete under this name.
    """

    def __init__(self, directory: str | os.PathLike, settings: Mapping[str, Any], about: Mapping | None = None):
        self.settings = {"format": FORMAT, **settings}
        self.about = dict(about or {})
        self.key = sha256_of(self.settings)[:32]
        self.directory = Path(directory)
        self.path = self.directory / f"{self.key}.parquet"
        self._part = self.directory / f".{self.key}.{uuid4().hex}.part"

    def read(self) -> dict[str, ReferenceLogProbs]:
        """
        Known log-probabilities by pair key: the rows of the file, and those that interrupted runs left. A file that
        cannot be read, or does not match its name, is renamed to `*.broken`.
        """
        known = self._read_file()
        for part in self.parts():
            with suppress(OSError):  # its run has just finished
                for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
                    with suppress(ValueError, TypeError):  # the last line may be truncated
                        key, *row = json.loads(line)
                        known[key] = ReferenceLogProbs(*row)
        return {key: row for key, row in known.items() if _is_valid(key, row)}

    def parts(self) -> list[Path]:
        """Files that runs left that did not reach [`ReferenceCache.write`]."""
        return sorted(self.directory.glob(f".{self.key}.*.part"))

    def append(self, rows: Mapping[str, ReferenceLogProbs]) -> None:
        """Append what was just computed to a file of this process, so that it is kept if the process is killed."""
        if rows:
            with self._writing(), open(self._part, "a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, *row]) + "\n" for key, row in rows.items())

    def write(self, rows: Mapping[str, ReferenceLogProbs]) -> None:
        """Write `rows` and everything else that is known to the file, and remove the parts."""
        parts = self.parts()
        rows = dict(rows) | {key: row for key, row in self.read().items() if key not in rows}
        metadata = {"what": _WHAT, "settings": self.settings, "about": self.about}
        schema = _COLUMNS.with_metadata({_METADATA: json.dumps(metadata, ensure_ascii=False)})
        table = pa.Table.from_pylist([{"pair": key, **row._asdict()} for key, row in rows.items()], schema)
        with self._writing():
            temporary = self.directory / f".{self.key}.{os.getpid()}.tmp"  # several runs may write the same file
            pq.write_table(table, temporary, write_page_checksum=True)
            os.replace(temporary, self.path)
        for part in parts:
            with suppress(OSError):  # of another user, or gone
                part.unlink()

    def _read_file(self) -> dict[str, ReferenceLogProbs]:
        if not self.path.exists():
            return {}
        try:
            table = pq.read_table(self.path, page_checksum_verification=True)
            if sha256_of(json.loads(table.schema.metadata[_METADATA])["settings"]) != sha256_of(self.settings):
                raise ValueError("it belongs to another reference")
            return {row.pop("pair"): ReferenceLogProbs(**row) for row in table.to_pylist()}
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        broken = self.path.with_name(f"{self.path.name}.broken")
        with self._writing():
            os.replace(self.path, broken)
        logger.warning("Renamed %s to %s (%s). Its numbers are computed again.", self.path, broken.name, problem)
        return {}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Make the directory, and explain why something cannot be written to it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(
                f"The reference's log-probabilities cannot be written to {self.directory} ({error.strerror}). Set "
                "another directory with ref_log_probs_dir."
            ) from None


def _is_valid(key: Any, row: ReferenceLogProbs) -> bool:
    numbers = (row.chosen, row.rejected)
    return isinstance(key, str) and len(key) == 64 and all(isinstance(n, float) and math.isfinite(n) for n in numbers)

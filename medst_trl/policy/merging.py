# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Merge an adapter into its base: a stand-alone model that appears only after its predictions match the adapter's.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.generation import GenerationConfig

from medst_trl.base.errors import UserError
from medst_trl.base.files import move_files
from medst_trl.base.hub_ids import split_revision
from medst_trl.base.settings import check_choice

from . import DTYPES
from .adapters import hub_commit, read_adapter_config
from .loading import TOKENS, load_policy


Batches = list[dict[str, torch.Tensor]]

# Largest difference of a log-probability between adapter and merged model, both in float32.
TOLERANCE = 1e-4
# In a smaller type both round differently. The cost of rounding is measured on the adapter itself, base and adapter in
# that type against float32; the merged model has the same number of roundings and is allowed a multiple of it (a wrong
# merge is off by nats).
ROUNDING_FACTOR = 3.0
# A server without sampling settings answers like LLaVA's own (temperature 0.2); one that gets a temperature uses the
# paper's top-k and top-p for asking. `transformers serve` never turns sampling on, only off (at temperature 0).
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_k": 100, "top_p": 0.95}


def merge_policy(
    model_name_or_path: str,
    output_dir: str | os.PathLike,
    examples: Iterable[dict[str, Any]],
    *,
    batches_of: Callable[[ProcessorMixin, Sequence[dict[str, Any]]], Batches],
    base_model_name_or_path: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """
    Merge an adapter into its base and save the model with processor, chat template and generation config.

    LoRA of both towers is added to the weights in float32 and rounded once; projector and `<vusr>` row replace those
    of the base. The saved files are loaded with plain `AutoModelForImageTextToText` and `AutoProcessor`, and have to
    give every target token of the examples the adapter's log-probabilities, over the whole vocabulary. Files appear in
    `output_dir` only then, `config.json` last. Merging runs on the CPU; peak memory is that of the model in float32
    (28 GB for 7B).

    Args:
        model_name_or_path (`str`):
            Directory or Hub id of an adapter.
        output_dir (`str` or `os.PathLike`):
            Directory for the model.
        examples (iterable of `dict`):
            Conversations to compare on: `id`, `images`, `messages`.
        batches_of (`Callable`):
            Takes a processor and the examples, and returns batches with `labels`, as in the adapter's training.
        base_model_name_or_path (`str`, *optional*):
            Base, if it has moved.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the saved weights; `"auto"` keeps that of the base's checkpoint.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Largest size of a file of weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the base's repository may run.

    Returns:
        `dict`: `base`, `base_revision`, `adapter_revision`, `dtype`, `parameters`, and `proof`: numbers of `examples`
        and `tokens` compared, `float32_difference`, `stored_difference` and `stored_tolerance` in nats.

    Raises:
        UserError: for a model without an adapter, weights that cannot be merged, or a difference above the tolerance.
            Nothing is left in `output_dir` then.
    """
    check_shard_size(max_shard_size)
    check_choice("dtype", dtype, DTYPES)
    if read_adapter_config(*split_revision(model_name_or_path)) is None:
        problem = f"{model_name_or_path!r} has no adapter to merge (adapter_config.json)"
        raise UserError(f"{problem}. Correct the name; a full model needs no merging.")
    examples, own = list(examples), {"base_model_name_or_path": base_model_name_or_path}
    load = partial(load_policy, model_name_or_path, **own, trust_remote_code=trust_remote_code)
    model, processor = load(dtype="float32")
    facts = _facts(model, model_name_or_path, dtype, trust_remote_code)
    batches = batches_of(processor, examples)
    expected = log_probs(model, batches)
    model = model.merge_and_unload().eval()
    proof = {"examples": len(examples), "tokens": sum(len(rows) for rows in expected)}
    proof["float32_difference"] = difference(log_probs(model, batches), expected)
    check_difference(proof["float32_difference"], TOLERANCE, "merged in memory, in float32")
    facts["parameters"], dtype = model.num_parameters(), facts["dtype"]
    with staged_model(Path(output_dir), ".merging") as staging:
        _save(model, processor, staging, dtype, max_shard_size)
        del model  # one copy in memory at a time
        saved, saved_processor = _load_plainly(staging, dtype, trust_remote_code)
        proof["stored_difference"] = difference(log_probs(saved, batches_of(saved_processor, examples)), expected)
        del saved
        proof["stored_tolerance"] = _tolerance(load, dtype, batches, expected)
        check_difference(proof["stored_difference"], proof["stored_tolerance"], f"loaded from disk, in {dtype}")
    if dtype == "float32":
        proof["float32_difference"] = proof["stored_difference"]
    return facts | {"proof": proof}


def _tolerance(load: Callable[..., tuple], dtype: str, batches: Batches, expected: list[torch.Tensor]) -> float:
    """Return the largest difference allowed in a type, see `ROUNDING_FACTOR`."""
    if dtype not in ("bfloat16", "float16"):
        return TOLERANCE
    adapter, _ = load(dtype=dtype)
    return ROUNDING_FACTOR * difference(log_probs(adapter, batches), expected)


def check_shard_size(size: str) -> None:
    """
    Check a maximum size of a file of weights, before hours of work.

    Raises:
        UserError: if it is not a size.
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError as error:
        raise UserError(f"max_shard_size {size!r} is not a size. Give one such as 5GB or 500MB.") from error


def _facts(model, adapter: str, dtype: str, trust_remote_code: bool) -> dict[str, Any]:
    """Describe the merge: base, Hub commits, and the type to save. Raises if the base has another type."""
    base = model.get_base_model()
    config = AutoConfig.from_pretrained(
        base.name_or_path, revision=base.hub_commit, trust_remote_code=trust_remote_code
    )
    if dtype == "auto":
        dtype = str(config.dtype or config.get_text_config().dtype or "float32").removeprefix("torch.")
    if dtype not in DTYPES[1:]:
        raise UserError(f"The base is in {dtype}, which cannot be merged. Set dtype to {' or '.join(DTYPES[1:])}.")
    name, revision = split_revision(adapter)
    return {
        "base": base.name_or_path,
        "base_revision": base.hub_commit,
        "adapter_revision": hub_commit(name, "adapter_config.json", revision),
        "dtype": dtype,
    }


def _save(model, processor: ProcessorMixin, directory: Path, dtype: str, max_shard_size: str) -> None:
    model.to(getattr(torch, dtype))
    # Evaluation and generation read no more of the base's but `stop_strings`, for which `generate` needs a tokenizer.
    kept = {name: getattr(model.generation_config, name) for name in TOKENS}
    model.generation_config = GenerationConfig(**kept, **SAMPLING)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    processor.save_pretrained(directory)


def _load_plainly(directory: Path, dtype: str, trust_remote_code: bool) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model as a tool that does not know medst_trl does."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval(), AutoProcessor.from_pretrained(directory, trust_remote_code=trust_remote_code)


@contextmanager
def staged_model(output_dir: Path, name: str) -> Iterator[Path]:
    """
    Yield the directory `name` inside `output_dir` for the files of a model. When the block ends, they replace those of
    another model in `output_dir`, `config.json` last: a directory that has it is complete. If the block raises, they
    are deleted.
    """
    for path in output_dir.glob(f"{name}*"):  # of an interrupted run; version 0.1.0 added a hash to the name
        shutil.rmtree(path)
    staging = output_dir / name
    staging.mkdir(parents=True)
    try:
        yield staging
        # Stale files must not be mistaken for those of the new model.
        for path in [output_dir / "config.json", *output_dir.glob("model*.safetensors*")]:
            path.unlink(missing_ok=True)
        move_files(staging, output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def log_probs(model: PreTrainedModel, batches: Batches) -> list[torch.Tensor]:
    """Compute log-probabilities at the target tokens: float32 of shape (targets, vocabulary) for each batch."""
    rows = []
    for batch in batches:
        inputs = BatchFeature({name: value for name, value in batch.items() if name != "labels"}).to(model.dtype)
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        rows.append(logits[batch["labels"][:, 1:] != -100].float().log_softmax(-1))
    return rows


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference in nats; NaN where anything is NaN, or of another shape."""
    if [rows.shape for rows in found] != [rows.shape for rows in expected]:
        return float("nan")
    return torch.stack([(one - other).abs().max() for one, other in zip(found, expected)]).max().item()


def check_difference(difference: float, tolerance: float, how: str) -> None:
    """
    Check a difference of log-probabilities.

    Raises:
        UserError: if it is above the tolerance.
    """
    if not difference <= tolerance:  # true for NaN
        raise UserError(
            f"The merged model ({how}) does not agree with the adapter: log-probabilities differ by up to "
            f"{difference:.2g}, more than {tolerance:.2g}. Nothing was written. PEFT cannot merge LoRA on tied "
            "embeddings, or into a quantized base. For any other adapter, try --dtype float32, and report it."
        )

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A stand-alone checkpoint of base and adapter, proven to say what the adapter says before it gets its name."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import split_revision
from medst_trl.interop.conversion.writing import check_shard_size

from .base_loading import has_file
from .base_weights import hub_commit
from .checkpoints import DTYPES, load_policy
from .hub_reach import check_reachable
from .merge_proof import batches_of, difference, log_probs, require, require_same_inputs


if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

# Largest difference of a log-probability between adapter and merged model, both in float32.
TOLERANCE = 1e-4
# In a smaller type both round, each its own way. What that costs is measured on the adapter itself, base and adapter
# in that type against float32; the merged model has the same number of roundings, and gets a factor for the luck of
# the draw (a wrong merge is off by nats).
OF_THE_TYPE = 3.0
# A server that is told nothing answers like LLaVA's own (temperature 0.2); one that is told a temperature has the
# paper's top-k and top-p for asking. `transformers serve` never turns sampling on, only off (at temperature 0).
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_k": 100, "top_p": 0.95}
# What else stays of the base's generation config: which tokens end a text or never stand in one. Evaluation and
# generation read no more of it either (`decoding.GREEDY`).
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "bad_words_ids", "sequence_bias")


def merge_policy(
    model_name_or_path: str,
    output_dir: str | os.PathLike,
    examples: Iterable[dict[str, Any]],
    *,
    base_model_name_or_path: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """
    Merges an adapter into its base and writes the model with processor, chat template and generation config.

    LoRA of both towers is added to the weights in float32 and rounded once; projector and `<vusr>` row take their
    places. What was written is loaded again by plain `AutoModelForImageTextToText` and `AutoProcessor`, and has to
    give each token of each example's answers and questions the adapter's log-probability, over the whole vocabulary.
    Files appear in `output_dir` only then, `config.json` last. Runs on the CPU; peak memory is that of the model in
    float32 (28 GB for 7B).

    Args:
        model_name_or_path (`str`):
            Folder or Hub id of an adapter.
        output_dir (`str` or `os.PathLike`):
            Folder for the model.
        examples (iterable of `dict`):
            Conversations to compare on: `id`, `images`, `messages`. Each is read as an answering prompt, and with its
            questions behind bare `<vusr>` tokens.
        base_model_name_or_path (`str`, *optional*):
            Base, where it has moved.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights written; `"auto"` takes that of the base's checkpoint.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Largest file of weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the base's repository may run.

    Returns:
        `dict`: `base`, `base_revision`, `adapter_revision`, `dtype`, `parameters`, and `proof`: numbers of `examples`
        and `tokens` compared, `float32_difference`, `stored_difference` and `stored_tolerance` in nats.

    Raises:
        UserError: for a model without an adapter, a quantised base, weights that cannot be merged, or a difference
            above the tolerance; nothing is left in `output_dir` then.

    Example:
    ```python
    >>> merge_policy("runs/demo/sft", "runs/demo/merged", built_in_examples())["proof"]["float32_difference"]
    ```
    """
    check_shard_size(max_shard_size)
    if dtype not in DTYPES:
        raise UserError(f"There is no dtype {dtype!r}; choose from {', '.join(DTYPES)}.")
    examples = list(examples)
    name, revision = split_revision(model_name_or_path)
    check_reachable(name)
    if not has_file(name, "adapter_config.json", revision):
        raise UserError(
            f"{model_name_or_path!r} has no adapter to merge (adapter_config.json): a full model stands alone already."
        )
    where = {"base_model_name_or_path": base_model_name_or_path, "trust_remote_code": trust_remote_code}
    model, processor = load_policy(model_name_or_path, dtype="float32", **where)
    facts = _facts(model, name, revision, trust_remote_code)
    stored_type = facts["dtype"] if dtype == "auto" else dtype
    if stored_type not in DTYPES[1:]:
        raise UserError(f"The base is in {stored_type}, which is not for merging. Set dtype: {', '.join(DTYPES[1:])}.")

    batches = batches_of(processor, examples)
    expected = log_probs(model, batches)
    merged = _merged(model)
    float32_difference = difference(log_probs(merged, batches), expected)
    require(float32_difference, TOLERANCE, "merged in memory, in float32")

    output_dir = Path(output_dir)
    staging = output_dir / ".merging"
    shutil.rmtree(staging, ignore_errors=True)
    parameters = merged.num_parameters()
    try:
        merged.to(_torch_type(stored_type))
        merged.generation_config = _generation_config(merged)
        merged.save_pretrained(staging, max_shard_size=max_shard_size)
        processor.save_pretrained(staging)
        del model, merged  # one copy in memory at a time
        loaded, loaded_processor = _load_plainly(staging, stored_type, trust_remote_code)
        require_same_inputs(batches, batches_of(loaded_processor, examples))
        stored_difference = difference(log_probs(loaded, batches), expected)
        del loaded
        tolerance = TOLERANCE
        if stored_type in ("bfloat16", "float16"):
            adapter, _ = load_policy(model_name_or_path, dtype=stored_type, **where)
            tolerance = OF_THE_TYPE * difference(log_probs(adapter, batches), expected)
        require(stored_difference, tolerance, f"loaded from disk, in {stored_type}")
        if stored_type == "float32":
            float32_difference = stored_difference
    except BaseException:  # a full disk, too: half a model of many gigabytes is of no use
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _publish(staging, output_dir)
    proof = {
        "examples": len(examples),
        "tokens": sum(len(rows) for rows in expected),
        "float32_difference": float32_difference,
        "stored_difference": stored_difference,
        "stored_tolerance": tolerance,
    }
    return facts | {"dtype": stored_type, "parameters": parameters, "proof": proof}


def _facts(model, adapter: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What is merged, with the commits that the Hub cache loaded it from."""
    from transformers import AutoConfig

    base = model.get_base_model()
    config = AutoConfig.from_pretrained(
        base.name_or_path, revision=base.hub_commit, trust_remote_code=trust_remote_code
    )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{base.name_or_path!r} is quantised, and a merged weight would be rounded to its few values. Give the "
            "model it was made from as base_model_name_or_path."
        )
    kind = config.dtype or config.get_text_config().dtype
    return {
        "base": base.name_or_path,
        "base_revision": base.hub_commit,
        "adapter_revision": hub_commit(adapter, "adapter_config.json", revision),
        "dtype": "float32" if kind is None else str(kind).removeprefix("torch."),
    }


def _merged(model) -> "PreTrainedModel":
    try:
        return model.merge_and_unload(safe_merge=True).eval()
    except ValueError as error:  # weights that are not finite
        raise UserError(f"The adapter cannot be merged: {error}") from error


def _generation_config(model: "PreTrainedModel") -> "GenerationConfig":
    from transformers import GenerationConfig

    kept = {name: getattr(model.generation_config, name, None) for name in _TOKENS}
    return GenerationConfig(**{name: value for name, value in kept.items() if value is not None}, **SAMPLING)


def _load_plainly(folder: Path, dtype: str, trust_remote_code: bool) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """As a tool loads it that knows nothing of medst_trl."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _torch_type(name: str) -> "torch.dtype":
    import torch

    return getattr(torch, name)


def _publish(staging: Path, output_dir: Path) -> None:
    """Each file appears whole, config.json last: a folder that has it is complete. No other model's weights stay."""
    for path in [output_dir / "config.json", *output_dir.glob("model*.safetensors*")]:
        path.unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():  # named chat templates, perhaps those of a run that was cut short in here
            shutil.rmtree(output_dir / path.name, ignore_errors=True)
        os.replace(path, output_dir / path.name)
    staging.rmdir()

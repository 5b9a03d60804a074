# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fingerprint of the weights that an adapter was trained on: saved beside the adapter, compared when it is loaded.

An adapter on another base of the same shapes runs and writes nonsense, and its configuration knows the base by name
only: directories are rebuilt, Hub repositories get other weights, and a base that has moved is named by hand.
"""

import hashlib
import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_json


BASE_FILE = "base_model.json"
# Computed or shared tensors, which some versions of transformers store and others leave out.
_NOT_ALWAYS_STORED = ("inv_freq", "lm_head.weight")


def weights_fingerprint(name_or_path: str, revision: str | None = None) -> str | None:
    """
    Hash the middle row of every matrix of a checkpoint, and every vector, read from its safetensors files.

    Rows are hashed as bfloat16, so that the same weights in float32 or bfloat16, in one file or many, have one
    fingerprint. It takes 700 short reads for a model of 7B; nothing is downloaded.

    Args:
        name_or_path (`str`):
            Directory, or Hub id of a model in the local cache.
        revision (`str`, *optional*):
            Hub revision.

    Returns:
        `str` or `None`: SHA-256; `None` without safetensors files or for quantized weights.
    """
    config = _find(name_or_path, "config.json", revision) if name_or_path else None  # "": built in memory
    if config is None or "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        return None
    files = {_find(name_or_path, "model.safetensors", revision)}
    index = _find(name_or_path, "model.safetensors.index.json", revision)
    if files == {None} and index is not None:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = {_find(name_or_path, name, revision) for name in names}
    if None in files:
        return None
    rows = {name: row for file in files for name, row in _middle_rows(file)}
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(f"{name}\0".encode() + rows[name])
    return digest.hexdigest()


def hub_commit(name_or_path: str, name: str, revision: str | None) -> str | None:
    """Return the commit of a file in the local Hub cache; `None` for a directory."""
    path = None if Path(name_or_path).is_dir() else _find(name_or_path, name, revision)
    return extract_commit_hash(str(path), None) if path else None


def write_base_file(model: PreTrainedModel | PeftModel, directory: str | Path) -> None:
    """Write the fingerprint of an adapter's base beside the adapter. A model without an adapter gets no file."""
    if not hasattr(model, "peft_config"):
        return
    base = model.get_base_model()
    # The path it was loaded from: the adapter's own configuration may name the one before the base moved.
    fingerprint = weights_fingerprint(base.name_or_path, getattr(base, "hub_commit", None))
    if fingerprint is not None:
        content = {"model_type": base.config.model_type, "weights_sha256": fingerprint}
        write_json(Path(directory, BASE_FILE), content)


def check_base(adapter: str, revision: str | None, base: PreTrainedModel, named: str | None) -> None:
    """
    Check that a base has the weights that an adapter was trained on. Warn if that cannot be determined.

    Args:
        adapter (`str`):
            Directory or Hub id of the adapter.
        revision (`str`, *optional*):
            Its Hub revision.
        base ([`~transformers.PreTrainedModel`]):
            The model it was loaded on.
        named (`str`, *optional*):
            The base in the adapter's own configuration.

    Raises:
        UserError: if both fingerprints are known and differ.
    """
    path = _find(adapter, BASE_FILE, revision, local_files_only=False)  # nothing else has downloaded it
    found = weights_fingerprint(base.name_or_path, getattr(base, "hub_commit", None)) if path else None
    recorded = _recorded(path) if path else None
    if found is None or recorded is None:
        if base.name_or_path != named:
            warnings.warn(
                f"Cannot verify that {base.name_or_path!r} is the base of the adapter {adapter!r}, which was trained "
                f"on {named!r}: there is no fingerprint of the weights to compare.",
                stacklevel=3,
            )
        return
    if found != recorded:
        raise UserError(
            f"The adapter {adapter!r} was trained on other weights than those of {base.name_or_path!r} (fingerprints "
            f"{recorded[:12]} and {found[:12]}), although their shapes agree. Its base is called {named!r}: pass "
            "exactly that model as base_model_name_or_path, or train the adapter again. To use the two together "
            f"anyway, delete {BASE_FILE} beside the adapter."
        )


def _recorded(path: Path) -> str | None:
    try:
        fingerprint = json.loads(path.read_text(encoding="utf-8"))["weights_sha256"]
    except (ValueError, LookupError, TypeError):  # a damaged file counts as missing
        return None
    return fingerprint if isinstance(fingerprint, str) else None


def _find(name_or_path: str, name: str, revision: str | None, local_files_only: bool = True) -> Path | None:
    """Find a file of a directory, of the local Hub cache, or of the Hub; `None` if there is none."""
    try:
        found = cached_file(name_or_path, name, revision=revision, local_files_only=local_files_only)
    except OSError:
        return None
    return Path(found) if found else None


def _middle_rows(file: Path):
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no dictionary)
            if name.endswith(_NOT_ALWAYS_STORED):
                continue
            stored = tensors.get_slice(name)
            shape = stored.get_shape()
            row = stored[shape[0] // 2 : shape[0] // 2 + 1] if len(shape) > 1 else tensors.get_tensor(name)
            if row.is_floating_point():  # only some versions store the indices of positions
                numbers = row.to(torch.bfloat16).contiguous().view(torch.int16)
                yield name, f"{shape}\0".encode() + numbers.numpy().tobytes()

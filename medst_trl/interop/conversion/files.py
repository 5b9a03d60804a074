# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Files that a conversion reads: directories or Hub repositories, JSON, and tensors without running code.

A `.bin` file is a pickle, which can hold code as well as numbers. Only PyTorch's restricted reader opens it: it builds
tensors and plain containers and refuses everything else before any of it runs.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from medst_trl.base.errors import UserError
from medst_trl.base.hub_ids import check_reachable, split_revision


# Names of the weights in a directory, in the order in which they are looked for.
ORIGINAL_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
TRAINED_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin", "non_lora_trainables.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SMALL_FILES = ("*.json", "*.model")
_NOT_READ = ("checkpoint-*/*", "global_step*/*", "runs/*", "*/optimizer.*", "optimizer.*")
NUMBERS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # by safetensors' names


def local_directory(source: str, what: str, *, weights: bool = True) -> Path:
    """
    Return the directory of a model: as given, or downloaded from the Hub, only the files that are read.

    Args:
        source (`str`):
            Directory, or Hub id (`org/name`, `org/name@revision`).
        what (`str`):
            What it is, for messages.
        weights (`bool`, *optional*, defaults to `True`):
            Whether its weights are read, too.

    Raises:
        UserError: if there is no such directory and the Hub has no such repository.
    """
    if Path(source).is_dir():
        return Path(source)
    name, revision = split_revision(source)
    check_reachable(name)
    try:
        patterns = [*_SMALL_FILES, *(_weight_patterns(name, revision) if weights else ())]
        wanted = {"allow_patterns": patterns, "ignore_patterns": _NOT_READ}
        return Path(huggingface_hub.snapshot_download(name, revision=revision, **wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[:1] or [""]
        raise UserError(
            f"{what} {source!r} is neither a directory nor available on the Hub ({type(error).__name__}: {first[0]})."
        ) from error


def _weight_patterns(name: str, revision: str | None) -> list[str]:
    """Choose one format of a model that has both. A training output has parts in each."""
    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except (OfflineModeIsEnabled, httpx2.TransportError):  # the cache holds what was chosen when it was downloaded
        files = []
    has_safetensors = any(fnmatch(file, "model*.safetensors") for file in files)
    return ["*.safetensors"] if has_safetensors else ["*.safetensors", "*.bin"]


def read_json(path: Path, what: str | None = None) -> dict[str, Any]:
    """
    Read a JSON object.

    Args:
        path (`Path`): The file.
        what (`str`, *optional*): What it holds, for the message if it is missing. None: a missing file is empty.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if what is None:
            return {}
        raise UserError(f"{path.parent} has no {path.name}, which holds {what}.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return content


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a file.

    Args:
        file (`Path`): The file.
        name (`str`): Its name there.
        shape (`tuple[int, ...]`): Its shape.
        kind (`str`): Type of its numbers as PyTorch calls it, such as `"float16"`, or how else it is stored.
        read (`Callable`): Reads it from disk.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], torch.Tensor]

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} in {self.file.name}"


def open_directory(directory: Path, names: tuple[str, ...], lacks: str | None) -> list[StoredTensor]:
    """
    List the tensors of a directory, which are in a single file or in the shards that an index lists.

    Args:
        directory (`Path`): Directory.
        names (`tuple[str, ...]`): Names of a single file, the preferred one first.
        lacks (`str`, *optional*): What to say of a directory without any of them. None: it may have none.

    Raises:
        UserError: if there are shards without their index, some of them are missing, or as [`open_weights`] says.
    """
    files = _find_weights(directory, names)
    if lacks and not files:
        raise UserError(f"{directory} {lacks}")
    return open_weights(files)


def _find_weights(directory: Path, names: tuple[str, ...]) -> list[Path]:
    for name in names:
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if (directory / name).is_file():
            return [directory / name]
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if shards := sorted(directory.glob(f"{stem}-*-of-*.{suffix}")):
            raise UserError(
                f"{directory} holds {len(shards)} shards such as {shards[0].name} but not their index "
                f"{name}.index.json, so missing ones would not be noticed. Download the index too."
            )
    return []


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index, "the names of the shards").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} is damaged (weight_map). Download it again.")
    listed = sorted(set(weight_map.values()))
    if outside := [name for name in listed if Path(name).name != name]:
        raise UserError(f"{index} names a file outside its directory, {outside[0]!r}. Do not use this checkpoint.")
    shards = [index.parent / name for name in listed]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards that its index lists: "
            f"{', '.join(missing[:5])}. Download them."
        )
    return shards


def open_weights(files: list[Path]) -> list[StoredTensor]:
    """
    List the tensors of files without reading them.

    Raises:
        UserError: if a file is damaged, holds more than tensors, or is neither safetensors nor PyTorch's.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file):
            if tensor.name in stored:
                raise UserError(f"{tensor.name} is both in {stored[tensor.name].file.name} and in {file.name}.")
            stored[tensor.name] = tensor
    return list(stored.values())


def _open_safetensors(file: Path) -> list[StoredTensor]:
    tensors = []
    try:
        opened = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118 (no dictionary)
            part = opened.get_slice(name)
            shape, kind = tuple(part.get_shape()), NUMBERS.get(part.get_dtype(), part.get_dtype())
            tensors.append(StoredTensor(file, name, shape, kind, partial(opened.get_tensor, name)))
        return tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or incomplete ({error}). Download it again.") from error


def _open_pickle(file: Path) -> list[StoredTensor]:
    content = _load_pickle(file)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()
    ):
        raise UserError(f"{file} holds something other than named tensors. Give the model's own weights.")

    def kind(tensor: torch.Tensor) -> str:
        if tensor.is_meta:
            return "without numbers"
        stored = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        return str(stored).removeprefix("torch.")

    return [StoredTensor(file, name, tuple(value.shape), kind(value), value.detach) for name, value in content.items()]


def _load_pickle(file: Path):
    for mmap in (True, False):  # files from before PyTorch 1.6 cannot be read in place
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a damaged file can fail in any way
            if mmap and "mmap can only be used" in str(error):
                continue
            if re.search(r"Weights only load failed(?s:.)*(?:GLOBAL|Unsupported (?:class|oper|operand))", str(error)):
                raise UserError(
                    f"{file} holds more than tensors, perhaps code, so it was refused and nothing of it was run "
                    f"({_reason(error)}). Ask for the weights as safetensors, or as a plain state "
                    "dict."
                ) from None
            raise UserError(f"{file} is damaged or incomplete ({_reason(error)}). Download it again.") from None


def _reason(error: Exception) -> str:
    """Return the line of PyTorch's long advice that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    main = [line for line in lines if "GLOBAL" in line or line.startswith(("WeightsUnpickler error", "Unsupported"))]
    return (main or lines or [type(error).__name__])[0][:200]

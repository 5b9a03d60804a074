# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensors in files, read one by one and never by running code.

A `.bin` file is a pickle, which can hold code as well as numbers. It is opened by PyTorch's restricted reader alone,
which builds tensors and plain containers and refuses everything else before any of it runs.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError


if TYPE_CHECKING:
    import torch

# The names a folder's weights may have, in the order they are looked for.
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin", "non_lora_trainables.bin")


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a file.

    Args:
        file (`Path`): The file.
        name (`str`): Its name there.
        shape (`tuple[int, ...]`): Its shape.
        kind (`str`): What its numbers are: a type of PyTorch's such as `"float16"`, or how else they are kept.
        read (`Callable`): Reads it from disk.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    read: "Callable[[], torch.Tensor]"

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} in {self.file.name}"

    @property
    def is_weight(self) -> bool:
        """Whether these are numbers that a model computes with, as they stand."""
        return self.kind in ("float16", "bfloat16", "float32", "float64")


def find_weights(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """
    The files that hold the weights of a folder: one, or the shards that an index lists.

    Args:
        folder (`Path`): Folder.
        names (`tuple[str, ...]`): Names of a single file, the preferred one first.

    Returns:
        `list[Path]`: Empty if there are none.

    Raises:
        UserError: if shards are there without their index, or some of them are missing.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if (folder / name).is_file():
            return [folder / name]
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if shards := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            raise UserError(
                f"{folder} holds {len(shards)} shards such as {shards[0].name} but not their index "
                f"{name}.index.json, so it cannot be told whether all of them are there. Download the index too."
            )
    return []


def _shards(index: Path) -> list[Path]:
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__}). Download it again.") from error
    if outside := [name for name in listed if Path(name).name != name]:
        raise UserError(f"{index} points out of its folder, to {sorted(outside)[0]!r}. It cannot be trusted.")
    shards = [index.parent / name for name in sorted(listed)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards that its index lists: "
            f"{', '.join(missing[:5])}. Download them."
        )
    return shards


def open_weights(files: list[Path]) -> list[StoredTensor]:
    """
    The tensors of some files, none of them read yet.

    Raises:
        UserError: if a file is damaged, holds more than tensors, or is neither safetensors nor PyTorch's.
    """
    stored, homes = [], {}
    for file in files:
        tensors = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
        for tensor in tensors:
            if tensor.name in homes:
                raise UserError(f"{tensor.name} stands both in {homes[tensor.name].name} and in {file.name}.")
            homes[tensor.name] = file
        stored += tensors
    return stored


def _open_safetensors(file: Path) -> list[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
        return [
            StoredTensor(
                file, name, tuple(part.get_shape()), _kind(part.get_dtype()), partial(opened.get_tensor, name)
            )
            for name in opened.keys()  # noqa: SIM118 (it is no dict)
            for part in [opened.get_slice(name)]
        ]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}). Download it again.") from error


def _open_pickle(file: Path) -> list[StoredTensor]:
    import torch

    content = _load_pickle(file)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()
    ):
        raise UserError(f"{file} holds something else than named tensors. Give the model's own weights.")
    return [
        StoredTensor(file, name, tuple(value.shape), _kind(value), partial(torch.Tensor.detach, value))
        for name, value in content.items()
    ]


def _kind(stored: "torch.Tensor | str") -> str:
    """Of a tensor, or of a type as safetensors spell it."""
    if isinstance(stored, str):
        return {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}.get(stored, stored)
    if stored.is_meta or str(stored.layout) != "torch.strided":
        return "without numbers" if stored.is_meta else str(stored.layout).removeprefix("torch.")
    return str(stored.dtype).removeprefix("torch.")


def _load_pickle(file: Path):
    import torch

    for mmap in (True, False):  # files from before PyTorch 1.6 cannot be read in place
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a damaged file can fail in any way
            if mmap and "mmap can only be used" in str(error):
                continue
            if re.search(r"Weights only load failed(?s:.)*(?:GLOBAL|Unsupported (?:class|oper|operand))", str(error)):
                raise UserError(
                    f"{file} holds more than tensors, perhaps code, so it was refused; nothing of it was run. "
                    f"({_reason(error)}) Get the weights as safetensors, or from whoever published them as a plain "
                    "state dict."
                ) from None
            raise UserError(f"{file} is damaged or cut short ({_reason(error)}). Download it again.") from None


def _reason(error: Exception) -> str:
    """What is wrong, of PyTorch's long advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "GLOBAL" in line or line.startswith(("WeightsUnpickler error", "Unsupported"))]
    return (told or lines or [type(error).__name__])[0][:200]

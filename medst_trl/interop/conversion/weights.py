# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The weights of a checkpoint: files, names, LoRA layers, and a check that every tensor is accounted for.

A `.bin` file is a pickle, which can hold code as well as numbers. Only PyTorch's restricted reader opens it: it builds
tensors and plain containers and refuses everything else before any of it runs.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from medst_trl.base.errors import UserError


# Names of the weights in a directory, in the order in which they are looked for.
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin", "non_lora_trainables.bin")
_NO_WEIGHTS = f"holds no weights ({' or '.join(_MODEL_FILES)}, or shards with their index)."
_PLAIN = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
MAX_LISTED = 20
PROJECTOR, VISION = "model.multi_modal_projector.", "model.vision_tower."
NORM = "model.language_model.norm.weight"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
# From the start of a name in any layout (the original's, Hugging Face's as published and as saved today, or CLIP's
# own) to its start in the model, after what PEFT and LLaVA's trainer put before it. The first match counts.
_WRAPPERS = re.compile(r"(base_model\.model\.)?(model\.(?=model\.))?")
_TO_MODEL = (
    (r"(model\.)?(vision_tower\.)+(vision_model\.)?|vision_model\.", VISION),
    # The two-layer projector was a plain sequence; the prototype extractor kept its names.
    (r"(model\.)?(mm|multi_modal)_projector\.0\.", f"{PROJECTOR}linear_1."),
    (r"(model\.)?(mm|multi_modal)_projector\.2\.", f"{PROJECTOR}linear_2."),
    (r"(model\.)?(mm|multi_modal)_projector\.", PROJECTOR),
    (r"(language_model\.)?lm_head\.", "lm_head."),
    (r"model\.(language_model\.)?|language_model\.model\.", "model.language_model."),
)
# LLaVA's names on the Hub, which every engine reads.
_TO_PUBLISHED = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    (VISION, "vision_tower.vision_model."),
    (PROJECTOR, "multi_modal_projector."),
)
# Computed, not learned: checkpoints of older versions of transformers contain them.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
# CLIP's other half, in a directory that is read for its vision tower only.
_TEXT_HALF = re.compile(r"text_model\.|visual_projection\.|text_projection\.|logit_scale$")
_FACTOR = re.compile(r"(?P<layer>.*)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_OTHER_THAN_LORA = ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "modules_to_save")


# --- Files -----------------------------------------------------------------------------------------------------------


def read_json(path: Path, what: str | None = None) -> dict[str, Any]:
    """
    Read a JSON object.

    Args:
        path (`Path`): The file.
        what (`str`, *optional*): What it holds, for the message if it is missing. None: a missing file is empty.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if what is None and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} has no {path.name}, which holds {what}.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return content


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a file, which is read when the tensor is used.

    Args:
        file (`Path`): The file.
        name (`str`): Its name there.
        tensor (`torch.Tensor`): The tensor, mapped into memory.
    """

    file: Path
    name: str
    tensor: torch.Tensor

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} in {self.file.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def problem(self) -> str | None:
        """How its numbers are stored, such as `"int8"`, if not as plain floating-point numbers."""
        if self.tensor.is_meta:
            return "without numbers"
        stored = self.tensor.dtype if self.tensor.layout == torch.strided else self.tensor.layout
        return None if stored in _PLAIN else str(stored).removeprefix("torch.")


def open_weights(
    place: Path, names: Sequence[str] = _MODEL_FILES, missing: str | None = _NO_WEIGHTS
) -> list[StoredTensor]:
    """
    List the tensors of a file, or of a directory with a single file or with the shards that an index lists. They are
    read when they are used.

    Args:
        place (`Path`): File or directory.
        names (sequence of `str`, *optional*): Names of a single file in the directory, the preferred one first. The
            default is for a model.
        missing (`str`, *optional*): End of the error if there is none of them. None: no error.

    Raises:
        UserError: if there are shards without their index, some of them are missing, or a file is damaged, holds more
            than tensors, or is neither safetensors nor PyTorch's.
    """
    files = [place] if place.is_file() else _find_weights(place, names)
    if missing and not files:
        raise UserError(f"{place} {missing}")
    stored = []
    for file in files:
        content = _load(file)
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in content.items()
        ):
            raise UserError(f"{file} holds something other than named tensors. Give the model's own weights.")
        stored += [StoredTensor(file, name, tensor.detach()) for name, tensor in content.items()]
    return stored


def _find_weights(directory: Path, names: Sequence[str]) -> list[Path]:
    for name in names:
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if (directory / name).is_file():
            return [directory / name]
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = {Path(name).name for name in read_json(index)["weight_map"].values()}  # never in another directory
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged (weight_map). Download it again.") from None
    if missing := [name for name in sorted(names) if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} shards that its index lists: "
            f"{', '.join(missing[:5])}. Download them."
        )
    return [index.parent / name for name in sorted(names)]


def _load(file: Path):
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Files from before PyTorch 1.6 are no archives, and cannot be mapped into memory.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors, perhaps code, or is damaged. Nothing of it was run. Ask for the "
            "weights as safetensors, or as a plain state dict."
        ) from error
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{file} is damaged or incomplete ({error}). Download it again.") from error


# --- Names and LoRA layers -------------------------------------------------------------------------------------------


def model_name(name: str) -> str | None:
    """
    Translate a tensor's name in a checkpoint of any layout to its name in the model.

    Returns:
        `str` or `None`: `None` for a tensor of an unknown layout.
    """
    name = _WRAPPERS.sub("", name, count=1)
    matches = ((re.match(old, name), new) for old, new in _TO_MODEL)
    return next((new + name[match.end() :] for match, new in matches if match), None)


def published_name(name: str) -> str:
    """Return the name that LLaVA-1.5 has on the Hub for a tensor of the model."""
    return next(new + name.removeprefix(old) for old, new in _TO_PUBLISHED if name.startswith(old))


@dataclass(frozen=True)
class Lora:
    """
    The change `scale * b @ a` of one weight.

    Args:
        a ([`StoredTensor`]): Of shape (rank, in).
        b ([`StoredTensor`]): Of shape (out, rank).
        scale (`float`): Alpha over rank.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float

    def __str__(self) -> str:
        return str(self.a)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes."""
        return (self.b.shape[0], self.a.shape[1])


def _scale(path: Path) -> tuple[float, int]:
    config = read_json(path, "the scale of its LoRA layers")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not a LoRA configuration ({type(error).__name__}: {error}).") from error
    unusual = [name for name in _OTHER_THAN_LORA if config.get(name)]
    if rank < 1 or config.get("peft_type", "LORA") != "LORA" or unusual:
        raise UserError(
            f"{path} is not a plain LoRA adapter ({', '.join(unusual) or config.get('peft_type')}). Merge it with "
            "PEFT first, and convert the merged model."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


@dataclass
class Parts:
    """
    The tensors of a model to be assembled, by names in the model.

    Args:
        weights (`dict[str, StoredTensor]`): Its weights.
        changes (`dict[str, Lora]`): Changes of some of them.
        unused (`list[StoredTensor]`): Tensors without a place.
        left_out (`list[str]`): Names of tensors that the model does not need.
    """

    weights: dict[str, StoredTensor] = field(default_factory=dict)
    changes: dict[str, Lora] = field(default_factory=dict)
    unused: list[StoredTensor] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, tensors: Iterable[StoredTensor], in_clip: bool = False) -> None:
        """
        Add tensors under their names in the model, replacing earlier ones. A projector replaces all of an earlier one.

        Args:
            tensors (iterable of [`StoredTensor`]): Of a model, or of a part; see [`open_weights`].
            in_clip (`bool`, *optional*, defaults to `False`): Whether only CLIP's vision tower is used.

        Raises:
            UserError: if two of them have the same name in the model.
        """
        placed: dict[str, StoredTensor] = {}
        for tensor in tensors:
            name = model_name(tensor.name)
            if _COMPUTED.search(tensor.name) or (in_clip and _TEXT_HALF.match(tensor.name)):
                self.left_out.append(tensor.name)
            elif name is None or (in_clip and not name.startswith(VISION)):
                self.unused.append(tensor)
            elif name in placed:
                raise UserError(f"Two tensors map to {name}: {tensor} and {placed[name]}. Remove one of them.")
            else:
                placed[name] = tensor
        if any(name.startswith(PROJECTOR) for name in placed):
            self.weights = {k: v for k, v in self.weights.items() if not k.startswith(PROJECTOR)}
        self.weights |= placed

    def add_lora(self, directory: Path) -> None:
        """
        Add the LoRA layers of a directory with `adapter_config.json` and `adapter_model.bin` or `.safetensors`.

        Raises:
            UserError: if a file is missing or damaged, a layer lacks one factor, the adapter is not plain LoRA, or
                another one changes the same weight.
        """
        path, factors = directory / "adapter_config.json", {}
        scale, rank = _scale(path)
        missing = f"has an adapter_config.json but neither {' nor '.join(_ADAPTER_FILES)}."
        for tensor in open_weights(directory, _ADAPTER_FILES, missing):
            match = _FACTOR.fullmatch(tensor.name)
            name = model_name(match["layer"] + ".weight") if match else None
            if name is None:
                self.unused.append(tensor)
            else:
                factors.setdefault(name, {})[match["factor"]] = tensor
        for name, pair in factors.items():
            a, b = pair.get("A"), pair.get("B")
            if None in (a, b) or not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank):
                raise UserError(f"lora_A {a} and lora_B {b} are not two factors of the rank {rank} in {path}.")
            if name in self.changes:
                raise UserError(f"Two adapters change {name}.")
            self.changes[name] = Lora(a, b, scale)

    def check(self, model: PreTrainedModel) -> None:
        """
        Check that the parts are exactly those of a model.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model on the meta device.

        Raises:
            UserError: listing what is missing, unexpected, or of the wrong shape.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            expected.pop(HEAD)
            if HEAD in self.weights:  # a copy of the embedding
                self.left_out.append(self.weights.pop(HEAD).name)
        placed = [*self.weights.items(), *self.changes.items()]
        tensors = [*self.weights.values(), *(half for lora in self.changes.values() for half in (lora.a, lora.b))]
        problems = {
            "are missing (names in the model)": [
                f"{name} {list(shape)}" for name, shape in expected.items() if name not in self.weights
            ],
            "have no place in the model": [str(part) for name, part in placed if name not in expected]
            + list(map(str, self.unused)),
            "are of another shape": [
                f"{part}, expected {list(expected[name])}"
                for name, part in placed
                if part.shape != expected.get(name, part.shape)
            ],
            "are not plain floating-point numbers": [f"{part}: {part.problem}" for part in tensors if part.problem],
        }
        if any(problems.values()):
            raise UserError(
                "The checkpoint is not the model that its config.json describes; nothing was written.\n"
                + "\n".join(_listed(what, found) for what, found in problems.items() if found)
                + "\nCheck that every file was downloaded, and that base, projector and vision tower belong together."
            )

    def read(self, name: str) -> torch.Tensor:
        """Read a weight with its change, in the type it is stored in. The change is added in float32."""
        weight, change = self.weights[name].tensor, self.changes.get(name)
        if change is None:
            return weight
        product = change.b.tensor.float() @ change.a.tensor.float()
        return (weight.float() + change.scale * product).to(weight.dtype)


def _listed(what: str, found: list[str]) -> str:
    return "\n  ".join([f"{len(found)} tensors {what}, such as:", *found[:MAX_LISTED]])

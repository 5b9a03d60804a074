# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Assemble a model's weights from stored tensors: names, LoRA layers, and a check that every tensor is accounted for.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from medst_trl.base.errors import UserError

from .files import NUMBERS, TRAINED_ADAPTER_FILES, StoredTensor, open_directory, read_json


MAX_LISTED = 20
PROJECTOR, VISION = "model.multi_modal_projector.", "model.vision_tower."
NORM = "model.language_model.norm.weight"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
# Prefixes that PEFT and LLaVA's trainer add to names.
_PREFIXES = (("base_model.model.", ""), ("model.model.", "model."))
# From the start of a name in any of the layouts to its start in the model. The first match counts.
_TO_MODEL = (
    # original, with the vision tower inside
    ("model.vision_tower.vision_tower.vision_model.", VISION),
    ("model.mm_projector.", PROJECTOR),
    # Hugging Face, as published and as saved today
    ("model.vision_tower.vision_model.", VISION),
    (VISION, VISION),
    (PROJECTOR, PROJECTOR),
    ("model.language_model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", VISION),
    ("vision_tower.", VISION),
    ("multi_modal_projector.", PROJECTOR),
    ("mm_projector.", PROJECTOR),
    # CLIP on its own
    ("vision_model.", VISION),
    # original, the language model
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
# The two-layer projector was a plain sequence; the prototype extractor kept its names.
_MLP = ((f"{PROJECTOR}0.", f"{PROJECTOR}linear_1."), (f"{PROJECTOR}2.", f"{PROJECTOR}linear_2."))
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


def model_name(name: str) -> str | None:
    """
    Translate a tensor's name in a checkpoint of any layout to its name in the model.

    Returns:
        `str` or `None`: `None` for a tensor of an unknown layout.
    """
    for prefix in _PREFIXES:
        name = _renamed(name, (prefix,)) or name
    name = _renamed(name, _TO_MODEL)
    return name and (_renamed(name, _MLP) or name)


def published_name(name: str) -> str:
    """Return the name that LLaVA-1.5 has on the Hub for a tensor of the model."""
    return _renamed(name, _TO_PUBLISHED)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((new + name.removeprefix(old) for old, new in table if name.startswith(old)), None)


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

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes."""
        return (self.b.shape[0], self.a.shape[1])

    def merged_into(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the changed weight in float32."""
        return weight.float() + self.scale * (self.b.read().float() @ self.a.read().float())


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

    def put(self, tensors: Iterable[StoredTensor], *, in_clip: bool = False) -> None:
        """
        Add tensors under their names in the model, replacing earlier ones. A projector replaces all of an earlier one.

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

    def change(self, directory: Path) -> None:
        """
        Add the LoRA layers of a directory with `adapter_config.json` and `adapter_model.bin` or `.safetensors`.

        Raises:
            UserError: if a file is missing or damaged, a layer lacks one factor, the adapter is not plain LoRA, or
                another one changes the same weight.
        """
        path, factors = directory / "adapter_config.json", {}
        scale, rank = _scale(path)
        lacks = f"has an adapter_config.json but neither {' nor '.join(TRAINED_ADAPTER_FILES)}."
        for tensor in open_directory(directory, TRAINED_ADAPTER_FILES, lacks):
            match = _FACTOR.fullmatch(tensor.name)
            name = model_name(match["layer"] + ".weight") if match else None
            if name is None:
                self.unused.append(tensor)
            else:
                factors.setdefault(name, {})[match["factor"]] = tensor
        for name, pair in factors.items():
            if len(pair) != 2:
                (half,) = pair.values()
                raise UserError(f"{half.file} lacks lora_A or lora_B of a layer; it has only {half}.")
            a, b = pair["A"], pair["B"]
            if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
                raise UserError(f"{a} and {b} do not fit the rank {rank} in {path}.")
            if name in self.changes:
                raise UserError(f"Two adapters change {name}.")
            self.changes[name] = Lora(a, b, scale)

    @property
    def has_vision(self) -> bool:
        """Whether a vision tower is among the weights."""
        return any(name.startswith(VISION) for name in self.weights)

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
        unused = [str(tensor) for name, tensor in self.weights.items() if name not in expected]
        unused += [str(tensor) for tensor in self.unused]
        unused += [str(lora.a) for name, lora in self.changes.items() if name not in expected]
        parts = [*self.weights.values(), *(half for lora in self.changes.values() for half in (lora.a, lora.b))]
        not_plain = [f"{part}: {part.kind}" for part in parts if part.kind not in NUMBERS.values()]
        problems = {
            "are missing (names in the model)": [
                f"{name} {list(shape)}" for name, shape in expected.items() if name not in self.weights
            ],
            "have no place in the model": unused,
            "are of another shape": [
                f"{part.a if isinstance(part, Lora) else part}, expected {list(expected[name])}"
                for name, part in [*self.weights.items(), *self.changes.items()]
                if name in expected and part.shape != expected[name]
            ],
            "are not plain floating-point numbers": not_plain,
        }
        if any(problems.values()):
            raise UserError(
                "The checkpoint is not the model that its config.json describes; nothing was written.\n"
                + "\n".join(_listed(what, found) for what, found in problems.items() if found)
                + "\nCheck that every file was downloaded, and that base, projector and vision tower belong together."
            )

    def read(self, name: str) -> torch.Tensor:
        """Read a weight with its change, in the type it is stored in."""
        tensor = self.weights[name].read()
        change = self.changes.get(name)
        return tensor if change is None else change.merged_into(tensor).to(tensor.dtype)


def _listed(what: str, found: list[str]) -> str:
    lines = [f"{len(found)} tensors {what}:", *(f"  {item}" for item in found[:MAX_LISTED])]
    return "\n".join(lines + ([f"  and {len(found) - MAX_LISTED} more"] if len(found) > MAX_LISTED else []))

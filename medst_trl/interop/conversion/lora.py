# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA layers of a training output, merged into the weights they stand on."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError

from .names import model_name
from .weights import ADAPTER_FILES, StoredTensor, find_weights, open_weights


if TYPE_CHECKING:
    import torch

_FACTOR = re.compile(r"(?P<layer>.*)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


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
        """Of the weight it changes."""
        return (self.b.shape[0], self.a.shape[1])

    def merged_into(self, weight: "torch.Tensor") -> "torch.Tensor":
        """The weight with the change, in float32."""
        return weight.float() + self.scale * (self.b.read().float() @ self.a.read().float())


def read_lora(folder: Path) -> tuple[dict[str, Lora], list[StoredTensor]]:
    """
    The LoRA layers of a folder.

    Args:
        folder (`Path`): Folder with `adapter_config.json` and `adapter_model.bin` or `.safetensors`.

    Returns:
        `tuple[dict[str, Lora], list[StoredTensor]]`: The change of each weight, by its name in the model, and the
        tensors that are none.

    Raises:
        UserError: if a file is missing or damaged, a layer lacks one factor, or the adapter is of another kind.
    """
    scale, rank = _scale(folder)
    files = find_weights(folder, ADAPTER_FILES)
    if not files:
        raise UserError(f"{folder} has an adapter_config.json but neither {' nor '.join(ADAPTER_FILES)}.")
    factors, others = {}, []
    for tensor in open_weights(files):
        match = _FACTOR.fullmatch(tensor.name)
        name = model_name(match["layer"] + ".weight") if match else None
        if name is None:
            others.append(tensor)
        else:
            factors.setdefault(name, {})[match["factor"]] = tensor
    changes = {}
    for name, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise UserError(f"{files[0]} has only one of the two factors of a layer: {next(iter(pair.values()))}.")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
            raise UserError(f"{a} and {b} do not fit the rank {rank} that {folder / 'adapter_config.json'} gives.")
        changes[name] = Lora(a, b, scale)
    return changes, others


def _scale(folder: Path) -> tuple[float, int]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError:
        raise UserError(f"{folder} has no adapter_config.json, so the scale of its LoRA layers is unknown.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not of a LoRA ({type(error).__name__}: {error}).") from error
    unusual = [
        name for name in ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "modules_to_save")
        if config.get(name)
    ]  # fmt: skip
    if rank < 1 or config.get("peft_type", "LORA") != "LORA" or unusual:
        raise UserError(
            f"{path} is not of plain LoRA ({', '.join(unusual) or config.get('peft_type')}). Merge it with PEFT "
            "first, and convert the merged model."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""From stored tensors to a model's weights: every tensor accounted for before anything is written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError

from .lora import Lora
from .names import PROJECTOR, VISION, is_harmless, model_name
from .weights import StoredTensor


if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, PreTrainedModel

MOST_LISTED = 20
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Parts:
    """
    What a model is put together from, by names in the model.

    Args:
        weights (`dict[str, StoredTensor]`): Its weights.
        changes (`dict[str, Lora]`): What is added to some of them.
        unused (`list[StoredTensor]`): Tensors without a place.
        left_out (`list[str]`): Names of tensors that nothing is lost without.
    """

    weights: dict[str, StoredTensor] = field(default_factory=dict)
    changes: dict[str, Lora] = field(default_factory=dict)
    unused: list[StoredTensor] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def put(self, tensors: Iterable[StoredTensor], *, in_clip: bool = False) -> None:
        """
        Adds tensors under their names in the model; they take the places of earlier ones. A projector comes whole, so
        nothing is left of an earlier one.

        Raises:
            UserError: if two of them have the same place.
        """
        placed: dict[str, StoredTensor] = {}
        for tensor in tensors:
            name = model_name(tensor.name)
            if is_harmless(tensor.name, in_clip):
                self.left_out.append(tensor.name)
            elif name is None or (in_clip and not name.startswith(VISION)):
                self.unused.append(tensor)
            elif name in placed:
                raise UserError(f"{tensor} and {placed[name]} are both the model's {name}.")
            else:
                placed[name] = tensor
        if any(name.startswith(PROJECTOR) for name in placed):
            self.weights = {k: v for k, v in self.weights.items() if not k.startswith(PROJECTOR)}
        self.weights |= placed

    def change(self, changes: Mapping[str, Lora], others: list[StoredTensor]) -> None:
        """Adds LoRA layers, and the other tensors of their files."""
        if twice := sorted(self.changes.keys() & changes.keys()):
            raise UserError(f"Two adapters change {twice[0]}.")
        self.changes |= changes
        self.unused += others

    @property
    def has_vision(self) -> bool:
        """Whether a vision tower is among the weights."""
        return any(name.startswith(VISION) for name in self.weights)

    def check(self, model: "PreTrainedModel") -> None:
        """
        Holds the parts against the model they shall become.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model on the meta device.

        Raises:
            UserError: listing what is missing, of another shape, or has no place.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            expected.pop(HEAD)
            if HEAD in self.weights:  # the embedding once more
                self.left_out.append(self.weights.pop(HEAD).name)
        missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in self.weights]
        unused = [str(tensor) for name, tensor in self.weights.items() if name not in expected]
        unused += [str(tensor) for tensor in self.unused]
        unused += [str(lora.a) for name, lora in self.changes.items() if name not in expected]
        misshapen = [
            f"{part.a if isinstance(part, Lora) else part}, expected {list(expected[name])}"
            for parts in (self.weights, self.changes)
            for name, part in parts.items()
            if name in expected and part.shape != expected[name]
        ]
        parts = [*self.weights.values(), *(half for lora in self.changes.values() for half in (lora.a, lora.b))]
        problems = {
            "are missing (by their names in the model)": missing,
            "have no place in the model": unused,
            "are of another shape": misshapen,
            "are no plain floating-point numbers": [f"{part}: {part.kind}" for part in parts if not part.is_weight],
        }
        if any(problems.values()):
            raise UserError(
                "The checkpoint is not the model that its config.json describes; nothing was written.\n"
                + "\n".join(_listed(what, found) for what, found in problems.items() if found)
                + "\nCheck that every file was downloaded, and that base, projector and vision tower belong together."
            )

    def read(self, name: str) -> "torch.Tensor":
        """A weight with its change, in the type it is stored in."""
        tensor = self.weights[name].read()
        change = self.changes.get(name)
        return tensor if change is None else change.merged_into(tensor).to(tensor.dtype)


def _listed(what: str, found: list[str]) -> str:
    lines = [f"{len(found)} tensors {what}:", *(f"  {item}" for item in found[:MOST_LISTED])]
    return "\n".join(lines + ([f"  and {len(found) - MOST_LISTED} more"] if len(found) > MOST_LISTED else []))


def model_on_meta(config: "LlavaConfig") -> "PreTrainedModel":
    """The model of a configuration, without memory for its weights."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from medst_trl.policy.prototype_llava import PrototypeLlavaConfig, PrototypeLlavaForConditionalGeneration

    prototype = isinstance(config, PrototypeLlavaConfig)
    with torch.device("meta"):
        return (PrototypeLlavaForConditionalGeneration if prototype else LlavaForConditionalGeneration)(config)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Parts of a vision-language model, by module name: language model, vision tower, projector, token embedding.

transformers exposes them through `get_decoder()`, `get_encoder("image")` and `get_input_embeddings()`; only the
projector has no accessor. It is the module beside the two towers (`multi_modal_projector`, `connector`), or the merger
at the end of the vision tower (Qwen).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .families import check_architecture, tested_families


if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_MERGERS = ("merger", "deepstack_merger_list", "connector")
# What PEFT adds to the names of the parameters that it wraps.
_PEFT_NAMES = re.compile(
    r"^base_model\.model\.|\.(?:original_module|modules_to_save\.[^.]+|base_layer|token_adapter)(?=\.)"
)


@dataclass(frozen=True)
class ModelParts:
    """
    Qualified module names of the parts of a vision-language model.

    Args:
        language_model (`str`): The decoder, for example `"model.language_model"`.
        vision_tower (`str`): The image encoder, for example `"model.vision_tower"`.
        projectors (`tuple[str, ...]`): The modules that map image features into the decoder's space.
        embedding (`str`): The token embedding.
        unused_vision_layers (`tuple[int, ...]`):
            Indices of vision layers after the one whose features are read: they receive no gradient (trl#1936).
    """

    language_model: str
    vision_tower: str
    projectors: tuple[str, ...]
    embedding: str
    unused_vision_layers: tuple[int, ...]

    def part_of(self, parameter: str) -> str:
        """Return `"vision"`, `"projector"` or `"language"` (everything else) for a parameter; PEFT names work too."""
        name = _PEFT_NAMES.sub("", parameter)
        if any(name.startswith(f"{projector}.") for projector in self.projectors):
            return "projector"
        return "vision" if name.startswith(f"{self.vision_tower}.") else "language"


def base_of(model: "nn.Module") -> "PreTrainedModel":
    """Return the model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def on_meta(config: "PreTrainedConfig", **kwargs: Any) -> "PreTrainedModel":
    """Build the vision-language model of a configuration on the meta device, without memory for its weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, **kwargs)


def model_parts(model: "PreTrainedModel | PeftModel") -> ModelParts:
    """
    Find the parts of a vision-language model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language model of any family. The names are those of the model without PEFT's wrapper.

    Returns:
        [`ModelParts`]

    Raises:
        UserError: if the model exposes no vision tower or no projector, or has a Q-Former instead.
    """
    model = base_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    vision, language = model.get_encoder("image"), model.get_decoder()
    if vision is model or id(vision) not in names:
        raise UserError(
            f"{type(model).__name__} exposes no vision tower (`get_encoder('image')`). Is it a vision-language model? "
            f"{tested_families()}"
        )
    check_architecture(model.config, type(model).__name__)
    vision_name = names[id(vision)]
    return ModelParts(
        language_model=names[id(language)],
        vision_tower=vision_name,
        projectors=_projectors(model, vision_name, names[id(language)]),
        embedding=names[id(model.get_input_embeddings())],
        unused_vision_layers=_unused_vision_layers(model, vision),
    )


def _projectors(model: "PreTrainedModel", vision: str, language: str) -> tuple[str, ...]:
    from torch import nn

    parent = vision.rpartition(".")[0]
    siblings = model.get_submodule(parent).named_children()
    named = [(f"{parent}.{name}" if parent else name, module) for name, module in siblings]
    output = model.get_output_embeddings()
    beside = [
        name
        for name, module in named
        if not (f"{language}.".startswith(f"{name}.") or name == vision or module is output)
        and any(True for _ in module.parameters())
    ]
    mergers = {name: module for name, module in model.get_submodule(vision).named_children() if name in _MERGERS}
    inside = []
    for name, module in mergers.items():  # PEFT wraps the members of a list, not the list (Qwen3-VL's deepstack)
        members = [f"{name}.{index}" for index in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
        inside += [f"{vision}.{member}" for member in members]
    if not (beside or inside):
        raise UserError(
            f"{type(model).__name__} has no projector beside or at the end of its vision tower `{vision}`. "
            f"This family is not supported. {tested_families()}"
        )
    return tuple(beside or inside)


def _unused_vision_layers(model: "PreTrainedModel", vision: "nn.Module") -> tuple[int, ...]:
    read = getattr(model.config, "vision_feature_layer", None)
    count = getattr(vision.config, "num_hidden_layers", None)
    if read is None or count is None:
        return ()
    # hidden_states[0] is the embedding, hidden_states[i] the output of layer i - 1
    outputs = [layer if layer >= 0 else count + 1 + layer for layer in ([read] if isinstance(read, int) else read)]
    return tuple(range(max(outputs), count))

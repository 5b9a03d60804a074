# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""An adapter that is trained further keeps its shape: settings that would give it another are refused, not ignored."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.policy.parts import model_parts


if TYPE_CHECKING:
    from peft import PeftModel


_PREFIXES = {"language": "", "vision": "vision_"}  # of the settings for each part


def keep_shape(args: Any, model: "PeftModel") -> str:
    """
    The shape of an adapter that training goes on with, in a sentence.

    Args:
        args (dataclass):
            A stage's arguments with `lora_r`, `lora_alpha`, `lora_dropout`, `vision_lora_r`, `vision_lora_alpha`.
        model ([`~peft.PeftModel`]):
            The adapter on its base.

    Raises:
        UserError: if one of these was set (is not the default) to another value than the adapter's.
    """
    own = _shape(model)
    defaults = {field.name: field.default for field in fields(args)}
    other = [name for name in own if getattr(args, name) not in (defaults[name], own[name])]
    if other:
        raise UserError(
            f"{args.model_name_or_path} is an adapter with "
            + ", ".join(f"{name} {own[name]}" for name in other)
            + ", which training goes on with; "
            + ", ".join(f"{name} {getattr(args, name)}" for name in other)
            + " would need a new one. Leave the setting out, or start from the base."
        )
    return (
        "Training goes on with the adapter's own " + ", ".join(f"{name} {value}" for name, value in own.items()) + "."
    )


def _shape(model: "PeftModel") -> dict[str, float]:
    name, part_of = model.active_adapter, model_parts(model.get_base_model()).part_of
    # Of the layers, not of their weights: under ZeRO-3 those have no shape.
    layers = {part_of(path): layer for path, layer in model.named_modules() if name in getattr(layer, "lora_A", ())}
    shape = {f"{prefix}lora_r": layers[part].r[name] if part in layers else 0 for part, prefix in _PREFIXES.items()}
    for part, layer in layers.items():
        shape[f"{_PREFIXES[part]}lora_alpha"] = layer.lora_alpha[name]
    return shape | ({"lora_dropout": model.peft_config[name].lora_dropout} if layers else {})

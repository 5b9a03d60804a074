# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Translate an original configuration to that of Hugging Face's model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from medst_trl.base.errors import UserError

from .files import read_json


if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlavaConfig

PROJECTORS = ("mlp2x_gelu", "cluster")
LANGUAGE_MODELS = ("llava", "llava_llama", "llama")  # the last as the base of a training output
# Which positions of the vision tower give the features: all, or those without the class token.
_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def llava_config(original: dict[str, Any], vision: "CLIPVisionConfig", rows: int) -> "LlavaConfig":
    """
    Build the configuration of a model.

    Args:
        original (`dict`):
            Original config.json; for a training output on a converted base, that of the base with the projector's keys
            of the training output.
        vision ([`~transformers.CLIPVisionConfig`]):
            Configuration of the vision tower.
        rows (`int`):
            Number of rows of the embedding.

    Returns:
        [`~transformers.LlavaConfig`] or [`PrototypeLlavaConfig`]

    Raises:
        UserError: if the projector or another setting is unknown.
    """
    from transformers import LlamaConfig, LlavaConfig

    from medst_trl.policy.prototype_llava import PrototypeLlavaConfig

    _check(original, vision)
    text = original.get("text_config") or original
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling", "head_dim"}
    kept = {key: value for key, value in text.items() if key in known - {"architectures", "dtype", "model_type"}}
    config_class = PrototypeLlavaConfig if original["mm_projector_type"] == "cluster" else LlavaConfig
    side, layer = vision.image_size // vision.patch_size, original.get("mm_vision_select_layer", -2)
    strategy = _STRATEGIES[original.get("mm_vision_select_feature") or "patch"]
    with _explained("config.json"):
        return config_class(
            vision_config=vision.to_dict(),
            text_config={**kept, "model_type": "llama", "vocab_size": rows},
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            image_seq_length=side**2 + (strategy == "full"),
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        )


@contextmanager
def _explained(file: str) -> Iterator[None]:
    """Turn the errors for values that no model can have into a [`UserError`]."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file} describes an impossible model: {' '.join(str(error).split())}") from error


def _check(original: dict[str, Any], vision: "CLIPVisionConfig") -> None:
    projector = original.get("mm_projector_type")
    if projector not in PROJECTORS:
        raise UserError(
            f"The projector of this checkpoint is of the type {projector!r} (mm_projector_type in config.json). Only "
            f"{' and '.join(PROJECTORS)} can be converted: LLaVA-1.5, SQ-LLaVA, STLLaVA-Med."
        )
    layers, count = original.get("mm_vision_select_layer", -2), vision.num_hidden_layers + 1
    layers = layers if isinstance(layers, list) else [layers]
    refused = {
        "mm_vision_select_feature": (original.get("mm_vision_select_feature") or "patch") not in _STRATEGIES,
        "mm_use_im_start_end": bool(original.get("mm_use_im_start_end")),
        "image_aspect_ratio": original.get("image_aspect_ratio") not in (None, "square", "pad"),
        "hidden_act": original.get("hidden_act", "silu") != "silu",
        # hidden states are those of the layers, and their input
        "mm_vision_select_layer": not all(isinstance(layer, int) and -count <= layer < count for layer in layers),
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{key} is {original[key]!r} in config.json, which no model like LLaVA-1.5 has.")
    width = original.get("mm_hidden_size", vision.hidden_size)
    if width != vision.hidden_size:
        raise UserError(
            f"The projector reads features of size {width} (mm_hidden_size), but the vision tower writes "
            f"{vision.hidden_size}. Give the tower that the checkpoint was trained with as --vision_tower."
        )


def vision_config(directory: Path) -> "CLIPVisionConfig":
    """
    Read the configuration of the vision tower from a CLIP directory.

    Raises:
        UserError: if there is none, or it is of another family.
    """
    from transformers import CLIPVisionConfig

    content = read_json(directory / "config.json", "the vision tower's configuration")
    content = content.get("vision_config", content) if content.get("model_type") == "clip" else content
    if content.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(
            f"{directory} holds a model of the type {content['model_type']!r}. The vision tower has to be CLIP."
        )
    known = CLIPVisionConfig().to_dict().keys() - {"model_type", "dtype", "transformers_version"}
    with _explained(str(directory / "config.json")):
        return CLIPVisionConfig(**{key: value for key, value in content.items() if key in known})

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face configuration that says what an original one does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from medst_trl.base.errors import UserError


if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlavaConfig

PROJECTORS = ("mlp2x_gelu", "cluster")
LANGUAGE_MODELS = ("llava", "llava_llama", "llama")  # the last as the base of a training output
# Of which positions of the vision tower the features are: all, or without the class token.
_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def llava_config(original: dict[str, Any], vision: "CLIPVisionConfig", rows: int) -> "LlavaConfig":
    """
    Configuration of a model.

    Args:
        original (`dict`):
            Original config.json; that of a converted base with the projector's keys of its training output.
        vision ([`~transformers.CLIPVisionConfig`]):
            Configuration of the vision tower.
        rows (`int`):
            Rows of the embedding.

    Returns:
        [`~transformers.LlavaConfig`] or [`PrototypeLlavaConfig`]

    Raises:
        UserError: if the projector or another setting is of a kind that is not known here.
    """
    from transformers import LlamaConfig, LlavaConfig

    from medst_trl.policy.prototype_llava import PrototypeLlavaConfig

    _check(original, vision)
    text = original.get("text_config") or original
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling", "head_dim"}
    kept = {key: value for key, value in text.items() if key in known - {"architectures", "dtype", "model_type"}}
    cls = PrototypeLlavaConfig if original["mm_projector_type"] == "cluster" else LlavaConfig
    side, layer = vision.image_size // vision.patch_size, original.get("mm_vision_select_layer", -2)
    strategy = _STRATEGIES[original.get("mm_vision_select_feature") or "patch"]
    with _explained("config.json"):
        return cls(
            vision_config=vision.to_dict(),
            text_config={**kept, "model_type": "llama", "vocab_size": rows},
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            image_seq_length=side**2 + (strategy == "full"),
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        )


@contextmanager
def _explained(file: str) -> Iterator[None]:
    """Values that no model can have, as [`UserError`]."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{file} describes no model that there can be: {told}") from error


def _check(original: dict[str, Any], vision: "CLIPVisionConfig") -> None:
    projector = original.get("mm_projector_type")
    if projector not in PROJECTORS:
        raise UserError(
            f"The projector of this checkpoint is of the type {projector!r} (mm_projector_type in config.json). "
            f"Converted are {' and '.join(PROJECTORS)}: LLaVA-1.5, SQ-LLaVA, STLLaVA-Med."
        )
    refused = {
        "mm_vision_select_feature": (original.get("mm_vision_select_feature") or "patch") not in _STRATEGIES,
        "mm_use_im_start_end": bool(original.get("mm_use_im_start_end")),
        "image_aspect_ratio": original.get("image_aspect_ratio") not in (None, "square", "pad"),
        "hidden_act": original.get("hidden_act", "silu") != "silu",
        "mm_vision_select_layer": not _are_layers(original.get("mm_vision_select_layer", -2), vision),
    }
    if wrong := [key for key, is_refused in refused.items() if is_refused]:
        key = wrong[0]
        raise UserError(f"{key} is {original[key]!r} in config.json, which no model of LLaVA-1.5's kind has.")
    width = original.get("mm_hidden_size", vision.hidden_size)
    if width != vision.hidden_size:
        raise UserError(
            f"The projector reads features of size {width} (mm_hidden_size), but the vision tower writes "
            f"{vision.hidden_size}. Give the tower that the checkpoint was trained with as --vision_tower."
        )


def _are_layers(selected: Any, vision: "CLIPVisionConfig") -> bool:
    """Whether the hidden states that a projector reads exist: those of the layers, and their input."""
    count = vision.num_hidden_layers + 1
    layers = selected if isinstance(selected, list) else [selected]
    return all(isinstance(layer, int) and -count <= layer < count for layer in layers)


def vision_config(folder: Path) -> "CLIPVisionConfig":
    """
    Configuration of the vision tower in a CLIP folder.

    Raises:
        UserError: if there is none, or it is of another family.
    """
    from transformers import CLIPVisionConfig

    from .sources import read_json

    content = read_json(folder / "config.json", "the vision tower's configuration")
    content = content.get("vision_config", content) if content.get("model_type") == "clip" else content
    if content.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(
            f"{folder} holds a model of the type {content['model_type']!r}; the vision tower has to be CLIP."
        )
    known = CLIPVisionConfig().to_dict().keys() - {"model_type", "dtype", "transformers_version"}
    with _explained(str(folder / "config.json")):
        return CLIPVisionConfig(**{key: value for key, value in content.items() if key in known})

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint of the original layout: its configuration, and its pieces wherever they are published."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from medst_trl.base.errors import UserError
from medst_trl.policy.parts import on_meta
from medst_trl.policy.prototype_llava import PrototypeLlavaConfig

from .assembling import EMBEDDING, Parts
from .files import (
    ORIGINAL_MODEL_FILES,
    PROJECTOR_FILES,
    TOKENIZER_FILES,
    StoredTensor,
    local_directory,
    open_directory,
    open_weights,
    read_json,
)


VISION_LORA = "Vit-lora"  # the first implementation's name
LANGUAGE_MODELS = ("llava", "llava_llama", "llama")  # the last as the base of a training output
# Type of the projector in the original configuration, by type of the converted model.
_PROJECTOR_OF = {"llava": "mlp2x_gelu", "prototype_llava": "cluster"}
# Which positions of the vision tower give the features: all, or those without the class token.
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_NO_WEIGHTS = f"holds no weights ({' or '.join(ORIGINAL_MODEL_FILES)}, or shards with their index)."


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint of the original layout, opened.

    Args:
        original (`dict`): Its configuration in the original's keys.
        config ([`~transformers.LlavaConfig`] or [`PrototypeLlavaConfig`]): The same for Hugging Face's model.
        parts ([`Parts`]): Its tensors, none of them read yet. They are exactly those of the model.
        tokenizer_directory (`Path`): Directory of its tokenizer.
        vision_directory (`Path`): Directory of the vision tower.
        has_vision_lora (`bool`): Whether the vision tower was trained by LoRA.
    """

    original: dict[str, Any]
    config: LlavaConfig
    parts: Parts
    tokenizer_directory: Path
    vision_directory: Path
    has_vision_lora: bool


def open_checkpoint(
    source: str, base: str | None, projector: str | None, vision_tower: str | None, vision_lora: str | None
) -> Checkpoint:
    """
    Open everything that makes up a model. The arguments are those of [`convert_checkpoint`].

    Raises:
        UserError: if a piece is missing, damaged, holds code, is of an unknown kind, or a tensor does not fit.
    """
    directory = local_directory(source, "The checkpoint")
    base_directory = _base_directory(directory, base)
    original, parts = original_config(directory, base_directory), Parts()
    parts.put(open_directory(base_directory, ORIGINAL_MODEL_FILES, _NO_WEIGHTS))
    vision_directory, vision = _vision_tower(original, vision_tower, parts, base_directory)
    if directory != base_directory:
        parts.change(directory)
        # Without its own projector that of the base would stay, and nothing would be missing.
        lacks = f"lacks the projector, which was trained in full ({PROJECTOR_FILES[-1]}). Download it, or give the "
        lacks += "projector as --projector."
        parts.put(open_directory(directory, PROJECTOR_FILES, lacks if projector is None else None))
    if projector is not None:
        parts.put(_projector(projector))
    lora = local_directory(vision_lora, "The vision tower's LoRA") if vision_lora else directory / VISION_LORA
    if lora.is_dir():
        parts.change(lora)
    embedding = parts.weights.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError("The checkpoint has no embedding (model.embed_tokens.weight), so it is not a language model.")
    config = llava_config(original, vision, rows=embedding.shape[0])  # not vocab_size: embeddings get resized
    parts.check(on_meta(config))
    has_tokenizer = any((directory / name).is_file() for name in TOKENIZER_FILES)
    tokenizer_directory = directory if has_tokenizer else base_directory
    return Checkpoint(original, config, parts, tokenizer_directory, vision_directory, lora.is_dir())


def _base_directory(directory: Path, base: str | None) -> Path:
    is_training_output = (directory / "adapter_config.json").is_file()
    if is_training_output and base is None:
        named = read_json(directory / "adapter_config.json", "LoRA settings").get("base_model_name_or_path")
        raise UserError(
            f"{directory} is a training output. Give the model it was trained from as --base"
            + (f" (it names {named!r})." if named else ".")
        )
    if base is not None and not is_training_output:
        raise UserError(
            f"--base is for training outputs, and {directory} has no adapter_config.json. Convert a full model "
            "without it."
        )
    return local_directory(base, "The base") if base is not None else directory


def original_config(directory: Path, base_directory: Path) -> dict[str, Any]:
    """
    Read the original configuration: the language model's from the base, the rest as the model was trained with it.

    Raises:
        UserError: if it is missing, damaged, or of an unknown kind.
    """
    config = read_json(base_directory / "config.json", "the model's configuration")
    if "text_config" in config:
        config = _as_original(config, base_directory, directory)
    elif config.get("model_type") not in LANGUAGE_MODELS:
        raise UserError(
            f"{base_directory} is a model of the type {config.get('model_type')!r}. Only models like LLaVA-1.5 on "
            f"Llama or Vicuna can be converted: {', '.join(LANGUAGE_MODELS)}."
        )
    if directory != base_directory and (directory / "config.json").is_file():
        own = read_json(directory / "config.json", "the model's configuration")
        config |= {key: own[key] for key in own if key.startswith("mm_") or key == "image_aspect_ratio"}
    return config


def _as_original(config: dict[str, Any], base_directory: Path, directory: Path) -> dict[str, Any]:
    """Return the configuration of a converted base in the original's keys."""
    projector = _PROJECTOR_OF.get(config.get("model_type"))
    are_parts = isinstance(config["text_config"], dict) and isinstance(config.get("vision_config"), dict)
    if projector is None or directory == base_directory or not are_parts:
        raise UserError(
            f"{base_directory} is in a Hugging Face layout already ({config.get('model_type')}). Other commands read "
            "it directly; here it can only be the --base of a training output."
        )
    images = read_json(base_directory / "processor_config.json").get("image_processor", {})
    return {
        "text_config": config["text_config"] | {"tie_word_embeddings": config.get("tie_word_embeddings", False)},
        "vision_config": config["vision_config"],
        "mm_projector_type": projector,
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if config.get("vision_feature_select_strategy") == "full" else "patch",
        "image_aspect_ratio": "pad" if images.get("do_pad") else "square",
    }


def _projector(projector: str) -> list[StoredTensor]:
    if Path(projector).is_file():
        return open_weights([Path(projector)])
    lacks = f"holds no projector ({', '.join(PROJECTOR_FILES)}). Give the file itself."
    return open_directory(local_directory(projector, "The projector"), PROJECTOR_FILES, lacks)


def _vision_tower(
    config: dict[str, Any], vision_tower: str | None, parts: Parts, base_directory: Path
) -> tuple[Path, CLIPVisionConfig]:
    """Find the vision tower's directory and configuration. Add its weights if the checkpoint has none."""
    is_converted = isinstance(config.get("vision_config"), dict)
    if parts.has_vision and vision_tower is None and is_converted:
        return base_directory, CLIPVisionConfig(**config["vision_config"])
    source = vision_tower or config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(source, str) or not source:
        raise UserError("config.json names no mm_vision_tower. Give the CLIP directory or Hub id as --vision_tower.")
    try:
        directory = local_directory(source, "The vision tower", weights=not parts.has_vision)
    except UserError as error:
        raise UserError(f"{error} Give the CLIP directory or Hub id as --vision_tower.") from error
    if not parts.has_vision:
        parts.put(open_directory(directory, ORIGINAL_MODEL_FILES, _NO_WEIGHTS), in_clip=True)
    return directory, vision_config(directory)


# --- Configurations --------------------------------------------------------------------------------------------------


def llava_config(original: dict[str, Any], vision: CLIPVisionConfig, rows: int) -> LlavaConfig:
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


def _check(original: dict[str, Any], vision: CLIPVisionConfig) -> None:
    projector = original.get("mm_projector_type")
    if projector not in _PROJECTOR_OF.values():
        raise UserError(
            f"The projector of this checkpoint is of the type {projector!r} (mm_projector_type in config.json). Only "
            f"{' and '.join(_PROJECTOR_OF.values())} can be converted: LLaVA-1.5, SQ-LLaVA, STLLaVA-Med."
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
            raise UserError(
                f"{key} is {original[key]!r} in config.json. Only architectures like LLaVA-1.5 can be converted."
            )
    width = original.get("mm_hidden_size", vision.hidden_size)
    if width != vision.hidden_size:
        raise UserError(
            f"The projector reads features of size {width} (mm_hidden_size), but the vision tower writes "
            f"{vision.hidden_size}. Give the tower that the checkpoint was trained with as --vision_tower."
        )


def vision_config(directory: Path) -> CLIPVisionConfig:
    """
    Read the configuration of the vision tower from a CLIP directory.

    Raises:
        UserError: if there is none, or it is of another family.
    """
    content = read_json(directory / "config.json", "the vision tower's configuration")
    content = content.get("vision_config", content) if content.get("model_type") == "clip" else content
    if content.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(
            f"{directory} holds a model of the type {content['model_type']!r}. The vision tower must be CLIP."
        )
    known = CLIPVisionConfig().to_dict().keys() - {"model_type", "dtype", "transformers_version"}
    with _explained(str(directory / "config.json")):
        return CLIPVisionConfig(**{key: value for key, value in content.items() if key in known})

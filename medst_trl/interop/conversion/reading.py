# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint of the original layout: its pieces, wherever they are published."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .assembling import Parts
from .files import MODEL_FILES, PROJECTOR_FILES, find_weights, local_directory, open_weights, read_json
from .model_config import LANGUAGE_MODELS, vision_config
from .processor import TOKENIZER_FILES


if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

VISION_LORA = "Vit-lora"  # the first implementation's name
_PROJECTOR_OF = {"llava": "mlp2x_gelu", "prototype_llava": "cluster"}


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint of the original layout, opened.

    Args:
        config (`dict`): Its configuration in the original's keys.
        vision ([`~transformers.CLIPVisionConfig`]): Configuration of its vision tower.
        parts ([`Parts`]): Its tensors, none of them read yet.
        tokenizer_directory (`Path`): Directory of its tokenizer.
        vision_directory (`Path`): Directory of the vision tower.
        has_vision_lora (`bool`): Whether the vision tower was trained by LoRA.
    """

    config: dict[str, Any]
    vision: "CLIPVisionConfig"
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
        UserError: if a piece is missing, damaged, holds code, or is of an unknown kind.
    """
    directory = local_directory(source, "The checkpoint")
    base_directory = _base_directory(directory, base)
    config = original_config(directory, base_directory)
    parts = Parts()
    parts.put(open_weights(_model_files(base_directory)))
    vision_directory, vision = _vision_tower(config, vision_tower, parts, base_directory)
    if directory != base_directory:
        parts.change(directory)
        parts.put(open_weights(_trained_in_full(directory, projector)))
    if projector is not None:
        parts.put(open_weights(_projector_files(projector)))
    lora = local_directory(vision_lora, "The vision tower's LoRA") if vision_lora else directory / VISION_LORA
    if lora.is_dir():
        parts.change(lora)
    has_tokenizer = any((directory / name).is_file() for name in TOKENIZER_FILES)
    tokenizer_directory = directory if has_tokenizer else base_directory
    return Checkpoint(config, vision, parts, tokenizer_directory, vision_directory, lora.is_dir())


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
    """The configuration of a converted base in the original's keys."""
    projector = _PROJECTOR_OF.get(config.get("model_type"))
    are_parts = isinstance(config["text_config"], dict) and isinstance(config.get("vision_config"), dict)
    if projector is None or directory == base_directory or not are_parts:
        raise UserError(
            f"{base_directory} is in a Hugging Face layout already ({config.get('model_type')}). Other commands take "
            "it as it is; here it can be the --base of a training output."
        )
    path = base_directory / "processor_config.json"
    images = (read_json(path, "the processor") if path.is_file() else {}).get("image_processor", {})
    return {
        "text_config": config["text_config"] | {"tie_word_embeddings": config.get("tie_word_embeddings", False)},
        "vision_config": config["vision_config"],
        "mm_projector_type": projector,
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if config.get("vision_feature_select_strategy") == "full" else "patch",
        "image_aspect_ratio": "pad" if images.get("do_pad") else "square",
    }


def _model_files(directory: Path) -> list[Path]:
    files = find_weights(directory, MODEL_FILES)
    if not files:
        raise UserError(f"{directory} holds no weights ({' or '.join(MODEL_FILES)}, or shards with their index).")
    return files


def _trained_in_full(directory: Path, projector: str | None) -> list[Path]:
    """A training output's projector. Without it, that of the base would stay and nothing would be missing."""
    files = find_weights(directory, PROJECTOR_FILES)
    if not files and projector is None:
        raise UserError(
            f"{directory} lacks the projector, which was trained in full ({PROJECTOR_FILES[-1]}). Download it, or "
            "give the projector as --projector."
        )
    return files


def _projector_files(projector: str) -> list[Path]:
    if Path(projector).is_file():
        return [Path(projector)]
    directory = local_directory(projector, "The projector")
    files = find_weights(directory, PROJECTOR_FILES)
    if not files:
        raise UserError(f"{directory} holds no projector ({', '.join(PROJECTOR_FILES)}). Give the file itself.")
    return files


def _vision_tower(
    config: dict[str, Any], vision_tower: str | None, parts: Parts, base_directory: Path
) -> "tuple[Path, CLIPVisionConfig]":
    """The vision tower's directory and configuration. Its weights are added if the checkpoint holds none."""
    from transformers import CLIPVisionConfig

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
        parts.put(open_weights(_model_files(directory)), in_clip=True)
    return directory, vision_config(directory)

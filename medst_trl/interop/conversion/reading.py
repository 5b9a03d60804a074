# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a conversion reads: the pieces of a checkpoint, wherever they are published."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .assembling import Parts
from .lora import read_lora
from .model_config import LANGUAGE_MODELS, vision_config
from .sources import local_folder, read_json
from .tokenizer import TOKENIZER_FILES
from .weights import MODEL_FILES, PROJECTOR_FILES, find_weights, open_weights


if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

VISION_LORA = "Vit-lora"  # as the first implementation calls it


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint of the original layout, opened.

    Args:
        config (`dict`): Its configuration in the original's keys.
        vision ([`~transformers.CLIPVisionConfig`]): Configuration of its vision tower.
        parts ([`Parts`]): Its tensors, none of them read yet.
        tokenizer_folder (`Path`): Where its tokenizer is.
        vision_folder (`Path`): Folder of the vision tower.
        has_vision_lora (`bool`): Whether the vision tower was trained by LoRA.
    """

    config: dict[str, Any]
    vision: "CLIPVisionConfig"
    parts: Parts
    tokenizer_folder: Path
    vision_folder: Path
    has_vision_lora: bool


def open_checkpoint(
    source: str, base: str | None, projector: str | None, vision_tower: str | None, vision_lora: str | None
) -> Checkpoint:
    """
    Opens everything that makes up a model. The arguments are those of [`convert_checkpoint`].

    Raises:
        UserError: if a piece is missing, damaged, holds code, or is of an unknown kind.
    """
    folder = local_folder(source, "The checkpoint")
    base_folder = _base_folder(folder, base)
    config = original_config(folder, base_folder)
    parts = Parts()
    parts.put(open_weights(_model_files(base_folder)))
    vision_folder, vision = _vision_tower(config, vision_tower, parts, base_folder)
    if folder != base_folder:
        parts.change(*read_lora(folder))
        parts.put(open_weights(_trained_in_full(folder, projector)))
    if projector is not None:
        parts.put(open_weights(_projector_files(projector)))
    lora_folder = local_folder(vision_lora, "The vision tower's LoRA") if vision_lora else folder / VISION_LORA
    has_vision_lora = lora_folder.is_dir()
    if has_vision_lora:
        parts.change(*read_lora(lora_folder))
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer_folder = folder if has_tokenizer else base_folder
    return Checkpoint(config, vision, parts, tokenizer_folder, vision_folder, has_vision_lora)


def _base_folder(folder: Path, base: str | None) -> Path:
    is_training_output = (folder / "adapter_config.json").is_file()
    if is_training_output and base is None:
        named = read_json(folder / "adapter_config.json", "LoRA settings").get("base_model_name_or_path")
        raise UserError(
            f"{folder} is a training output: give the model it was trained from as --base"
            + (f" (it names {named!r})." if named else ".")
        )
    if base is not None and not is_training_output:
        raise UserError(
            f"--base is for training outputs, and {folder} has no adapter_config.json. Convert a full model without."
        )
    return local_folder(base, "The base") if base is not None else folder


def original_config(folder: Path, base_folder: Path) -> dict[str, Any]:
    """The original configuration: the language model's as the base has it, the rest as it was trained with."""
    config = read_json(base_folder / "config.json", "what the model is like")
    if "text_config" in config:
        config = _as_original(config, base_folder, folder)
    elif config.get("model_type") not in LANGUAGE_MODELS:
        raise UserError(
            f"{base_folder} is a model of the type {config.get('model_type')!r}. Converted are those of LLaVA-1.5's "
            f"kind on Llama or Vicuna: {', '.join(LANGUAGE_MODELS)}."
        )
    if folder != base_folder and (folder / "config.json").is_file():
        own = read_json(folder / "config.json", "what the model is like")
        config |= {key: own[key] for key in own if key.startswith("mm_") or key == "image_aspect_ratio"}
    return config


def _as_original(config: dict[str, Any], base_folder: Path, folder: Path) -> dict[str, Any]:
    projector = {"llava": "mlp2x_gelu", "prototype_llava": "cluster"}.get(config.get("model_type"))
    are_parts = isinstance(config["text_config"], dict) and isinstance(config.get("vision_config"), dict)
    if projector is None or folder == base_folder or not are_parts:
        raise UserError(
            f"{base_folder} is in a Hugging Face layout already ({config.get('model_type')}): give it to the other "
            "commands as it is, or as --base of a training output."
        )
    path = base_folder / "processor_config.json"
    images = (read_json(path, "the processor") if path.is_file() else {}).get("image_processor", {})
    return {
        "text_config": config["text_config"] | {"tie_word_embeddings": config.get("tie_word_embeddings", False)},
        "vision_config": config["vision_config"],
        "mm_projector_type": projector,
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if config.get("vision_feature_select_strategy") == "full" else "patch",
        "image_aspect_ratio": "pad" if images.get("do_pad") else "square",
    }


def _model_files(folder: Path) -> list[Path]:
    files = find_weights(folder, MODEL_FILES)
    if not files:
        raise UserError(f"{folder} holds no weights ({' or '.join(MODEL_FILES)}, or shards of them with their index).")
    return files


def _trained_in_full(folder: Path, projector: str | None) -> list[Path]:
    """A training output's projector. Without it, that of the base would stay and nothing would be missing."""
    files = find_weights(folder, PROJECTOR_FILES)
    if not files and projector is None:
        raise UserError(
            f"{folder} lacks what was trained in full ({PROJECTOR_FILES[-1]}). Download it, or give the projector as "
            "--projector."
        )
    return files


def _projector_files(projector: str) -> list[Path]:
    if Path(projector).is_file():
        return [Path(projector)]
    folder = local_folder(projector, "The projector")
    files = find_weights(folder, PROJECTOR_FILES)
    if not files:
        raise UserError(f"{folder} holds no projector ({', '.join(PROJECTOR_FILES)}). Give the file itself.")
    return files


def _vision_tower(
    config: dict[str, Any], vision_tower: str | None, parts: Parts, base_folder: Path
) -> "tuple[Path, CLIPVisionConfig]":
    """The vision tower's folder and configuration; its weights are added where the checkpoint holds none."""
    from transformers import CLIPVisionConfig

    if (
        parts.has_vision and vision_tower is None and isinstance(config.get("vision_config"), dict)
    ):  # of a converted base
        return base_folder, CLIPVisionConfig(**config["vision_config"])
    source = vision_tower or config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(source, str) or not source:
        raise UserError("config.json names no mm_vision_tower: give the CLIP folder or Hub id as --vision_tower.")
    try:
        folder = local_folder(source, "The vision tower", weights=not parts.has_vision)
    except UserError as error:
        raise UserError(f"{error} Give the CLIP folder or Hub id as --vision_tower.") from error
    if not parts.has_vision:
        parts.put(open_weights(_model_files(folder)), in_clip=True)
    return folder, vision_config(folder)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fit a processor to its model: it has to write one image token for each feature that the model makes of an image.

Exports of older versions lack settings that processors now need, or have others: LLaVA's `patch_size`,
`vision_feature_select_strategy` and `num_additional_image_tokens`. All follow from the model's configuration, so they
are set from there, and a saved policy has them. What the model would make of an image is counted on the meta device,
without weights.
"""

import warnings
from collections.abc import Iterator
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig, ProcessorMixin

from medst_trl.base.errors import UserError


_SIDE = 64  # pixels of the image that is counted
_LENGTHS = ("image_seq_length", "image_seq_len")  # names of a fixed number of tokens per image or tile


def fit_processor(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> None:
    """
    Give a processor the settings that follow from its model's configuration, in place, with a warning if they differ.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of a vision-language model.
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.
        name (`str`):
            Directory or Hub id of the processor, for messages.

    Raises:
        UserError: if the processor cannot process an image, or does not fit the model even then. Families whose images
            have any size, and unknown ones, are not counted.
    """
    changes = {}
    for part, wanted in _wanted(processor, config):
        own = {key: value for key, value in wanted.items() if value is not None and hasattr(part, key)}
        for key, value in own.items():
            if _plain(getattr(part, key)) != _plain(value):
                changes[key] = value
                setattr(part, key, value)
    if changes.keys() & set(_LENGTHS):  # Gemma 3 makes its placeholder when it is created
        settings = {key: getattr(processor, key, None) for key in signature(type(processor).__init__).parameters}
        processor.__init__(**{key: value for key, value in settings.items() if value is not None})
    if not isinstance(getattr(processor, "num_additional_image_tokens", 0), int):
        processor.num_additional_image_tokens = 0  # counted below
    tokens, features = _count(processor, config, name)
    if features and not tokens:
        raise UserError(
            f"The processor of {name!r} writes {processor.image_token!r} for images, which is not the token "
            f"{config.image_token_id} of the model's config.json (image_token_id). Correct one of them."
        )
    if features not in (None, tokens) and hasattr(processor, "num_additional_image_tokens"):
        changes["num_additional_image_tokens"] = processor.num_additional_image_tokens + features - tokens
        processor.num_additional_image_tokens = changes["num_additional_image_tokens"]
        tokens, features = _count(processor, config, name)
    if features not in (None, tokens):
        raise UserError(
            f"The processor of {name!r} writes {tokens} image tokens for an image of which the model makes {features} "
            f"features. {_advice(processor)}"
        )
    if changes:
        problem = f"The processor of {name!r} does not fit its model."
        listed = ", ".join(f"{key} {value}" for key, value in sorted(changes.items()))
        warnings.warn(f"{problem} Set from the model's config.json: {listed}.", stacklevel=3)


def _wanted(processor: ProcessorMixin, config: PreTrainedConfig) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the parts of a processor, with settings that follow from the model's configuration."""
    vision, images = getattr(config, "vision_config", None), getattr(processor, "image_processor", None)
    patch = getattr(vision, "patch_size", None)
    if hasattr(processor, "vision_feature_select_strategy"):  # LLaVA. For others, a patch may be several of the tower
        strategy = getattr(config, "vision_feature_select_strategy", None)
        yield processor, {"patch_size": patch, "vision_feature_select_strategy": strategy}
    yield processor, dict.fromkeys(_LENGTHS, _image_length(config, images))
    for part in (images, getattr(processor, "video_processor", None)):
        if hasattr(part, "merge_size"):  # Qwen-VL
            names = {"merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
            yield part, {"patch_size": patch} | {key: getattr(vision, name, None) for key, name in names.items()}
    grid, tiles = getattr(config, "image_grid_pinpoints", None), getattr(vision, "max_num_tiles", None)
    yield images, {"image_grid_pinpoints": grid, "max_image_tiles": tiles}  # LLaVA-NeXT, Llama 3.2-Vision


def _image_length(config: PreTrainedConfig, images: Any) -> int | None:
    """Return the number of tokens of an image or tile: Gemma 3's, InternVL's, or Idefics3's and SmolVLM's."""
    if (length := getattr(config, "mm_tokens_per_image", None)) is not None:
        return length
    scale, ratio = getattr(config, "scale_factor", None), getattr(config, "downsample_ratio", None)
    if not (scale or ratio) or not hasattr(config, "vision_config"):
        return None
    side, patch = (_plain(getattr(config.vision_config, key)) for key in ("image_size", "patch_size"))
    side, patch = (size[0] if isinstance(size, list) else size for size in (side, patch))
    side = (getattr(images, "max_image_size", None) or {}).get("longest_edge", side)
    return int((side // patch * (ratio or 1 / scale)) ** 2)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _count(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> tuple[int, int | None]:
    """Return the number of image tokens of an image, and of the features that the model makes of it if known."""
    if not (hasattr(processor, "image_token") and _advice(processor)):
        return 0, None
    try:
        image = Image.new("RGB", (_SIDE, _SIDE))
        inputs = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        problem = f"The processor of {name!r} cannot process an image ({error})."
        raise UserError(f"{problem} {_advice(processor)}") from error
    tokens = int((inputs["input_ids"] == getattr(config, "image_token_id", None)).sum())
    try:
        with torch.device("meta"):
            model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](deepcopy(config)).base_model
            known = signature(model.get_image_features).parameters.keys() & inputs.keys()
            # Sizes of images are numbers that decide on shapes.
            wanted = {key: inputs[key].to("meta") if inputs[key].is_floating_point() else inputs[key] for key in known}
            features = model.get_image_features(**wanted, return_dict=True).pooler_output
    except (KeyError, AttributeError, TypeError, NotImplementedError):
        return tokens, None
    except (ValueError, RuntimeError) as error:
        if "meta" in str(error):  # shapes depend on values
            return tokens, None
        raise UserError(
            f"The model cannot read an image of the processor of {name!r} ({error}). Set size and crop_size in its "
            "preprocessor_config.json or processor_config.json to the image_size of the model's vision_config."
        ) from error
    return tokens, sum(rows.numel() // rows.shape[-1] for rows in tree_leaves(features))


def _advice(processor: ProcessorMixin) -> str:
    settings = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", *_LENGTHS)
    own = [f"{key} (now {getattr(processor, key)})" for key in settings if hasattr(processor, key)]
    return f"Set {', '.join(own)} in its processor_config.json to fit the model's config.json." if own else ""

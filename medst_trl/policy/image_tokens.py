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
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig, ProcessorMixin
from transformers.modeling_utils import set_zero3_state

from medst_trl.base.errors import UserError

from .families import FAMILIES, family_of


_SIDE = 64  # pixels of the image that is counted
_SETTINGS = (
    "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_seq_length", "image_seq_len",
    "merge_size", "temporal_patch_size",
)  # fmt: skip


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
    before = _settings(processor)
    _set_from(config, processor)
    tokens, features = _count(processor, config, name)
    if tokens and features not in (None, tokens):
        if hasattr(processor, "num_additional_image_tokens"):
            processor.num_additional_image_tokens += features - tokens  # one for CLIP's class token
        if hasattr(processor, "image_seq_length"):
            processor.image_seq_length = processor.image_seq_length * features // tokens
        # Gemma 3 makes its placeholder when it is created.
        arguments = {key: getattr(processor, key, None) for key in signature(type(processor).__init__).parameters}
        processor.__init__(**{key: value for key, value in arguments.items() if value is not None})
        tokens, features = _count(processor, config, name)
    after = _settings(processor)
    if features not in (None, tokens):
        raise UserError(
            f"The processor of {name!r} writes {tokens} image tokens ({processor.image_token}) for an image of which "
            f"the model makes {features} features. Copy the processor of the model, or set the image_token_id of its "
            f"config.json and {', '.join(after)} of its processor_config.json."
        )
    if before != after:
        changes = ", ".join(f"{key} {value}" for key, value in after.items() if before[key] != value)
        warnings.warn(f"The processor of {name!r} did not fit its model and has now {changes}.", stacklevel=3)


def _settings(processor: ProcessorMixin) -> dict[str, Any]:
    """Return the settings on which the number of image tokens depends."""
    images = getattr(processor, "image_processor", None)
    values = [(key, getattr(part, key, None)) for part in (images, processor) for key in _SETTINGS]
    return {key: value for key, value in values if value is not None or hasattr(processor, key)}


def _set_from(config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Set what a model's configuration determines."""
    vision, images = getattr(config, "vision_config", None), getattr(processor, "image_processor", None)
    values = {
        "patch_size": getattr(vision, "patch_size", None),
        "merge_size": getattr(vision, "spatial_merge_size", None),
        "temporal_patch_size": getattr(vision, "temporal_patch_size", None),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
    }
    # The processors of LLaVA, and the parts of Qwen-VL's. In other families, a patch may be several of the tower.
    parts = [processor] if hasattr(processor, "vision_feature_select_strategy") else []
    parts += [
        part for part in (images, getattr(processor, "video_processor", None)) if getattr(part, "merge_size", None)
    ]
    for part in parts:
        for key, value in values.items():
            if value is not None and hasattr(part, key):
                setattr(part, key, value)
    if hasattr(config, "scale_factor") and hasattr(images, "max_image_size"):  # Idefics3, SmolVLM
        side = images.max_image_size["longest_edge"] // vision.patch_size
        processor.image_seq_len = int((side / config.scale_factor) ** 2)


def _count(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> tuple[int, int | None]:
    """Return the number of image tokens of an image, and of the features that the model makes of it if known."""
    if not hasattr(processor, "image_token") or family_of(config.model_type).name not in FAMILIES:
        return 0, None
    try:
        image = Image.new("RGB", (_SIDE, _SIDE))
        inputs = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
        tokens = int((inputs["input_ids"] == config.image_token_id).sum())
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        problem = f"The processor of {name!r} cannot process an image with {_settings(processor)} ({error})."
        raise UserError(f"{problem} Set these values in its processor_config.json.") from error
    try:
        with torch.device("meta"), set_zero3_state():  # under ZeRO-3, transformers would divide the parts among ranks
            config = deepcopy(config)
            config._attn_implementation = "eager"  # the only one that every machine has
            model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).base_model
            known = signature(model.get_image_features).parameters.keys() & inputs.keys()
            # Sizes of images are numbers that decide on shapes.
            wanted = {key: inputs[key].to("meta") if inputs[key].is_floating_point() else inputs[key] for key in known}
            features = model.get_image_features(**wanted, return_dict=True).pooler_output
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        # Unknown families differ, and shapes may depend on values, which there are none of ("meta").
        if type(error) not in (ValueError, RuntimeError) or "meta" in str(error):
            return tokens, None
        raise UserError(
            f"The model cannot read an image of the processor of {name!r} ({error}). Set size and crop_size in its "
            "preprocessor_config.json or processor_config.json to the image_size of the model's vision_config."
        ) from error
    return tokens, sum(rows.numel() // rows.shape[-1] for rows in tree_leaves(features))

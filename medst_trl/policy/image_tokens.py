# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fit a processor to its model. A processor must insert one image token per image feature of the model.

Exports of older versions lack settings that processors now need, or have others: LLaVA's `patch_size`,
`vision_feature_select_strategy` and `num_additional_image_tokens`. All follow from the model's configuration, so they
are set from there, and a saved policy has them. What the model would make of an image is counted on the meta device,
without weights.
"""

import logging
from collections.abc import Iterator
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig, ProcessorMixin
from transformers.image_utils import SizeDict
from transformers.modeling_utils import set_zero3_state

from medst_trl.base.errors import UserError
from medst_trl.base.processes import rank

from .families import FAMILIES, family_of


logger = logging.getLogger(__name__)

_SIDE = 64  # pixels of the image that is counted


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
    for part, key, value in _implied(config, processor):
        if value is not None and getattr(part, key, value) != value:
            setattr(part, key, value)
            changes[key] = value
    tokens, features = _count(processor, config, name)
    if features not in (None, tokens) and hasattr(processor, "num_additional_image_tokens"):
        processor.num_additional_image_tokens += features - tokens  # one for CLIP's class token
        changes["num_additional_image_tokens"] = processor.num_additional_image_tokens
        tokens, features = _count(processor, config, name)
    if features not in (None, tokens):
        raise UserError(
            f"The processor of {name!r} writes {tokens} image tokens ({processor.image_token}) for an image of which "
            f"the model makes {features} features. Copy the processor of the model, or correct the number of image "
            "tokens in its processor_config.json or the image_token_id of its config.json."
        )
    if changes and rank() == 0:
        used = ", ".join(f"{key} {value}" for key, value in changes.items())
        logger.warning(f"The processor of {name!r} does not match its model. Using {used} from the configuration.")


def _implied(config: PreTrainedConfig, processor: ProcessorMixin) -> Iterator[tuple[Any, str, Any]]:
    """Yield parts of a processor with the name and value of a setting that the model's configuration implies."""
    vision, images = getattr(config, "vision_config", None), getattr(processor, "image_processor", None)
    # The processors of LLaVA, and the parts of Qwen-VL's. In other families, a patch may be several of the tower.
    parts = [processor] if hasattr(processor, "vision_feature_select_strategy") else []
    parts += [part for part in vars(processor).values() if getattr(part, "merge_size", None)]
    for part in parts:
        yield part, "patch_size", getattr(vision, "patch_size", None)
        yield part, "merge_size", getattr(vision, "spatial_merge_size", None)
        yield part, "temporal_patch_size", getattr(vision, "temporal_patch_size", None)
        yield part, "vision_feature_select_strategy", getattr(config, "vision_feature_select_strategy", None)
    side = getattr(vision, "image_size", None)
    if side is None or not _is_listed(config):
        return
    height, width = side if isinstance(side, list | tuple) else (side, side)
    if "height" in (getattr(images, "size", None) or {}):  # the tower reads one size only
        yield images, "size", SizeDict(height=height, width=width)
    if hasattr(config, "scale_factor") and hasattr(images, "max_image_size"):  # Idefics3, SmolVLM
        yield images, "max_image_size", {"longest_edge": side}
        yield processor, "image_seq_len", int((side // vision.patch_size / config.scale_factor) ** 2)


def _is_listed(config: PreTrainedConfig) -> bool:
    return family_of(config.model_type).name in FAMILIES


def _count(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> tuple[int, int | None]:
    """Return the number of image tokens of an image, and of the features that the model makes of it if known."""
    if not hasattr(processor, "image_token") or not _is_listed(config):
        return 0, None
    try:
        image = Image.new("RGB", (_SIDE, _SIDE))
        inputs = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
        tokens = int((inputs["input_ids"] == config.image_token_id).sum())
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"The processor of {name!r} cannot process an image ({error}). Copy the processor of the model, or set "
            "patch_size and what else is missing in its processor_config.json."
        ) from error
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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The processor of a converted checkpoint: tokenizer, images as in training, chat template."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.policy.chat_template import vicuna_template

from .sources import read_json


if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast


def build_processor(
    tokenizer: "PreTrainedTokenizerFast",
    config: "LlavaConfig",
    *,
    vision_folder: Path,
    pad_to_square: bool,
    text_role: bool,
) -> "LlavaProcessor":
    """
    Puts a processor together.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            From [`read_tokenizer`].
        config ([`~transformers.LlavaConfig`]):
            The model's configuration.
        vision_folder (`Path`):
            Folder of the vision tower, for the colours in its `preprocessor_config.json` or `processor_config.json`.
        pad_to_square (`bool`):
            Whether images are padded with the mean colour to a square, as in the training of LLaVA-1.5. The first
            implementation did so in training only; here every stage does what the processor says.
        text_role (`bool`):
            Whether questions open with the text role `VUSER:`.

    Returns:
        [`~transformers.LlavaProcessor`]
    """
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaProcessor

    vision = config.vision_config
    side = vision.image_size
    # The processors on PIL: the others need torchvision.
    images = (LlavaImageProcessorPil if pad_to_square else CLIPImageProcessorPil)(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        **({"do_pad": True} if pad_to_square else {}),
        **_colours(vision_folder),
    )
    adds_bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=vicuna_template(text_role=text_role, write_bos=not adds_bos),
    )


def _colours(folder: Path) -> dict[str, Any]:
    """Mean and deviation of colours, where a vision tower has its own; CLIP's otherwise."""
    found = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name, "how images are prepared")
            content = content.get("image_processor", content)
            found |= {key: content[key] for key in ("image_mean", "image_std") if key in content}
    return found

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a tensor of LLaVA is called: in original checkpoints, in published ones, and in the model itself."""

import re


# From the start of a name in any of the layouts to the start of its name in the model. The first that fits counts.
_TO_MODEL = (
    # what PEFT and LLaVA's trainer put in front
    ("base_model.model.", ""),
    ("model.model.", "model."),
    # original, with the vision tower inside
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.", "model.multi_modal_projector."),
    # Hugging Face, as published and as saved today
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.", "model.vision_tower."),
    ("model.multi_modal_projector.", "model.multi_modal_projector."),
    ("model.language_model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("mm_projector.", "model.multi_modal_projector."),
    # CLIP on its own
    ("vision_model.", "model.vision_tower."),
    # original, the language model
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
PROJECTOR, VISION = "model.multi_modal_projector.", "model.vision_tower."
# The two-layer projector was a plain sequence; the prototype extractor kept its names.
_MLP = ((f"{PROJECTOR}0.", f"{PROJECTOR}linear_1."), (f"{PROJECTOR}2.", f"{PROJECTOR}linear_2."))

# Computed, not learned: checkpoints of older versions of transformers carry them along.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
# CLIP's other half, in a folder that is read for its vision tower alone.
_TEXT_HALF = re.compile(r"text_model\.|visual_projection\.|text_projection\.|logit_scale$")

# LLaVA as it stands on the Hub, which every engine reads.
_TO_PUBLISHED = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def model_name(name: str) -> str | None:
    """
    A tensor's name in the model.

    Args:
        name (`str`):
            Its name in a checkpoint of any layout.

    Returns:
        `str` or `None`: `None` for a tensor of none of the layouts.
    """
    for start, replacement in _TO_MODEL[:2]:
        if name.startswith(start):
            name = replacement + name.removeprefix(start)
    for start, replacement in _TO_MODEL[2:]:
        if name.startswith(start):
            name = replacement + name.removeprefix(start)
            break
    else:
        return None
    for start, replacement in _MLP:
        if name.startswith(start):
            return replacement + name.removeprefix(start)
    return name


def published_name(name: str) -> str:
    """The name that LLaVA-1.5 has on the Hub for a tensor of the model."""
    for start, replacement in _TO_PUBLISHED:
        if name.startswith(start):
            return replacement + name.removeprefix(start)
    raise KeyError(name)


def is_harmless(name: str, in_clip: bool = False) -> bool:
    """Whether nothing is lost without a tensor: it is computed, or belongs to CLIP's text half."""
    return bool(_COMPUTED.search(name) or (in_clip and _TEXT_HALF.match(name)))

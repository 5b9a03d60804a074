# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What `medst convert` will write, told from the small files of the original checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.fingerprints import cached_revision

from .hub import hub_answers


if TYPE_CHECKING:
    from transformers import LlavaConfig


def converted_config(settings: Mapping[str, Any]) -> "tuple[LlavaConfig, bool] | None":
    """
    Configuration of the converted model, and whether it is asked by the text role.

    Args:
        settings (`dict`): Those of a `convert` step.

    Returns:
        None where the original's configuration is neither here nor can be had from the Hub.

    Raises:
        UserError: for a checkpoint that `medst convert` would refuse.
    """
    from medst_trl.interop.conversion.model_config import llava_config, vision_config
    from medst_trl.interop.conversion.reading import VISION_LORA, original_config
    from medst_trl.interop.conversion.sources import local_folder

    source, base = settings["source"], settings.get("base") or settings["source"]
    if not (_is_at_hand(source) and _is_at_hand(base)):
        return None
    folder, base_folder = (local_folder(name, "The checkpoint", weights=False) for name in (source, base))
    config = original_config(folder, base_folder)
    tower = settings.get("vision_tower") or config.get("mm_vision_tower")
    if tower is None or not _is_at_hand(tower):
        return None
    vision = vision_config(local_folder(tower, "The vision tower", weights=False))
    uses_text = config.get("mm_projector_type") == "cluster" or bool(settings.get("vision_lora"))
    role = settings.get("vusr_role") or ("text" if uses_text or (folder / VISION_LORA).is_dir() else "token")
    return llava_config(config, vision, config.get("vocab_size", 32000)), role == "text"


def _is_at_hand(source: str) -> bool:
    """Here, in the local cache, or on a Hub that answers."""
    return Path(source).is_dir() or cached_revision(source) is not None or hub_answers()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which families of models are tested, and which cannot work, told by the configuration before a weight is read."""

from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# By `model_type`. Each goes the whole way in tests/test_any_vlm.py. Others of the same build may work, too: what they
# lack is refused where it is missed.
TESTED_FAMILIES = {
    "gemma3": "Gemma 3, MedGemma",
    "idefics3": "Idefics3",
    "internvl": "InternVL 3 and 3.5 (the -hf checkpoints)",
    "llava": "LLaVA-1.5 and its kind",
    "llava_next": "LLaVA-NeXT",
    "mllama": "Llama 3.2-Vision",
    "prototype_llava": "SQ-LLaVA, STLLaVA-Med (converted)",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "smolvlm": "SmolVLM",
}


def tested_families() -> str:
    """A sentence that names them, for the end of a message."""
    return f"Tested families: {'; '.join(TESTED_FAMILIES.values())}."


def check_family(config: "PreTrainedConfig", name: str, remote_code: bool = False) -> None:
    """
    Refuses what no vision-language model of a supported build can be loaded from.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of a model.
        name (`str`):
            How to call the model.
        remote_code (`bool`, *optional*, defaults to `False`):
            Whether the model's own code may run, and may make more of the configuration than transformers does.

    Raises:
        UserError: for a model without a vision tower, and as [`check_build`].
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not (remote_code and hasattr(config, "auto_map")):
        raise UserError(
            f"{name!r} is of the type `{config.model_type}`, which has no vision tower that transformers knows: give "
            f"a vision-language model. {tested_families()}"
        )
    check_build(config, name)


def check_build(config: "PreTrainedConfig", name: str) -> None:
    """
    Refuses vision-language models that are built otherwise than as vision tower, projector and decoder.

    Raises:
        UserError: for a model with a Q-Former, or with an encoder for its text.
    """
    kind = f"{name!r} is of the type `{config.model_type}`"
    if getattr(config, "qformer_config", None) is not None:
        raise UserError(
            f"{kind}, whose images pass through a Q-Former, where an adapter is not known to belong: this family is "
            f"not supported. {tested_families()}"
        )
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise UserError(
            f"{kind}, an encoder with a decoder. Conversations are trained on decoders alone: this family is not "
            f"supported. {tested_families()}"
        )

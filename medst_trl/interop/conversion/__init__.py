# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints of the original LLaVA code to Hugging Face's layout.

This module holds the settings; `convert.py` does the work.
"""

from dataclasses import dataclass

from medst_trl.base.settings import documented


@documented
@dataclass
class ConvertArguments:
    """
    Arguments of `medst convert`.

    Args:
        source (`str`):
            Directory or Hub id of a full model, or of the output of LLaVA's training scripts.
        output_dir (`str`):
            Directory for the converted model.
        base (`str`, *optional*):
            Directory or Hub id of the base model of a training output, original or converted.
        projector (`str`, *optional*):
            File, directory or Hub id of a projector that is published separately (mm_projector.bin).
        vision_tower (`str`, *optional*):
            Directory or Hub id of the CLIP vision tower. Default: mm_vision_tower of config.json.
        vision_lora (`str`, *optional*):
            Directory or Hub id of the LoRA layers of the vision tower. Default: Vit-lora inside source.
        vusr_role (`str`, *optional*):
            How question turns start: text (VUSER:) or token (<vusr>, which needs training). Default: text for models
            with a prototype extractor or a ViT LoRA, which SQ-LLaVA and STLLaVA-Med have; otherwise token.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights: auto (the language model's), float32, bfloat16, float16, float64.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Maximum size of a weights file.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the output of an earlier run and start again.
    """

    source: str
    output_dir: str
    base: str | None = None
    projector: str | None = None
    vision_tower: str | None = None
    vision_lora: str | None = None
    vusr_role: str | None = None
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    overwrite: bool = False

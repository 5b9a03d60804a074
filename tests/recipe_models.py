# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Configurations of the models that recipes start from, with their real dimensions and without weights.

`EXPECTED` has the number of parameters that stage 1 trains in each, computed by hand from these dimensions.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import Gemma3Config, LlavaConfig, PreTrainedConfig, Qwen2_5_VLConfig

from medst_trl.pipeline.plan.memory import policy_of
from medst_trl.pipeline.recipe import Step
from medst_trl.policy.families import trained_parameters


def _llava() -> LlavaConfig:
    """Vicuna-7B, CLIP ViT-L/14-336, two-layer projector; the vocabulary is padded to a multiple of 64."""
    return LlavaConfig(
        text_config={
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
            "projection_dim": 768,
        },
        vision_feature_layer=-2, image_token_index=32000,
    )  # fmt: skip


def _gemma() -> Gemma3Config:
    """Gemma 3 4B with SigLIP-400M at 896 pixels; input and output embeddings are tied."""
    return Gemma3Config(
        text_config={
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
            "sliding_window": 1024, "query_pre_attn_scalar": 256,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=256,
    )  # fmt: skip


def _qwen() -> Qwen2_5_VLConfig:
    """Qwen2.5 7B; the merger at the end of its vision tower joins 2 x 2 patches."""
    return Qwen2_5_VLConfig(
        text_config={
            "model_type": "qwen2_5_vl_text", "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "patch_size": 14, "spatial_merge_size": 2, "out_hidden_size": 3584, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava-hf/llava-1.5-7b-hf": _llava,
    "google/medgemma-4b-it": _gemma,
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen,
}
# Number of parameters of the published checkpoints, which the configurations must reproduce.
PARAMETERS = {
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "google/medgemma-4b-it": 4_300_079_472,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
}


def _lora_parameters(rank: int, *layers: tuple[int, int]) -> int:
    """Return the number of LoRA parameters: inputs x rank and rank x outputs for each linear layer."""
    return sum(rank * (inputs + outputs) for inputs, outputs in layers)


# With LoRA of rank 128 in the language model and 32 in the vision tower.
EXPECTED = {
    "llava-hf/llava-1.5-7b-hf": {
        # 32 layers: q, k, v, o; gate, up; down; and the row of `<vusr>`
        "language": 32 * _lora_parameters(128, *[(4096, 4096)] * 4, *[(4096, 11008)] * 2, (11008, 4096)) + 4096,
        # 23 of 24 layers, because the output of the last is not used: q, k, v, out; fc1; fc2
        "vision": 23 * _lora_parameters(32, *[(1024, 1024)] * 4, (1024, 4096), (4096, 1024)),
        # two layers with a bias each
        "projector": (1024 + 1) * 4096 + (4096 + 1) * 4096,
    },
    "google/medgemma-4b-it": {
        # 34 layers, 8 heads of 256 for queries and 4 for keys and values
        "language": 34
        * _lora_parameters(128, (2560, 2048), *[(2560, 1024)] * 2, (2048, 2560), *[(2560, 10240)] * 2, (10240, 2560))
        + 2560,
        "vision": 27 * _lora_parameters(32, *[(1152, 1152)] * 4, (1152, 4304), (4304, 1152)),
        # one matrix and the gain of a norm
        "projector": 1152 * 2560 + 1152,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        # 28 layers, 28 heads of 128 for queries and 4 for keys and values
        "language": 28
        * _lora_parameters(128, (3584, 3584), *[(3584, 512)] * 2, (3584, 3584), *[(3584, 18944)] * 2, (18944, 3584))
        + 3584,
        # 32 layers: q, k and v in one matrix; out; gate, up; down
        "vision": 32 * _lora_parameters(32, (1280, 3 * 1280), (1280, 1280), *[(1280, 3420)] * 2, (3420, 1280)),
        # the gain of a norm, and two layers with a bias over four patches each
        "projector": 1280 + (5120 + 1) * 5120 + (5120 + 1) * 3584,
    },
}


def config_directory(name: str, directory: Path) -> Path:
    """Save only the `config.json` of a model on the Hub, and return its directory."""
    if name not in CONFIGS:
        raise KeyError(f"A recipe starts from {name!r}: add its dimensions, and what it trains, to {__file__}.")
    CONFIGS[name]().save_pretrained(directory / name)
    return directory / name


def trainable_parameters(step: Step, steps: Sequence[Step] = ()) -> dict[str, int]:
    """Return the number of parameters by part that a plan shows for a training step."""
    counts = Counter()
    for (part, _), count in trained_parameters(policy_of(step, steps).model).items():
        counts[part] += count
    return dict(counts)

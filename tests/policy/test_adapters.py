# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The adapter stands on the right modules, at the right ranks, in families that name them differently."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
)

from medst_trl.base.errors import UserError
from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.parts import model_parts


TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
CONFIGS = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 8, **VISION},
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "idefics3_vision", **VISION},
        "scale_factor": 1,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "internvl_vision", **VISION},
        "vision_feature_layer": -2,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
            "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
            "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
        },
    },
}  # fmt: skip
EXPECTED = {  # projector, vision layers that train
    "llava": ("model.multi_modal_projector", {0, 1}),
    "gemma3": ("model.multi_modal_projector", {0, 1, 2}),
    "idefics3": ("model.connector", {0, 1, 2}),
    "internvl": ("model.multi_modal_projector", {0, 1}),
    "qwen2_5_vl": ("model.visual.merger", {0, 1, 2}),
    "qwen3_vl": ("model.visual.merger", {0, 1, 2}),
}


def tiny(family):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**CONFIGS[family]))


@pytest.mark.parametrize("family", CONFIGS)
def test_modules_and_ranks(family):
    model = tiny(family)
    parts = model_parts(model)
    projector, vision_layers = EXPECTED[family]
    assert parts.projectors[0] == projector
    peft_model = get_peft_model(model, adapter_config(model, vusr_token_id=5, r=8, vision_r=4))
    ranks = {"language": set(), "vision": set()}
    layers = {"language": set(), "vision": set()}
    for name, parameter in peft_model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.part_of(name)
        if "lora_A" in name:
            ranks[part].add(parameter.shape[0])
            layers[part].add(int(next(piece for piece in name.split(".") if piece.isdigit())))
        elif "lora_B" not in name:
            assert part == "projector" or "trainable_tokens_delta" in name, name
    assert ranks == {"language": {8}, "vision": {4}}
    assert layers == {"language": {0, 1}, "vision": vision_layers}
    tokens = [p for n, p in peft_model.named_parameters() if "trainable_tokens_delta" in n]
    assert [tuple(p.shape) for p in tokens] == [(1, TEXT["hidden_size"])]


def test_every_parameter_of_a_peft_model_has_its_part():
    model = tiny("llava")
    plain = {name: model_parts(model).part_of(name) for name, _ in model.named_parameters()}
    assert set(plain.values()) == {"language", "vision", "projector"}
    parts = model_parts(model)
    wrapped = get_peft_model(model, adapter_config(model, vusr_token_id=5))
    for name, _ in wrapped.named_parameters():
        kind = "vision" if "vision_tower" in name else "projector" if "projector" in name else "language"
        assert parts.part_of(name) == kind, name


def test_a_frozen_vision_tower():
    model = tiny("llava")
    peft_model = get_peft_model(model, adapter_config(model, vision_r=0))
    assert not [n for n, p in peft_model.named_parameters() if p.requires_grad and "vision" in n]


def test_a_text_model_is_refused():
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    with pytest.raises(UserError, match="no vision tower"):
        model_parts(model)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The modules that an adapter trains, and the checks when an adapter is loaded."""

import pytest
import tiny_dpo
import tiny_run
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.families import model_parts
from medst_trl.policy.loading import load_policy


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
EXPECTED = {  # projector, trained vision layers
    "llava": ("model.multi_modal_projector", {0, 1}),
    "gemma3": ("model.multi_modal_projector", {0, 1, 2}),
    "idefics3": ("model.connector", {0, 1, 2}),
    "internvl": ("model.multi_modal_projector", {0, 1}),
    "qwen2_5_vl": ("model.visual.merger", {0, 1, 2}),
    "qwen3_vl": ("model.visual.merger", {0, 1, 2}),
}


def meta_model(family):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**CONFIGS[family]))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_adapter_has_the_expected_modules_and_ranks(family):
    model = meta_model(family)
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


def test_every_parameter_of_a_peft_model_belongs_to_a_part():
    model = meta_model("llava")
    parts_by_name = {name: model_parts(model).part_of(name) for name, _ in model.named_parameters()}
    assert set(parts_by_name.values()) == {"language", "vision", "projector"}
    parts = model_parts(model)
    peft_model = get_peft_model(model, adapter_config(model, vusr_token_id=5))
    for name, _ in peft_model.named_parameters():
        kind = "vision" if "vision_tower" in name else "projector" if "projector" in name else "language"
        assert parts.part_of(name) == kind, name


def test_a_frozen_vision_tower_does_not_train():
    model = meta_model("llava")
    peft_model = get_peft_model(model, adapter_config(model, vision_r=0))
    assert not [n for n, p in peft_model.named_parameters() if p.requires_grad and "vision" in n]


def test_a_text_model_is_refused():
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    with pytest.raises(UserError, match="no vision tower"):
        model_parts(model)


@pytest.fixture
def adapter(tmp_path):
    tiny_dpo.save_adapter(tmp_path)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ({"text_size": 64}, r"size mismatch for .*\n.*\n.*\nPass"),
        ({"text_layers": 3}, r"it lacks .*language_model\.layers\.2\."),
        ({"text_layers": 1}, r"no place for .*language_model\.layers\.1\."),
    ],
)
def test_a_base_of_a_different_size_is_refused(adapter, tmp_path, size, problem):
    model, processor = tiny_llava(**tiny_run.SMALL | size)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"does not fit '.*other' .*names '.*base'[^$]*{problem}"):
        load_policy(str(adapter), base_model_name_or_path=str(tmp_path / "other"))


@pytest.mark.parametrize("part", ["lora_A", "multi_modal_projector", "token"])
def test_an_adapter_that_lacks_a_part_is_refused(adapter, part):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    remaining = {name: value for name, value in weights.items() if part not in name}
    assert 0 < len(remaining) < len(weights)
    save_file(remaining, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"does not fit .*\n  it lacks .*{part}"):
        load_policy(str(adapter))


def test_another_warning_of_peft_that_is_an_error_is_reported(adapter, monkeypatch):
    def from_pretrained(*args, **kwargs):
        raise UserWarning("Some adapter keys are new here.\nDetails follow.")

    monkeypatch.setattr(PeftModel, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"does not fit .*\n  Some adapter keys are new here\.\nPass") as refused:
        load_policy(str(adapter))
    assert isinstance(refused.value.__cause__, UserWarning)


def test_an_adapter_with_an_unexpected_tensor_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_A" in name)
    save_file(weights | {f"{name}.again": weights[name].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="no place for .*again"):
        load_policy(str(adapter))


def test_weights_that_are_not_readable_safetensors_are_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"no readable adapter_model\.safetensors"):
        load_policy(str(adapter))
    path.rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no readable adapter_model\.safetensors"):
        load_policy(str(adapter))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"peft_type": "NOPE"}', "cannot be read"),
        ("{}", "not a LoRA adapter"),
        (
            '{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "x"}',
            "not a LoRA adapter but of the type PREFIX_TUNING",
        ),
        ('{"peft_type": "LORA"}', "names no base"),
    ],
)
def test_an_invalid_adapter_config_is_refused(adapter, content, message):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_policy(str(adapter))


def test_the_output_of_the_original_code_is_refused(adapter):
    (adapter / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"medst convert --source {adapter} --base"):
        load_policy(str(adapter))


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"weights_sha256": 3}'])
def test_a_damaged_fingerprint_is_treated_as_missing(adapter, content):
    (adapter / "base_model.json").write_text(content)
    assert load_policy(str(adapter))

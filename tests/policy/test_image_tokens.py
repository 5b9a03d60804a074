# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Processors that do not fit their model: settings from the model's configuration, or a refusal."""

import json
from copy import deepcopy
from functools import cache

import pytest
import tiny_run
import torch
from family_models import CROSS_ATTENTION, MODELS, base_model
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import random_image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.image_utils import SizeDict

from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.image_tokens import fit_processor
from medst_trl.policy.loading import load_policy, load_processor


LLAVA = {"patch_size": None, "vision_feature_select_strategy": None, "num_additional_image_tokens": 0}
QWEN = {"image_processor.patch_size": 14, "image_processor.merge_size": 1, "image_processor.temporal_patch_size": 4}
# Settings that a family's processor may lack or have wrong.
WRONG = {
    "vicuna": LLAVA,
    "llava-1.5-hf": LLAVA,
    "llava-mistral": LLAVA,
    "prototype-llava": LLAVA,
    "llava-next": LLAVA,
    "qwen2-vl": QWEN,
    "qwen2.5-vl": QWEN,
    "qwen3-vl": QWEN,
    "gemma-3": {"image_processor.size": SizeDict(height=8, width=8)},
    "internvl": {"image_processor.size": SizeDict(height=384, width=384)},
    "idefics3": {"image_seq_len": 169, "image_processor.max_image_size": {"longest_edge": 364}},
    "smolvlm": {"image_seq_len": 169, "image_processor.max_image_size": {"longest_edge": 364}},
    "llama-3.2-vision": {"image_processor.size": SizeDict(height=224, width=224)},
}
family_model = cache(base_model)


def change(processor, name, value):
    part, _, key = name.rpartition(".")
    setattr(getattr(processor, part) if part else processor, key, value)


def inputs(processor):
    return processor(
        images=[[random_image(0, (40, 30))]], text=[f"{processor.image_token} What?"], return_tensors="pt"
    )


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", [*MODELS, *CROSS_ATTENTION])
def test_a_processor_that_fits_stays_as_it_is(family, caplog):
    model, right = family_model(family)
    processor = deepcopy(right)
    fit_processor(processor, model.config, "right")
    assert not caplog.messages
    assert equal(inputs(processor), inputs(right))


@pytest.mark.parametrize("family", WRONG)
def test_settings_are_taken_from_the_configuration(family, caplog):
    model, right = family_model(family)
    wrong = WRONG[family]
    for changed in [*({name: value} for name, value in wrong.items()), wrong]:
        processor = deepcopy(right)
        for name, value in changed.items():
            change(processor, name, value)
        fit_processor(processor, model.config, "base")
        assert "The processor of 'base' does not match its model. Using " in caplog.text
        assert equal(inputs(processor), inputs(right)), changed
        caplog.clear()
        fit_processor(processor, model.config, "base")
        assert not caplog.messages


@pytest.mark.parametrize("family", ["gemma-3", "internvl"])
def test_a_wrong_number_of_image_tokens_is_refused(family):
    model, right = family_model(family)
    parts = {name: getattr(right, name) for name in ("image_processor", "tokenizer")}
    processor = type(right)(**parts, image_seq_length=256)
    with pytest.raises(UserError, match="writes 256 image tokens .* number of image tokens in its processor_config"):
        fit_processor(processor, model.config, "base")


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([None, 1, 3, 14, 16]), st.sampled_from([None, "default", "full"]),
    st.integers(0, 5), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_settings_of_llava_become_right(patch_size, strategy, additional, class_token, full):
    """For towers with and without a class token, of which the model drops the first feature or not."""
    model, processor = family_model("vicuna")
    config, processor = deepcopy(model.config), deepcopy(processor)
    config.vision_feature_select_strategy = "full" if full else "default"
    if not class_token:
        shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
        own = {name: getattr(config.vision_config, name) for name in (*shared, "patch_size")}
        config.vision_config = SiglipVisionConfig(**own)
        processor.image_processor = SiglipImageProcessorPil(
            size={"height": own["image_size"], "width": own["image_size"]}
        )
    processor.patch_size, processor.vision_feature_select_strategy = patch_size, strategy
    processor.num_additional_image_tokens = additional
    fit_processor(processor, config, "base")
    assert processor.num_additional_image_tokens == class_token
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (8, "full" if full else "default")
    batch = inputs(processor)
    tokens = (batch["input_ids"] == config.image_token_id).sum().item()
    features = LlavaForConditionalGeneration(config).model.get_image_features(batch["pixel_values"], return_dict=True)
    assert tokens == 4 + class_token - (not full) == sum(map(len, features.pooler_output))


def test_a_family_that_is_not_listed_is_not_counted(monkeypatch):
    """What its processor takes, and what its model returns, may differ."""
    model, processor = family_model("gemma-3")
    config = deepcopy(model.config)
    monkeypatch.setattr(type(config), "model_type", "unknown")
    monkeypatch.setattr(type(processor), "__call__", None)
    fit_processor(processor, config, "base")


@pytest.fixture
def base(tmp_path):
    model, processor = tiny_llava(**tiny_run.SMALL)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def as_old_export(base):
    """Write a processor as transformers did before 4.46: no processor_config.json."""
    path = base / "processor_config.json"
    content = json.loads(path.read_text())
    path.unlink()
    images = content["image_processor"] | {"processor_class": "LlavaProcessor"}
    (base / "preprocessor_config.json").write_text(json.dumps(images))


def without_class_token(base):
    path = base / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_additional_image_tokens": 0}))


@pytest.mark.parametrize("damage", [as_old_export, without_class_token])
def test_a_loaded_policy_is_saved_with_a_right_processor(base, tmp_path, damage, caplog):
    expected = json.loads((base / "processor_config.json").read_text())
    damage(base)
    _, processor = load_policy(str(base))
    assert "num_additional_image_tokens 1 from the configuration" in caplog.text
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "processor_config.json").read_text()) == expected
    assert inputs(AutoProcessor.from_pretrained(tmp_path / "saved"))["input_ids"].shape[1] > 4


def test_a_trainer_fits_the_processor_of_a_model_in_memory(tmp_path, caplog):
    model, processor = tiny_run.small_policy()
    processor.num_additional_image_tokens = 0
    tiny_run.make_trainer(tmp_path, policy=(model, processor, None), lora=False)
    assert "num_additional_image_tokens 1" in caplog.text
    assert processor.num_additional_image_tokens == 1


def test_what_cannot_be_repaired_is_refused_before_weights_are_read(base):
    (base / "model.safetensors").unlink()
    path = base / "processor_config.json"
    content = json.loads(path.read_text())
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    path.write_text(json.dumps(content | {"image_processor": content["image_processor"] | sizes}))
    with pytest.raises(UserError, match=r"cannot read an image .*Input image size \(32\*32\).*Set size and crop_size"):
        load_policy(str(base))
    path.write_text(json.dumps(content))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    with pytest.raises(
        UserError, match=r"writes 0 image tokens \(<image>\) for an image of which the model makes 4 .*image_token_id"
    ):
        load_policy(str(base))


def test_a_configuration_without_the_settings_is_refused_with_what_to_set(base):
    config = json.loads((base / "config.json").read_text())
    as_old_export(base)
    processor, *_ = load_processor(str(base), None, None, False)
    processor.patch_size = None
    vision = CLIPVisionConfig(**config["vision_config"])
    model, _ = family_model("vicuna")
    unknown = deepcopy(model.config)
    unknown.vision_config = vision
    unknown.vision_config.patch_size = None
    with pytest.raises(UserError, match="cannot process an image .*NoneType.*set patch_size"):
        fit_processor(processor, unknown, "base")

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder that is no whole model is refused with what is wrong of it; nothing is drawn at random in silence."""

import json
import shutil

import pytest
import tiny_run
import torch
from safetensors.torch import load_file, save_file

from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.loading import load_policy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model, processor = tiny_llava(**tiny_run.SMALL)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def base(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "base")


def change_weights(base, change):
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_the_files_lack_are_not_drawn_at_random(base):
    def without_one(weights):
        del weights[next(name for name in weights if name.endswith("linear_1.weight"))]

    change_weights(base, without_one)
    with pytest.raises(UserError, match=r"its files lack model\.multi_modal_projector\.linear_1\.weight\. Download"):
        load_policy(str(base))


def test_weights_of_another_shape(base):
    change_weights(base, lambda weights: weights.update({sorted(weights)[5]: torch.ones(3, 3)}))
    with pytest.raises(UserError, match="other shapes than config.json says"):
        load_policy(str(base))


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors", ""),
        ("model.safetensors", "{}"),
        ("config.json", "[]"),
        ("generation_config.json", "[]"),
        ("processor_config.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
    ],
)
def test_files_of_something_else(base, name, content):
    (base / name).write_text(content)
    with pytest.raises(UserError, match=f"could be loaded from '{base}'"):
        load_policy(str(base))


def test_the_original_layout_is_to_be_converted(base):
    config = json.loads((base / "config.json").read_text())
    original = {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (base / "config.json").write_text(json.dumps(config | original))
    with pytest.raises(UserError, match=rf"medst convert --source {base}"):
        load_policy(str(base))

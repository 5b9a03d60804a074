# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of weights does not depend on how they are stored, and identifies the base of an adapter."""

import json
import shutil

import pytest
import tiny_dpo
import tiny_run
import torch
from transformers import AutoModelForImageTextToText

from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.adapters import BASE_FILE, base_of_adapter, weights_fingerprint, write_base_file
from medst_trl.policy.loading import load_policy


def save_base(directory, dtype=torch.float32, seed=0, change=None, **save_kwargs):
    model, processor = tiny_llava(**tiny_run.SMALL, seed=seed)
    if change:
        with torch.no_grad():
            model.get_parameter(change).add_(0.01)
    model.to(dtype).save_pretrained(directory, **save_kwargs)
    processor.save_pretrained(directory)
    return str(directory)


def test_dtype_and_sharding_do_not_change_the_fingerprint(tmp_path):
    fingerprint = weights_fingerprint(save_base(tmp_path / "one"))
    assert fingerprint and len(fingerprint) == 64
    assert weights_fingerprint(save_base(tmp_path / "bfloat16", torch.bfloat16)) == fingerprint
    shards = save_base(tmp_path / "shards", max_shard_size="50KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert weights_fingerprint(shards) == fingerprint


@pytest.mark.parametrize(
    "change",
    [
        "model.multi_modal_projector.linear_1.bias",
        "model.language_model.layers.1.mlp.up_proj.weight",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
    ],
)
def test_every_part_changes_the_fingerprint(tmp_path, change):
    bases = save_base(tmp_path / "one"), save_base(tmp_path / "other", change=change)
    assert weights_fingerprint(bases[0]) != weights_fingerprint(bases[1])


def test_missing_safetensors_and_quantized_weights_have_no_fingerprint(tmp_path):
    assert weights_fingerprint(str(tmp_path)) is None
    assert weights_fingerprint("org/model-that-is-not-here") is None
    config = tmp_path / "base" / "config.json"
    save_base(config.parent)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {}}))
    assert weights_fingerprint(str(config.parent)) is None


@pytest.fixture
def adapter(tmp_path):
    write_base_file(tiny_dpo.save_adapter(tmp_path), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_fingerprint_file_contains_no_path(adapter, tmp_path):
    assert str(tmp_path) not in (adapter / BASE_FILE).read_text()


def test_a_base_of_the_same_name_with_other_weights_is_refused(adapter, tmp_path):
    assert load_policy(str(adapter))
    save_base(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match="other weights than those of .*base.*although their shapes agree"):
        load_policy(str(adapter))
    (adapter / BASE_FILE).unlink()  # as the message suggests
    assert load_policy(str(adapter))


def test_a_given_base_must_have_the_same_weights(adapter, tmp_path, caplog):
    copied, other = tmp_path / "copied", save_base(tmp_path / "other", seed=1)
    shutil.copytree(tmp_path / "base", copied)
    AutoModelForImageTextToText.from_pretrained(copied, dtype="bfloat16").save_pretrained(copied)
    assert load_policy(str(adapter), base_model_name_or_path=str(copied)) and not caplog.messages
    with pytest.raises(UserError, match="trained on other weights than those of .*other"):
        load_policy(str(adapter), base_model_name_or_path=other)
    (adapter / BASE_FILE).write_text("{")  # treated as missing
    assert load_policy(str(adapter), base_model_name_or_path=other)


def test_a_base_above_the_adapter_is_recognized_by_its_fingerprint(tmp_path, monkeypatch):
    project, adapter = tmp_path / "project", tmp_path / "project/deep/runs/adapter"
    write_base_file(tiny_dpo.save_adapter(adapter.parent), adapter)
    (adapter.parent / "base").rename(project / "base")
    save_base(project / "deep/base", seed=1)  # nearer, with other weights
    save_base(tmp_path / "org/base", seed=1)
    save_base(tmp_path)
    (project / "config.json").write_text("{")
    assert base_of_adapter(adapter, "base") == str(project / "base")
    for named in ("", None, "org/base", "org/other", "/elsewhere/base"):
        assert base_of_adapter(adapter, named) == named
    assert base_of_adapter("org/adapter", "base") == "base"
    monkeypatch.chdir(adapter)
    assert base_of_adapter(".", "base") == str(project / "base")
    monkeypatch.chdir(project / "deep")
    assert base_of_adapter("runs/adapter", "base") == "base"  # relative to this directory
    (adapter / BASE_FILE).unlink()
    monkeypatch.chdir(adapter)
    assert base_of_adapter(".", "base") == "base"


def test_trainers_write_the_fingerprint(tmp_path):
    base = save_base(tmp_path / "base")
    model, processor = load_policy(base)
    config = tiny_run.adapter_config(model, vusr_token_id=tiny_run.add_vusr(processor), r=4, vision_r=2)
    trainer = tiny_run.train(tmp_path / "sft", policy=(model, processor, config), max_steps=1, save_strategy="steps")
    trainer.save_model(str(tmp_path / "sft"))
    dpo_trainer = tiny_dpo.make_trainer(tmp_path / "dpo", policy=load_policy(str(tmp_path / "sft"), is_trainable=True))
    dpo_trainer.save_model(str(tmp_path / "dpo"))
    for directory in ("sft", "sft/checkpoint-1", "dpo"):
        record = json.loads((tmp_path / directory / BASE_FILE).read_text())
        assert record == {"model_type": "llava", "weights_sha256": weights_fingerprint(base)}, directory

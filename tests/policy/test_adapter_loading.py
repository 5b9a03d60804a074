# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What does not fit between adapter and base is named; nothing of an adapter is lost in silence."""

import pytest
import tiny_dpo
import tiny_run
from safetensors.torch import load_file, save_file

from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.loading import load_policy


@pytest.fixture
def adapter(tmp_path):
    model, processor = tiny_dpo.adapter_policy(tmp_path)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    processor.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ({"text_size": 64}, r"size mismatch for .*\n.*\n.*\n.*and \d+ more"),
        ({"text_layers": 3}, r"it lacks .*language_model\.layers\.2\."),
        ({"text_layers": 1}, r"no place for .*language_model\.layers\.1\."),
    ],
)
def test_a_base_of_another_size(adapter, tmp_path, size, problem):
    model, processor = tiny_llava(**tiny_run.SMALL | size)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"does not fit '.*other' .*names '.*base'[^$]*{problem}"):
        load_policy(str(adapter), base_model_name_or_path=str(tmp_path / "other"))


@pytest.mark.parametrize("part", ["lora_A", "multi_modal_projector", "token"])
def test_a_part_that_the_file_lacks(adapter, part):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    left = {name: value for name, value in weights.items() if part not in name}
    assert 0 < len(left) < len(weights)
    save_file(left, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"does not fit .*\n  it lacks .*{part}"):
        load_policy(str(adapter))


def test_a_part_that_goes_nowhere(adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_A" in name)
    save_file(weights | {f"{name}.again": weights[name].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="no place for .*again"):
        load_policy(str(adapter))


def test_only_safetensors(adapter):
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
        ('{"peft_type": "LORA", "base_model_name_or_path": 3}', "names 3 as its base"),
        ('{"peft_type": "LORA"}', "names no base"),
    ],
)
def test_a_configuration_of_something_else(adapter, content, message):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_policy(str(adapter))


def test_a_training_output_of_the_original_code_is_to_be_converted(adapter):
    (adapter / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"medst convert --source {adapter} --base"):
        load_policy(str(adapter))


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"weights_sha256": 3}'])
def test_a_damaged_fingerprint_is_none(adapter, content):
    (adapter / "base_model.json").write_text(content)
    assert load_policy(str(adapter))

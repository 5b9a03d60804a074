# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""QLoRA: the language model in 4 bits, everything that trains in full precision."""

import importlib.util
import json
import math

import pytest
import tiny_dpo
import tiny_run
import torch
from datasets import Dataset
from safetensors.torch import load_file

from medst_trl import load_policy
from medst_trl.base.errors import UserError
from medst_trl.data.schema import instruct_features, preference_features
from medst_trl.engines.decoding import chat_inputs
from medst_trl.pipeline.stages import dpo, sft


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra qlora)"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, processor = tiny_run.small_policy(text_size=64)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    rows = [tiny_run.conversation(n) | {"image_ids": [str(n)]} for n in range(12)]
    for message in (message for row in rows for message in row["messages"]):
        message["vusr"] = False
    known = {"image_ids": ["x"], "score_chosen": 9.0, "score_rejected": 2.0, "judge": "{}"}
    pairs = [tiny_dpo.pair(n) | known for n in range(12)]
    for name, content, features in (
        ("instruct", rows, instruct_features()),
        ("preferences", pairs, preference_features()),
    ):
        (folder / name).mkdir()
        Dataset.from_list(content, features=features).to_parquet(folder / name / "train-00000-of-00001.parquet")
    return folder


def train(stage, inputs, output_dir, **options):
    options = {
        "output_dir": output_dir, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "load_in_4bit": True, **options,
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    stage.main(*stage.STAGE.make_parser().parse_args_and_config(words))
    return load_file(output_dir / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapter(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "sft"
    paths = {"model_name_or_path": inputs / "base", "dataset": inputs / "instruct"}
    train(sft, inputs, folder, **paths, lora_r=4, vision_lora_r=2, bf16=True, use_cpu=True)
    return folder


@needs_bitsandbytes
def test_the_language_model_alone_is_quantised(inputs):
    from bitsandbytes.nn import Linear4bit

    model, _ = load_policy(str(inputs / "base"), load_in_4bit=True)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantised = {name for name, module in linear.items() if isinstance(module, Linear4bit)}
    assert quantised == {name for name in linear if name.startswith("model.language_model.")}
    assert len(quantised) == 14 and len(linear) > 30
    layer = linear["model.language_model.layers.0.mlp.up_proj"]
    assert layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested
    assert layer.weight.quant_type == "nf4"


@needs_bitsandbytes
def test_what_trains_is_kept_in_full_precision_and_loads_with_either_base(inputs, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    kinds = ("language_model", "vision_tower", "multi_modal_projector", "trainable_tokens")
    assert all(any(kind in name for name in weights) for kind in kinds)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    row, logits = tiny_run.conversation(3), {}
    for four_bit in (True, False):
        model, processor = load_policy(str(adapter), load_in_4bit=four_bit, dtype="float32")
        inputs_of_model = chat_inputs(processor, [row["messages"][:1]], [row["images"]])
        with torch.no_grad():
            logits[four_bit] = model(**inputs_of_model).logits.flatten()
    alike = torch.nn.functional.cosine_similarity(logits[True], logits[False], dim=0).item()
    assert 0.9 < alike < 0.9999  # as near as 4 bits are


@needs_bitsandbytes
@pytest.mark.parametrize("precompute", [False, True])
def test_preferences_begin_at_the_reference(inputs, adapter, tmp_path, precompute):
    paths = {"model_name_or_path": adapter, "dataset": inputs / "preferences", "ref_log_probs_dir": tmp_path / "ref"}
    weights = train(dpo, inputs, tmp_path / "dpo", **paths, precompute_ref_log_probs=precompute)
    log = json.loads((tmp_path / "dpo" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    before = load_file(adapter / "adapter_model.safetensors")
    assert weights.keys() == before.keys()
    for part in ("language_model", "vision_tower", "multi_modal_projector"):
        assert any(part in name and not torch.equal(weights[name], before[name]) for name in weights)


@needs_bitsandbytes
def test_every_weight_cannot_train_in_4_bits(inputs, tmp_path):
    paths = {"model_name_or_path": inputs / "base", "dataset": inputs / "instruct"}
    with pytest.raises(UserError, match="use_lora: false"):
        train(sft, inputs, tmp_path / "sft", **paths, use_lora=False)


def test_a_missing_package_is_named(inputs, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    paths = {"model_name_or_path": inputs / "base", "dataset": inputs / "instruct"}
    with pytest.raises(UserError, match=r'pip install "medst_trl\[qlora\]"'):
        train(sft, inputs, tmp_path / "sft", **paths)

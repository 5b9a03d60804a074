# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A merged model equals the adapter on its base and loads without PEFT; a wrong merge is refused."""

import json
import math
import os
from functools import partial

import pytest
import torch
from families import FAMILIES as PROCESSORS
from families import TEXT_ROLE
from family_models import MODELS, tiny_model
from peft import LoraModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stages.merge import batches_of, drawn_examples
from medst_trl.policy import merging
from medst_trl.policy.adapters import adapter_config, retie_lm_head
from medst_trl.policy.loading import load_policy
from medst_trl.policy.merging import check_difference, difference
from medst_trl.policy.vusr import VUSR, add_vusr


merge_policy = partial(merging.merge_policy, batches_of=batches_of)
RANKS = {"r": 4, "lora_alpha": 8, "vision_r": 2, "vision_lora_alpha": 4, "lora_dropout": 0.0}
FAMILIES = {  # model and overrides
    "llava": ("llava-1.5-hf", {}),
    "tied": ("vicuna", {"tie_word_embeddings": True}),
    "spare rows": ("vicuna", {"spare_rows": 8}),
    "text role": (TEXT_ROLE, {}),
    "prototype": ("prototype-llava", {}),
    "qwen2.5-vl": ("qwen2.5-vl", {}),
}


def save_adapter(directory, family="llava", **ranks):
    """Save a base and an adapter of it in which every part has changed."""
    name, overrides = FAMILIES[family]
    if family == "text role":
        processor = PROCESSORS[name]()
        base = MODELS["llava-1.5-hf"](processor, 0).eval()
    else:
        base, processor = tiny_model(name, **overrides)
    base.save_pretrained(directory / "base")
    processor.save_pretrained(directory / "base")
    model, processor = load_policy(str(directory / "base"))
    model = get_peft_model(model, adapter_config(model, **{"vusr_token_id": add_vusr(processor), **RANKS, **ranks}))
    retie_lm_head(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory / "adapter", save_embedding_layers=False)
    processor.save_pretrained(directory / "adapter")
    (directory / "merged").mkdir()
    return str(directory / "adapter"), directory / "merged"


def logits(model, processor, text):
    content = [{"type": "image", "image": Image.new("RGB", (16, 16), "gray")}, {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        return inputs["input_ids"], model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_the_merged_model(family, tmp_path):
    adapter, merged = save_adapter(tmp_path, family)
    result = merge_policy(adapter, merged, drawn_examples())
    assert result["dtype"] == "float32" and result["base"] == str(tmp_path / "base")
    assert result["proof"]["float32_difference"] <= 1e-4 and result["proof"]["tokens"] > 30
    assert {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"} <= {
        path.name for path in merged.iterdir()
    }
    assert not list(merged.glob(".*")) and not list(merged.glob("adapter*"))

    policy, processor = load_policy(adapter)
    base, _ = load_policy(str(tmp_path / "base"))
    merged_policy = AutoModelForImageTextToText.from_pretrained(merged).eval(), AutoProcessor.from_pretrained(merged)
    for model, own_processor in (merged_policy, load_policy(str(merged))):
        assert model.num_parameters() == base.num_parameters() == result["parameters"]
        for text in ("What is it?", VUSR):
            (tokens, expected), (own_tokens, actual) = (
                logits(policy, processor, text), logits(model, own_processor, text),
            )  # fmt: skip
            assert torch.equal(tokens, own_tokens)
            assert (actual - expected).abs().max() < 1e-4
            assert (actual - logits(base, processor, text)[1]).abs().max() > 1e-2, "the adapter has no effect"


def test_an_adapter_that_trains_only_the_projector_can_be_merged(tmp_path):
    adapter, merged = save_adapter(tmp_path, vusr_token_id=None, r=0, vision_r=0)
    assert merge_policy(adapter, merged, drawn_examples())["proof"]["float32_difference"] <= 1e-4
    base, actual = (AutoModelForImageTextToText.from_pretrained(path) for path in (tmp_path / "base", merged))
    old, new = dict(base.named_parameters()), dict(actual.named_parameters())
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        name for name in old if "projector" in name
    }


def test_the_generation_config_has_stop_tokens_suppressed_tokens_and_sampling(tmp_path):
    adapter, merged = save_adapter(tmp_path)
    base = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(base | {"repetition_penalty": 1.5}))
    merge_policy(adapter, merged, drawn_examples())
    config, (policy, processor) = GenerationConfig.from_pretrained(merged), load_policy(adapter)
    assert (
        config.do_sample and config.temperature < 1 and config.top_k == 100
    )  # a client can turn sampling off, but not on
    assert config.eos_token_id == policy.generation_config.eos_token_id
    assert processor.tokenizer.convert_tokens_to_ids(VUSR) in config.suppress_tokens
    assert config.repetition_penalty is None  # the policy was not evaluated with it


def test_a_smaller_dtype_is_rounded_once_and_sharded(tmp_path):
    adapter, merged = save_adapter(tmp_path)
    (tmp_path / "exact").mkdir()
    merge_policy(adapter, tmp_path / "exact", drawn_examples())
    result = merge_policy(adapter, merged, drawn_examples(), dtype="bfloat16", max_shard_size="100KB")
    proof = result["proof"]
    assert proof["float32_difference"] <= 1e-4 < proof["stored_difference"] <= proof["stored_tolerance"]
    exact = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "exact").named_parameters())
    rounded = AutoModelForImageTextToText.from_pretrained(merged)
    assert rounded.dtype == torch.bfloat16 and len(list(merged.glob("model-*-of-*.safetensors"))) > 1
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, exact[name].to(torch.bfloat16)), name


def unload_adapter(tuner):
    return tuner.unload()


def merge_without_token(tuner, merge=LoraModel.merge_and_unload):
    merged = merge(tuner)
    with torch.no_grad():
        merged.get_input_embeddings().weight[-1] = 0
    return merged


@pytest.mark.parametrize("wrong", [unload_adapter, merge_without_token])
def test_a_wrong_merge_is_refused(tmp_path, monkeypatch, wrong):
    adapter, merged = save_adapter(tmp_path)
    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(UserError, match="merged in memory.*differ by up to"):
        merge_policy(adapter, merged, drawn_examples())
    assert not list(merged.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_that_change_when_saved_are_refused(tmp_path, monkeypatch, dtype, value):
    adapter, merged = save_adapter(tmp_path)
    load = merging._load_plainly

    def load_changed_weights(*args):
        model, processor = load(*args)
        with torch.no_grad():
            model.model.multi_modal_projector.linear_2.weight.fill_(value)
        return model, processor

    monkeypatch.setattr(merging, "_load_plainly", load_changed_weights)
    with pytest.raises(UserError, match="loaded from disk"):
        merge_policy(adapter, merged, drawn_examples(), dtype=dtype)
    assert not list(merged.iterdir())


def test_nan_is_a_difference():
    zeros, one = torch.zeros(2, 3), torch.full((2, 3), 0.5)
    broken = torch.tensor([[0.0, float("nan"), 0.0]])
    assert math.isnan(difference([zeros, one], [one, zeros[:1]]))
    assert difference([zeros, one], [zeros, zeros]) == 0.5
    for actual in ([zeros, broken], [broken, zeros]):
        with pytest.raises(UserError, match="differ by up to nan"):
            check_difference(difference(actual, [torch.zeros_like(rows) for rows in actual]), 1.0, "x")


def test_examples_without_an_answer_are_refused(tmp_path):
    adapter, merged = save_adapter(tmp_path)
    (example,) = drawn_examples(1)
    del example["messages"][1], example["messages"][0]["content"][1]
    with pytest.raises(UserError, match="no answer to compare"):
        merge_policy(adapter, merged, [example])


def test_a_processor_that_changes_when_saved_is_refused(tmp_path, monkeypatch):
    adapter, merged = save_adapter(tmp_path)
    load = merging._load_plainly

    def load_changed_processor(*args):
        model, processor = load(*args)
        processor.image_processor.image_mean = [0.1, 0.1, 0.1]
        return model, processor

    monkeypatch.setattr(merging, "_load_plainly", load_changed_processor)
    with pytest.raises(UserError, match="loaded from disk.* does not agree"):
        merge_policy(adapter, merged, drawn_examples())
    assert not list(merged.iterdir())


def test_config_json_is_written_last(tmp_path, monkeypatch):
    """A directory with config.json is complete; files of an interrupted run are replaced."""
    adapter, merged = save_adapter(tmp_path)
    names, replace = [], os.replace

    def raise_no_space(source, target):
        if len(names) == 2:
            raise OSError("no space")
        names.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", raise_no_space)
    with pytest.raises(OSError, match="no space"):
        merge_policy(adapter, merged, drawn_examples())
    assert not (merged / "config.json").exists()
    monkeypatch.undo()
    merge_policy(adapter, merged, drawn_examples())
    assert (merged / "config.json").is_file() and not (merged / ".merging").exists()
    with safe_open(merged / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "lora" in name or "modules_to_save" in name]  # noqa: SIM118


def test_a_model_without_an_adapter_is_refused(tmp_path):
    save_adapter(tmp_path)
    with pytest.raises(UserError, match="no adapter to merge"):
        merge_policy(str(tmp_path / "base"), tmp_path / "merged", drawn_examples())


def test_a_base_of_another_type_is_refused(tmp_path, monkeypatch):
    adapter, merged = save_adapter(tmp_path)
    loaded = load_policy(adapter, dtype="float32")
    monkeypatch.setattr(merging, "load_policy", lambda *args, **kwargs: loaded)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float8_e4m3fn"}))
    with pytest.raises(UserError, match="The base is in float8_e4m3fn.*Set dtype to float32 or"):
        merge_policy(adapter, merged, drawn_examples())


@pytest.mark.parametrize("problem", ["gated", "missing", "unreachable"])
def test_an_adapter_that_the_hub_does_not_give_is_refused_with_the_reason(tmp_path, monkeypatch, problem):
    from medst_trl.policy import adapters

    def cached_file(*args, **kwargs):
        raise OSError(f"the repository is {problem}")

    monkeypatch.setattr(adapters, "check_reachable", lambda name: None)
    monkeypatch.setattr(adapters, "cached_file", cached_file)
    for load in (load_policy, partial(merge_policy, output_dir=tmp_path / "merged", examples=[], batches_of=None)):
        with pytest.raises(UserError, match=f"'org/x' is neither a directory nor .* on the Hub: .*{problem}"):
            load("org/x")


def test_non_finite_weights_are_refused(tmp_path):
    adapter, merged = save_adapter(tmp_path)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    next(value for name, value in weights.items() if "lora_B" in name).fill_(float("inf"))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not agree"):
        merge_policy(adapter, merged, drawn_examples())
    assert not list(merged.iterdir())


def test_a_second_merge_replaces_the_first(tmp_path):
    adapter, merged = save_adapter(tmp_path)
    merge_policy(adapter, merged, drawn_examples(1))
    merge_policy(adapter, merged, drawn_examples(1), max_shard_size="100KB", dtype="bfloat16")
    assert not (merged / "model.safetensors").exists()
    assert AutoModelForImageTextToText.from_pretrained(merged).dtype == torch.bfloat16


def test_a_failed_merge_leaves_nothing_on_disk(tmp_path, monkeypatch):
    from transformers import modeling_utils

    adapter, merged = save_adapter(tmp_path)
    save = modeling_utils.safe_save_file

    def raise_no_space(*args, **kwargs):
        save(*args, **kwargs)
        raise OSError("no space")

    monkeypatch.setattr(modeling_utils, "safe_save_file", raise_no_space)
    with pytest.raises(OSError, match="no space"):
        merge_policy(adapter, merged, drawn_examples(1))
    assert not list(merged.iterdir())


def test_an_invalid_shard_size_is_refused_before_loading(tmp_path):
    with pytest.raises(UserError, match="'big' is not a size"):
        merge_policy(str(tmp_path), tmp_path / "merged", drawn_examples(1), max_shard_size="big")

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters that train embedding and output layer, with fewer or more rows than the policy."""

import pytest
import tiny_dpo
import tiny_run
import torch
from datasets import Dataset
from family_models import base_model
from peft import LoraConfig, get_peft_model
from random_images import random_image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from medst_trl.base.errors import UserError
from medst_trl.data.schema import preference_features
from medst_trl.engines.decoding import chat_inputs
from medst_trl.engines.engine import OpenedImage, Prompt, Sampling, to_answer, to_ask
from medst_trl.engines.kinds.transformers import TransformersEngine
from medst_trl.pipeline.stages import dpo, merge, sft
from medst_trl.policy.loading import load_policy
from medst_trl.policy.vusr import VUSR


BOTH = ["embed_tokens", "lm_head"]
LANGUAGE_MODEL = r".*(language|text)_model\.layers.*q_proj"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    directory, family="vicuna", *, rows=None, tokens=(), targets=LANGUAGE_MODEL, modules=BOTH, **overrides
):
    """
    Save a base, and an adapter of it as other tools make them: without `<vusr>`, with `rows` rows of the vocabulary
    (with the base's by default), for new `tokens`, which are saved with a tokenizer and without a processor.
    """
    model, processor = base_model(family, **overrides)
    for part in (model, processor):
        part.save_pretrained(directory / "base")
    model = AutoModelForImageTextToText.from_pretrained(directory / "base")
    if tokens:
        processor.tokenizer.add_tokens(list(tokens))
        processor.tokenizer.save_pretrained(directory / "adapter")
    if rows or tokens:
        model.resize_token_embeddings(rows or len(processor.tokenizer), mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=modules))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory / "adapter")
    return model.eval()


def logits(model, processor):
    with torch.no_grad():
        return model(**chat_inputs(processor, [to_answer([], 1, "What is it?")], [[random_image(0, (40, 30))]])).logits


CASES = {
    "both": {},
    "tied": {"tie_word_embeddings": True},
    "embedding": {"modules": ["embed_tokens"]},
    "output": {"modules": ["lm_head"]},
    "LoRA": {"modules": None, "targets": r".*(language_model.*q_proj|embed_tokens|lm_head)$"},
    "LoRA on the embedding": {"modules": None, "targets": r".*(language_model.*q_proj|embed_tokens)$"},
    "new tokens": {"tokens": ["<new>", "<newer>"]},
    "padded": {"rows": 1088},
    "padded, new tokens": {"rows": 1088, "tokens": ["<new>", "<newer>"]},
}


@pytest.mark.parametrize(
    "family, case", [*(("vicuna", case) for case in CASES), ("llava-next", "both"), ("qwen2.5-vl", "both"),
    ("gemma-3", "tied"), ("idefics3", "both")],
)  # fmt: skip
def test_an_adapter_with_other_rows_writes_the_same(tmp_path, family, case):
    adapter = save_adapter(tmp_path, family, **CASES[case])
    model, processor = load_policy(str(tmp_path / "adapter"))
    tokens, token = processor.tokenizer.get_vocab(), processor.tokenizer.convert_tokens_to_ids(VUSR)
    assert set(CASES[case].get("tokens", ())) <= tokens.keys()
    actual, expected = logits(model, processor), logits(adapter, processor)
    assert torch.equal(actual[..., :token], expected[..., :token])
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == actual.shape[-1] == max(token + 1, expected.shape[-1]) == model.config.get_text_config().vocab_size
    if expected.shape[-1] <= token:
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if "modules" not in CASES[case]:
                torch.testing.assert_close(layer.weight[token], layer.weight[:token].mean(0))
    engine = TransformersEngine(model, processor)
    texts = engine.write([Prompt(to_ask([], 1), [OpenedImage(b"", random_image(1, (40, 30)))])], Sampling())
    assert VUSR not in texts[0].text

    trainable, _ = load_policy(str(tmp_path / "adapter"), is_trainable=True)
    assert {name for name, parameter in trainable.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in adapter.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("layers", ["embed_tokens", "lm_head", "(embed_tokens|lm_head)"])
def test_lora_on_tied_embeddings_is_not_merged_wrongly(tmp_path, layers):
    """PEFT adds the product to one of the two layers, or twice to their shared weight."""
    save_adapter(tmp_path, modules=None, targets=rf".*(language_model.*q_proj|{layers})$", tie_word_embeddings=True)
    with pytest.raises(UserError, match="does not agree with the adapter: .* cannot merge LoRA on tied embeddings"):
        run(merge, tmp_path / "merged", model_name_or_path=tmp_path / "adapter")
    assert not list((tmp_path / "merged").glob("*.safetensors"))


def test_an_adapter_without_rows_of_known_tokens_is_refused(tmp_path):
    save_adapter(tmp_path)
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    key = next(key for key in weights if "lm_head" in key)
    save_file(weights | {key: weights[key][:-1]}, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"(?s)does not fit .*size mismatch for .*lm_head"):
        load_policy(str(tmp_path / "adapter"))


def run(stage, output_dir, **options):
    options |= {"output_dir": output_dir}
    arguments = [argument for key, value in options.items() for argument in (f"--{key}", str(value))]
    stage.STAGE.main(*stage.STAGE.make_parser().parse_args_and_config(arguments))
    return output_dir


@pytest.mark.parametrize("case", ["both", "tied", "padded", "LoRA on the embedding"])
def test_both_stages_train_it_further_and_it_can_be_merged(tmp_path, case):
    save_adapter(tmp_path, **CASES[case])
    judged = {"image_ids": ["x"], "score_chosen": 9.0, "score_rejected": 2.0, "judge": "{}"}
    pairs = Dataset.from_list([tiny_dpo.pair(n) | judged for n in range(4)], features=preference_features())
    (tmp_path / "pairs").mkdir()
    pairs.to_parquet(tmp_path / "pairs" / "train-00000-of-00001.parquet")
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "learning_rate": 1e-2}
    data = tiny_run.write_instruct(tmp_path / "data", range(4))
    first = run(sft, tmp_path / "sft", model_name_or_path=tmp_path / "adapter", dataset=data, **training)
    second = run(dpo, tmp_path / "dpo", model_name_or_path=first, dataset=tmp_path / "pairs", **training)
    before, after = (load_file(path / WEIGHTS) for path in (first, second))
    assert any(not torch.equal(before[key], after[key]) for key in before if "embed_tokens" in key)
    merged = run(merge, tmp_path / "merged", model_name_or_path=second)  # compares the two
    model, processor = load_policy(str(merged))
    assert model.get_input_embeddings().weight.shape[0] == (1088 if case == "padded" else 1025)
    torch.testing.assert_close(logits(model, processor), logits(*load_policy(str(second))), rtol=0, atol=1e-4)

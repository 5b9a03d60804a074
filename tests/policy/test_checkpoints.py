# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import tiny_run
import torch
from peft import get_peft_model
from PIL import Image
from transformers import pipeline

from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.adapters import adapter_config, retie_lm_head
from medst_trl.policy.loading import load_policy
from medst_trl.policy.vusr import VUSR


def _save_base(folder, **kwargs):
    model, processor = tiny_llava(**tiny_run.SMALL, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def _prompt(processor, question):
    content = [{"type": "image", "image": Image.new("RGB", (16, 16), "gray")}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_an_enlarged_model_answers_as_before(tmp_path):
    base, base_processor = _save_base(tmp_path)
    model, processor = load_policy(str(tmp_path))
    token = processor.tokenizer.convert_tokens_to_ids(VUSR)
    assert model.get_input_embeddings().num_embeddings == token + 1 == len(base_processor.tokenizer) + 1
    inputs = _prompt(processor, "What is it?")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[..., :token], base(**_prompt(base_processor, "What is it?")).logits)


def test_loading_twice_gives_the_same_weights(tmp_path):
    _save_base(tmp_path)
    first, second = (dict(load_policy(str(tmp_path))[0].named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_spare_row_is_taken_before_the_vocabulary_grows(tmp_path):
    base, _ = _save_base(tmp_path, spare_rows=8)
    model, processor = load_policy(str(tmp_path))
    assert model.get_input_embeddings().weight.shape == base.get_input_embeddings().weight.shape
    assert processor.tokenizer.convert_tokens_to_ids(VUSR) < model.get_input_embeddings().num_embeddings


def test_generation_stops_at_terminators_and_never_writes_the_token(tmp_path):
    _save_base(tmp_path)
    model, processor = load_policy(str(tmp_path))
    token = processor.tokenizer.convert_tokens_to_ids(VUSR)
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id
    with torch.no_grad():
        model.get_output_embeddings().weight[token] = 100 * model.get_output_embeddings().weight.abs().max()
    torch.manual_seed(0)
    written = model.generate(**_prompt(processor, "What?"), do_sample=True, max_new_tokens=20, num_return_sequences=8)
    assert token not in written[:, -20:]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spare_rows", [0, 8])
def test_an_adapter_comes_back_with_its_token_and_template(tmp_path, tied, spare_rows):
    base_folder, adapter_folder = tmp_path / "base", tmp_path / "adapter"
    _save_base(base_folder, tie_word_embeddings=tied, spare_rows=spare_rows)
    model, processor = load_policy(str(base_folder))
    token = processor.tokenizer.convert_tokens_to_ids(VUSR)
    model = get_peft_model(model, adapter_config(model, vusr_token_id=token, r=4, vision_r=2))
    retie_lm_head(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(adapter_folder, save_embedding_layers=False)
    processor.save_pretrained(adapter_folder)

    loaded, loaded_processor = load_policy(str(adapter_folder))
    assert loaded_processor.chat_template == processor.chat_template
    assert not any(p.requires_grad for p in loaded.parameters())
    for question in ("What is it?", VUSR):
        inputs = _prompt(loaded_processor, question)
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, loaded(**inputs).logits)

    again, _ = load_policy(str(adapter_folder), is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


def test_an_adapter_without_processor_takes_its_bases(tmp_path):
    base_folder, adapter_folder = tmp_path / "base", tmp_path / "adapter"
    _save_base(base_folder)
    model, processor = load_policy(str(base_folder))
    get_peft_model(model, adapter_config(model, r=4, vision_r=0)).save_pretrained(adapter_folder)
    _, loaded = load_policy(str(adapter_folder))
    assert loaded.chat_template == processor.chat_template


def test_a_base_that_has_moved_is_named_and_can_be_given(tmp_path):
    base_folder, adapter_folder, elsewhere = tmp_path / "base", tmp_path / "adapter", tmp_path / "elsewhere"
    _save_base(base_folder)
    model, processor = load_policy(str(base_folder))
    get_peft_model(model, adapter_config(model, r=4, vision_r=0)).save_pretrained(adapter_folder)
    processor.save_pretrained(adapter_folder)
    base_folder.rename(elsewhere)
    with pytest.raises(UserError, match="base_model_name_or_path"):
        load_policy(str(adapter_folder))
    assert load_policy(str(adapter_folder), base_model_name_or_path=str(elsewhere))


@pytest.mark.parametrize("where", ["missing/folder", "org/model-that-is-not-here"])
def test_nothing_there_is_a_clear_error(where):
    with pytest.raises(UserError, match=where):
        load_policy(where)


def test_the_pipeline_leaves_a_bare_turn_to_the_model(tmp_path, monkeypatch):
    _save_base(tmp_path)
    model, processor = load_policy(str(tmp_path))
    prompts, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: prompts.append(kwargs["input_ids"]) or generate(**kwargs))
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": Image.new("RGB", (16, 16), "gray")}, {"type": "text", "text": VUSR}]
    written = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4)
    assert prompts[0][0, -1] == processor.tokenizer.convert_tokens_to_ids(VUSR)
    assert written[0]["generated_text"]


def test_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(UserError, match="float17"):
        load_policy("nowhere", dtype="float17")

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_run import SMALL
from transformers import AutoModelForImageTextToText, AutoProcessor

from medst_trl.demo.phantoms import MODALITIES, QUADRANTS, QUESTIONS, make_phantoms
from medst_trl.demo.tiny_model import (
    BACKGROUNDS,
    SPECIAL_TOKENS,
    conversations,
    draw_pictures,
    explanations,
    questions,
    tiny_llava,
)


MODEL, PROCESSOR = tiny_llava()
PICTURES = draw_pictures(300, seed=1)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "In the corner."}]},
    {"role": "user", "content": "Which?"},
]


def small(**kwargs):
    return tiny_llava(**{**SMALL, **kwargs})


def encode(processor, size: int):
    return processor(
        text=processor.apply_chat_template(MESSAGES, add_generation_prompt=True),
        images=Image.linear_gradient("L").resize((size, size)),
        add_special_tokens=False,
        return_tensors="pt",
    )


def test_the_tiny_model_has_the_documented_sizes():
    assert 1_000_000 < MODEL.num_parameters() < 2_000_000
    assert small()[0].num_parameters() < 100_000


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_can_be_encoded(text):
    tokenizer = PROCESSOR.tokenizer
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_words_of_the_phantoms_take_few_tokens():
    tokens = words = 0
    for phantom in make_phantoms(81, seed=0):
        for question in phantom.questions:
            text = f" {question['question']} {question['answer']}"
            tokens += len(PROCESSOR.tokenizer.tokenize(text))
            words += len(text.replace("?", " ?").replace(".", " .").split())
    assert tokens < 1.1 * words


def test_the_chat_template_is_vicuna_with_an_end_token_after_each_answer():
    text = PROCESSOR.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert text == ("<s>Be brief. USER: <image>\nWhere is it? ASSISTANT: In the corner.</s>USER: Which? ASSISTANT:")


def test_special_tokens_are_single_tokens_without_vusr():
    tokenizer = PROCESSOR.tokenizer
    assert tokenizer.convert_ids_to_tokens(range(len(SPECIAL_TOKENS))) == list(SPECIAL_TOKENS)
    assert "<vusr>" not in tokenizer.get_vocab()
    assert tokenizer.pad_token_id is not None and tokenizer.is_fast


def test_an_image_takes_one_token_per_patch():
    inputs = encode(PROCESSOR, 100)  # resized
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert (inputs["input_ids"] == PROCESSOR.image_token_id).sum() == (64 // 16) ** 2
    assert MODEL(**inputs).logits.shape[-1] == len(PROCESSOR.tokenizer)


@pytest.mark.parametrize("spare_rows", [0, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_a_reloaded_model_gives_equal_logits(tmp_path, tied, spare_rows):
    model, processor = small(tie_word_embeddings=tied, spare_rows=spare_rows)
    assert model.get_input_embeddings().weight.shape[0] == len(processor.tokenizer) + spare_rows
    shares = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert shares == tied
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded, reloaded_processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    inputs = encode(reloaded_processor, 16)
    assert inputs["input_ids"].tolist() == encode(processor, 16)["input_ids"].tolist()
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)


def test_image_features_come_from_the_layer_before_the_last():
    model, processor = small()
    model.train()
    inputs = encode(processor, 16)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    layers = model.model.vision_tower.encoder.layers
    assert all(parameter.grad is None for parameter in layers[-1].parameters())
    assert all(parameter.grad is not None for layer in layers[:-1] for parameter in layer.parameters())


def test_weights_depend_on_the_seed_and_leave_the_global_random_state_unchanged():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = small(seed=0)[0], small(seed=0)[0], small(seed=1)[0]
    assert torch.equal(torch.rand(1), expected)
    weights = [model.state_dict() for model in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])


def test_the_tokenizer_is_the_same_in_another_process():
    code = (
        "from medst_trl.demo.tiny_model import tiny_llava; print(tiny_llava()[1].tokenizer.backend_tokenizer.to_str())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == PROCESSOR.tokenizer.backend_tokenizer.to_str()


# --- Training data ---------------------------------------------------------------------------------------------------


def all_text(rows) -> list[str]:
    return [part["text"] for row in rows for m in row["messages"] for part in m["content"] if part["type"] == "text"]


def test_the_pixels_show_the_shape_in_the_corner_of_the_ground_truth():
    plain = [picture for picture in PICTURES if picture.background == "plain" and picture.corner]
    assert {picture.corner for picture in plain} == set(QUADRANTS)
    for picture in plain:
        pixels = np.asarray(picture.image, dtype=float)
        shape = np.abs(pixels - np.median(pixels)) > 60
        y, x = (axis.mean() for axis in np.nonzero(shape))
        assert picture.corner == f"{'lower' if y > 32 else 'upper'} {'right' if x > 32 else 'left'}"
        assert (pixels[shape].mean() > np.median(pixels)) == (picture.brightness == "bright")


def test_pictures_depend_on_the_seed():
    assert [p.image.tobytes() for p in draw_pictures(20, seed=1)] == [p.image.tobytes() for p in PICTURES[:20]]
    assert len({p.image.tobytes() for p in PICTURES + draw_pictures(300, seed=2)}) == 600


def test_every_background_occurs_and_some_pictures_have_no_shape():
    assert {picture.background for picture in PICTURES} == set(BACKGROUNDS)
    assert 0.5 < sum(picture.corner is not None for picture in PICTURES) / len(PICTURES) < 0.9


def test_answers_describe_the_picture():
    rng = np.random.default_rng(0)
    for picture in PICTURES:
        answers = " ".join(answer for _, answer in questions(picture, rng))
        assert picture.background in answers
        if picture.corner:
            assert f"{picture.size} {picture.brightness} shape in the {picture.corner} corner" in answers
        else:
            assert "no shape" in answers and "corner" not in answers


def test_conversations_have_one_image_and_the_requested_turns():
    rows = list(conversations(PICTURES[:20], seed=0, turns=2))
    for picture, row in zip(PICTURES, rows, strict=False):
        assert row["images"] == [picture.image]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
        assert [part["type"] for m in row["messages"] for part in m["content"]].count("image") == 1
    assert rows == list(conversations(PICTURES[:20], seed=0, turns=2))


def test_the_base_data_have_no_medical_labels():
    # Conversations about pictures have no medical words. Only the explanations, which have no images, have some.
    medical = re.compile(
        r"\b(lesion|scan|quadrant|tissue|modality|finding|" + "|".join(MODALITIES) + r")\b", re.IGNORECASE
    )
    assert not [text for text in all_text(conversations(PICTURES, seed=0)) if medical.search(text)]
    texts = list(explanations(200, seed=0))
    assert all(row["images"] == [] for row in texts)
    answers = {q["answer"] for p in make_phantoms(81, seed=0) for q in p.questions if len(q["answer"].split()) > 1}
    wordings = {wording for wordings in QUESTIONS.values() for wording in wordings}
    assert not answers & set(all_text(texts))
    assert not wordings & set(all_text(texts))


def test_the_base_data_have_every_word_of_the_phantoms():
    # Stage 1 does not train the output layer, so it can hardly learn a word that the base data lack.
    base_words = set(re.findall(r"\w+", " ".join(all_text([*explanations(200, 0), *conversations(PICTURES, 0)]))))
    phantom_words = {word for quadrant in QUADRANTS for word in quadrant.split()}
    for phantom in make_phantoms(162, seed=0):
        for question in phantom.questions:
            phantom_words |= set(re.findall(r"\w+", f"{question['question']} {question['answer']}"))
    assert phantom_words - base_words == set()

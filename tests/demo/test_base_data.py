# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0

import re

import numpy as np

from medst_trl.demo.base_data import BACKGROUNDS, conversations, draw_pictures, explanations, questions
from medst_trl.demo.phantoms import MODALITIES, QUADRANTS, QUESTIONS, make_phantoms


PICTURES = draw_pictures(300, seed=1)


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

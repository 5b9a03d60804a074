# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import random
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.evaluation.controls import blank_image, compare_vqa, shuffled_rows
from medst_trl.evaluation.scores_file import format_scores
from medst_trl.evaluation.scoring import figures, score_vqa


@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.integers(0, 5))
def test_no_question_keeps_its_image_after_shuffling(image_ids, seed):
    assume(not image_ids or 2 * max(Counter(image_ids).values()) <= len(image_ids))
    shuffled = shuffled_rows(image_ids, seed)
    assert sorted(shuffled) == list(range(len(image_ids)))
    assert all(image_ids[row] != image_ids[donor] for row, donor in enumerate(shuffled))


@pytest.mark.parametrize("image_ids", [["a"], ["a", "a"], ["a", "a", "b"]])
def test_too_many_equal_images_cannot_be_shuffled(image_ids):
    with pytest.raises(UserError, match="cannot be shuffled"):
        shuffled_rows(image_ids)


def test_the_shuffle_depends_on_the_seed():
    image_ids = [str(number) for number in range(50)]
    assert shuffled_rows(image_ids, 1) == shuffled_rows(image_ids, 1) != shuffled_rows(image_ids, 2)


def test_blank_images_keep_their_size():
    blank = blank_image(Image.linear_gradient("L").resize((70, 50)))
    assert blank.size == (70, 50)
    assert blank.getextrema() == ((128, 128),) * 3


def rows(predictions, answers="yes"):
    return [
        {"id": str(i), "image_id": str(i // 2), "answer": answers, "answer_type": "closed", "prediction": text}
        for i, text in enumerate(predictions)
    ]


@pytest.mark.parametrize("variant", ["strict", "llava_med"])
def test_equal_predictions_have_a_difference_of_zero(variant):
    rng = random.Random(0)
    real = rows([rng.choice(["yes", "no"]) for _ in range(60)])
    result = compare_vqa(real, real[::-1], variant)
    for _, leaf in figures(result):
        assert leaf["difference"] in (0, None)
        assert leaf["difference_interval"] in ([0, 0], None)
    assert (
        dict(figures(result))[("closed", "accuracy")]["value"]
        == score_vqa(real, variant)["closed"]["accuracy"]["value"]
    )


def test_the_difference_equals_a_value_computed_by_hand():
    real = rows(["yes"] * 60 + ["no"] * 40)
    control = rows(["yes"] * 40 + ["no"] * 60)
    leaf = compare_vqa(real, control)["closed"]["accuracy"]
    assert (leaf["value"], leaf["difference"]) == pytest.approx((40, 20))
    assert 5 < leaf["difference_interval"][0] < 20 < leaf["difference_interval"][1] < 35


def test_pairing_narrows_the_interval():
    """The predictions agree on nearly all images, so the paired interval is narrower than that of one score."""
    rng = random.Random(0)
    texts = [rng.choice(["yes", "no"]) for _ in range(400)]
    real, control = rows(texts), rows(["no", *texts[1:]])
    leaf, unpaired = compare_vqa(real, control)["closed"]["accuracy"], score_vqa(real)["closed"]["accuracy"]
    assert leaf["difference_interval"][1] - leaf["difference_interval"][0] < 2
    assert unpaired["interval"][1] - unpaired["interval"][0] > 5


def test_the_table_shows_the_difference():
    real, control = rows(["yes"] * 20), rows(["no"] * 20)
    table = format_scores(score_vqa(real), {"blank": compare_vqa(real, control)})
    line = next(line for line in table.splitlines() if line.startswith("closed: accuracy"))
    assert line.split()[2:4] == ["20", "100.0"]
    assert "+100.0 [+100.0, +100.0]" in line


def test_predictions_of_different_questions_are_refused():
    real = rows(["yes", "no"])
    for control, message in (
        (real[:1], "do not answer the same questions: 1 id"),
        ([*real, *real], "is repeated"),
        ([row | {"id": None} for row in real], "has no id"),
    ):
        with pytest.raises(UserError, match=message):
            compare_vqa(real, control)

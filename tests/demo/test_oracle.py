# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that the oracle knows the ground truth and errs at its error rate."""

import pytest
from datasets import Dataset

from medst_trl.base.errors import UserError
from medst_trl.data.images import image_id
from medst_trl.demo import oracle as phantom_oracle
from medst_trl.demo.oracle import open_oracle, score_answer
from medst_trl.demo.phantoms import Truth, answer, make_phantoms


LESION = Truth("CT", True, "upper left", "small", "bright")
HEALTHY = Truth("MRI", False)


@pytest.mark.parametrize("split", ["train", "unlabelled"])
def test_only_the_right_answer_scores_ten(split):
    for phantom in make_phantoms(81, 1, split):
        for question in phantom.questions:
            assert score_answer(question["question"], question["answer"], phantom.truth) == 10
            for other in ("", "Perhaps.", "It is a bird."):
                assert score_answer(question["question"], other, phantom.truth) == 1


@pytest.mark.parametrize(
    "question, better, worse, truth",
    [
        ("Is there a lesion in the scan?", "Yes, there is.", "No.", LESION),
        ("Is there a lesion in the scan?", "No lesion.", "Yes", HEALTHY),
        ("Which modality is shown?", "It is a CT scan.", "MRI", LESION),
        ("Where is the lesion?", "upper left", "In the upper right quadrant.", LESION),
        ("What does the lesion look like?", "It is small and dark.", "It is large and dark.", LESION),
        ("What does the lesion look like?", "It is small.", "It is small and large.", LESION),
        ("Please describe the scan.", "A small bright lesion.", "The CT scan shows no lesion.", LESION),
        ("Please describe the scan.", "The MRI scan shows no lesion.", "The CT scan shows no lesion.", HEALTHY),
        ("Is the lesion bright?", "Yes", "No", LESION),
    ],
)  # fmt: skip
def test_better_answers_score_higher(question, better, worse, truth):
    assert score_answer(question, better, truth) > score_answer(question, worse, truth)


def test_answers_to_impossible_questions_score_one():
    assert score_answer("Where is the lesion?", "upper left", HEALTHY) == 1
    assert score_answer("Nonsense", "upper left", LESION) == 1


def test_verdicts_err_at_the_error_rate_and_equally_in_both_orders():
    phantoms = make_phantoms(60, 2, "unlabelled")
    candidates = Dataset.from_list([{"image_ids": [image_id(phantom.image)]} for phantom in phantoms])
    question, wrong_answers = "Which modality is shown?", {"CT": "MRI", "MRI": "ultrasound", "ultrasound": "CT"}
    for rate, low, high in ((0.0, 0, 0), (0.3, 0.15, 0.45)):
        errors = 0
        judge = open_oracle(candidates, error_rate=rate, seed=2)
        for phantom in phantoms:
            right = answer(question, phantom.truth)
            pair = {"image_ids": [image_id(phantom.image)], "question": question}
            forward = judge(pair | {"answers": [right, wrong_answers[right]]})
            swapped = judge(pair | {"answers": [wrong_answers[right], right]})
            assert forward == swapped[::-1]  # an error does not depend on the order
            errors += forward[0] < forward[1]
        assert low <= errors / len(phantoms) <= high


def test_images_that_are_not_phantoms_are_refused(monkeypatch):
    monkeypatch.setattr(phantom_oracle, "MOST_PHANTOMS", 50)
    known = make_phantoms(1, 0, "unlabelled")[0]
    candidates = Dataset.from_list([{"image_ids": ["a"]}, {"image_ids": [image_id(known.image)]}])
    with pytest.raises(UserError, match="1 of 2 images"):
        open_oracle(candidates)

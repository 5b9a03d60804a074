# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0

from collections import Counter

import numpy as np
import pytest
from phantom_rows import benchmark_rows

from medst_trl.demo import phantoms
from medst_trl.demo.phantoms import (
    BRIGHTNESSES,
    MODALITIES,
    QUESTIONS,
    SPLITS,
    VIEWS,
    Truth,
    answer,
    instruct_rows,
    is_well_formed,
    make_phantoms,
    question_kind,
)


ALL_QUESTIONS = [w.format(view=view) for wordings in QUESTIONS.values() for w in wordings for view in VIEWS]
PHANTOMS = make_phantoms(162, seed=3)


def tissue_means(phantom) -> dict[str, float]:
    """Return the mean grey value around each possible position of a lesion, minus the median of the four means."""
    pixels = np.asarray(phantom.image, dtype=float)
    y, x = np.mgrid[:64, :64]
    means = {}
    for quadrant in phantoms.QUADRANTS:
        centre_x, centre_y = (44 if "right" in quadrant else 20), (44 if "lower" in quadrant else 20)
        means[quadrant] = pixels[np.hypot(x - centre_x, y - centre_y) <= 8].mean()
    middle = np.median(list(means.values()))
    return {quadrant: mean - middle for quadrant, mean in means.items()}


def test_the_quadrant_that_differs_most_is_that_of_the_lesion():
    with_lesion = [phantom for phantom in PHANTOMS if phantom.truth.lesion]
    assert with_lesion
    for phantom in with_lesion:
        means = tissue_means(phantom)
        lesion = max(means, key=lambda quadrant: abs(means[quadrant]))
        assert lesion == phantom.truth.quadrant, phantom.id
        assert (means[lesion] > 0) == (phantom.truth.brightness == "bright"), phantom.id


def test_without_a_lesion_quadrants_differ_little():
    differences = {True: [], False: []}
    for phantom in PHANTOMS:
        differences[phantom.truth.lesion].append(max(abs(mean) for mean in tissue_means(phantom).values()))
    assert max(differences[False]) < np.median(differences[True])


def test_large_lesions_cover_more_than_small_ones():
    areas = {"small": [], "large": []}
    for phantom in PHANTOMS:
        if phantom.truth.modality == "CT" and phantom.truth.brightness == "bright":
            middle = np.asarray(phantom.image)[11:53, 11:53]  # inside the ring of bone
            areas[phantom.truth.size].append((middle > 225).sum())
    assert areas["small"] and max(areas["small"]) < min(areas["large"])


def test_modalities_differ_in_their_pixels():
    bone = [np.asarray(p.image).max() for p in PHANTOMS if p.truth == Truth("CT", False)]
    soft_tissue = [np.asarray(p.image).max() for p in PHANTOMS if p.truth == Truth("MRI", False)]
    speckle = [np.asarray(p.image)[25:40, 25:40].std() for p in PHANTOMS if p.truth == Truth("ultrasound", False)]
    uniform = [np.asarray(p.image)[25:40, 25:40].std() for p in PHANTOMS if p.truth == Truth("CT", False)]
    assert max(soft_tissue) < min(bone)
    assert max(uniform) < min(speckle)


def test_phantoms_depend_on_the_seed():
    again, other = make_phantoms(20, seed=3), make_phantoms(20, seed=4)
    for first, second, third in zip(PHANTOMS, again, other, strict=False):
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.id, first.truth, first.questions) == (second.id, second.truth, second.questions)
        assert first.image.tobytes() != third.image.tobytes()


def test_no_image_and_no_id_is_shared_between_splits_or_seeds():
    drawn = [p for split in SPLITS for seed in (0, 1, 2) for p in make_phantoms(60, seed, split)]
    assert len({p.image.tobytes() for p in drawn}) == len(drawn)
    assert len({p.id for p in drawn}) == len(drawn)
    assert len({q["id"] for p in drawn for q in p.questions}) == sum(len(p.questions) for p in drawn)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train"):
        make_phantoms(1, seed=0, split="heldout")


def test_truths_are_balanced():
    truths = Counter(phantom.truth for phantom in PHANTOMS)
    assert {count for truth, count in truths.items() if truth.lesion} == {2}
    assert sum(truth.lesion for truth in truths) == 48
    assert {truths[Truth(modality, False)] for modality in MODALITIES} == {22}


def test_guessing_the_most_frequent_answer_scores_low():
    answers = {}
    for phantom in make_phantoms(405, seed=0, split="test"):
        for question in phantom.questions:
            answers.setdefault(question["question_type"], Counter())[question["answer"]] += 1
    guessed = sum(counter.most_common(1)[0][1] for counter in answers.values())
    assert len(answers) == 6
    assert guessed / sum(map(Counter.total, answers.values())) < 0.4


def test_questions_are_answered_from_the_ground_truth():
    for phantom in PHANTOMS:
        for question in phantom.questions:
            assert is_well_formed(question["question"], phantom.truth)
            assert question["answer"] == answer(question["question"], phantom.truth)
            assert (question["answer_type"] == "closed") == (question["answer"] in ("Yes", "No"))
            assert set(question) == {"id", "question", "answer", "answer_type", "question_type", "link"}


@pytest.mark.parametrize("question", ALL_QUESTIONS)
def test_every_wording_is_well_formed(question):
    with_lesion = Truth("MRI", True, "upper left", "small", "dark")
    assert question_kind(question) in QUESTIONS
    assert is_well_formed(question, with_lesion)
    assert answer(f"  {question.lower()} ", with_lesion) == answer(question, with_lesion)


@pytest.mark.parametrize(
    "question",
    [
        "",
        "?",
        "lesion",
        "Where is the fracture?",
        "Is there a lesion in the",
        "Where is the lesion? In the",
        "Yes",
        "<vusr>",
    ],
)
def test_other_text_is_not_well_formed(question):
    assert question_kind(question) is None
    assert not is_well_formed(question)


def test_a_scan_without_a_lesion_has_no_questions_about_the_lesion():
    truth = Truth("CT", False)
    answered = {question_kind(question) for question in ALL_QUESTIONS if is_well_formed(question, truth)}
    assert answered == {"presence", "modality", "description"}
    assert answer("Is there a lesion in the scan?", truth) == "No"
    with pytest.raises(ValueError, match="Where is the lesion"):
        answer("Where is the lesion?", truth)


def test_questions_about_opposite_brightness_have_opposite_answers():
    for brightness in BRIGHTNESSES:
        truth = Truth("CT", True, "lower left", "large", brightness)
        assert answer(f"Is the lesion {brightness}?", truth) == "Yes"
        other = BRIGHTNESSES[1 - BRIGHTNESSES.index(brightness)]
        assert answer(f"Is the lesion {other}?", truth) == "No"


def test_instruct_rows_are_conversations_about_one_image():
    for phantom, row in zip(PHANTOMS, instruct_rows(PHANTOMS, seed=0), strict=True):
        assert (row["id"], row["images"]) == (phantom.id, [phantom.image])
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * len(phantom.questions)
        kinds = [[part["type"] for part in message["content"]] for message in row["messages"]]
        assert kinds == [["image", "text"]] + [["text"]] * (len(roles) - 1)
        texts = [message["content"][-1]["text"] for message in row["messages"]]
        asked = {(q["question"], q["answer"]) for q in phantom.questions}
        assert set(zip(texts[::2], texts[1::2], strict=True)) == asked
        assert not any(message["vusr"] for message in row["messages"])


def test_the_order_of_questions_depends_only_on_the_seed():
    def order(seed, chosen):
        return [[m["content"][-1]["text"] for m in row["messages"]] for row in instruct_rows(chosen, seed)]

    assert order(0, PHANTOMS[:20]) == order(0, PHANTOMS)[:20]
    assert order(0, PHANTOMS) != order(1, PHANTOMS)
    first = Counter(question_kind(texts[0]) for texts in order(0, PHANTOMS))
    assert len(first) == len(QUESTIONS)  # every kind is the first question of some conversation


def test_turns_limit_a_conversation():
    assert {len(row["messages"]) for row in instruct_rows(PHANTOMS, seed=0, turns=2)} == {4}


def test_rows_have_the_columns_of_their_kind():
    from datasets import Dataset

    from medst_trl.data.schema import benchmark_features, instruct_features

    instruct = Dataset.from_list(list(instruct_rows(PHANTOMS[:3], seed=0)), features=instruct_features())
    benchmark = Dataset.from_list(list(benchmark_rows(PHANTOMS[:3])), features=benchmark_features())
    assert instruct[0]["images"][0].tobytes() == PHANTOMS[0].image.tobytes()
    assert instruct[0]["image_ids"] == [benchmark[0]["image_id"]]
    assert benchmark[2]["questions"] == PHANTOMS[2].questions

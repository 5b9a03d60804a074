# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test which pairs are kept, in which split they are, and how they are counted."""

import json
import random

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medst_trl import build_preferences
from medst_trl.data.groups import Grouping
from medst_trl.data.schema import image_part, text_of, text_part
from medst_trl.selftrain.preferences import near_duplicates, select_preferences


def candidate(number: int, image_ids=None, question=None, answers=("one two", "three")) -> dict:
    image_ids = [f"image{number}"] if image_ids is None else image_ids
    content = [*(image_part() for _ in image_ids), text_part(question or f"What is number {number} about?")]
    return {
        "id": f"r{number}#0",
        "image_ids": image_ids,
        "prompt": [{"role": "user", "content": content}],
        "answers": list(answers),
        "generation": "{}",
    }


def judgement(candidate: dict, verdict=0, scores=(8.0, 4.0), dropped=None, pair=None, **more) -> dict:
    k = 0 if pair is None else pair
    return {
        "id": candidate["id"] if pair is None else f"{candidate['id']}/{pair}",
        "candidate": candidate["id"],
        "image_ids": candidate["image_ids"],
        "question": text_of(candidate["prompt"][-1]["content"]),
        "answers": candidate["answers"][2 * k : 2 * k + 2],
        "scores": list(scores) if scores else None,
        "verdict": None if dropped else verdict,
        "dropped": dropped,
        "orders": [{"shown": [0, 1], "scores": list(scores or ()), "verdict": verdict, "reply": "8 4"}],
        "model": "some-judge",
        "prompt_version": "paper",
        **more,
    }


def build(candidates, judgements=None, **settings):
    return build_preferences(Dataset.from_list(candidates), judgements or map(judgement, candidates), **settings)


def benchmark(image_id: str, *questions: str) -> Dataset:
    return Dataset.from_list([{"image_id": image_id, "questions": [{"question": q} for q in questions]}])


def reasons(preferences) -> dict:
    return {row["id"]: row["reason"] for row in preferences.rejected}


@pytest.mark.parametrize("verdict", [0, 1])
def test_the_winner_is_chosen_and_keeps_its_score(verdict):
    answers, scores = ("left lung", "right lung"), (3.0, 7.5)
    single = candidate(1, answers=answers)
    [row] = build([single], [judgement(single, verdict, scores)]).train
    assert [text_of(row[key][0]["content"]) for key in ("chosen", "rejected")] == [
        answers[verdict],
        answers[1 - verdict],
    ]
    assert (row["score_chosen"], row["score_rejected"]) == (scores[verdict], scores[1 - verdict])
    assert row["prompt"] == single["prompt"] and row["row"] == 0
    judge = json.loads(row["judge"])
    assert judge["model"] == "some-judge" and judge["orders"][0]["scores"] == [3.0, 7.5]


def test_a_judge_that_is_named_by_its_path_is_not_named_in_the_pairs():
    single = candidate(1)
    [row] = build([single], [judgement(single, model="/home/jones/models/judge")]).train
    assert json.loads(row["judge"])["model"] == "judge"


def test_four_answers_give_two_pairs():
    single = candidate(1, answers=("a", "b", "c", "d"))
    rows = build([single], [judgement(single, 0, pair=0), judgement(single, 1, pair=1)]).train
    assert [text_of(row["chosen"][0]["content"]) for row in rows] == ["a", "d"]


def test_a_pair_is_used_once():
    """The candidate and the chosen answer do not matter. Pairs about another image are different pairs."""
    shared = {"image_ids": ["one"], "question": "Is it dark?"}
    candidates = [
        candidate(0, answers=("Yes", "No"), **shared),
        candidate(1, answers=("No", "Yes"), **shared | {"question": "is it dark"}),
        candidate(2, answers=("Yes", "No"), **shared | {"image_ids": ["other"]}),
        candidate(3, answers=("Yes", "No"), **shared | {"question": "Is it wide?"}),
    ]
    margins = [(6.0, 4.0), (9.0, 4.0), (6.0, 4.0), (6.0, 4.0)]
    judgements = [judgement(item, 0, scores) for item, scores in zip(candidates, margins, strict=True)]
    preferences = build(candidates, judgements)
    assert reasons(preferences) == {"r0#0": "near_duplicate_question"}  # the pair with the largest margin is kept
    assert {row["value"] for row in preferences.rejected} == {"is it dark"}
    assert preferences.counts["rejected"] == {"near_duplicate_question": 1}
    assert preferences.counts["train"]["pairs"] == len(preferences.train) == 3


def test_every_pair_is_kept_or_rejected_with_a_reason():
    candidates = [candidate(number) for number in range(8)]
    unknown = candidate(9)
    judgements = [
        judgement(candidates[0]),
        judgement(candidates[1], dropped="flip"),
        judgement(candidates[2], dropped="tie"),
        judgement(candidates[3], verdict=None),
        judgement(candidates[4]) | {"answers": ["of another", "run"]},
        judgement(candidates[0]),  # a repeated judgement
        judgement(unknown),
    ]
    preferences = build(candidates, judgements)
    assert [row["id"] for row in preferences.train] == ["r0#0"]
    assert [row["reason"] for row in preferences.rejected] == [
        "flip", "tie", "no_verdict", "other_answers", "unknown_candidate", "duplicate_id",
    ]  # fmt: skip
    assert preferences.counts["pairs"] == len(judgements) == 1 + sum(preferences.counts["rejected"].values())


def test_rejected_pairs_are_counted_if_none_is_kept():
    candidates = [candidate(number) for number in range(3)]
    preferences = build(candidates, [judgement(item, dropped="tie") for item in candidates])
    assert preferences.train == preferences.validation == []
    assert preferences.counts["rejected"] == {"tie": 3} and preferences.counts["lengths"] == {}
    assert build([candidate(0)], [judgement(candidate(1))]).counts["rejected"] == {"unknown_candidate": 1}


def test_the_splits_share_no_images():
    rng = random.Random(0)
    # Pairs about two images connect groups of images, which must stay in one split.
    images = [sorted(rng.sample(range(400), k=rng.choice([1, 1, 1, 2]))) for _ in range(900)]
    candidates = [
        candidate(number, [f"image{image}" for image in image_numbers]) for number, image_numbers in enumerate(images)
    ]
    preferences = build(candidates, validation_share=0.2, seed=1)
    train, validation = (
        {image for row in rows for image in row["image_ids"]} for rows in (preferences.train, preferences.validation)
    )
    assert not train & validation and len(preferences.train) + len(preferences.validation) == 900
    assert 0.03 < len(preferences.validation) / 900 < 0.6
    shuffled = build(
        candidates, [judgement(item) for item in rng.sample(candidates, 900)], validation_share=0.2, seed=1
    )
    assert {row["id"] for row in shuffled.validation} == {row["id"] for row in preferences.validation}
    other_seed = build(candidates, validation_share=0.2, seed=2)
    assert {row["id"] for row in other_seed.validation} != {row["id"] for row in preferences.validation}


def test_validation_has_the_requested_share_of_the_images():
    candidates = [candidate(number) for number in range(2000)]
    assert len(build(candidates, validation_share=0.1).validation) == pytest.approx(200, abs=40)
    assert build(candidates).validation == []
    assert len(build(candidates[:3], validation_share=0.001).validation) == 1  # at least one image
    assert build(candidates[:1], validation_share=0.5).validation == []  # but never all images


def test_benchmark_images_are_dropped_by_default():
    candidates = [
        candidate(0, ["seen"]),
        candidate(1, ["seen"], "Is it DARK ?"),
        candidate(2, ["new"], "is it dark ?"),
    ]
    candidates.append(candidate(3, ["new"], "Is it bright?"))
    benchmarks = [benchmark("seen", "Is it dark ?"), benchmark("other", "What?")]
    preferences = build(candidates, benchmarks=benchmarks)
    assert reasons(preferences) == {"r0#0": "image_in_benchmark", "r1#0": "image_and_question_in_benchmark"}
    assert preferences.counts["shared_with_benchmarks"] == {"image_and_question": 1, "image": 1, "question": 1}
    kept = build(candidates, benchmarks=benchmarks, keep_benchmark_images=True)
    assert len(kept.train) == 4
    assert kept.counts["shared_with_benchmarks"] == preferences.counts["shared_with_benchmarks"]


def test_near_duplicate_questions_about_one_image_are_dropped():
    questions = ["Is the lung clear?", "is a lung, clear", "Is the left lung clear?"]
    candidates = [candidate(number, ["one"], question) for number, question in enumerate(questions)]
    candidates.append(candidate(3, ["another"], questions[0]))
    margins = [(6.0, 5.0), (9.0, 2.0), (6.0, 5.0), (6.0, 5.0)]
    judgements = [judgement(item, 0, scores) for item, scores in zip(candidates, margins, strict=True)]
    preferences = build(candidates, judgements)
    assert reasons(preferences) == {"r0#0": "near_duplicate_question"}  # the pair with the smaller margin is dropped
    assert preferences.rejected[0]["value"] == questions[1]
    assert len(build(candidates, judgements, duplicate_similarity=None).train) == 4
    assert set(reasons(build(candidates, judgements, duplicate_similarity=0.5))) == {"r0#0", "r2#0"}


def test_pairs_without_scores_have_no_margin():
    candidates = [candidate(number, ["one"], "Is it dark?", answers) for number, answers in enumerate(["ab", "cd"])]
    preferences = build(candidates, [judgement(item, scores=None) for item in candidates])
    assert reasons(preferences) == {"r1#0": "near_duplicate_question"}
    assert preferences.train[0]["score_chosen"] is None


WORDS = st.lists(st.sampled_from(["is", "the", "lung", "left", "clear", "dark"]), min_size=1, max_size=5)


@given(st.lists(st.tuples(WORDS, st.integers(0, 3)), max_size=8))
def test_a_dropped_question_has_a_better_one_that_is_kept(questions):
    pairs = [
        {"image_ids": ["one"], "prompt": [{"role": "user", "content": [text_part(f"{' '.join(words)} {number}")]}],
         "row": number, "score_chosen": float(score), "score_rejected": 0.0}
        for number, (words, score) in enumerate(questions)
    ]  # fmt: skip
    dropped = near_duplicates(pairs, 0.4, Grouping([(["one"], [])]))
    kept = {text_of(pair["prompt"][0]["content"]): pair for index, pair in enumerate(pairs) if index not in dropped}
    for index, winner in dropped.items():
        assert winner in kept and kept[winner]["score_chosen"] >= pairs[index]["score_chosen"]


def test_lengths_are_counted_in_words():
    answers = [("one two three", "one"), ("one", "one two"), ("one two", "three four"), ("1 2 3 4 5", "1 2 3")]
    candidates = [candidate(number, answers=texts) for number, texts in enumerate(answers)]
    assert build(candidates).counts["lengths"]["train"] == {
        "chosen_words": 2.75, "rejected_words": 2.0, "words_gap": 0.75,
        "longer_chosen": 2, "longer_rejected": 1, "same_length": 1, "longer_chosen_share": 0.6667,
    }  # fmt: skip


def test_each_split_is_balanced_by_length():
    candidates = [
        candidate(number, answers=("long answer", "short") if number % 5 else ("no", "long answer"))
        for number in range(300)
    ]
    preferences = build(candidates, length_balanced=True, validation_share=0.3, seed=3)
    for split in ("train", "validation"):
        lengths = preferences.counts["lengths"][split]
        assert lengths["longer_chosen"] == lengths["longer_rejected"] > 0
    assert preferences.counts["rejected"]["length_balance"] == 300 - sum(
        preferences.counts[split]["pairs"] for split in ("train", "validation")
    )
    again = build(
        candidates,
        [judgement(item) for item in reversed(candidates)],
        length_balanced=True,
        validation_share=0.3,
        seed=3,
    )
    assert {row["id"] for row in again.train} == {row["id"] for row in preferences.train}


def test_pairs_without_judgements_can_be_selected():
    pairs = build([candidate(number) for number in range(4)]).train
    assert select_preferences(pairs).train == pairs


def grouped(rows: list[dict], *groups: str | None) -> list[dict]:
    return [row | {"group_id": group} for row, group in zip(rows, groups, strict=True)]


def test_groups_of_benchmarks_are_dropped_by_default():
    candidates = grouped([candidate(n) for n in range(4)], "5a17ed-p", "5a17ed-q", None, "0ther0-r")
    held = Dataset.from_list(grouped([{"image_id": "x", "questions": []}], "5a17ed-p"))
    preferences = build(candidates, benchmarks=[held])
    assert reasons(preferences) == {"r0#0": "group_in_benchmark"}
    assert preferences.counts["shared_with_benchmarks"]["group"] == 1
    assert [pair["group_id"] for pair in preferences.train] == ["5a17ed-q", None, "0ther0-r"]
    kept = build(candidates, benchmarks=[held], keep_benchmark_images=True)
    assert len(kept.train) == 4 and kept.counts["shared_with_benchmarks"]["group"] == 1
    # Groups that cannot be compared have no count instead of 0.
    other = Dataset.from_list(grouped([{"image_id": "y", "questions": []}], "0ther0-z"))
    for rows, benchmarks, reason in (
        (candidates[3:], [held], "groups of another kind, or hashed with another salt"),
        (candidates[:2], [other, held], "groups of another kind, or hashed with another salt"),
        (candidates[2:3], [held], "the training data has no groups"),
        (candidates[1:3], [held], "1 training image without a group"),
    ):
        counts = build(rows[-1:] if len(benchmarks) > 1 else rows, benchmarks=benchmarks).counts
        assert counts["shared_with_benchmarks"]["group"] is None and counts["groups_not_compared"] == reason
    counts = build(candidates[1:2], benchmarks=[held]).counts
    assert counts["shared_with_benchmarks"]["group"] == 0 and "groups_not_compared" not in counts


def test_near_copies_of_benchmark_images_are_dropped_by_default():
    image = Image.effect_noise((200, 160), 60)
    images = [image.resize((100, 80)), Image.effect_noise((100, 80), 60)]
    candidates = [candidate(n) | {"images": [image]} for n, image in enumerate(images)]
    held = Dataset.from_list([{"image_id": "original", "image": image, "questions": []}])
    preferences = build(candidates, benchmarks=[held])
    assert reasons(preferences) == {"r0#0": "near_copy_in_benchmark"}
    assert preferences.counts["shared_with_benchmarks"]["near_copy"] == 1
    off = build(candidates, benchmarks=[held], near_copy_bits=0)
    assert len(off.train) == 2 and "near_copy" not in off.counts["shared_with_benchmarks"]


def test_images_whose_hashes_are_known_are_not_decoded(monkeypatch):
    monkeypatch.setattr("medst_trl.data.overlap._identities", None)
    candidates = [candidate(n, question="Is it dark?") | {"images": [Image.effect_noise((9, 9), 60)]} for n in (3, 4)]
    codes = {"image3": 64 * "a", "image4": 63 * "a" + "b"}
    assert list(reasons(build(candidates, near_hashes=codes)).values()) == ["near_duplicate_question"]


def test_near_duplicate_questions_are_found_in_a_group_and_about_near_copies():
    same = [candidate(n, question="Is it dark?") for n in range(5)]
    pairs = build(grouped(same, "p", "p", "q", None, None)).train
    assert [pair["group_id"] for pair in pairs] == ["p", "q", None, None]
    codes = {"image3": 64 * "a", "image4": 63 * "a" + "b"}
    pairs = build_preferences(Dataset.from_list(same), map(judgement, same), near_copy_bits=0).train
    assert len(pairs) == 5
    assert [pair["id"] for pair in select_preferences(pairs, near_hashes=codes).train] == [
        "r0#0",
        "r1#0",
        "r2#0",
        "r3#0",
    ]


def test_slices_of_a_volume_are_near_duplicates_of_their_neighbors_only():
    codes = {f"image{n}": f"{(1 << 8 * n) - 1:064x}" for n in range(12)}
    slices = [candidate(n, question="Is it dark?") for n in range(12)]
    assert len(build(slices, near_hashes=codes).train) == 6
    # What is a near duplicate is not what must not be divided.
    different = [candidate(n) for n in range(12)]
    preferences = build(different, near_hashes=codes, duplicate_similarity=None, validation_share=0.5)
    assert not (preferences.train and preferences.validation)


@pytest.mark.parametrize("groups", [(None, None, None), ("5a17ed-p", None, "5a17ed-q"), ("5a17ed-p",) * 3])
def test_near_duplicate_questions_about_an_image_are_found_whatever_its_groups_are(groups):
    rows = grouped([candidate(n, ["one"], "Is it dark?", (f"yes {n}", "no")) for n in range(3)], *groups)
    assert list(reasons(build(rows)).values()) == ["near_duplicate_question"] * 2


@given(st.lists(st.none() | st.integers(0, 8), min_size=2, max_size=40), st.floats(0.1, 0.9))
def test_the_splits_share_no_group(groups, share):
    rows = [candidate(n) for n in range(len(groups))]
    names = [None if group is None else f"5a17ed-{group}" for group in groups]
    answers = ({"role": "assistant", "content": text} for text in "ab")
    common = {"row": 0, "score_chosen": None, "score_rejected": None} | {
        name: [answer] for name, answer in zip(("chosen", "rejected"), answers)
    }
    pairs = [row | common for row in grouped(rows, *names)]
    preferences = select_preferences(pairs, validation_share=share, duplicate_similarity=None)
    train, validation = (
        {pair["group_id"] for pair in side} - {None} for side in (preferences.train, preferences.validation)
    )
    assert train.isdisjoint(validation)
    assert len(preferences.train) + len(preferences.validation) == len(pairs)

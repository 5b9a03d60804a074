# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.data.assemble import conversations_about_image, hold_out, split_off_validation
from medst_trl.data.schema import text_of
from medst_trl.data.source import Conversation, Question


def question(name, image="a", split="train", text=None, link=None):
    return Question(name, image, split, text or f"{name}?", f"answer {name}", "open", None, link)


def test_pairs_are_compared_by_pixels_and_normalised_text():
    ids = {"a": "1", "copy of a": "1", "b": "2"}
    questions = [
        question("held", "a", "test", "Is it  normal?"),
        question("same", "copy of a", "train", "is it normal?"),
        question("other image", "b", "train", "Is it normal?"),
        question("other words", "a", "train"),
    ]
    splits, counts = hold_out(questions, ids)
    assert [q.id for q in splits["train"]] == ["other image", "other words"]
    assert counts == {
        "images_in_train_and_test": 1,
        "pairs_in_train_and_test": 1,
        "questions_removed_for_pairs_in_train_and_test": 1,
    }
    splits, counts = hold_out(questions, ids, image_disjoint=True)
    assert [q.id for q in splits["train"]] == ["other image"]
    assert counts["questions_removed_for_images_in_train_and_test"] == 1


def test_overlap_is_reported_even_if_there_is_none():
    assert hold_out([question("x")], {"a": "1"})[1] == {"images_in_train_and_test": 0}


talks = st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=40)


@given(talks, st.floats(0, 0.9), st.integers(0, 5), st.randoms())
def test_validation_shares_no_image_with_train(images, fraction, seed, random):
    ids = {str(n): f"id{n % 20}" for n in range(31)}  # some images have two names
    conversations = [Conversation(f"c{n}", tuple(map(str, names)), []) for n, names in enumerate(images)]
    split = split_off_validation(conversations, ids, fraction, seed)
    assert [talk.id for talk in split] == [talk.id for talk in conversations]
    seen = {
        s: {ids[name] for talk in split if talk.split == s for name in talk.images} for s in ("train", "validation")
    }
    assert seen["train"].isdisjoint(seen["validation"])
    shuffled = random.sample(conversations, len(conversations))
    places = {talk.id: talk.split for talk in split_off_validation(shuffled, ids, fraction, seed)}
    assert places == {talk.id: talk.split for talk in split}


def test_validation_has_about_the_requested_fraction():
    conversations = [Conversation(str(n), (str(n),), []) for n in range(2000)]
    ids = {str(n): f"{n:064d}" for n in range(2000)}
    for seed in (0, 1):
        split = split_off_validation(conversations, ids, 0.2, seed)
        assert 340 < sum(talk.split == "validation" for talk in split) < 460
    assert all(talk.split == "train" for talk in split_off_validation(conversations, ids, 0.0, 0))


def test_the_kth_conversation_takes_the_kth_wording():
    questions = [
        question("a1", link="A"), question("b1", link="B"), question("a2", link="A"), question("c"),
        question("a3", link="A3", text="A1?"), question("b2", link="B"),
    ]  # fmt: skip
    talks = conversations_about_image("x", questions)
    asked = [[text_of(m["content"]) for m in talk.messages if m["role"] == "user"] for talk in talks]
    # a3 has the words of a1, so both are one question, whatever their links are.
    assert asked == [["a1?", "b1?", "c?"], ["a2?", "b2?"], ["A1?"]]
    assert [talk.id for talk in talks] == ["x-0", "x-1", "x-2"]

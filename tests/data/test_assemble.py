# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from medst_trl.data.assemble import conversations_about_image, hold_out, split_off_validation
from medst_trl.data.groups import Grouping
from medst_trl.data.schema import text_of
from medst_trl.data.source import Conversation, Question


def question(name, image="a", split="train", text=None, link=None):
    return Question(name, image, split, text or f"{name}?", f"answer {name}", "open", None, link)


def test_overlapping_pairs_are_found_by_pixels_and_normalized_text():
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
    splits, counts = hold_out(questions, ids, disjoint="image")
    assert [q.id for q in splits["train"]] == ["other image"]
    assert counts["questions_removed_for_images_in_train_and_test"] == 1


def test_an_overlap_of_zero_is_reported():
    assert hold_out([question("x")], {"a": "1"})[1] == {"images_in_train_and_test": 0}
    apart = [question("x"), question("y", "b", "test")]
    assert hold_out(apart, {"a": "1", "b": "2"})[1] == {"images_in_train_and_test": 0}


image_lists = st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=40)


@given(image_lists, st.floats(0, 0.9), st.integers(0, 5), st.randoms())
def test_validation_shares_no_image_with_train(images, fraction, seed, random):
    ids = {str(n): f"id{n % 20}" for n in range(31)}  # some images have two names
    conversations = [Conversation(f"c{n}", tuple(map(str, names)), []) for n, names in enumerate(images)]
    split = split_off_validation(conversations, ids, fraction, seed)
    assert [item.id for item in split] == [item.id for item in conversations]
    seen = {
        s: {ids[name] for conversation in split if conversation.split == s for name in conversation.images}
        for s in ("train", "validation")
    }
    assert seen["train"].isdisjoint(seen["validation"])
    shuffled = random.sample(conversations, len(conversations))
    splits_by_id = {
        conversation.id: conversation.split for conversation in split_off_validation(shuffled, ids, fraction, seed)
    }
    assert splits_by_id == {conversation.id: conversation.split for conversation in split}


def test_validation_has_about_the_requested_fraction():
    conversations = [Conversation(str(n), (str(n),), []) for n in range(2000)]
    ids = {str(n): f"{n:064d}" for n in range(2000)}
    for seed in (0, 1):
        split = split_off_validation(conversations, ids, 0.2, seed)
        assert 340 < sum(conversation.split == "validation" for conversation in split) < 460
    assert all(conversation.split == "train" for conversation in split_off_validation(conversations, ids, 0.0, 0))


def test_paraphrases_are_spread_over_conversations():
    questions = [
        question("a1", link="A"), question("b1", link="B"), question("a2", link="A"), question("c"),
        question("a3", link="A3", text="A1?"), question("b2", link="B"),
    ]  # fmt: skip
    conversations = conversations_about_image("x", questions)
    asked = [
        [text_of(m["content"]) for m in conversation.messages if m["role"] == "user"] for conversation in conversations
    ]
    # a3 has the text of a1, so both count as one question, regardless of their links.
    assert asked == [["a1?", "b1?", "c?"], ["a2?", "b2?"], ["A1?"]]
    assert [conversation.id for conversation in conversations] == ["x-0", "x-1", "x-2"]


def test_groups_and_near_copies_are_reported_and_kept_apart():
    ids = {name: name for name in "abcdefg"}
    test = [replace(question("t1", "a", "test"), group="P"), replace(question("t2", "b", "test"), group="Q")]
    train = [
        replace(question("same group", "c"), group="P"),
        replace(question("near copy", "d"), group="R"),
        replace(question("group of the near copy", "e"), group="R"),
        replace(question("other", "f"), group="S"),
        Conversation("talk", ("g",), [{"role": "user"}], group="Q"),
    ]
    grouping = Grouping(
        [([record.image], [record.group]) for record in test + train[:4]] + [(["g"], ["Q"])], [("b", "d")]
    )
    reported = {
        "images_in_train_and_test": 0, "near_copies_in_train_and_test": 1, "groups_in_train_and_test": 2,
    }  # fmt: skip
    for disjoint, left, removed in (
        ("none", [record.id for record in train], {}),
        ("image", ["same group", "group of the near copy", "other", "talk"], {"questions_removed_for_images": 1}),
        (
            "group",
            ["group of the near copy", "other"],
            {"questions_removed_for_groups": 2, "conversations_removed_for_groups": 1},
        ),
    ):
        splits, counts = hold_out(test + train, ids, disjoint, grouping)
        assert [record.id for record in splits["train"]] == left and splits["test"] == test
        assert counts == reported | {f"{name}_in_train_and_test": number for name, number in removed.items()}


def test_the_question_of_a_near_copy_is_removed_like_that_of_the_image():
    questions = [question("held", "a", "test", "Normal?"), question("copy", "b", "train", "normal?")]
    splits, counts = hold_out(questions, {"a": "1", "b": "2"}, "none", Grouping((), [("1", "2")]))
    assert splits["train"] == [] and counts["pairs_in_train_and_test"] == 1
    assert counts["near_copies_in_train_and_test"] == 1 and counts["images_in_train_and_test"] == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.none() | st.integers(0, 6)), max_size=40), st.floats(0, 0.9))
def test_validation_shares_no_group_with_train(members, fraction):
    ids = {str(n): f"id{n}" for n in range(31)}
    conversations = [
        Conversation(f"c{n}", (str(image),), [], group=group and f"P{group}")
        for n, (image, group) in enumerate(members)
    ]
    split = split_off_validation(conversations, ids, fraction, seed=1)
    sides = [[item for item in split if item.split == side] for side in ("train", "validation")]
    for part in (lambda item: item.images[0], lambda item: item.group):
        train, validation = ({part(item) for item in side} - {None} for side in sides)
        assert train.isdisjoint(validation)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.data.assemble import assemble, conversations_about_image, hold_out
from medst_trl.data.groups import GroupIds
from medst_trl.data.schema import text_of
from medst_trl.data.source import Conversation, Question, Records, Rejected


def question(name, image="a", split="train", text=None, link=None, image_id=None):
    ids = (image_id or image,)
    return Question(name, (image,), split, text or f"{name}?", f"answer {name}", "open", None, link, image_ids=ids)


def test_overlapping_pairs_are_found_by_pixels_and_normalized_text():
    questions = [
        question("held", "a", "test", "Is it  normal?"),
        question("same", "copy of a", "train", "is it normal?", image_id="a"),
        question("other image", "b", "train", "Is it normal?"),
        question("other words", "a", "train"),
    ]
    splits, counts, removed = hold_out(questions)
    assert [q.id for q in splits["train"]] == ["other image", "other words"]
    assert counts == {"images_in_train_and_test": 1, "pairs_in_train_and_test": 1}
    assert removed == [Rejected("same", "question_in_test", "copy of a, is it normal?")]
    splits, counts, removed = hold_out(questions, disjoint="image")
    assert [q.id for q in splits["train"]] == ["other image"]
    assert [(item.id, item.reason) for item in removed[1:]] == [("other words", "image_in_test")]


def test_an_overlap_of_zero_is_reported():
    assert hold_out([question("x")])[1] == {"images_in_train_and_test": 0}
    apart = [question("x"), question("y", "b", "test")]
    assert hold_out(apart)[1] == {"images_in_train_and_test": 0}


def divided(conversations, ids, fraction, seed):
    """Return the rows of train and those of validation."""
    groups = GroupIds()
    groups.salt = bytes(32)
    index = {name: {"image_id": image_id} for name, image_id in ids.items()}
    records = Records("own", conversations=conversations)
    rows = assemble(records, index, groups=groups, validation_fraction=fraction, seed=seed).rows
    return rows["instruct", "train"], rows["instruct", "validation"]


ASKED = [{"role": "user"}]


image_lists = st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=40)


@given(image_lists, st.floats(0, 0.9), st.integers(0, 5), st.randoms())
def test_validation_shares_no_image_with_train(images, fraction, seed, random):
    ids = {str(n): f"id{n % 20}" for n in range(31)}  # some images have two names
    conversations = [Conversation(f"c{n}", tuple(map(str, names)), ASKED) for n, names in enumerate(images)]
    train, validation = divided(conversations, ids, fraction, seed)
    for rows in (train, validation):  # in their order
        assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), key=lambda name: int(name[1:]))
    assert len(train) + len(validation) == len(conversations)
    seen = [{image for row in rows for image in row["image_ids"]} for rows in (train, validation)]
    assert seen[0].isdisjoint(seen[1])
    shuffled = divided(random.sample(conversations, len(conversations)), ids, fraction, seed)
    assert [{row["id"] for row in rows} for rows in shuffled] == [
        {row["id"] for row in rows} for rows in (train, validation)
    ]


def test_validation_has_about_the_requested_fraction():
    conversations = [Conversation(str(n), (str(n),), ASKED) for n in range(2000)]
    ids = {str(n): f"{n:064d}" for n in range(2000)}
    for seed in (0, 1):
        _, validation = divided(conversations, ids, 0.2, seed)
        assert 340 < len(validation) < 460
    assert divided(conversations, ids, 0.0, 0)[1] == []


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
    test = [replace(question("t1", "a", "test"), group="P"), replace(question("t2", "b", "test"), group="Q")]
    train = [
        replace(question("same group", "c"), group="P"),
        replace(question("near copy", "d"), group="R"),
        replace(question("group of the near copy", "e"), group="R"),
        replace(question("other", "f"), group="S"),
        Conversation("talk", ("g",), ASKED, group="Q", image_ids=("g",)),
    ]
    reported = {
        "images_in_train_and_test": 0, "near_copies_in_train_and_test": 1, "groups_in_train_and_test": 2,
    }  # fmt: skip
    for disjoint, left, removed in (
        ("none", [record.id for record in train], {}),
        (
            "image",
            ["same group", "group of the near copy", "other", "talk"],
            {"near copy": ("near_copy_in_test", "d, b")},
        ),
        (
            "group",
            ["group of the near copy", "other"],
            {
                "same group": ("group_in_test", "c, P"),
                "near copy": ("near_copy_in_test", "d, b"),
                "talk": ("group_in_test", "g, Q"),
            },
        ),
    ):
        splits, counts, rejected = hold_out(test + train, disjoint, {"d": {"b"}})
        assert [record.id for record in splits["train"]] == left and splits["test"] == test
        assert counts == reported and {item.id: (item.reason, item.value) for item in rejected} == removed


def test_the_question_of_a_near_copy_is_removed_like_that_of_the_image():
    questions = [question("held", "a", "test", "Normal?"), question("copy", "b", "train", "normal?")]
    splits, counts, _ = hold_out(questions, "none", {"b": {"a"}})
    assert splits["train"] == [] and counts["pairs_in_train_and_test"] == 1
    assert counts["near_copies_in_train_and_test"] == 1 and counts["images_in_train_and_test"] == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.none() | st.integers(0, 6)), max_size=40), st.floats(0, 0.9))
def test_validation_shares_no_group_with_train(members, fraction):
    ids = {str(n): f"id{n}" for n in range(31)}
    conversations = [
        Conversation(f"c{n}", (str(image),), ASKED, group=None if group is None else f"P{group}")
        for n, (image, group) in enumerate(members)
    ]
    sides = divided(conversations, ids, fraction, seed=1)
    for part in (lambda row: row["images"][0], lambda row: row["group_id"]):
        train, validation = ({part(row) for row in side} - {None} for side in sides)
        assert train.isdisjoint(validation)


@pytest.fixture
def made(tmp_path):
    """Assemble records whose images have the names and ids a, b, c ..., and near hashes of these bits."""

    def run(records, hashes=None, **options):
        talks = [record for record in records if not isinstance(record, Question)]
        questions = [record for record in records if isinstance(record, Question)]
        own = Records("own", Path("images"), conversations=talks, questions=questions)
        index = {name: {"image_id": name} for record in records for name in record.images}
        for name, bits in (hashes or {}).items():
            index[name] |= {"near_hash": None if bits is None else f"{bits:064x}"}
        return assemble(own, index, groups=GroupIds(tmp_path / "salt"), **options)

    return run


def test_images_without_a_near_hash_are_counted_beside_the_near_copies(made):
    hashes = {"a": None, "b": None, "c": 0}
    notes = made([question(name, name, "test" if name == "a" else "train") for name in hashes], hashes)[2]["notes"]
    assert (notes["near_copies_in_train_and_test"], notes["images_too_plain_to_find_near_copies"]) == (0, 2)


def chain(count: int) -> dict[str, int]:
    """Return hashes of which each differs from the next by 4 bits, as those of the slices of a volume."""
    return {f"slice{number:02}": (1 << 4 * number) - 1 for number in range(count)}


@pytest.mark.parametrize("disjoint", ["none", "image", "group"])
def test_near_copies_of_near_copies_stay_in_train(made, disjoint):
    """Of the slices of a volume, each is a near copy of the next, but the first is none of the last."""
    hashes = chain(60)
    records = [question(name, name, "test" if name >= "slice50" else "train", "Normal?") for name in hashes]
    rows, rejected, counts = made(records, hashes, disjoint=disjoint)
    assert {item.value.split(",")[0] for item in rejected} == {"slice48", "slice49"}  # 10 bits are two steps
    assert counts["notes"]["near_copies_in_train_and_test"] == 2
    assert len(rows["instruct", "train"]) == 48 and len(rows["benchmark", "test"]) == 10
    assert counts["notes"]["images_kept_together"].startswith("60 of 60")


def test_what_belongs_together_is_not_divided_and_an_empty_validation_split_is_noted(made):
    talks = [Conversation(name, (name,), [{"role": "user"}]) for name in chain(20)]
    rows, _, counts = made(talks, chain(20), validation_fraction=0.001)
    assert len(rows["instruct", "train"]) == 20 and counts["notes"]["validation_split"].startswith("empty: ")
    rows, _, counts = made(talks, chain(20), validation_fraction=0.999)
    assert len(rows["instruct", "validation"]) == 20 and "validation_split" not in counts["notes"]


def test_unlabeled_images_of_validation_are_left_out(made):
    records = []
    for patient in "PQRSTU":
        records.append(question(patient, f"{patient}1", text="Normal?"))
        records += [Conversation(f"{patient}{n}", (f"{patient}{n}",), []) for n in (1, 2)]
    records = [replace(record, group=record.id[0]) for record in records] + [Conversation("alone", ("x",), [])]
    rows, rejected, _ = made(records, validation_fraction=0.5)
    validation = {row["group_id"] for row in rows["instruct", "validation"]}
    assert 0 < len(validation) < 6
    assert Counter(item.reason for item in rejected) == {"drawn_for_validation": 2 * len(validation)}
    left = [row["group_id"] for row in rows["images", "train"]]
    assert validation.isdisjoint(left) and len(left) == 2 * (6 - len(validation)) + 1
    # An image that belongs to no conversation is never drawn.
    records = [Conversation(str(n), (str(n),), []) for n in range(30)]
    assert len(made(records, validation_fraction=0.9).rows["images", "train"]) == 30


def test_all_rows_of_an_image_of_two_patients_have_one_group(made):
    test = [replace(question("1", "x", "test"), group="P"), replace(question("2", "x", "test"), group="Q")]
    train = [replace(question("3", "p"), group="P"), replace(question("4", "q"), group="Q"), question("5", "x")]
    rows, _, counts = made([*test, *train, question("6", "other")])
    [group] = {row["group_id"] for row in rows["benchmark", "test"]}
    assert [row["group_id"] for row in rows["instruct", "train"]] == [group, group, group, None]
    assert counts["notes"]["groups_in_train_and_test"] == 1 and counts["notes"]["records_without_group"] == 1
    _, rejected, counts = made([*test, *train], disjoint="group")
    assert len(rejected) == 3 and "instruct/train" not in counts["datasets"]

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Datasets of other people in our columns: the same content in any usual form gives the same rows."""

from datetime import datetime

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, LargeList, List, Value
from hypothesis import given, settings
from PIL import Image as PILImage

from medst_trl.base.errors import UserError
from medst_trl.data.conform import conform, missing_columns
from medst_trl.data.groups import GroupIds
from medst_trl.data.images import image_id, store_image
from medst_trl.data.overlap import with_image_ids
from medst_trl.data.schema import KINDS, dialogue, features_of, image_part, text_part


def image(shade: int) -> dict:
    return {"bytes": store_image(PILImage.new("L", (5, 4), shade)).bytes, "path": None}


TEXTS = st.text("abc <é?", min_size=1, max_size=8).filter(str.strip)  # blank ones are rejected
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


@st.composite
def conversations(draw):
    """Rows of a dataset in one of the usual forms, with the messages that they stand for."""
    as_text, extra_keys, placeholders = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    rows, expected = [], []
    for turns in draw(st.lists(TURNS, min_size=1, max_size=4)):
        images = draw(st.integers(0, 2))
        messages = dialogue(turns, images)
        expected.append(messages)
        found = []
        for turn in messages:
            parts = [part for part in turn["content"] if placeholders or part["type"] == "text"]
            if extra_keys:
                parts = [part | {"image": None, "index": 1} for part in parts]
            content = "".join(part["text"] or "" for part in turn["content"]) if as_text else parts
            found.append({"role": turn["role"], "content": content} | ({"name": "x"} if extra_keys else {}))
        rows.append({"images": [image(shade) for shade in range(images)], "messages": found})
    return rows, expected


@settings(max_examples=60, deadline=None)
@given(conversations())
def test_conversations_in_any_form_are_the_same(case):
    rows, expected = case
    dataset = Dataset.from_list(rows).cast_column("images", List(Image()))
    found = conform(dataset, "instruct")
    assert found.features == features_of("instruct")
    assert found["messages"][:] == expected
    assert found["id"][:] == [str(place) for place in range(len(rows))]
    assert [len(row) for row in found["images"]] == [len(row["images"]) for row in rows]
    assert found["group_id"][:] == [None] * len(rows)
    assert conform(found, "instruct") is found


@settings(max_examples=60, deadline=None)
@given(TURNS, TEXTS, TEXTS, st.sampled_from(["prompt", "implicit", "prompt repeated", "texts"]), st.booleans())
def test_pairs_in_any_form_are_the_same(turns, good, bad, form, as_text):
    turns = turns[:1] if form == "texts" else turns
    prompt = dialogue(turns)[:-1]
    if as_text:
        prompt = [message | {"content": message["content"][0]["text"]} for message in prompt]
    answers = [[{"role": "assistant", "content": text if as_text else [text_part(text)]}] for text in (good, bad)]
    row = {"image": image(7), "chosen": prompt + answers[0], "rejected": prompt + answers[1]}
    if form == "prompt":
        row |= {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    elif form == "prompt repeated":
        row |= {"prompt": prompt}
    elif form == "texts":
        row |= {"prompt": turns[0][0], "chosen": good, "rejected": bad}
    found = conform(Dataset.from_list([row]).cast_column("image", Image()), "preferences")
    assert found.features == features_of("preferences") and "image" not in found.features
    expected = [{"role": turn["role"], "content": turn["content"]} for turn in dialogue(turns, 1)[:-1]]
    assert found[0]["prompt"] == expected
    assert found[0]["chosen"] == [{"role": "assistant", "content": [text_part(good)]}]
    assert found[0]["rejected"] == [{"role": "assistant", "content": [text_part(bad)]}]
    assert [found[0][name] for name in ("score_chosen", "score_rejected", "judge", "group_id")] == [None] * 4


def test_types_that_differ_only_in_representation_are_accepted_without_copying_images():
    large = Features({
        "id": Value("int64"), "images": LargeList(Image()), "weight": Value("float32"), "note": Value("string"),
        "prompt": LargeList({"content": LargeList({"text": Value("large_string"), "type": Value("large_string")}),
                             "role": Value("large_string")}),
        "chosen": Value("large_string"), "rejected": Value("string"), "score_chosen": Value("int32"),
    })  # fmt: skip
    rows = [
        {"id": 7, "images": [image(1)], "prompt": [{"role": "user", "content": [image_part(), text_part("What?")]}],
         "chosen": "a", "rejected": "b", "score_chosen": 8, "weight": 0.5, "note": "kept"},
    ] * 3  # fmt: skip
    dataset = Dataset.from_list(rows, features=large)
    before = pa.total_allocated_bytes()
    found = conform(dataset, "preferences")
    assert pa.total_allocated_bytes() - before < 10_000
    for name, feature in features_of("preferences").items():
        assert found.features[name] == feature
    assert found["id"][:] == ["7", "7-2", "7-3"]
    assert found["score_chosen"][:] == [8.0] * 3 and found["weight"][:] == [0.5] * 3 and found["note"][0] == "kept"
    assert found.features["weight"] == Value("float64")


def test_selected_rows_stay_selected():
    rows = [{"image": image(shade), "prompt": str(shade), "chosen": "a", "rejected": "b"} for shade in range(5)]
    dataset = Dataset.from_list(rows).cast_column("image", Image()).select([4, 1])
    found = conform(dataset, "preferences")
    assert [row["prompt"][0]["content"][1]["text"] for row in found] == ["4", "1"]
    assert [row["images"][0].getpixel((0, 0)) for row in found] == [4, 1]


def test_missing_images_and_null_lists_are_no_images():
    dataset = Dataset.from_dict({"image": [image(1), None], "messages": [dialogue([("q", "a")], n) for n in (1, 0)]})
    found = conform(dataset.cast_column("image", Image()), "instruct")
    assert [len(row) for row in found["images"]] == [1, 0]
    dataset = Dataset.from_dict(
        {"images": [None, [image(1)]], "messages": [dialogue([("q", "a")], n) for n in (0, 1)]}
    )
    found = conform(dataset.cast_column("images", List(Image())), "instruct")
    assert [len(row) for row in found["images"]] == [0, 1] and found[1]["images"][0].getpixel((0, 0)) == 1


@pytest.mark.parametrize(
    ("kind", "columns", "missing"),
    [
        ("instruct", ["messages"], ["images"]),
        ("instruct", ["image", "messages"], []),
        ("images", ["image"], []),
        ("preferences", ["images", "chosen"], ["prompt", "rejected"]),
        ("preferences", ["images", "chosen", "rejected"], []),
        ("candidates", ["images", "prompt"], ["answers"]),
        ("benchmark", ["image", "question"], ["questions"]),
        ("benchmark", ["image", "question", "answer"], []),
    ],
)
def test_only_what_a_stage_cannot_do_without_is_required(kind, columns, missing):
    assert missing_columns(columns, kind) == missing
    if missing:
        with pytest.raises(UserError, match=f"lacks the columns? {', '.join(missing)} of {kind} data; it has "):
            conform(Dataset.from_dict({name: [] for name in columns}), kind)


@pytest.mark.parametrize("name", KINDS)
def test_every_dataset_that_a_stage_writes_stays_as_it_is(name):
    dataset = Dataset.from_dict({column: [] for column in features_of(name)}, features=features_of(name))
    assert conform(dataset, name) is dataset


def test_a_column_of_another_type_is_reported():
    dataset = Dataset.from_dict(
        {"image": [image(1)], "prompt": ["q"], "chosen": ["a"], "rejected": ["b"], "score_chosen": ["high"]}
    )
    with pytest.raises(UserError, match="none of its 1 rows can be used.* could not convert string to float: 'high'"):
        conform(dataset.cast_column("image", Image()), "preferences")
    dataset = Dataset.from_dict({"image": [7], "prompt": ["q"], "chosen": ["a"], "rejected": ["b"]})
    with pytest.raises(UserError, match=r"images of preferences data have another type .*\n  is:        int64"):
        conform(dataset, "preferences")


def test_rows_that_cannot_be_read_are_counted_and_empty(capsys):
    good = dialogue([("q", "a")])
    rows = [good, [{"role": "user", "content": [{"type": "audio", "text": None}]}], good]
    dataset = Dataset.from_dict({"image": [image(1)] * 3, "messages": rows}).cast_column("image", Image())
    # parts that our columns can hold, but that no stage can use
    dataset = conform(dataset.remove_columns("messages").add_column("messages", [
        [turn | {"name": "x"} for turn in row] for row in rows
    ]), "instruct")  # fmt: skip
    assert [len(row) for row in dataset["messages"]] == [2, 1, 2]
    assert dataset[1]["messages"][0]["content"] == [image_part()]
    assert "1 of 3 rows cannot be used" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of its 1 rows can be used. The first: row 0: .*'audio'"):
        conform(Dataset.from_dict({"images": [[]], "messages": [[rows[1][0] | {"name": "x"}]]}), "instruct")


def test_a_benchmark_may_have_one_question_per_row(capsys):
    rows = [
        {"question": " Is it normal? ", "answer": "Yes", "answer_type": None},
        {"question": "How many?", "answer": "4", "answer_type": "CLOSED "},
        {"question": "Where?", "answer": "left lung", "answer_type": None},
        {"question": "Where?", "answer": None, "answer_type": None},
    ]
    rows = [
        {"image": image(shade), "image_id": f"synpic{shade}", "qid": shade, **row} for shade, row in enumerate(rows)
    ]
    found = with_image_ids(conform(Dataset.from_list(rows).cast_column("image", Image()), "benchmark"))
    questions = [question for row in found["questions"] for question in row]
    assert [[q["id"], q["question"], q["answer"], q["answer_type"]] for q in questions] == [
        ["0", "Is it normal?", "Yes", "closed"],
        ["1", "How many?", "4", "closed"],
        ["2", "Where?", "left lung", "open"],
    ]
    assert "1 of 4 rows cannot be used. The first: row 3: no_answer" in capsys.readouterr().out
    assert found["image_id"][:] == [image_id(PILImage.new("RGB", (5, 4), (shade,) * 3)) for shade in range(4)]


def test_nested_questions_of_a_benchmark_need_neither_ids_nor_types():
    asked = [[{"question": "Normal?", "answer": "no"}, {"question": "Where?", "answer": "left|right"}], [], None]
    dataset = Dataset.from_dict({"image": [image(n) for n in range(3)], "questions": asked})
    found = conform(dataset.cast_column("image", Image()), "benchmark")
    assert found.features == features_of("benchmark")
    questions = [[(q["id"], q["answer"], q["answer_type"]) for q in row] for row in found["questions"]]
    assert questions == [[("0", "no", "closed"), ("0-1", "left|right", "open")], [], []]


def test_images_to_ask_about_may_have_messages_of_any_type():
    for messages in (["text"], [None], [[{"role": "user", "content": "q"}]], [7]):
        dataset = Dataset.from_dict({"image": [image(1)], "messages": messages}).cast_column("image", Image())
        assert conform(dataset, "images")["messages"][:] == [[]]


def test_rows_without_messages_are_rejected_as_those_that_cannot_be_read():
    dataset = Dataset.from_dict({"image": [image(1)] * 2, "messages": [dialogue([("q", "a")]), None]})
    found = conform(dataset.cast_column("image", Image()), "instruct")
    assert [turn["role"] for turn in found[1]["messages"]] == ["user"]


def pairs(**columns) -> dict:
    return {"image": image(1), "prompt": "q", "chosen": "a", "rejected": "b"} | columns


def conformed(rows: list[dict], kind: str) -> Dataset:
    return conform(Dataset.from_list(rows).cast_column("image", Image()), kind)


def test_raw_groups_are_hashed_with_the_salt_of_the_user(tmp_path, monkeypatch):
    """They may be numbers of patients, and are published."""
    monkeypatch.setenv("MEDST_GROUP_SALT", str(tmp_path / "salt"))
    hashed = GroupIds().of_key("MRN0042")
    found = conformed([pairs(group_id=group) for group in ("MRN0042", " MRN0042", hashed, None)], "preferences")
    assert found["group_id"][:] == [hashed, hashed, hashed, None]
    whole = conformed([pairs(group_id=12.0), pairs(group_id=13.5)], "preferences")
    assert whole["group_id"][:] == [GroupIds().of_key("12"), GroupIds().of_key("13.5")]
    again = conform(found.remove_columns("group_id").add_column("group_id", ["ward3-17"] * 4), "preferences")
    assert {*again["group_id"]} == {GroupIds().of_key("ward3-17")}, "also if all columns have our types"


@pytest.mark.parametrize("given", [["Mueller_0.png"], ["1"], ["AB" * 32], ["ab" * 31]])
def test_image_ids_that_are_no_hashes_of_pixels_are_computed(given):
    found = conformed([pairs(image_ids=given), pairs(image_ids=["ab" * 32])], "preferences")
    assert found["image_ids"][:] == [None, ["ab" * 32]]
    again = conform(found.remove_columns("image_ids").add_column("image_ids", [given, given]), "preferences")
    assert with_image_ids(again)["image_ids"][:] == [[image_id(PILImage.new("L", (5, 4), 1))]] * 2


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["", "  ", "nan", "NaN", "null", "#N/A"]), st.sampled_from(["question", "answer"]), st.booleans()
)
def test_empty_texts_are_not_trained_on(text, place, typed):
    def talk(question: str, answer: str) -> list[dict]:
        turns = [("user", question), ("assistant", answer)]
        return [{"role": role, "content": [text_part(value)] if typed else value} for role, value in turns]

    bad = talk(text, "a") if place == "question" else talk("q", text)
    found = conformed([{"image": image(1), "messages": messages} for messages in (talk("q", "a"), bad)], "instruct")
    assert [len(messages) for messages in found["messages"]] == [2, 1]
    bad = pairs(prompt=text) if place == "question" else pairs(chosen=text)
    found = conformed([pairs(), bad], "preferences")
    assert [len(answer) for answer in found["chosen"]] == [1, 0]


def test_roles_of_llava_are_read_and_others_cost_their_row(capsys):
    def talk(user: str, assistant: str) -> dict:
        return {"image": image(1), "messages": [{"role": user, "content": "q"}, {"role": assistant, "content": "a"}]}

    rows = [talk("Human", "GPT"), talk("user", "narrator"), talk("assistant", "assistant")]
    found = conformed(rows, "instruct")
    assert [turn["role"] for turn in found[0]["messages"]] == ["user", "assistant"]
    assert [len(messages) for messages in found["messages"]] == [2, 1, 1]
    assert "2 of 3 rows cannot be used. The first: row 1: messages need a role" in capsys.readouterr().out


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_weights_are_finite_numbers_of_at_least_0_and_missing_ones_are_1(weight):
    found = conformed([pairs(weight=0.5), pairs(weight=None), pairs(weight=weight)], "preferences")
    assert found["weight"][:2] == [0.5, 1.0] and [len(answer) for answer in found["chosen"]] == [1, 1, 0]
    exact = found.remove_columns("weight").add_column("weight", [weight, 2.0, 3.0]).select([0, 1])
    assert conform(exact, "preferences")["weight"][:] == [1.0, 2.0]


def test_a_question_that_cannot_be_used_does_not_cost_the_others_of_its_image(capsys):
    asked = [[{"question": "Normal?", "answer": "no"}, {"question": "Where?", "answer": None}], None]
    found = conform(Dataset.from_dict({"image": [image(1), image(2)], "questions": asked}), "benchmark")
    assert [[question["question"] for question in row] for row in found["questions"]] == [["Normal?"], []]
    assert "1 of 2 rows cannot be used. The first: row 0: no_answer" in capsys.readouterr().out


def test_questions_that_repeat_an_id_get_another_one():
    rows = [{"image": image(n), "question": "Normal?", "answer": "no", "id": "q"} for n in range(2)]
    found = conformed(rows, "benchmark")
    assert [question["id"] for row in found["questions"] for question in row] == ["q", "q-2"]


def test_questions_may_have_further_columns_of_any_type():
    asked = [[{"question": "Normal?", "answer": "no", "asked": datetime(2026, 1, 1)}]]
    found = conform(Dataset.from_dict({"image": [image(1)], "questions": asked}), "benchmark")
    assert found[0]["questions"][0]["answer"] == "no"


def test_candidates_without_two_answers_have_none(capsys):
    rows = [pairs(answers=answers) for answers in (["a", "b"], ["a"], None)]
    found = conformed(rows, "candidates")
    assert found["answers"][:] == [["a", "b"], [], []]
    assert "2 of 3 rows cannot be used. The first: row 1: it has fewer than two answers" in capsys.readouterr().out

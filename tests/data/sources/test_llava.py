# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.data.schema import text_of
from medst_trl.data.source import SourceRequest
from medst_trl.data.sources.llava import read_llava, split_at_images


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def read(tmp_path, *records, name="a.json"):
    (tmp_path / name).write_text(json.dumps(records))
    return read_llava(SourceRequest(tmp_path / name, tmp_path))


def reasons(tmp_path, *records):
    return [rejected.reason for rejected in read(tmp_path, *records).rejected]


def kinds(message):
    return [part["text"] if part["type"] == "text" else 0 for part in message["content"]]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=5))
def test_joining_the_parts_gives_the_text(segments):
    text = "<image>".join(segments)
    parts = split_at_images(text)
    joined = "".join(part["text"] if part["type"] == "text" else "<image>" for part in parts)
    # Without what the docstring says is removed: breaks around placeholders, outer whitespace, and empty parts.
    expected = re.sub(r"[\r\n]*<image>[\r\n]*", "<image>", text.strip())
    expected = "<image>".join(piece if piece.strip() else "" for piece in expected.split("<image>"))
    assert joined == expected
    assert sum(part["type"] == "image" for part in parts) == text.count("<image>")
    assert all(part["text"].strip() for part in parts if part["type"] == "text")


def test_turns_and_images_keep_their_order(tmp_path):
    source = read(
        tmp_path,
        {
            "id": 7,
            "image": ["a.png", "b.png", "c.png"],
            "conversations": [
                human("Compare <image> with\n<image>\nplease."),
                gpt(" Both <image> are alike. "),
                {"role": "user", "content": "And this?\n<image>"},
                {"role": "assistant", "content": "No."},
            ],
        },
    )
    (conversation,) = source.conversations
    assert (conversation.id, conversation.images) == ("7", ("a.png", "b.png", "c.png"))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert kinds(conversation.messages[0]) == ["Compare ", 0, " with", 0, "please."]
    assert kinds(conversation.messages[1]) == ["Both <image> are alike."], "a placeholder in an answer is not text"
    assert kinds(conversation.messages[2]) == ["And this?", 0]
    assert text_of(conversation.messages[3]["content"]) == "No."


def test_without_placeholders_the_images_come_first(tmp_path):
    source = read(
        tmp_path,
        {"image": "a.png", "conversations": [human("What?"), gpt("That."), human("More?"), gpt("No.")]},
        {"image": ["a.png", "b.png"], "conversations": [human("What?"), gpt("That.")]},
        {"conversations": [human("No image?"), gpt("None.")]},
        {"conversatons": [human("LLaVA-Med's spelling?"), gpt("Yes.")]},
    )
    assert [kinds(conversation.messages[0])[:-1] for conversation in source.conversations] == [[0], [0, 0], [], []]
    assert [conversation.id for conversation in source.conversations] == [f"record-00000{n}" for n in range(4)]


def test_numbers_become_text(tmp_path):
    (conversation,) = read(tmp_path, {"conversations": [human("How many?"), gpt(4)]}).conversations
    assert text_of(conversation.messages[1]["content"]) == "4"


BAD = {
    "placeholder_mismatch": {"image": "a.png", "conversations": [human("<image> <image> What?"), gpt("x")]},
    "starts_with_answer": {"conversations": [gpt("x"), human("y")]},
    "same_role_twice": {"conversations": [human("x"), human("y"), gpt("z")]},
    "empty_turn": {"conversations": [human("x"), gpt(" \n ")]},
    "ends_with_question": {"conversations": [human("x"), gpt("y"), human("z")]},
    "unknown_role": {"conversations": [{"from": "system", "value": "x"}, human("x"), gpt("y")]},
    "no_conversation": {"image": "a.png"},
    "bad_image_field": {"image": {"file": "a.png"}, "conversations": [human("x"), gpt("y")]},
    "not_text": {"conversations": [human(["x"]), gpt("y")]},
    "bad_unicode": {"conversations": [human("x"), gpt("\ud800")]},
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_records_are_rejected_with_their_reason(tmp_path, expected):
    good = {"id": "good", "conversations": [human("x"), gpt("y")]}
    source = read(tmp_path, BAD[expected] | {"id": "bad"}, good)
    assert [(item.id, item.reason) for item in source.rejected] == [("bad", expected)]
    assert [conversation.id for conversation in source.conversations] == ["good"]
    json.dumps(source.rejected[0].as_row()).encode()


def test_more_bad_records_are_rejected(tmp_path):
    only_image = {"image": "a.png", "conversations": [human("<image>\n"), gpt("y")]}
    no_image = {"conversations": [human("<image> what?"), gpt("y")]}
    turn = {"conversations": ["x"]}
    null = {"conversations": [human(None), gpt("y")]}
    assert reasons(tmp_path, only_image, no_image, turn, null) == [
        "empty_turn", "placeholder_mismatch", "no_conversation", "empty_turn",
    ]  # fmt: skip


def test_the_first_of_two_records_with_the_same_id_is_kept(tmp_path):
    good = {"conversations": [human("x"), gpt("y")]}
    source = read(tmp_path, good | {"id": 1}, good | {"id": "1"}, good | {"id": ""}, good | {"id": None})
    assert [item.reason for item in source.rejected] == ["duplicate_id"]
    assert [conversation.id for conversation in source.conversations] == ["1", "record-000002", "record-000003"]


def test_records_of_merged_files_with_the_same_id_are_renamed(tmp_path):
    kinds = [("Where?", "In the chest."), ("What?", "A grey square."), ("Why?", "Because of the light.")]
    records = [
        {"id": n, "image": f"{n}.png", "conversations": [human(f"<image>\n{question}"), gpt(answer)]}
        for question, answer in kinds
        for n in range(3)
    ]
    taken = {"id": "1-2", "conversations": [human("x"), gpt("y")]}
    source = read(tmp_path, taken, *records, records[4], records[0])
    names = ["1-2", "0", "1", "2", "0-2", "1-3", "2-2", "0-3", "1-4", "2-3"]
    assert [conversation.id for conversation in source.conversations] == names
    assert [text_of(c.messages[1]["content"]) for c in source.conversations] == [
        "y",
        *(a for _, a in kinds for _ in "012"),
    ]
    assert [(item.id, item.reason) for item in source.rejected] == [("1", "duplicate_id"), ("0", "duplicate_id")]


def test_many_records_with_one_id_are_read_in_linear_time(tmp_path):
    records = [{"id": "x", "conversations": [human(f"{n}?"), gpt("y")]} for n in range(20_000)]
    names = [conversation.id for conversation in read(tmp_path, *records).conversations]
    assert (names[:2], names[-1], len(set(names))) == (["x", "x-2"], "x-20000", 20_000)


def test_booleans_are_answers_and_missing_values_are_not(tmp_path):
    good = [human("x"), gpt(True), {"from": "Human ", "value": "y"}, {"from": "GPT", "value": False}]
    source = read(
        tmp_path,
        {"image": float("nan"), "id": float("nan"), "conversations": good},
        {"conversations": [human("x"), gpt(float("nan"))]},
        {"conversations": [human("x"), gpt("NaN")]},
        {"conversations": [human(True), gpt("y")]},
    )
    (conversation,) = source.conversations
    assert (conversation.id, conversation.images) == ("record-000000", ())
    assert [text_of(turn["content"]) for turn in conversation.messages] == ["x", "yes", "y", "no"]
    assert [item.reason for item in source.rejected] == ["empty_turn", "empty_turn", "not_text"]


def test_real_conversations_are_read(shared_data, tmp_path):
    path = shared_data / "preference_pairs" / "mmedpo_vqa-rad_dpo_weighted.json"
    source = read_llava(SourceRequest(path, shared_data / "vqa_rad" / "images"))
    assert len(source.conversations) + len(source.rejected) == 1797
    assert {item.reason for item in source.rejected} <= {"duplicate_id"}
    path = shared_data / "llava_med" / "llava_med_instruct_few_shot_examples.json"
    few_shot = read_llava(SourceRequest(path, tmp_path))
    assert len(few_shot.conversations) + len(few_shot.rejected) == 8


def test_keys_may_have_their_usual_other_names(tmp_path):
    talk = [human("x"), gpt("y")]
    source = read(
        tmp_path,
        {"images": ["a.png", "b.png"], "conversations": talk},
        {"Image": "c.png", "Conversations": talk, "image_path": "d.png"},
        {"image": "e.png", "Image": "f.png", "conversations": talk},
    )
    assert [conversation.images for conversation in source.conversations] == [("a.png", "b.png"), ("c.png",)]
    assert [item.reason for item in source.rejected] == ["repeated_column"]
    assert source.counts == {"columns_not_used": "image_path"}

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from PIL import Image
from tables import write_table

from medst_trl.base.errors import UserError
from medst_trl.data.schema import load_records, text_of
from medst_trl.data.sources.captions import BRIEF, DETAILED, instruction, read_captions
from medst_trl.pipeline.stages.prepare import PrepareArguments, main


SHORT, LONG = " ".join(["word"] * 29), " ".join(["word"] * 30)


def question_of(conversation):
    return text_of(conversation.messages[0]["content"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_each_caption_answers_a_request_that_matches_its_length(tmp_path, suffix):
    rows = [{"id": f"r{n}", "image": f"{n}.png", "caption": LONG if n % 2 else SHORT} for n in range(100)]
    conversations = read_captions(write_table(tmp_path / f"table{suffix}", rows), tmp_path).conversations
    for row, conversation in zip(rows, conversations, strict=True):
        assert (conversation.id, conversation.images) == (row["id"], (row["image"],))
        user, assistant = conversation.messages
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert text_of(assistant["content"]) == row["caption"]
        assert question_of(conversation) in (DETAILED if row["caption"] == LONG else BRIEF)
    assert {question_of(conversation) for conversation in conversations} == {
        *BRIEF,
        *DETAILED,
    }  # every wording is used


def test_the_request_of_a_record_depends_only_on_its_id_and_the_seed(tmp_path):
    rows = [{"id": f"r{n}", "image": "a.png", "caption": SHORT} for n in range(40)]
    read = lambda rows, seed: {  # noqa: E731
        conversation.id: question_of(conversation)
        for conversation in read_captions(write_table(tmp_path / "t.csv", rows), tmp_path, seed).conversations
    }
    all_requests = read(rows, 0)
    assert read(rows[::-3], 0).items() <= all_requests.items()
    assert read(rows, 1) != all_requests
    assert instruction("r0", SHORT, 0) == all_requests["r0"]


def test_bad_records_are_rejected(tmp_path):
    lines = [
        {"id": "1", "image": "a.png", "caption": "A scan."}, {"id": "1", "image": "b.png", "caption": "Again."},
        {"image": "", "caption": "x"}, {"image": "a.png", "caption": "  "}, {"image": "a.png"},
        {"image": "a.png", "caption": ["x"]}, {"image": "a.png", "caption": "half \ud800"}, 5,
    ]  # fmt: skip
    path = write_table(tmp_path / "t.jsonl", lines)
    path.write_text(path.read_text() + '\n{"image": "a.png", "cap')
    source = read_captions(path, tmp_path)
    assert [item.reason for item in source.rejected] == [
        "duplicate_id", "no_image", "no_caption", "no_caption", "not_text", "bad_unicode", "not_an_object",
        "malformed_json",
    ]  # fmt: skip
    assert [conversation.id for conversation in source.conversations] == ["1"]


def test_prepare_writes_instruct_data_from_captions(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("L", (20, 20), ord(name[0])).save(tmp_path / name)
    rows = [{"image": name, "caption": SHORT} for name in ("a.png", "b.png", "missing.png")]
    table = write_table(tmp_path / "t.csv", rows)
    main(PrepareArguments(output_dir=str(tmp_path / "out"), source="captions", data_path=str(table), num_workers=1))
    dataset = load_records(tmp_path / "out" / "instruct", "train")
    assert dataset["id"] == ["row-000000", "row-000001"] and dataset[1]["images"][0].getpixel((0, 0)) == ord("b")
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert (rejected["id"], rejected["reason"]) == ("row-000002", "missing")
    with pytest.raises(UserError, match="no column `image`"):
        read_captions(write_table(tmp_path / "other.csv", [{"file": "a.png", "caption": "x"}]), tmp_path)

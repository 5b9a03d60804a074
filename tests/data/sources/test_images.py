# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import csv
import json

import pytest
from PIL import Image
from tables import write_table

from medst_trl.base.errors import UserError
from medst_trl.data.loading import load_records
from medst_trl.data.schema import text_of
from medst_trl.data.source import SourceRequest
from medst_trl.data.sources.images import BRIEF, DETAILED, instruction, read_captions, read_folder, read_table
from medst_trl.pipeline.stages.prepare import PrepareArguments, main


def test_every_visible_file_of_a_directory_is_read_in_order(tmp_path):
    for name in ("b.png", "a/c.dcm", "a/IM0001", ".hidden.png", ".git/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [conversation.images[0] for conversation in read_folder(SourceRequest(tmp_path)).conversations]
    assert names == ["b.png", "notes.txt", "a/IM0001", "a/c.dcm"]
    assert not any(conversation.messages for conversation in read_folder(SourceRequest(tmp_path)).conversations)
    with pytest.raises(UserError, match="holds no files"):
        read_folder(SourceRequest(tmp_path / ".git" / "none"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".xlsx"])
def test_a_table_can_contain_questions_and_images_without_questions(tmp_path, suffix):
    answer = "a liver" if suffix == ".tsv" else "a\nliver"  # a line of a TSV file is a row
    rows = [
        {"image": "a.png", "question": 'What, "exactly"?', "answer": answer, "split": "test"},
        {"image": "a.png", "question": "Normal?", "answer": "Yes", "split": ""},
        {"image": "b.png", "question": "", "answer": "", "split": ""},
    ]
    source = read_table(SourceRequest(write_table(tmp_path / f"table{suffix}", rows), tmp_path))
    assert [(q.split, q.question, q.answer, q.answer_type) for q in source.questions] == [
        ("test", 'What, "exactly"?', answer, "open"),
        ("train", "Normal?", "Yes", "closed"),
    ]
    assert [conversation.images for conversation in source.conversations] == [("b.png",)] and not source.rejected


def test_bad_rows_are_rejected(tmp_path):
    lines = [
        "id,image,question,answer,split,answer_type", "1,a.png,q,a,,", "1,a.png,q,a,,", "2,,q,a,,", "3,a.png,q,,,",
        "4,a.png,,a,,", "5,a.png,q,a,holdout,", "6,a.png,q,a,,maybe", "9,a.png,q,--,,", "7,a.png", "", "8,b.png,,,,",
    ]  # fmt: skip
    (tmp_path / "a.csv").write_text("\n".join(lines))
    source = read_table(SourceRequest(tmp_path / "a.csv", tmp_path))
    assert [item.reason for item in source.rejected] == [
        "duplicate_id", "no_image", "no_answer", "no_question", "bad_split", "bad_answer_type", "no_answer",
        "malformed_row",
    ]  # fmt: skip
    assert len(source.questions) == 1 and len(source.conversations) == 1


@pytest.mark.parametrize("text", ["", "file,question\na.png,x\n"])
def test_a_table_without_images_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"a\.csv"):
        read_table(SourceRequest(tmp_path / "a.csv", tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "Picture,Question\n",
            "no column `image` .it has picture, question.. Rename its columns",
        ),
        ("a.csv", "image,question,answer,Answer \na.png,q,a,b\n", "several columns `answer`"),
    ],
)
def test_a_header_that_would_lose_data_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(SourceRequest(tmp_path / name, tmp_path))


def test_rows_end_only_at_line_breaks(tmp_path):
    rows = [["a.png", "Is it\x85?", "yes\u2028"], ["b.png", "one\ntwo", "\x0c"]]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answer"], *rows])
    source = read_table(SourceRequest(tmp_path / "a.csv", tmp_path))
    assert [item.images for item in source.questions] == [("a.png",)]
    assert [item.reason for item in source.rejected] == ["no_answer"]


SHORT, LONG = " ".join(["word"] * 29), " ".join(["word"] * 30)


def request_of(conversation):
    return text_of(conversation.messages[0]["content"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_each_caption_answers_a_request_that_matches_its_length(tmp_path, suffix):
    rows = [{"id": f"r{n}", "image": f"{n}.png", "caption": LONG if n % 2 else SHORT} for n in range(100)]
    table = write_table(tmp_path / f"table{suffix}", rows)
    conversations = read_captions(SourceRequest(table, tmp_path)).conversations
    for row, conversation in zip(rows, conversations, strict=True):
        assert (conversation.id, conversation.images) == (row["id"], (row["image"],))
        user, assistant = conversation.messages
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert text_of(assistant["content"]) == row["caption"]
        assert request_of(conversation) in (DETAILED if row["caption"] == LONG else BRIEF)
    assert {request_of(conversation) for conversation in conversations} == {
        *BRIEF,
        *DETAILED,
    }  # every wording is used


def test_the_request_of_a_record_depends_only_on_its_id_and_the_seed(tmp_path):
    rows = [{"id": f"r{n}", "image": "a.png", "caption": SHORT} for n in range(40)]
    read = lambda rows, seed: {  # noqa: E731
        conversation.id: request_of(conversation)
        for conversation in read_captions(
            SourceRequest(write_table(tmp_path / "t.csv", rows), tmp_path, seed=seed)
        ).conversations
    }
    all_requests = read(rows, 0)
    assert read(rows[::-3], 0).items() <= all_requests.items()
    assert read(rows, 1) != all_requests
    assert instruction("r0", SHORT, 0) == all_requests["r0"]


def test_bad_captions_are_rejected(tmp_path):
    lines = [
        {"id": "1", "image": "a.png", "caption": "A scan."}, {"id": "1", "image": "a.png", "caption": "A scan."},
        {"image": "", "caption": "x"}, {"image": "a.png", "caption": "  "}, {"image": "a.png"},
        {"image": "a.png", "caption": ["x"]}, {"image": "a.png", "caption": "half \ud800"}, 5,
    ]  # fmt: skip
    path = write_table(tmp_path / "t.jsonl", lines)
    path.write_text(path.read_text() + '\n{"image": "a.png", "cap')
    source = read_captions(SourceRequest(path, tmp_path))
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
        other = write_table(tmp_path / "other.csv", [{"file": "a.png", "caption": "x"}])
        read_captions(SourceRequest(other, tmp_path))


def test_the_error_for_rows_without_answers_names_one(tmp_path):
    table = write_table(tmp_path / "t.csv", [{"image": "0.png", "Question": "Q?", "answers": "yes"}])
    with pytest.raises(UserError, match="1 no_answer, for example 'row-000000'. "):
        main(PrepareArguments(output_dir=str(tmp_path / "out"), source="images", data_path=str(table)))

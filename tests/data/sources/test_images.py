# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import csv

import pytest
from tables import write_table

from medst_trl.base.errors import UserError
from medst_trl.data.sources.images import read_folder, read_table


def test_every_visible_file_of_a_directory_is_read_in_order(tmp_path):
    for name in ("b.png", "a/c.dcm", "a/IM0001", ".hidden.png", ".git/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [conversation.images[0] for conversation in read_folder(tmp_path).conversations]
    assert names == ["b.png", "notes.txt", "a/IM0001", "a/c.dcm"]
    assert not any(conversation.messages for conversation in read_folder(tmp_path).conversations)
    with pytest.raises(UserError, match="holds no files"):
        read_folder(tmp_path / ".git" / "none")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_can_contain_questions_and_images_without_questions(tmp_path, suffix):
    rows = [
        {"image": "a.png", "question": 'What, "exactly"?', "answer": "a\nliver", "split": "test"},
        {"image": "a.png", "question": "Normal?", "answer": "Yes", "split": ""},
        {"image": "b.png", "question": "", "answer": "", "split": ""},
    ]
    source = read_table(write_table(tmp_path / f"table{suffix}", rows), tmp_path)
    assert [(q.split, q.question, q.answer, q.answer_type) for q in source.questions] == [
        ("test", 'What, "exactly"?', "a\nliver", "open"),
        ("train", "Normal?", "Yes", "closed"),
    ]
    assert [conversation.images for conversation in source.conversations] == [("b.png",)] and not source.rejected


def test_bad_rows_are_rejected(tmp_path):
    lines = [
        "id,image,question,answer,split,answer_type", "1,a.png,q,a,,", "1,a.png,q2,a,,", "2,,q,a,,", "3,a.png,q,,,",
        "4,a.png,,a,,", "5,a.png,q,a,dev,", "6,a.png,q,a,,maybe", "7,a.png", "", "8,b.png,,,,",
    ]  # fmt: skip
    (tmp_path / "a.csv").write_text("\n".join(lines))
    source = read_table(tmp_path / "a.csv", tmp_path)
    assert [item.reason for item in source.rejected] == [
        "duplicate_id", "no_image", "no_answer", "no_question", "bad_split", "bad_answer_type", "malformed_row",
    ]  # fmt: skip
    assert len(source.questions) == 1 and len(source.conversations) == 1


@pytest.mark.parametrize("text", ["", "file,question\na.png,x\n"])
def test_a_table_without_images_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"a\.csv"):
        read_table(tmp_path / "a.csv", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "image;question;answer\n",
            "Separate its columns by commas instead of semicolons",
        ),  # as written by Excel in some European locales
        ("a.tsv", "image,question\n", "by tabs instead of commas"),
        ("a.csv", "Image,Question\n", "no column `image` .it has Image, Question.. Rename"),
        ("a.csv", "image,question,answer,answer\na.png,q,a,b\n", "several columns `answer`"),
    ],
)
def test_a_header_that_would_lose_data_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name, tmp_path)


def test_rows_end_only_at_line_breaks(tmp_path):
    rows = [["a.png", "Is it\x85?", "yes\u2028"], ["b.png", "one\ntwo", "\x0c"]]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answer"], *rows])
    source = read_table(tmp_path / "a.csv", tmp_path)
    assert [item.image for item in source.questions] == ["a.png"]
    assert [item.reason for item in source.rejected] == ["no_answer"]

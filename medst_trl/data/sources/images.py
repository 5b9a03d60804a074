# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Plain images: a directory, or a table of file names, optionally with questions and answers."""

import os
from collections.abc import Callable
from pathlib import Path

from medst_trl.base.errors import UserError
from medst_trl.data.reading import read_rows
from medst_trl.data.schema import ANSWER_TYPES
from medst_trl.data.source import (
    SOURCES,
    BadRecord,
    Conversation,
    Question,
    Records,
    Source,
    SourceCard,
    guess_answer_type,
    optional_text,
    text_value,
)


_SPLITS = ("train", "validation", "test")


def read_folder(directory: Path) -> Records:
    """
    Read every file in a directory, except hidden ones, as one unlabeled image.

    Whether a file is an image depends on its content, not its name; other files are rejected when they are read.
    """
    records = Records("images", directory)
    for root, directories, files in os.walk(directory):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for file in sorted(files):
            if not file.startswith("."):
                name = (Path(root) / file).relative_to(directory).as_posix()
                records.conversations.append(Conversation(name, (name,), []))
    if not records.conversations:
        raise UserError(f"{directory} holds no files. Correct the path to the images.")
    return records


def read_table(path: Path, image_folder: Path) -> Records:
    """
    Read a table of images, `.csv` or `.tsv` with a header, or `.jsonl` / `.json` objects; for a directory see
    [`read_folder`].

    Columns: `image`, a file name; optionally `question` and `answer` together, and with them `id`, `split` (train,
    validation or test; default train), `answer_type` (open or closed; default closed for yes and no), `question_type`
    and `link` (shared by the paraphrases of one question). A row without a question is an unlabeled image.

    Rejected, by reason: `malformed_row`, `malformed_json`, `not_an_object`, `no_image`, `no_question`, `no_answer`,
    `bad_split`, `bad_answer_type`, `not_text`, `bad_unicode`, `duplicate_id`.
    """

    if path.is_dir():
        return read_folder(path)

    def record(name: str, image: str, row: dict) -> Question | Conversation:
        if row.get("question") or row.get("answer"):
            return question_of(name, image, row)
        return Conversation(name, (image,), [])

    records = Records("images", image_folder)
    collect_rows(records, path, record)
    return records


def collect_rows(records: Records, path: Path, make: Callable[[str, str, dict], Question | Conversation]) -> None:
    """Add what `make` returns for the id, the image and the row of each row of a table."""
    records.collect(
        read_rows(path),
        lambda name, row: make(name, text_value(row.get("image"), missing="no_image"), row),
        default_id=lambda position, _: f"row-{position:06d}",
        own_id=lambda row: row.get("id") or None,
    )


def question_of(name: str, image: str, row: dict) -> Question:
    """Make a question of a row with the columns that [`read_table`] describes."""
    answer = text_value(row.get("answer"), missing="no_answer")
    split = row.get("split") or "train"
    if split not in _SPLITS:
        raise BadRecord("bad_split", split)
    answer_type = row.get("answer_type") or guess_answer_type(answer)
    if answer_type not in ANSWER_TYPES:
        raise BadRecord("bad_answer_type", answer_type)
    return Question(
        id=name,
        image=image,
        split=split,
        question=text_value(row.get("question"), missing="no_question"),
        answer=answer,
        answer_type=answer_type,
        question_type=optional_text(row.get("question_type")),
        link=optional_text(row.get("link")),
    )


SOURCES.register(
    Source(
        name="images",
        summary="a directory of images, or a table (csv, tsv, jsonl) with image, optionally question, answer, split",
        read=lambda request: read_table(request.data_path, request.image_folder),
        card=SourceCard("images from the publisher of this repository"),
        reads_folders=True,
    )
)

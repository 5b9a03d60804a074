# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Plain images: a folder, or a table with a column of file names and, if you have them, questions and answers."""

import csv
import io
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from medst_trl.base.errors import UserError

from .json_records import read_json_records
from .records import BadRecord, Conversation, Question, Rejected, Source, optional_text, text_value
from .schema import ANSWER_TYPES
from .text_files import read_text_file


SPLITS = ("train", "validation", "test")


def read_folder(folder: Path) -> Source:
    """
    Every file under a folder, hidden ones apart, as one unlabelled image.

    Whether a file is an image shows its content, not its name; what is none is set aside when the images are read.
    """
    source = Source("images", folder)
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            if not file.startswith("."):
                name = (Path(root) / file).relative_to(folder).as_posix()
                source.conversations.append(Conversation(name, (name,), []))
    if not source.conversations:
        raise UserError(f"{folder} holds no files. Correct the path to the images.")
    return source


def read_table(path: Path, image_folder: Path) -> Source:
    """
    A table of images: `.csv` or `.tsv` with a header, or `.jsonl` / `.json` objects.

    Columns: `image`, a file name; optionally `question` and `answer` together, and with them `id`, `split` (train,
    validation or test; default train), `answer_type` (open or closed; default closed for yes and no), `question_type`
    and `link` (the same for the wordings of one question). A row without a question is an unlabelled image.

    Set aside, by reason: `malformed_row`, `malformed_json`, `not_an_object`, `no_image`, `no_question`, `no_answer`,
    `bad_split`, `bad_answer_type`, `not_text`, `bad_unicode`, `duplicate_id`.
    """
    source, ids = Source("images", image_folder), set()
    for position, row in read_rows(path):
        if isinstance(row, Rejected):
            source.rejected.append(row)
            continue
        name = f"row-{position:06d}"
        try:
            name = text_value(row.get("id") or name, missing="")
            if name in ids:
                raise BadRecord("duplicate_id", name)
            image = text_value(row.get("image"), missing="no_image")
            if row.get("question") or row.get("answer"):
                source.questions.append(_question(name, image, row))
            else:
                source.conversations.append(Conversation(name, (image,), []))
            ids.add(name)
        except BadRecord as bad:
            source.rejected.append(Rejected(name, bad.reason, bad.value))
    return source


def read_rows(path: Path) -> Iterator[tuple[int, dict | Rejected]]:
    """The rows of a table with a column `image`, whichever of the forms it has, with their positions from 0."""
    is_json = path.suffix.lower() in (".json", ".jsonl")
    return read_json_records(path, known_by="image") if is_json else _delimited(path)


def check_header(
    header: list[str],
    needed: Collection[str],
    path: Path,
    delimiter: str | None,
    advice: str = "Name its columns so.",
) -> None:
    """
    Refuse a table without a column that is needed, or with two of one name, of which one would be lost.

    Raises:
        UserError: naming the columns, and the separator where that seems to be the reason.
    """
    if missing := [name for name in needed if name not in header]:
        other = next((sign for sign in ";\t,|" if sign != delimiter and len(header) == 1 and sign in header[0]), None)
        if delimiter and other:
            advice = f"Separate its columns by {_SIGNS[delimiter]} instead of {_SIGNS[other]}."
        there = ", ".join(header) or "none"
        raise UserError(
            f"{path} has no column {', '.join(f'`{name}`' for name in missing)} (it has {there}). {advice}"
        )
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{path} has several columns {', '.join(f'`{name}`' for name in twice)}. Leave one of each.")


_SIGNS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def _question(name: str, image: str, row: dict) -> Question:
    answer = text_value(row.get("answer"), missing="no_answer")
    split = row.get("split") or "train"
    if split not in SPLITS:
        raise BadRecord("bad_split", split)
    answer_type = row.get("answer_type") or ("closed" if answer.lower() in ("yes", "no") else "open")
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


def _delimited(path: Path) -> Iterator[tuple[int, dict | Rejected]]:
    """Rows of a CSV or TSV file by column name; what has more or fewer fields than the header is set aside."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text_file(path, "table"), newline=""), delimiter=delimiter)
    header, position = None, -1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:  # a field larger than csv's limit
            fields = [str(error)]
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            check_header(header, ("image",), path, delimiter)
            continue
        position += 1
        if len(fields) == len(header):
            yield position, dict(zip(header, fields))
        else:
            yield position, Rejected(f"{path.name}#{position}", "malformed_row", ",".join(fields))
    if header is None:
        raise UserError(f"{path} is empty.")

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Prediction files of VLMEvalKit: a table with `index`, `question`, `answer`, `prediction` and further columns of the
data set. Its `PRED_FORMAT` chooses between `xlsx` (the default), `tsv` and `json`.

An empty cell is an empty answer, a wrong one. (VLMEvalKit reads tables with pandas, which takes "NA", "None" and
"null" for missing values; here they are kept as text.)
"""

import csv
import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_json, write_text
from medst_trl.data.reading import check_header, read_text_file, read_workbook
from medst_trl.data.source import Rejected
from medst_trl.evaluation.predictions import PREDICTION_FORMATS, PredictionFormat, ReadRow

from .questions import answer_type, json_rows, read_with_answers


_DELIMITERS = {".tsv": "\t", ".csv": ",", ".xlsx": None}
_EXPECTED = "VLMEvalKit's prediction files have the columns index, question, answer and prediction."
_COLUMNS = ("index", "question", "answer", "prediction")
_REQUIRED = ("index", "question", "prediction")  # test sets with hidden answers have none
_OURS = ("id", "image_id", "answer_type", "question_type", "group_id")


def _rows(path: Path) -> Iterator[ReadRow]:
    """Rows by column name; rows of a table with more or fewer cells than its header are rejected."""
    suffix = path.suffix.lower()
    if suffix not in _DELIMITERS:
        yield from json_rows(path, _REQUIRED)
        return
    # Answers that start with `=` are formulas in a workbook that pandas writes.
    workbook = read_workbook(path, "let VLMEvalKit write PRED_FORMAT=tsv", formulas=True)
    lines = (cells for _, cells in workbook) if suffix == ".xlsx" else _cells(path, _DELIMITERS[suffix])
    header = [str(name) for name in next(lines, [])]
    check_header(header, _REQUIRED, path, _DELIMITERS[suffix], _EXPECTED)
    for number, cells in enumerate(lines, start=1):
        name = f"row {number}"
        if len(cells) != len(header):
            yield name, Rejected(name, f"{len(cells)} cells instead of {len(header)}", cells)
        else:
            yield name, dict(zip(header, cells))


def _write(records: list[dict[str, Any]], path: Path) -> None:
    """Write `.tsv`, `.csv` or `.json`, depending on the suffix."""
    rows = [
        {
            "index": number,
            "question": record.get("question") or "",
            "answer": str(record["answer"]),
            "prediction": str(record["prediction"]),
            **{key: record.get(key) for key in _OURS},
        }
        for number, record in enumerate(records)
    ]
    suffix = path.suffix.lower()
    if suffix == ".json":
        write_json(path, rows)
        return
    if not _DELIMITERS.get(suffix):
        raise UserError(f"VLMEvalKit's predictions are written as .tsv, .csv or .json. Rename {path}.")
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=_DELIMITERS[suffix], quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow((*_COLUMNS, *_OURS))
    writer.writerows([row[key] for key in (*_COLUMNS, *_OURS)] for row in rows)
    write_text(path, text.getvalue())


def _record(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A prediction under VLMEvalKit's `index`, or under the id that a file of ours has beside it."""
    answer = None if row.get("answer") == "" else row.get("answer")
    return {
        "id": str(row["index"] if row.get("id") in (None, "") else row["id"]),
        "image_id": row.get("image_id") or None,
        "question": row["question"],
        "answer": answer,
        **answer_type(answer, row.get("answer_type")),
        "question_type": row.get("question_type") or None,
        "group_id": row.get("group_id") or None,
        "prediction": row["prediction"],
    }


def _cells(path: Path, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)  # an endless answer may exceed csv's 128 KiB
    text = read_text_file(path, "predictions")
    yield from (cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if cells)


PREDICTION_FORMATS.register(
    PredictionFormat(
        name="vlmevalkit",
        summary="tables of VLMEvalKit",
        expected=_EXPECTED,
        guess=lambda path, first: path.suffix.lower() in _DELIMITERS or first.keys() >= {"index", "prediction"},
        read=partial(read_with_answers, _rows, _record),
        write=_write,
    )
)

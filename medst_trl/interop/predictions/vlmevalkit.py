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
from functools import partial
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_json, write_text
from medst_trl.data.reading import read_rows
from medst_trl.evaluation.predictions import PREDICTION_FORMATS, PredictionFormat

from .questions import GOLD, answer_type, read_with_answers


_DELIMITERS = {".tsv": "\t", ".csv": ","}
_EXPECTED = "VLMEvalKit's prediction files have the columns index, question, answer and prediction."
_COLUMNS = ("index", "question", "answer", "prediction")
_REQUIRED = ("index", "question", "prediction")  # test sets with hidden answers have none
_READ = partial(read_rows, advice=_EXPECTED, instead="let VLMEvalKit write PRED_FORMAT=tsv", as_written=True)
_OURS = ("id", "image_id", "answer_type", "question_type", "group_id")


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
    if suffix not in _DELIMITERS:
        raise UserError(f"VLMEvalKit's predictions are written as .tsv, .csv or .json. Rename {path}.")
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=_DELIMITERS[suffix], quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow((*_COLUMNS, *_OURS))
    writer.writerows([row[key] for key in (*_COLUMNS, *_OURS)] for row in rows)
    write_text(path, text.getvalue())


def _record(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A prediction under VLMEvalKit's `index`, or under the id that a file of ours has beside it."""
    return {
        "id": str(row["index"] if row.get("id") in (None, "") else row["id"]),
        **{key: None if row.get(key) == "" else row.get(key) for key in GOLD},
        "question": row["question"],
        **answer_type(row.get("answer") or None, row.get("answer_type")),
        "prediction": row["prediction"],
    }


PREDICTION_FORMATS.register(
    PredictionFormat(
        name="vlmevalkit",
        summary="tables of VLMEvalKit",
        expected=_EXPECTED,
        guess=lambda path, first: (
            path.suffix.lower() in (*_DELIMITERS, ".xlsx") or first.keys() >= {"index", "prediction"}
        ),
        read=partial(read_with_answers, _REQUIRED, _record, read=_READ),
        write=_write,
    )
)

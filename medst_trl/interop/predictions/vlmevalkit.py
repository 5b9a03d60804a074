# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Prediction files of VLMEvalKit: a table with `index`, `question`, `answer`, `prediction` and further columns of the
data set. Its `PRED_FORMAT` chooses between `xlsx` (the default), `tsv` and `json`.

An empty cell is an empty answer, a wrong one. (VLMEvalKit reads tables with pandas, which takes "NA", "None" and
"null" for missing values; here they are kept as text.)
"""

from functools import partial
from typing import Any

from medst_trl.data.reading import read_rows
from medst_trl.evaluation.predictions import PREDICTION_FORMATS, PredictionFormat
from medst_trl.evaluation.questions import GOLD, answer_type


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
        expected="VLMEvalKit's prediction files have the columns index, question, answer and prediction.",
        needs=("index", "question", "prediction"),  # test sets with hidden answers have none
        guess=lambda path, first: (
            path.suffix.lower() in (".tsv", ".csv", ".xlsx") or first.keys() >= {"index", "prediction"}
        ),
        record=_record,
        rows=partial(read_rows, as_written=True),
    )
)

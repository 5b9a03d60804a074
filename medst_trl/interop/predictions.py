# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Prediction files of other evaluation projects.

- `llava_med`: answer files of LLaVA-Med (`model_vqa_med.py` of v1, `model_vqa.py` of v1.5), JSON lines of
  `question_id`, `prompt`, `text` (the prediction), `answer_id`, `model_id` and `metadata`. They hold no right answers.
  Ours carry them in `metadata`, which is empty in LLaVA-Med's own.
- `medevalkit`: `results.json` of MedEvalKit, a JSON array of `question`, `answer`, `response`, for SLAKE also
  `answer_type` and `lang`, and per record its own scores, which are ignored. It names neither questions nor images. As
  in MedEvalKit, the prediction is the content of `\boxed{...}` or of `<answer>` tags if the response has them; the
  whole response is kept as `response`.
- `vlmevalkit`: tables of VLMEvalKit with `index`, `question`, `answer`, `prediction` and further columns of the data
  set. Its `PRED_FORMAT` chooses between `xlsx` (the default), `tsv` and `json`. An empty cell is an empty answer, a
  wrong one. (VLMEvalKit reads tables with pandas, which takes "NA", "None" and "null" for missing values; here they
  are kept as text.)
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from medst_trl.data.cells import BadRecord
from medst_trl.data.reading import read_rows
from medst_trl.evaluation.predictions import GOLD, NOT_ENGLISH, PREDICTION_FORMATS, PredictionFormat, answer_type


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def _llava_med_record(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A prediction under LLaVA-Med's id, with the right answer if the file is one of ours."""
    metadata = row.get("metadata")
    gold = {key: metadata[key] for key in GOLD if key in metadata} if isinstance(metadata, Mapping) else {}
    record = {"id": str(row["question_id"]), "question": row["prompt"], **gold, "prediction": row["text"]}
    return record | ({"generation": {"model": row["model_id"]}} if row.get("model_id") else {})


PREDICTION_FORMATS.register(
    PredictionFormat(
        name="llava_med",
        summary="LLaVA-Med's answer files, v1 and v1.5",
        expected="LLaVA-Med's answer files are JSON lines with question_id, prompt and text.",
        needs=("question_id", "prompt", "text"),
        guess=lambda path, first: first.keys() >= {"question_id", "text"},
        record=_llava_med_record,
    )
)


def final_answer(response: str) -> str:
    r"""The content of the last `\boxed{}`, otherwise of `<answer>` tags, otherwise the whole response."""
    start = response.rfind("\\boxed{")
    depth = 0
    for place in range(start + len("\\boxed"), len(response)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(response[place], 0)
        if depth == 0:
            return response[start + len("\\boxed{") : place]
    found = _ANSWER.findall(response)
    return " ".join(text.strip() for text in found) if found else response


def _medevalkit_record(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A prediction, numbered in the file's order. SLAKE's questions in other languages than English are rejected."""
    if row.get("lang") not in (None, "en"):
        raise BadRecord(NOT_ENGLISH, row["lang"])
    response = str(row["response"])
    # A file of ours has the prediction itself, which may look like markup.
    prediction = row["prediction"] if row.get("prediction") is not None else final_answer(response)
    return {
        "id": row.get("id") or str(number),
        **{key: row.get(key) for key in GOLD},
        **answer_type(row["answer"], row.get("answer_type")),
        "prediction": prediction,
        **({"response": response} if response != prediction else {}),
    }


PREDICTION_FORMATS.register(
    PredictionFormat(
        name="medevalkit",
        summary="results.json of MedEvalKit",
        expected="MedEvalKit's results.json is an array of objects with question, answer and response.",
        needs=("question", "answer", "response"),
        guess=lambda path, first: first.keys() >= {"question", "answer", "response"},
        record=_medevalkit_record,
    )
)


def _vlmevalkit_record(row: dict[str, Any], number: int) -> dict[str, Any]:
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
        record=_vlmevalkit_record,
        rows=partial(read_rows, as_written=True),
    )
)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
`results.json` of MedEvalKit: a JSON array of `question`, `answer`, `response`, for SLAKE also `answer_type` and
`lang`, and per record its own scores, which are ignored.

It names neither questions nor images. As in MedEvalKit, the prediction is the content of `\boxed{...}` or of
`<answer>` tags if the response has them; the whole response is kept as `response`.
"""

import re
from typing import Any

from medst_trl.data.cells import BadRecord
from medst_trl.evaluation.predictions import PREDICTION_FORMATS, PredictionFormat
from medst_trl.evaluation.questions import GOLD, NOT_ENGLISH, answer_type


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


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


def _record(row: dict[str, Any], number: int) -> dict[str, Any]:
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
        record=_record,
    )
)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Answer files of LLaVA-Med (`model_vqa_med.py` of v1, `model_vqa.py` of v1.5): JSON lines of `question_id`, `prompt`,
`text` (the prediction), `answer_id`, `model_id` and `metadata`.

They hold no right answers. Ours carry them in `metadata`, which is empty in LLaVA-Med's own.
"""

from collections.abc import Mapping
from typing import Any

from medst_trl.evaluation.predictions import PREDICTION_FORMATS, PredictionFormat
from medst_trl.evaluation.questions import GOLD


def _record(row: dict[str, Any], number: int) -> dict[str, Any]:
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
        record=_record,
    )
)

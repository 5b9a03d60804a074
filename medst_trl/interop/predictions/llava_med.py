# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Answer files of LLaVA-Med (`model_vqa_med.py` of v1, `model_vqa.py` of v1.5): JSON lines of `question_id`, `prompt`,
`text` (the prediction), `answer_id`, `model_id` and `metadata`.

They hold no right answers. Ours carry them in `metadata`, which is empty in LLaVA-Med's own.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from medst_trl.base.files import write_json, write_jsonl
from medst_trl.evaluation.predictions import PREDICTION_FORMATS, PredictionFormat

from .questions import GOLD, read_with_answers


def _record(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A prediction under LLaVA-Med's id, with the right answer if the file is one of ours."""
    metadata = row.get("metadata")
    gold = {key: metadata[key] for key in GOLD if key in metadata} if isinstance(metadata, Mapping) else {}
    record = {"id": str(row["question_id"]), "question": row["prompt"], **gold, "prediction": row["text"]}
    return record | ({"generation": {"model": row["model_id"]}} if row.get("model_id") else {})


def _write(records: list[dict[str, Any]], path: Path) -> None:
    """Write an answer file, and `answers_questions.json`, against which LLaVA-Med's `run_eval.py` scores it."""
    write_jsonl(path, map(_row, records))
    write_json(path.with_name(f"{path.stem}_questions.json"), [_question(record) for record in records])


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question_id": str(record["id"]),
        "prompt": record.get("question") or "",
        "text": str(record["prediction"]),
        "answer_id": hashlib.sha256(str(record["id"]).encode()).hexdigest()[:22],
        "model_id": (record.get("generation") or {}).get("model") or "",
        "metadata": {key: record[key] for key in GOLD if record.get(key) is not None},
    }


def _question(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(record["id"]),
        "image": str(record.get("image_id") or ""),
        "answer_type": str(record["answer_type"]).strip().upper(),
        "conversations": [
            {"from": "human", "value": f"{record.get('question') or ''}\n<image>"},
            {"from": "gpt", "value": str(record["answer"])},
        ],
    }


PREDICTION_FORMATS.register(
    PredictionFormat(
        name="llava_med",
        summary="LLaVA-Med's answer files, v1 and v1.5",
        expected="LLaVA-Med's answer files are JSON lines with question_id, prompt and text.",
        guess=lambda path, first: first.keys() >= {"question_id", "text"},
        read=partial(read_with_answers, ("question_id", "prompt", "text"), _record),
        write=_write,
    )
)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Answer files of LLaVA-Med (`model_vqa_med.py` of v1, `model_vqa.py` of v1.5): JSON lines of `question_id`, `prompt`,
`text` (the prediction), `answer_id`, `model_id` and `metadata`.

They hold no right answers. Ours carry them in `metadata`, which is empty in LLaVA-Med's own.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medst_trl.evaluation.metrics import RecordError

from .rows import Item, json_rows, write_text


KEYS = {"question_id", "text"}
EXPECTED = "LLaVA-Med's answer files are JSON lines with question_id, prompt and text."
_GOLD = ("image_id", "question", "answer", "answer_type", "question_type")


def read(path: Path) -> Iterator[Item]:
    """Predictions under LLaVA-Med's ids, with right answers where a file of ours has them."""
    for name, row in json_rows(path, ("question_id", "prompt", "text")):
        if isinstance(row, RecordError):
            yield name, row
            continue
        metadata = row.get("metadata")
        gold = {key: metadata[key] for key in _GOLD if key in metadata} if isinstance(metadata, Mapping) else {}
        record = {"id": str(row["question_id"]), "question": row["prompt"], **gold, "prediction": row["text"]}
        if row.get("model_id"):
            record["generation"] = {"model": row["model_id"]}
        yield name, record


def write(records: list[dict[str, Any]], path: Path) -> None:
    """Write an answer file, and the file of questions that LLaVA-Med's `run_eval.py` scores it against."""
    write_text(path, "".join(json.dumps(_row(record), ensure_ascii=False) + "\n" for record in records))
    gold = [_question(record) for record in records]
    write_text(questions_path(path), json.dumps(gold, ensure_ascii=False, indent=1) + "\n")


def questions_path(path: Path) -> Path:
    """Where the file of questions lies: `answers_questions.json` beside `answers.jsonl`."""
    return path.with_name(f"{path.stem}_questions.json")


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    model = (record.get("generation") or {}).get("model")
    return {
        "question_id": str(record["id"]),
        "prompt": record.get("question") or "",
        "text": str(record["prediction"]),
        "answer_id": hashlib.sha256(str(record["id"]).encode()).hexdigest()[:22],
        "model_id": model or "",
        "metadata": {key: record[key] for key in _GOLD if record.get(key) is not None},
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

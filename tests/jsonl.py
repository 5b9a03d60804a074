# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Read JSON lines, and write the predictions file that a run without a model evaluates."""

import json
from pathlib import Path


PREDICTION = {
    "id": "1", "image_id": "a", "question": "Is there a fracture?", "answer": "no", "answer_type": "closed",
    "question_type": "presence", "prediction": "no", "generation": "{}",
}  # fmt: skip


def read_jsonl(path: str | Path) -> list[dict]:
    """Return the records of a file with one JSON object per line."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_prediction(path: Path) -> None:
    """Write a predictions file with one record. Its evaluation is a distributed stage that needs no model."""
    path.write_text(json.dumps(PREDICTION) + "\n", encoding="utf-8")

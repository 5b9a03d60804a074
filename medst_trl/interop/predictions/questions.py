# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The questions of a benchmark with their right answers, for predictions that come without."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.data.json_records import read_json_records


def read_questions(
    benchmark: str | os.PathLike | Iterable[Mapping[str, Any]], split: str = "test"
) -> list[dict[str, Any]]:
    """
    All questions of a benchmark in its order.

    Args:
        benchmark (`str`, `os.PathLike` or iterable of `dict`):
            Folder or Hub id of a benchmark, LLaVA-Med's file of questions (`.json`), or questions.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the benchmark.

    Returns:
        `list[dict]`: id, image_id, question, answer, answer_type, question_type.

    Raises:
        UserError: if there is no such benchmark, or the file is another one.
    """
    if not isinstance(benchmark, str | os.PathLike):
        return [dict(question) for question in benchmark]
    if str(benchmark).endswith(".json"):
        return _of_llava_med(Path(benchmark))
    from medst_trl.data.schema import check_columns, load_records
    from medst_trl.evaluation.vqa import questions_of

    dataset = load_records(benchmark, split)
    check_columns(dataset, "benchmark")
    return questions_of(dataset)


def _of_llava_med(path: Path) -> list[dict[str, Any]]:
    """What `run_eval.py` takes as `--gt`: id, image, answer_type, and a conversation of question and answer."""
    return [_question(record, f"{path}, record {number + 1}") for number, record in read_json_records(path, "id")]


def _question(record: Any, name: str) -> dict[str, Any]:
    try:
        # A part of LLaVA-Med's files spells the key so.
        turns = record["conversations"] if "conversations" in record else record["conversatons"]
        return {
            "id": str(record["id"]),
            "image_id": str(record["image"]) if record.get("image") else None,
            "question": turns[0]["value"].replace("<image>", "").strip(),
            "answer": turns[1]["value"],
            "answer_type": record["answer_type"].strip().lower(),
            "question_type": None,
        }
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(
            f"{name} is no question of LLaVA-Med's: expected id, answer_type and conversations of a question and its "
            "answer. Give a benchmark that `medst prepare` wrote, or LLaVA-Med's test file."
        ) from None

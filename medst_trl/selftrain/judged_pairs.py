# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Candidates and what a judge said of them, brought together as preference rows."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from medst_trl.data.schema import text_part
from medst_trl.data.source import Rejected


if TYPE_CHECKING:
    from datasets import Dataset


def judged_pairs(candidates: "Dataset", judgements: Iterable[Mapping]) -> tuple[list[dict], list[Rejected]]:
    """What the judge decided as preference rows, and what it did not decide; see [`build_preferences`]."""
    by_id = {}
    columns = candidates.select_columns(["id", "image_ids", "prompt", "answers"])  # no image is decoded
    for row, candidate in enumerate(columns):
        by_id.setdefault(candidate["id"], (row, candidate))
    pairs, rejected = [], []
    for judgement in judgements:
        row, candidate = by_id.get(judgement["candidate"], (None, None))
        reason = judgement.get("dropped")
        if reason is None and judgement["verdict"] not in (0, 1):
            reason = "no_verdict"
        if reason is None and candidate is None:
            reason = "unknown_candidate"
        if reason is None and not set(judgement["answers"]) <= set(candidate["answers"]):
            reason = "other_answers"
        if reason is None:
            pairs.append(_preference_row(row, candidate, judgement))
        else:
            rejected.append(Rejected(judgement["id"], reason, judgement.get("question")))
    return pairs, rejected


def _preference_row(row: int, candidate: Mapping, judgement: Mapping) -> dict:
    winner = judgement["verdict"]
    scores = judgement.get("scores") or (None, None)
    kept = ("shown", "scores", "verdict", "criteria")  # the replies stay in judgements.jsonl
    judge = {
        "model": judgement.get("model"),
        "prompt_version": judgement.get("prompt_version"),
        "orders": [{key: order[key] for key in kept if key in order} for order in judgement.get("orders") or ()],
    }
    return {
        "id": judgement["id"],
        "row": row,
        "image_ids": list(candidate["image_ids"]),
        "prompt": candidate["prompt"],
        "chosen": [_answer(judgement["answers"][winner])],
        "rejected": [_answer(judgement["answers"][1 - winner])],
        "score_chosen": scores[winner],
        "score_rejected": scores[1 - winner],
        "judge": json.dumps(judge, ensure_ascii=False),
    }


def _answer(answer: str) -> dict:
    return {"role": "assistant", "content": [text_part(answer)]}

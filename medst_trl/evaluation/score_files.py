# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""From predictions files to `scores.json`: every variant, and every control beside it. No model, no torch."""

import json
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .controls import compare_vqa
from .metrics import score_vqa
from .predictions import read_predictions


def control_path(path: str | os.PathLike, control: str | None) -> Path:
    """Where a control's predictions lie: `predictions_blank.jsonl` beside `predictions.jsonl`."""
    path = Path(path)
    return path.with_name(f"{path.stem}_{control}{path.suffix}") if control else path


def score_files(
    path: str | os.PathLike,
    *,
    variants: Collection[str] = ("strict", "llava_med"),
    closed_rule: str = "gated",
    controls: Collection[str] = (),
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """
    Score a predictions file, and the controls' files beside it.

    Args:
        path (`str` or `os.PathLike`):
            Predictions file.
        variants (collection of `str`, *optional*):
            Rules to score by, see [`~medst_trl.evaluation.metrics.score_vqa`].
        closed_rule (`str`, *optional*, defaults to `"gated"`):
            Rule of `llava_med` for closed questions.
        controls (collection of `str`, *optional*):
            Controls whose files (see [`control_path`]) are to be compared.
        bootstrap_samples, seed:
            As in `score_vqa`.

    Returns:
        `tuple`: `{"counts", "scores": {variant: ...}, "controls": {control: {variant: ...}}}`, and the lines set
        aside, see [`~medst_trl.evaluation.predictions.read_predictions`].

    Raises:
        UserError: if a file cannot be used, or a control does not answer the same questions.
    """
    records, rejected = read_predictions(path)
    common = {"bootstrap_samples": bootstrap_samples, "seed": seed}
    settings = {name: common | ({"closed_rule": closed_rule} if name == "llava_med" else {}) for name in variants}
    ids = {record.get("id") for record in records}
    compared = {}
    for control in controls:
        others = [row for row in read_predictions(control_path(path, control))[0] if row.get("id") in ids]
        compared[control] = {name: compare_vqa(records, others, name, **kwargs) for name, kwargs in settings.items()}
    counts = {
        "records": len(records),
        "rejected": dict(Counter(line["reason"] for line in rejected)),
        "cut_off": sum(_was_cut_off(record.get("generation")) for record in records),
    }
    if guessed := sum(record.get("answer_type_guessed") is True for record in records):
        counts["answer_types_guessed"] = guessed
    scores = {name: score_vqa(records, name, **kwargs) for name, kwargs in settings.items()}
    return {"counts": counts, "scores": scores, "controls": compared}, rejected


def write_scores(path: Path, scores: dict[str, Any]) -> None:
    """The file appears when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _was_cut_off(generation: Any) -> bool:
    return isinstance(generation, dict) and generation.get("ended") is False

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Single cases to look at: judged pairs, kept and dropped, and benchmark questions answered before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError

from .judging import KEPT, Judging, is_judgement
from .pictures import find_pictures
from .run_folder import Run, StageRun, parse_line
from .scores import Comparison, Evaluation, is_right, read_answers


@dataclass
class Case:
    """
    A judged pair.

    Attributes:
        pictures (`list[str]`): Data URLs.
        question (`str`): What the policy asked.
        answers (`list[str]`): Its two answers.
        scores (`list`): A score for each, or None.
        chosen (`int`, *optional*): Which one the judge preferred; None for a pair that was dropped.
        dropped (`str`, *optional*): Why.
        replies (`list[dict]`): `order` (which answer was shown first), `scores`, `verdict`, `reply` of each call.
    """

    pictures: list[str]
    question: str
    answers: list[str]
    scores: list[Any]
    chosen: int | None
    dropped: str | None
    replies: list[dict[str, Any]]


@dataclass
class Answered:
    """A benchmark question with the right answer, and what was answered before and after."""

    pictures: list[str]
    question: str
    answer: str
    before: str
    after: str


@dataclass
class Crossing:
    """How the answers of two policies to the same questions differ in being right."""

    before: Evaluation
    after: Evaluation
    counts: dict[str, int]
    cases: dict[str, list[Answered]]


CROSSINGS = {
    (False, True): "wrong before, right after",
    (True, False): "right before, wrong after",
    (False, False): "wrong both times",
    (True, True): "right both times",
}


def judged_cases(run: Run, judge: StageRun, judging: Judging, most: int, size: int) -> list[Case]:
    """At most `most` pairs of a judge stage: half of them kept, the others dropped, each reason in turn."""
    dropped = [_spread(offsets, most) for outcome, offsets in judging.offsets.items() if outcome != KEPT]
    in_turn = [offset for offset in chain(*zip_longest(*dropped)) if offset is not None]
    kept = _spread(judging.offsets.get(KEPT, []), max((most + 1) // 2, most - len(in_turn)))
    rows = []
    with open(judge.folder / "judgements.jsonl", "rb") as file:
        for offset in [*kept, *in_turn[: most - len(kept)]]:
            file.seek(offset)
            rows.append(parse_line(file.readline()) or {})
    rows = [row for row in rows if is_judgement(row)]
    folders = _candidates(run, judge)
    names = {str(row.get("candidate")) for row in rows}
    pictures = find_pictures(run, folders, "id", "images", names, size)
    return [_case(row, pictures.get(str(row.get("candidate")), [])) for row in rows]


def crossings(run: Run, comparison: Comparison, most: int, size: int) -> Crossing | None:
    """The newest policy beside the one before, on the questions of a benchmark."""
    if not comparison.compared:
        return None
    before, after = comparison.before, comparison.compared[-1]
    old, new = read_answers(run, before), read_answers(run, after)
    kinds: dict[str, list[str]] = {name: [] for name in CROSSINGS.values()}
    try:
        for key, row in new.items():
            if key in old:
                kinds[CROSSINGS[is_right(old[key]), is_right(row)]].append(key)
    except UserError:
        return None
    shown = {name: _spread(keys, most // 3) for name, keys in list(kinds.items())[:3]}
    wanted = {str(new[key].get("image_id")) for keys in shown.values() for key in keys}
    pictures = find_pictures(run, _benchmarks(run, after), "image_id", "image", wanted, size)

    def answered(key: str) -> Answered:
        row = new[key]
        return Answered(
            pictures.get(str(row.get("image_id")), []),
            str(row.get("question", "")),
            str(row["answer"]),
            str(old[key]["prediction"]),
            str(row["prediction"]),
        )

    cases = {name: [answered(key) for key in keys] for name, keys in shown.items()}
    return Crossing(before, after, {name: len(keys) for name, keys in kinds.items()}, cases)


def _case(row: Mapping[str, Any], pictures: list[str]) -> Case:
    kept = row["dropped"] is None
    replies = [
        {
            "first": order["shown"][0],
            "scores": order["scores"] if _are_two(order.get("scores")) else None,
            "verdict": order["verdict"],
            "reply": order.get("reply") or "",
        }
        for order in row["orders"]
    ]
    return Case(
        pictures=pictures,
        question=str(row.get("question", "")),
        answers=[str(answer) for answer in row["answers"]],
        scores=row["scores"] if _are_two(row.get("scores")) else [None, None],
        chosen=row["verdict"] if kept else None,
        dropped=row["dropped"],
        replies=replies,
    )


def _are_two(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _candidates(run: Run, judge: StageRun) -> list[Path]:
    """Where the pairs' pictures lie: what the judge read, or what stands beside it after a move."""
    beside = [stage.folder / "candidates" for stage in run.of("generate", judge.round)]
    return [*beside, *_local(judge.settings.get("candidates"))]


def _benchmarks(run: Run, evaluation: Evaluation) -> list[Path]:
    beside = [stage.folder / "benchmark" for stage in run.of("prepare")]
    return [*beside, *_local(evaluation.content.get("benchmark"))]


def _local(setting: Any) -> list[Path]:
    names = setting if isinstance(setting, list) else [setting]
    return [Path(name) for name in names if isinstance(name, str) and name]


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly from first to last."""
    if len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)] if most > 0 else []

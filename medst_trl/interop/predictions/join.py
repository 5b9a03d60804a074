# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which question of a benchmark a prediction answers.

Neither ids nor order are safe alone: MEVF's VQA-RAD numbers its questions one higher than the official release, so
that LLaVA-Med's id 13 is another question there; order says nothing once a file is sorted or cut; and one text stands
under many images ("Is this an axial plane?"). So a way of joining counts only if the text of every question agrees.
"""

import os
import re
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.evaluation.metrics import RecordError

from .rows import NOT_ENGLISH, Item


_GOLD = ("id", "image_id", "question", "answer", "answer_type", "question_type")


def join_questions(items: list[Item], questions: list[dict[str, Any]], path: str | os.PathLike) -> list[Item]:
    """
    Give every prediction the id, the right answer, the types and the image of its question.

    By id where most ids of the file are the benchmark's (its own, or what stands behind the source's name, `13` of
    `vqa_rad-13`), else by order where the numbers agree: the benchmark's, which goes by images, or that of its ids,
    which is the order of most authors' files. In any way a prompt has to open with its question (blanks,
    case and `<image>` apart; LLaVA-Med appends options to closed ones), and a right answer in the file has to be the
    benchmark's.

    Args:
        items (`list`):
            Names and records of a file's rows, see `rows.py`.
        questions (`list[dict]`):
            The benchmark's, see [`read_questions`].
        path (`str` or `os.PathLike`):
            The file, to name it.

    Returns:
        `list`: the rows; errors stay, rows about no question of the benchmark become errors, and so do, at the end,
        questions without a prediction.

    Raises:
        UserError: if neither way joins them.
    """
    rows = {place: record for place, (_, record) in enumerate(items) if isinstance(record, dict)}
    known = _ids(questions)
    by_id = {place: known.get(str(record["id"])) for place, record in rows.items()}
    failures = [f"{len(items)} rows, {len(questions)} questions"]
    ways = [("id", by_id)] if 2 * sum(question is not None for question in by_id.values()) > len(rows) else []
    places = [place for place, (_, record) in enumerate(items) if not _foreign(record)]
    if len(places) == len(questions):
        for way, order in (("order", questions), ("order of ids", sorted(questions, key=_number))):
            ways.append((way, {place: question for place, question in zip(places, order) if place in rows}))
    for way, found in ways:
        differing = [place for place, question in found.items() if question and not _agree(rows[place], question)]
        if not differing:
            return _joined(items, found, questions)
        asked, there = rows[differing[0]]["question"], found[differing[0]]["question"]
        failures.append(f"by {way} {len(differing)} differ, for example {str(asked)[:80]!r} and {there[:80]!r}")
    raise UserError(
        f"{path} does not answer the questions of this benchmark ({'; '.join(failures)}). Give the benchmark and the "
        "split that were asked: its ids, or its number and order of questions."
    )


def _joined(items: list[Item], found: dict[int, dict | None], questions: list[dict[str, Any]]) -> list[Item]:
    joined: list[Item] = []
    for place, (name, record) in enumerate(items):
        if isinstance(record, RecordError):
            joined.append((name, record))
        elif found[place] is None:
            joined.append((name, RecordError("not in the benchmark", record["id"], name)))
        else:
            rest = {key: value for key, value in record.items() if key not in (*_GOLD, "answer_type_guessed")}
            joined.append((name, {key: found[place].get(key) for key in _GOLD} | rest))
    answered = {question["id"] for question in found.values() if question}
    missing = [question["id"] for question in questions if question["id"] not in answered]
    return joined + [(str(key), RecordError("no prediction for a question", key, str(key))) for key in missing]


def _foreign(record: dict[str, Any] | RecordError) -> bool:
    """Whether a row is no question of a benchmark in one language (MedEvalKit asks SLAKE's in both)."""
    return isinstance(record, RecordError) and record.reason == NOT_ENGLISH


def _number(question: dict[str, Any]) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", str(question["id"]))]


def _ids(questions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Questions by id, and by the end of the id where all begin alike: `vqa_rad-13` is `13` to LLaVA-Med."""
    parted = [str(question["id"]).rpartition("-") for question in questions]
    ends = {}
    if len({start for start, _, _ in parted}) == 1:
        ends = {end: question for (_, _, end), question in zip(parted, questions)}
    return ends | {str(question["id"]): question for question in questions}


def _agree(record: dict[str, Any], question: dict[str, Any]) -> bool:
    asked, answer = _plain(record["question"]), record.get("answer")
    same_answer = answer is None or _plain(answer) == _plain(question["answer"])
    return asked.startswith(_plain(question["question"])) and same_answer


def _plain(text: Any) -> str:
    return " ".join(str(text).replace("<image>", " ").casefold().split())

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The questions of a benchmark, and which of them each row of a predictions file answers.

Neither ids nor order are safe alone. MEVF's VQA-RAD numbers its questions one higher than the official release, so
LLaVA-Med's id 13 is another question there. Order means nothing once a file is sorted or cut. Many images share one
text ("Is this an axial plane?"). Rows are therefore joined only if the text of every question agrees.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.data.cells import BadRecord, guess_answer_type
from medst_trl.data.reading import read_json_records


Benchmark = str | os.PathLike | Iterable[Mapping[str, Any]]
"""A benchmark's directory or Hub id, a file of questions, or the questions themselves."""
Rows = dict[str, dict[str, Any] | BadRecord]
"""The rows of a file by their names, each as a record or the reason why there is none."""

NOT_ENGLISH = "not in English"
# What a benchmark says about an id.
GOLD = ("image_id", "group_id", "question", "answer", "answer_type", "question_type")


def answer_type(answer: Any, given: Any) -> dict[str, Any]:
    """Return the answer type that a file gives, or a guess that is marked as one."""
    kind = str(given).strip().lower()
    if kind in ("open", "closed"):
        return {"answer_type": kind}
    return {"answer_type": guess_answer_type(str(answer).strip()), "answer_type_guessed": True}


def read_questions(benchmark: Benchmark, split: str = "test") -> list[dict[str, Any]]:
    """
    Read all questions of a benchmark, in its order.

    Returns:
        `list[dict]`: id, image_id, group_id, question, answer, answer_type, question_type.

    Raises:
        UserError: if the benchmark does not exist, or the file holds something else.
    """
    if not isinstance(benchmark, str | os.PathLike):
        return [dict(question) for question in benchmark]
    if str(benchmark).endswith(".json"):  # what LLaVA-Med's `run_eval.py` takes as `--gt`
        records = read_json_records(Path(benchmark), "id")
        return [_question(record, f"{benchmark}, record {number + 1}") for number, record in records]
    from medst_trl.data.loading import load_records

    from .vqa import questions_of

    return questions_of(load_records(benchmark, split, "benchmark"))


def _question(record: Any, name: str) -> dict[str, Any]:
    try:
        # Some of LLaVA-Med's files spell the key this way.
        turns = record["conversations"] if "conversations" in record else record["conversatons"]
        return {
            "id": str(record["id"]),
            "image_id": str(record["image"]) if record.get("image") else None,
            "group_id": None,
            "question": turns[0]["value"].replace("<image>", "").strip(),
            "answer": turns[1]["value"],
            "answer_type": record["answer_type"].strip().lower(),
            "question_type": None,
        }
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{name} is not one of LLaVA-Med's questions, with id, answer_type, conversations.") from None


def join_questions(rows: Rows, questions: list[dict[str, Any]], path: Path) -> Rows:
    """
    Give every prediction the id, the right answer, the types and the image of its question.

    Rows are joined by id if most ids of the file are the benchmark's (its own, or the part behind the source's name,
    `13` of `vqa_rad-13`). Otherwise they are joined by order if the numbers agree: the benchmark's order, which is by
    image, or the order of its ids, which is that of most authors' files. In both cases every prompt must start with
    its question (blanks, case and `<image>` apart; LLaVA-Med appends options to closed ones), and a right answer in
    the file must be the benchmark's.

    Args:
        rows (`dict`):
            Rows of a file by their names.
        questions (`list[dict]`):
            The benchmark's, see [`read_questions`].
        path (`Path`):
            The file, to name it.

    Returns:
        `dict`: the rows. Rows about no question of the benchmark are rejected, too, and questions without a prediction
        follow as rejected rows.

    Raises:
        UserError: if they can be joined neither by id nor by order.
    """
    records = {name: row for name, row in rows.items() if isinstance(row, dict)}
    failures = [f"{len(rows)} rows, {len(questions)} questions"]
    for by, found in _matchings(rows, records, questions):
        differing = [name for name, question in found.items() if question and not _agree(records[name], question)]
        if not differing:
            return _joined(rows, found, questions)
        asked, there = records[differing[0]].get("question"), found[differing[0]]["question"]
        failures.append(f"by {by} {len(differing)} differ, for example {str(asked)[:80]!r} and {there[:80]!r}")
    raise UserError(
        f"{path} does not answer the questions of this benchmark ({'; '.join(failures)}). Give the benchmark and the "
        "split that were asked: with the same ids, or the same number and order of questions."
    )


def _matchings(
    rows: Rows, records: dict[str, dict], questions: list[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, dict | None]]]:
    """Yield the possible matchings: what they go by, and the question of each record."""
    known = _by_id(questions)
    by_id = {name: known.get(str(record.get("id"))) for name, record in records.items()}
    if 2 * sum(question is not None for question in by_id.values()) > len(records):
        yield "id", by_id
    # MedEvalKit asks SLAKE's questions in both languages; a benchmark has one.
    asked = [name for name, row in rows.items() if isinstance(row, dict) or row.reason != NOT_ENGLISH]
    if len(asked) == len(questions):
        by_number = sorted(questions, key=lambda question: list(map(int, re.findall(r"\d+", str(question["id"])))))
        for by, order in (("order", questions), ("order of ids", by_number)):
            yield by, {name: question for name, question in zip(asked, order) if name in records}


def _joined(rows: Rows, found: dict[str, dict | None], questions: list[dict[str, Any]]) -> Rows:
    joined = dict(rows)
    for name, question in found.items():
        if question is None:
            joined[name] = BadRecord("not in the benchmark", rows[name].get("id"))
        else:
            rest = {key: value for key, value in rows[name].items() if key not in ("id", *GOLD, "answer_type_guessed")}
            joined[name] = {key: question.get(key) for key in ("id", *GOLD)} | rest
    answered = {question["id"] for question in found.values() if question}
    missing = [str(question["id"]) for question in questions if question["id"] not in answered]
    return joined | {key: BadRecord("no prediction for a question", key) for key in missing}


def _by_id(questions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Questions by id, and by the end of the id if all start alike: `vqa_rad-13` is `13` in LLaVA-Med's files."""
    parted = [str(question["id"]).rpartition("-") for question in questions]
    start_alike = len({start for start, _, _ in parted}) == 1
    ends = {end: question for (_, _, end), question in zip(parted, questions)} if start_alike else {}
    return ends | {str(question["id"]): question for question in questions}


def _agree(record: dict[str, Any], question: dict[str, Any]) -> bool:
    asked, answer = _plain(record.get("question")), record.get("answer")
    same_answer = answer is None or _plain(answer) == _plain(question["answer"])
    return asked.startswith(_plain(question["question"])) and same_answer


def _plain(text: Any) -> str:
    return " ".join(str(text).replace("<image>", " ").casefold().split())

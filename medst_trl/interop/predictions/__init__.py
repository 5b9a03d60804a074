# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Prediction files of other evaluation projects, read and written.

- `medst`: ours, JSON lines (see [`medst_trl.data.schema`]).
- `llava_med`: answer files of LLaVA-Med, v1 and v1.5. They hold no right answers.
- `medevalkit`: `results.json` of MedEvalKit.
- `vlmevalkit`: prediction files of VLMEvalKit, `.tsv`, `.csv`, `.json`; `.xlsx` is read with the extra `xlsx`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_jsonl
from medst_trl.data.json_records import read_json_records
from medst_trl.evaluation import predictions
from medst_trl.evaluation.metrics import RecordError, read_record

from . import llava_med, medevalkit, vlmevalkit
from .join import join_questions
from .questions import read_questions
from .rows import Item, printable_record


OTHERS = {"llava_med": llava_med, "medevalkit": medevalkit, "vlmevalkit": vlmevalkit}
FORMATS = ("medst", *OTHERS)


def read_predictions(
    path: str | os.PathLike,
    format: str | None = None,
    *,
    benchmark: str | os.PathLike | Iterable[Mapping[str, Any]] | None = None,
    split: str = "test",
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """
    Read a predictions file of any of `FORMATS`; rows that cannot be scored are set aside.

    Without a benchmark, right answers are the file's own, and where it does not say which questions are closed, those
    whose answer is yes or no count as closed (`answer_type_guessed` marks them): other figures than with the
    benchmark's own types.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        format (`str`, *optional*):
            One of `FORMATS`; by default what its name and its first record say.
        benchmark (`str`, `os.PathLike` or iterable of `dict`, *optional*):
            Where right answers, their types and the images' ids come from: a benchmark's folder or Hub id, LLaVA-Med's
            file of questions (`.json`), or the questions themselves. Rows are joined by id or by order, and only where
            every question's text agrees, see [`join_questions`].
        split (`str`, *optional*, defaults to `"test"`):
            Split of the benchmark.

    Returns:
        `tuple`: the records (id, image_id, question, answer, answer_type, question_type, prediction), and for each row
        set aside its `id` (or its number), `reason` and offending `value`. Questions of the benchmark without a
        prediction are among the latter.

    Raises:
        UserError: if the file is missing or of another format, holds no right answers and no benchmark is given, or
            does not answer the questions of the benchmark.

    Example:

    ```python
    >>> records, rejected = read_predictions("answer-file.jsonl", benchmark="runs/vqa_rad/prepare/benchmark")
    >>> score_vqa(records, "llava_med")["closed"]["accuracy"]
    ```
    """
    format = format or guess_format(path)
    _check_format(format)
    if format == "medst":
        if benchmark is not None:
            raise UserError(f"{path} holds its right answers; leave the benchmark out (or name another format).")
        return predictions.read_predictions(path)
    items = [_printable(name, record) for name, record in OTHERS[format].read(Path(path))]
    if benchmark is not None:
        items = join_questions(items, read_questions(benchmark, split), path)
    elif _without_answers(items):
        raise UserError(
            f"{path} holds no right answers: give the benchmark it answers, a folder or Hub id, or LLaVA-Med's file "
            "of questions (.json)."
        )
    return predictions.sort_out(items, path, OTHERS[format].EXPECTED)


def write_predictions(records: Iterable[Mapping[str, Any]], path: str | os.PathLike, format: str) -> None:
    """
    Write predictions in one of `FORMATS`. The file appears under its name when it is complete.

    What a format has no place for goes into fields that its own tools ignore, so that [`read_predictions`] gives the
    same records back: id, image_id, question, answer, answer_type, question_type and prediction.

    Args:
        records (iterable of `dict`):
            Predictions, see [`medst_trl.data.schema`]. Those without an `id` are numbered.
        path (`str` or `os.PathLike`):
            The file. For `vlmevalkit` its suffix decides between `.tsv`, `.csv` and `.json`.
        format (`str`):
            One of `FORMATS`.

    Raises:
        UserError: if a record cannot be scored, two have one id, or the format is unknown or cannot be written.
    """
    _check_format(format)
    rows = _checked(records)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows) if format == "medst" else OTHERS[format].write(rows, path)


def guess_format(path: str | os.PathLike) -> str:
    """The format of a file by its suffix and the keys of its first record; `"medst"` where they say nothing."""
    path = Path(path)
    if path.suffix.lower() in vlmevalkit.TABLES:
        return "vlmevalkit"
    try:
        records = (record for _, record in read_json_records(path, known_by="question") if isinstance(record, dict))
        first = next(records, {})
    except UserError:
        return "medst"
    return next((name for name, format in OTHERS.items() if first.keys() >= format.KEYS), "medst")


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise UserError(f"There is no predictions format {format!r}; choose from {', '.join(FORMATS)}.")


def _printable(name: str, record: dict[str, Any] | RecordError) -> Item:
    try:
        return name, record if isinstance(record, RecordError) else printable_record(record, name)
    except RecordError as error:
        return name, error


def _without_answers(items: list[Item]) -> bool:
    records = [record for _, record in items if isinstance(record, dict)]
    return bool(records) and all(record.get("answer") is None for record in records)


def _checked(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    checked, seen = [], set()
    for place, record in enumerate(records):
        record = {**record, "id": str(place if record.get("id") is None else record["id"])}
        read_record(record, place)
        record = printable_record(record, f"Record {record['id']!r}")
        if record["id"] in seen:
            raise UserError(f"Two predictions have the id {record['id']!r}; give each question its own.")
        seen.add(record["id"])
        checked.append(record)
    return checked

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Prediction files: formats, reading, the questions that they answer, and scores with every metric and control.

Our own format is JSON lines, one question per line (see [`medst_trl.data.schema`]). Other projects' formats register
themselves in `PREDICTION_FORMATS`.

Neither ids nor order alone show which question of a benchmark a row answers. MEVF's VQA-RAD numbers its questions one
higher than the official release, so LLaVA-Med's id 13 is another question there. Order means nothing once a file is
sorted or cut. Many images share one text ("Is this an axial plane?"). Rows are therefore joined only if the text of
every question agrees.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.registry import Registry
from medst_trl.base.settings import settings_among
from medst_trl.data.cells import BadRecord, guess_answer_type, printable
from medst_trl.data.reading import read_json_records
from medst_trl.data.source import Rejected

from .metric import METRICS, describe_figures
from .scoring import compare_vqa, read_answer, score_vqa


OWN_FORMAT = "medst"
PREDICTIONS_FILE = "predictions.jsonl"
NOT_ENGLISH = "not in English"
# What a benchmark says about an id.
GOLD = ("image_id", "group_id", "question", "answer", "answer_type", "question_type")

Benchmark = str | os.PathLike | Iterable[Mapping[str, Any]]
"""A benchmark's directory or Hub id, a file of questions, or the questions themselves."""
_Rows = dict[str, dict[str, Any] | BadRecord]
"""The rows of a file by their names, each as a record or the reason why there is none."""

_REASONS = {"malformed_json": "not JSON", "not_an_object": "not a JSON object", "bad_quotes": "unclosed quotes"}
_NO_ANSWERS = "It holds no right answers. Give the benchmark that it answers, see `medst evaluate --help`."


def _read_json(path: Path, needs: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | Rejected]]:
    return read_json_records(path, needs[0])


@dataclass(frozen=True)
class PredictionFormat:
    """
    A format of prediction files.

    Args:
        name (`str`):
            Its name in `--predictions_format`.
        summary (`str`):
            One line on whose files these are.
        expected (`str`):
            What such a file holds. Ends the message about a file that holds something else.
        needs (`tuple[str]`):
            Keys that each row must have a value for.
        guess (`Callable`):
            Takes the path and the first JSON record (empty if there is none). Returns whether this is the file's
            format.
        record (`Callable`, *optional*):
            Takes a row and its number from 0, and returns a prediction as in our own format. Raises a [`BadRecord`]
            for a row that cannot be used. Returns the row by default.
        rows (`Callable`, *optional*):
            Takes the path and `needs`, and returns numbers and rows of the file. Reads JSON by default.
    """

    name: str
    summary: str
    expected: str
    needs: tuple[str, ...]
    guess: Callable[[Path, Mapping[str, Any]], bool]
    record: Callable[[dict[str, Any], int], dict[str, Any]] = lambda row, number: row
    rows: Callable[[Path, Sequence[str]], Iterable[tuple[int, dict[str, Any] | Rejected]]] = _read_json


PREDICTION_FORMATS: Registry[PredictionFormat] = Registry(
    "predictions format",
    modules=("medst_trl.interop.predictions",),
    parts=("summary", "expected", "needs", "guess"),
    order=lambda formats: sorted(formats, key=lambda format: (format.name != OWN_FORMAT, format.name)),
)


def answer_type(answer: Any, given: Any) -> dict[str, Any]:
    """Return the answer type that a file gives, or a guess that is marked as one."""
    kind = str(given).strip().lower()
    if kind in ("open", "closed"):
        return {"answer_type": kind}
    return {"answer_type": guess_answer_type(str(answer).strip()), "answer_type_guessed": True}


def read_predictions(
    path: str | os.PathLike, format: str | None = None, *, benchmark: Benchmark | None = None, split: str = "test"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Read a predictions file; rows that cannot be scored are rejected.

    Without a benchmark, the right answers are the file's own. If the file does not say which questions are closed,
    those whose answer is yes or no count as closed (marked by `answer_type_guessed`), so figures may differ from those
    with the benchmark's own types.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        format (`str`, *optional*):
            A name in `PREDICTION_FORMATS`. Defaults to the format that matches the file's name and first record.
        benchmark (`str`, `os.PathLike` or iterable of `dict`, *optional*):
            Source of right answers, their types and image ids: a benchmark's directory or Hub id, LLaVA-Med's file of
            questions (`.json`), or the questions themselves. Rows are joined by id or by order, and only if every
            question's text agrees.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the benchmark.

    Returns:
        `tuple`: the records (id, image_id, group_id, question, answer, answer_type, question_type, prediction), and
        for each rejected row its `id` (or its number), `reason` and offending `value`. Questions of the benchmark
        without a prediction are among the latter.

    Raises:
        UserError: if the file is missing or has another format, holds no record that can be scored, holds no right
            answers and no benchmark is given, or does not answer the questions of the benchmark.

    Example:

    ```python
    >>> records, rejected = read_predictions("answer-file.jsonl", benchmark="runs/vqa_rad/prepare/benchmark")
    >>> score_vqa(records, "llava_med")["closed"]["accuracy"]
    ```
    """
    found, path = PREDICTION_FORMATS.get(format or guess_format(path)), Path(path)
    rows = {f"row {number + 1}": _record(found, row, number) for number, row in found.rows(path, found.needs)}
    if benchmark is not None:
        rows = _join_questions(rows, read_questions(benchmark, split), path)
    records, rejected = {}, []
    for name, row in rows.items():
        try:
            if isinstance(row, BadRecord):
                raise row
            name = row.get("id", name)
            read_answer(row)
            if name in records:
                raise BadRecord("repeated id", name)
            records[name] = row
        except BadRecord as error:
            rejected.append(Rejected(str(name), error.reason, error.value).as_row())
    if not records:
        first = rejected[0] if rejected else {"id": "the file", "reason": "empty"}
        advice = _NO_ANSWERS if any(row["reason"] == "no answer" for row in rejected) else found.expected
        raise UserError(f"{path} holds no prediction that can be scored ({first['id']}: {first['reason']}). {advice}")
    return list(records.values()), rejected


def _record(format: PredictionFormat, row: dict[str, Any] | Rejected, number: int) -> dict[str, Any] | BadRecord:
    """Return the record of a row, or the reason why there is none."""
    if isinstance(row, Rejected):
        return BadRecord(_REASONS.get(row.reason, row.value), row.value)
    row = {key: None if value != value else value for key, value in row.items()}  # NaN from pandas
    try:
        if missing := [key for key in format.needs if row.get(key) is None]:
            raise BadRecord(f"no {missing[0]}", row)
        record = format.record(row, number)
        if not isinstance(record.get("id", ""), str | int):
            raise BadRecord("id is not a text", record["id"])
        text = json.dumps(record, ensure_ascii=False, default=str)
        if printable(text) != text:  # lone surrogates, from bytes in another encoding
            raise BadRecord("invalid Unicode", text)
    except BadRecord as error:
        return error
    return record


def guess_format(path: str | os.PathLike) -> str:
    """Return the format that matches a file's name and the keys of its first record; our own if none does."""
    path, first = Path(path), {}
    with suppress(UserError):
        first = next((row for _, row in read_json_records(path, key="question") if isinstance(row, dict)), {})
    return next((format.name for format in PREDICTION_FORMATS.values() if format.guess(path, first)), OWN_FORMAT)


PREDICTION_FORMATS.register(
    PredictionFormat(
        name=OWN_FORMAT,
        summary="ours, JSON lines",
        expected="A predictions file is JSON lines: one object per line with answer, answer_type and prediction.",
        needs=(),  # `read_answer` names a record by its id
        guess=lambda path, first: False,  # the default
        rows=lambda path, needs: read_json_records(path, "prediction"),
    )
)


# The questions of a benchmark, and which of them each row answers


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


def _join_questions(rows: _Rows, questions: list[dict[str, Any]], path: Path) -> _Rows:
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
    rows: _Rows, records: dict[str, dict], questions: list[dict[str, Any]]
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


def _joined(rows: _Rows, found: dict[str, dict | None], questions: list[dict[str, Any]]) -> _Rows:
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


# Scores


def control_path(path: str | os.PathLike, control: str | None) -> Path:
    """Return the path of a control's predictions: `predictions_blank.jsonl` beside `predictions.jsonl`."""
    path = Path(path)
    return path.with_name(f"{path.stem}_{control}{path.suffix}") if control else path


def score_predictions(
    records: Collection[Mapping[str, Any]],
    controls: Mapping[str, Collection[Mapping[str, Any]]],
    *,
    variants: Collection[str] | None = None,
    settings: Iterable[Any] = (),
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Score predictions and their controls with several metrics.

    Args:
        records (collection of `dict`):
            Predictions.
        controls (`dict`):
            Name of each control to its predictions. Those of other questions than `records` are left out.
        variants (collection of `str`, *optional*):
            Names of metrics. Defaults to those that come with the package.
        settings (iterable of dataclasses, *optional*):
            Settings of metrics. A metric whose settings are missing uses its defaults.
        bootstrap_samples, seed:
            As in [`~medst_trl.evaluation.scoring.score_vqa`].

    Returns:
        `dict`: the content of `scores.json`: `counts`, `scores` (by metric), `controls` (by control and metric) and
        `figures` (see [`~medst_trl.evaluation.metric.describe_figures`]).

    Raises:
        UserError: if a control does not answer the same questions.
    """
    variants, given = variants or METRICS.built_in(), list(settings)
    arguments = {}
    for variant in variants:
        own = settings_among(given, METRICS.get(variant).settings)
        arguments[variant] = {"bootstrap_samples": bootstrap_samples, "seed": seed, **(asdict(own) if own else {})}
    ids = {record.get("id") for record in records}
    compared = {}
    for control, others in controls.items():
        others = [row for row in others if row.get("id") in ids]
        compared[control] = {name: compare_vqa(records, others, name, **kwargs) for name, kwargs in arguments.items()}
    generations = [record["generation"] for record in records if isinstance(record.get("generation"), Mapping)]
    optional = {
        "refused": sum("problem" in generation for generation in generations),
        "answer_types_guessed": sum(record.get("answer_type_guessed") is True for record in records),
    }
    counts = {"records": len(records), "cut_off": sum(generation.get("ended") is False for generation in generations)}
    return {
        "counts": counts | {name: number for name, number in optional.items() if number},
        "scores": {name: score_vqa(records, name, **kwargs) for name, kwargs in arguments.items()},
        "controls": compared,
        "figures": describe_figures(variants),
    }

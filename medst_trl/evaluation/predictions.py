# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Prediction files: formats, reading, writing, and scores with every metric and control.

Our own format is JSON lines, one question per line (see [`medst_trl.data.schema`]). Other projects' formats register
themselves in `PREDICTION_FORMATS`.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_jsonl
from medst_trl.base.registry import Registry
from medst_trl.base.settings import settings_among
from medst_trl.data.cells import BadRecord, printable
from medst_trl.data.reading import read_json_records, read_text_file
from medst_trl.data.source import Rejected

from .metric import METRICS, describe_figures
from .scoring import compare_vqa, naming, read_answer, score_vqa


OWN_FORMAT = "medst"
PREDICTIONS_FILE = "predictions.jsonl"

ReadRow = tuple[str, dict[str, Any] | Rejected]
"""The name of a row in a file, for messages, and its record or the reason why there is none."""
Benchmark = str | os.PathLike | Iterable[Mapping[str, Any]]
"""A benchmark's directory or Hub id, a file of questions, or the questions themselves."""


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
        guess (`Callable`):
            Takes the path and the first JSON record (empty if there is none). Returns whether this is the file's
            format.
        read (`Callable`):
            Takes the path, a [`Benchmark`] that has the right answers (or None) and its split. Returns [`ReadRow`]s.
        write (`Callable`):
            Takes checked records and the path. Writes the file, atomically.
    """

    name: str
    summary: str
    expected: str
    guess: Callable[[Path, Mapping[str, Any]], bool]
    read: Callable[[Path, Benchmark | None, str], Iterable[ReadRow]]
    write: Callable[[list[dict[str, Any]], Path], None]


PREDICTION_FORMATS: Registry[PredictionFormat] = Registry(
    "predictions format",
    modules=("medst_trl.interop.predictions",),
    parts=("summary", "expected", "guess", "read", "write"),
    order=lambda formats: sorted(formats, key=lambda format: (format.name != OWN_FORMAT, format.name)),
)


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
    found = PREDICTION_FORMATS.get(format or guess_format(path))
    records, rejected, seen = [], [], set()
    for name, record in found.read(Path(path), benchmark, split):
        key = name
        try:
            if isinstance(record, Rejected):
                raise BadRecord(record.reason, record.value)
            if not isinstance(record, dict):
                raise BadRecord("not a JSON object", record)
            key = record.get("id", name)
            if not isinstance(key, str | int):
                raise BadRecord("id is not a text", key)
            read_answer(record)
            if record.get("id") in seen:
                raise BadRecord("repeated id", record["id"])
        except BadRecord as error:
            rejected.append(Rejected(str(key), error.reason, error.value).as_row())
        else:
            records.append(record)
            seen.add(key)
    if not records:
        first = rejected[0] if rejected else {"id": "the file", "reason": "empty"}
        problem = f"{path} holds no prediction that can be scored ({first['id']}: {first['reason']})."
        raise UserError(f"{problem} {found.expected}")
    return records, rejected


def export_predictions(records: Iterable[Mapping[str, Any]], path: str | os.PathLike, format: str) -> None:
    """
    Write predictions in one of `PREDICTION_FORMATS`, atomically.

    Keys that a format does not have go into fields that its own tools ignore, so that [`read_predictions`] returns the
    same records: id, image_id, question, answer, answer_type, question_type, prediction and group_id.

    Args:
        records (iterable of `dict`):
            Predictions, see [`medst_trl.data.schema`]. Those without an `id` are numbered.
        path (`str` or `os.PathLike`):
            The file. For `vlmevalkit` its suffix decides between `.tsv`, `.csv` and `.json`.
        format (`str`):
            A name in `PREDICTION_FORMATS`.

    Raises:
        UserError: if a record cannot be scored, two have one id, or the format is unknown or cannot be written.
    """
    found = PREDICTION_FORMATS.get(format)
    rows: dict[str, dict[str, Any]] = {}
    for position, record in enumerate(records):
        record = {**record, "id": str(position if record.get("id") is None else record["id"])}
        with naming(record, position):
            read_answer(record)
            check_unicode(record)
        if record["id"] in rows:
            raise UserError(f"Two predictions have the id {record['id']!r}. Give each question its own.")
        rows[record["id"]] = record
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.write(list(rows.values()), path)


def check_unicode(record: dict[str, Any]) -> None:
    """Raise a [`BadRecord`] if UTF-8 cannot hold its texts (lone surrogates, from bytes in another encoding)."""
    text = json.dumps(record, ensure_ascii=False, default=str)
    if printable(text) != text:
        raise BadRecord("characters that are no Unicode", text)


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
        raise UserError(
            f"{name} is not one of LLaVA-Med's questions: expected id, answer_type and conversations with a question "
            "and its answer. Give a benchmark that `medst prepare` wrote, or LLaVA-Med's test file."
        ) from None


def guess_format(path: str | os.PathLike) -> str:
    """Return the format that matches a file's name and the keys of its first record; our own if none does."""
    path = Path(path)
    first = {}
    with suppress(UserError):
        first = next((row for _, row in read_json_records(path, key="question") if isinstance(row, dict)), {})
    return next((format.name for format in PREDICTION_FORMATS.values() if format.guess(path, first)), OWN_FORMAT)


def _read_own(path: Path, benchmark: Benchmark | None = None, split: str = "test") -> Iterator[ReadRow]:
    if benchmark is not None:
        raise UserError(f"{path} holds its right answers. Leave the benchmark out, or name another format.")
    for number, line in enumerate(read_text_file(path, "predictions").split("\n"), start=1):
        if not line.strip():
            continue
        name = f"line {number}"
        try:
            line.encode()  # fails for lone surrogates, from bytes in another encoding
            yield name, json.loads(line)
        except (ValueError, RecursionError):  # UnicodeEncodeError and JSONDecodeError are ValueErrors
            yield name, Rejected(name, "not JSON", line)


PREDICTION_FORMATS.register(
    PredictionFormat(
        name=OWN_FORMAT,
        summary="ours, JSON lines",
        expected="A predictions file is JSON lines: one object per line with answer, answer_type and prediction.",
        guess=lambda path, first: False,  # the default
        read=_read_own,
        write=lambda records, path: write_jsonl(path, records),
    )
)


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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of predictions on a benchmark. Pure Python: scoring needs neither a model nor torch."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from medst_trl.base.errors import UserError

from . import llava_med, strict
from .bootstrap import LEVEL, Figure, interval, resample


VARIANTS = ("strict", "llava_med")
NO_TYPE = "(none)"  # question type of records without one, in a benchmark where others have one


class RecordError(UserError):
    """A record that cannot be scored: why (one of a few reasons, to be counted) and the value that is wrong."""

    def __init__(self, reason: str, value: Any, name: str, advice: str = ""):
        super().__init__(f"{name}: {reason} ({value!r}). {advice}".strip())
        self.reason = reason
        self.value = value


class Answered(NamedTuple):
    """A record as the scorers take it: texts are texts, the answer type is one of two."""

    image_id: str | None
    question_type: str | None
    closed: bool
    answer: str
    prediction: str


Scored = tuple[Answered, dict[Figure, float]]


def score_vqa(
    records: Iterable[Mapping[str, Any]],
    variant: str = "strict",
    *,
    closed_rule: str | None = None,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Score predictions, open and closed questions apart.

    Every figure is a mean over records in percent, `{"value", "n", "interval"}`: `n` is the number of records it is
    the mean of (0 gives the value None), `interval` its 95% bootstrap interval, or None where the figure rests on a
    single image or record. Whole images are drawn where every record has an `image_id`, since questions about one
    image are not independent; records otherwise. A bootstrap sees only the variation that is there: all right or all
    wrong gives an interval of no width, however small n is.

    Args:
        records (iterable of `dict`):
            `answer`, `answer_type` (open or closed, in any case), `prediction`; optionally `question_type`,
            `image_id`, `id`. Texts may be numbers. Other keys are not looked at, nor does the order matter.
        variant (`str`, *optional*, defaults to `"strict"`):
            `"strict"` or `"llava_med"`, see [`medst_trl.evaluation.strict`] and [`medst_trl.evaluation.llava_med`].
        closed_rule (`str`, *optional*):
            For `llava_med`: `"gated"` (default), `"substring"` or `"drop_misses"`.
        bootstrap_samples (`int`, *optional*, defaults to `1000`):
            Number of resamples; 0 leaves every interval None.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `dict`: `variant`, `closed_rule`, `n`, `n_images`, `bootstrap`, then the figures.
        - `strict`: `exact_match` (all records), `open` (`exact_match`, `precision`, `recall`, `f1`) and `closed`
          (`accuracy`, of which `yes_no` and `other` questions; `no_verdict`, the share of yes/no questions whose
          prediction says neither, wrong each). `exact_match` and `accuracy` carry `majority`: what the most frequent
          answer of each question type would score, chosen with the right answers in view and without looking at an
          image.
        - `llava_med`: `open` (`exact`, `precision`, `recall`, `f1`, `bleu_1` to `bleu_3`) and `closed` (`accuracy`).
        - `question_types`: the same figures for each question type.

    Raises:
        UserError: if a record lacks a key or has an unknown answer type, or for an unknown variant or closed rule.

    Example:

    ```python
    >>> from medst_trl import score_vqa
    >>> records = [{"answer": "Yes", "answer_type": "closed", "prediction": "yes, a small one"}]
    >>> score_vqa(records)["closed"]["accuracy"]
    {'value': 100.0, 'n': 1, 'interval': None, 'majority': 100.0}
    ```
    """
    scored = score_records(records, variant, closed_rule)
    cluster = clusters_of([answered for answered, _ in scored])
    means = resample(zip(cluster, with_types(scored)), bootstrap_samples, seed)
    by_image = all(answered.image_id is not None for answered, _ in scored)
    unit = "image" if by_image else "record"
    types = sorted({answered.question_type for answered, _ in scored} - {None})
    result = {
        "variant": variant,
        **({"closed_rule": closed_rule or "gated"} if variant == "llava_med" else {}),
        "n": len(scored),
        "n_images": len(set(cluster)) if by_image else None,
        "bootstrap": {"samples": bootstrap_samples, "seed": seed, "unit": unit, "level": LEVEL},
    }
    values = defaultdict(list)
    for scores in with_types(scored):
        for figure, value in scores.items():
            values[figure].append(value)
    for figure in _names(variant, types):
        found = values.get(figure, [])
        leaf = {
            "value": 100 * math.fsum(found) / len(found) if found else None,
            "n": len(found),
            "interval": interval(means.get(figure, [])),
        }
        _set(result, figure, leaf)
    if not types:
        result["question_types"] = {}
    if variant == "strict":
        _add_majority(result, [answered for answered, _ in scored])
    return result


def score_records(records: Iterable[Mapping[str, Any]], variant: str, closed_rule: str | None = None) -> list[Scored]:
    """Each record with its figures, see [`score_vqa`]."""
    score = _scorer(variant, closed_rule)
    return [
        (answered, score(answered.closed, answered.answer, answered.prediction))
        for answered in _with_types_all_or_none([read_record(record, place) for place, record in enumerate(records)])
    ]


def read_record(record: Mapping[str, Any], place: int = 0) -> Answered:
    """
    Check a record and bring its values into form.

    Args:
        record (`dict`): See [`score_vqa`].
        place (`int`, *optional*, defaults to `0`): Its place among the records, to name one that has no id.

    Raises:
        UserError: naming the record and the key that is missing or cannot be used.
    """
    name = f"Record {record['id']!r}" if record.get("id") is not None else f"Record number {place + 1} (without an id)"
    for key in ("answer", "answer_type", "prediction"):
        value = record.get(key)
        if value is None or value != value:  # a gap in a table reads as NaN
            raise RecordError(f"no {key}", value, name, "Each record needs answer, answer_type and prediction.")
        if not isinstance(value, str | int | float):
            raise RecordError(f"{key} is not a text", value, name)
    answer, kind = str(record["answer"]).strip(), str(record["answer_type"]).strip().lower()
    if not answer:
        raise RecordError("empty answer", answer, name, "No prediction could be right; leave the record out.")
    if kind not in ("open", "closed"):
        raise RecordError("unknown answer_type", record["answer_type"], name, "It has to be open or closed.")
    question_type, image_id = record.get("question_type"), record.get("image_id")
    return Answered(
        None if image_id is None else str(image_id),
        None if question_type is None else str(question_type).strip() or None,
        kind == "closed",
        answer,
        str(record["prediction"]),
    )


def clusters_of(answered: list[Answered]) -> list[Any]:
    """What the bootstrap draws: images where every record names its image, else records."""
    if all(record.image_id is not None for record in answered):
        return [record.image_id for record in answered]
    return list(range(len(answered)))


def with_types(scored: Iterable[Scored]) -> Iterator[dict[Figure, float]]:
    """The figures of each record, once more under its question type."""
    for answered, scores in scored:
        kind = answered.question_type
        prefix = ("question_types", kind)
        yield scores if kind is None else scores | {prefix + figure: value for figure, value in scores.items()}


def figures(scores: Mapping[str, Any], path: Figure = ()) -> Iterator[tuple[Figure, dict[str, Any]]]:
    """All figures of a result of [`score_vqa`], each with its path in it."""
    for key, value in scores.items():
        if isinstance(value, Mapping):
            if "interval" in value:
                yield (*path, key), value
            else:
                yield from figures(value, (*path, key))


def _scorer(variant: str, closed_rule: str | None) -> Callable[[bool, str, str], dict[Figure, float]]:
    if variant not in VARIANTS:
        raise UserError(f"There is no variant {variant!r} of the scores; choose from {', '.join(VARIANTS)}.")
    if variant == "strict":
        if closed_rule is not None:
            raise UserError("closed_rule belongs to the variant llava_med; strict has one rule for closed questions.")
        return strict.score
    if closed_rule is not None and closed_rule not in llava_med.CLOSED_RULES:
        raise UserError(f"There is no closed_rule {closed_rule!r}; choose from {', '.join(llava_med.CLOSED_RULES)}.")
    return partial(llava_med.score, closed_rule=closed_rule or "gated")


def _names(variant: str, types: list[str]) -> list[Figure]:
    own = (strict if variant == "strict" else llava_med).FIGURES
    return [prefix + figure for prefix in ((), *(("question_types", kind) for kind in types)) for figure in own]


def _with_types_all_or_none(answered: list[Answered]) -> list[Answered]:
    if all(record.question_type is None for record in answered):
        return answered
    return [record._replace(question_type=record.question_type or NO_TYPE) for record in answered]


def _set(result: dict[str, Any], figure: Figure, leaf: dict[str, Any]) -> None:
    for key in figure[:-1]:
        result = result.setdefault(key, {})
    result[figure[-1]] = leaf


def _add_majority(result: dict[str, Any], answered: list[Answered]) -> None:
    typed = [(record, " ".join(strict.tokens(record.answer))) for record in answered]
    result["exact_match"]["majority"] = _majority(typed)
    result["open"]["exact_match"]["majority"] = _majority([item for item in typed if not item[0].closed])
    result["closed"]["accuracy"]["majority"] = _majority([item for item in typed if item[0].closed])
    for kind, scores in result["question_types"].items():
        scores["exact_match"]["majority"] = _majority([item for item in typed if item[0].question_type == kind])


def _majority(typed: list[tuple[Answered, str]]) -> float | None:
    answers = defaultdict(Counter)
    for record, answer in typed:
        answers[record.question_type][answer] += 1
    return 100 * sum(max(counts.values()) for counts in answers.values()) / len(typed) if typed else None

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of predictions with bootstrap intervals. Pure Python: scoring needs neither a model nor torch."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict
from operator import mul
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.data.cells import BadRecord, is_missing

from .metric import METRICS, Answered, FigurePath, make_settings


LEVEL = 0.95
NO_TYPE = "(none)"  # question type of records without one, in a benchmark where others have one

Scored = tuple[Answered, dict[FigurePath, float]]
Means = Mapping[FigurePath, list[float | None]]


def score_vqa(
    records: Iterable[Mapping[str, Any]],
    variant: str = "strict",
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """
    Score predictions, open and closed questions apart.

    Every figure is a mean over records in percent, `{"value", "n", "interval"}`. `n` is the number of records in the
    mean (0 gives the value None). `interval` is its 95% bootstrap interval, or None if the figure depends on a single
    group or record. Groups (a patient, or else an image) are resampled with all their questions if every record has a
    `group_id` or `image_id`, since such questions are not independent; otherwise records are resampled. A bootstrap
    sees only the variation in the sample: if all records are right, or all are wrong, the interval has no width,
    however small n is.

    Args:
        records (iterable of `dict`):
            `answer`, `answer_type` (open or closed, in any case), `prediction`; optionally `question_type`,
            `image_id`, `group_id`, `id`. Texts may be numbers. Other keys and the order are ignored.
        variant (`str`, *optional*, defaults to `"strict"`):
            Name of a metric: `"strict"`, `"llava_med"` (see [`medst_trl.evaluation.metrics`]), or one of a plugin.
        bootstrap_samples (`int`, *optional*, defaults to `1000`):
            Number of resamples; 0 leaves every interval None.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.
        **settings:
            Settings of the metric; None stands for the default. `llava_med` has `closed_rule`: `"gated"` (default),
            `"substring"` or `"drop_misses"`.

    Returns:
        `dict`: `variant`, the metric's settings, `n`, `n_images`, `n_groups` (if there are any), `bootstrap`, then the
        figures.
        - `strict`: `exact_match` (all records), `open` (`exact_match`, `precision`, `recall`, `f1`) and `closed`
          (`accuracy`, divided into `yes_no` and `other` questions; `no_verdict`, the share of yes/no questions whose
          prediction says neither, each of them wrong). `exact_match` and `accuracy` carry `majority`: what the most
          frequent answer of each question type would score. It uses the reference answers, but no
          image.
        - `llava_med`: `open` (`exact`, `precision`, `recall`, `f1`, `bleu_1` to `bleu_3`) and `closed` (`accuracy`).
        - `question_types`: the same figures for each question type.

    Raises:
        UserError: if a record lacks a key or has an unknown answer type, or for an unknown variant or setting.

    Example:

    ```python
    >>> from medst_trl import score_vqa
    >>> records = [{"answer": "Yes", "answer_type": "closed", "prediction": "yes, a small one"}]
    >>> score_vqa(records)["closed"]["accuracy"]
    {'value': 100.0, 'n': 1, 'interval': None, 'majority': 100.0}
    ```
    """
    scored = score_records(records, variant, **settings)
    means = resample(zip(clusters_of(scored), also_by_type(scored)), bootstrap_samples, seed)
    return summarize(scored, variant, settings, means, {"samples": bootstrap_samples, "seed": seed})


def compare_vqa(
    records: Iterable[Mapping[str, Any]],
    control_records: Iterable[Mapping[str, Any]],
    variant: str = "strict",
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """
    Score a control and how much better the real predictions are.

    Args:
        records (iterable of `dict`):
            The real predictions, see [`score_vqa`], each with a unique `id`.
        control_records (iterable of `dict`):
            Predictions of the control, for the same ids.
        variant, bootstrap_samples, seed, **settings:
            As in `score_vqa`.

    Returns:
        `dict`: the scores of the control, in which every figure carries `difference` (real minus control, in
        percentage points) and `difference_interval`, a paired 95% bootstrap interval: the same groups or images are
        drawn for both sides.

    Raises:
        UserError: if ids are missing or repeated, or the two sides do not answer the same ids.
    """
    real, control = _by_id(records, "predictions"), _by_id(control_records, "control predictions")
    if odd := real.keys() ^ control.keys():
        raise UserError(
            f"Predictions and control do not answer the same questions: {len(odd)} ids are on one side only, for "
            f"example {min(map(str, odd))!r}. Run the control again with the settings of the predictions."
        )
    sides = {"real": real.values(), "control": [control[key] for key in real]}
    scored = {name: score_records(rows, variant, **settings) for name, rows in sides.items()}
    pairs = [
        {(name, *path): value for name, scores in zip(sides, both) for path, value in scores.items()}
        for both in zip(*(also_by_type(rows) for rows in scored.values()))
    ]
    means = resample(zip(clusters_of(scored["real"]), pairs), bootstrap_samples, seed)

    bootstrap = {"samples": bootstrap_samples, "seed": seed}
    real_result, result = (summarize(rows, variant, settings, {}, bootstrap) for rows in scored.values())
    real_figures = dict(iter_figures(real_result))
    for path, leaf in iter_figures(result):
        value = real_figures.get(path, {}).get("value")
        both = means.get(("real", *path), []), means.get(("control", *path), [])
        differences = [None if None in pair else pair[0] - pair[1] for pair in zip(*both)]
        leaf["interval"] = interval(both[1])
        leaf["difference"] = None if None in (value, leaf["value"]) else value - leaf["value"]
        leaf["difference_interval"] = interval(differences)
    return result


def _by_id(records: Iterable[Mapping[str, Any]], what: str) -> dict[Any, Mapping[str, Any]]:
    records = list(records)
    found = {record.get("id"): record for record in records}
    if None in found or len(found) < len(records):
        raise UserError(f"In the {what}, an id is missing or repeated. Give each record an id of its own.")
    return found


def summarize(
    scored: list[Scored], variant: str, settings: Mapping[str, Any], means: Means, bootstrap: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Summarize scored records as [`score_vqa`] returns them.

    Args:
        scored (`list`): Result of [`score_records`].
        variant (`str`): Name of the metric.
        settings (`dict`): Settings of the metric.
        means (`dict`): Result of [`resample`]. Figures that it lacks get no interval.
        bootstrap (`dict`): Its number of samples and its seed.
    """
    metric, answered = METRICS.get(variant), [row for row, _ in scored]
    own_settings = make_settings(metric, settings)
    clusters, images = clusters_of(scored), {row.image_id for row in answered}
    by_group = any(row.group_id is not None for row in answered)
    unit = "record" if 0 in clusters else "group" if by_group else "image"
    result = {
        "variant": variant,
        **(asdict(own_settings) if own_settings else {}),
        "n": len(scored),
        "n_images": None if None in images else len(images),
        **({"n_groups": len(set(clusters))} if unit == "group" else {}),
        "bootstrap": {**bootstrap, "unit": unit, "level": LEVEL},
    }
    types = sorted({row.question_type for row in answered} - {None})
    values = defaultdict(list)
    for scores in also_by_type(scored):
        for path, value in scores.items():
            values[path].append(value)
    for prefix in ((), *(("question_types", kind) for kind in types)):
        for path in (prefix + figure.path for figure in metric.figures):
            found = values[path]
            value = 100 * math.fsum(found) / len(found) if found else None
            _nested(result, path).update(value=value, n=len(found), interval=interval(means.get(path, [])))
    result.setdefault("question_types", {})
    for path, value in metric.majority(answered).items() if metric.majority else ():
        _nested(result, path)["majority"] = value
    return result


def score_records(records: Iterable[Mapping[str, Any]], variant: str, **settings: Any) -> list[Scored]:
    """Score each record, see [`score_vqa`]."""
    metric = METRICS.get(variant)
    own_settings = make_settings(metric, settings)
    answered = []
    for position, record in enumerate(records):
        try:
            answered.append(read_answer(record))
        except BadRecord as error:
            name = f"number {position + 1} (without id)" if record.get("id") is None else repr(record["id"])
            raise UserError(
                f"Record {name}: {error.reason} ({error.value!r}). Each record needs an answer that is not empty, an "
                "answer_type (open or closed) and a prediction."
            ) from None
    if any(row.question_type is not None for row in answered):
        answered = [row._replace(question_type=row.question_type or NO_TYPE) for row in answered]
    return [(row, metric.score(row, own_settings)) for row in answered]


def read_answer(record: Mapping[str, Any]) -> Answered:
    """
    Check a record and normalize its values.

    Args:
        record (`dict`): See [`score_vqa`].

    Raises:
        BadRecord: if a key is missing or invalid.
    """
    for key in ("answer", "answer_type", "prediction"):
        value = record.get(key)
        if value is None or value != value:  # pandas reads an empty cell as NaN
            raise BadRecord(f"no {key}", value)
        if not isinstance(value, str | int | float):
            raise BadRecord(f"{key} is not a text", value)
    answer, answer_type = str(record["answer"]).strip(), str(record["answer_type"]).strip().lower()
    if not answer:
        raise BadRecord("empty answer", answer)
    if answer_type not in ("open", "closed"):
        raise BadRecord("unknown answer_type", record["answer_type"])
    image_id, group = (None if is_missing(record.get(key)) else str(record[key]) for key in ("image_id", "group_id"))
    question_type = None if record.get("question_type") is None else str(record["question_type"]).strip() or None
    return Answered(image_id, question_type, answer_type == "closed", answer, str(record["prediction"]), group)


def clusters_of(scored: list[Scored]) -> list[Hashable]:
    """Return what the bootstrap draws for each record: its group or image if every record has one, or the record."""
    clusters = [row.group_id or row.image_id for row, _ in scored]
    return list(range(len(clusters))) if None in clusters else clusters


def also_by_type(scored: Iterable[Scored]) -> Iterator[dict[FigurePath, float]]:
    """Yield the scores of each record, also under its question type."""
    for row, scores in scored:
        prefix = ("question_types", row.question_type)
        typed = {} if row.question_type is None else {prefix + path: value for path, value in scores.items()}
        yield scores | typed


def iter_figures(scores: Mapping[str, Any], path: FigurePath = ()) -> Iterator[tuple[FigurePath, dict[str, Any]]]:
    """Yield all figures in a result of [`score_vqa`], each with its path."""
    for key, value in scores.items():
        if isinstance(value, Mapping) and "interval" in value:
            yield (*path, key), value
        elif isinstance(value, Mapping):
            yield from iter_figures(value, (*path, key))


def _nested(result: dict[str, Any], path: FigurePath) -> dict[str, Any]:
    for key in path:
        result = result.setdefault(key, {})
    return result


def resample(records: Iterable[tuple[Hashable, Mapping[FigurePath, float]]], samples: int, seed: int) -> Means:
    """
    Compute the mean of every figure over resampled clusters (the cluster bootstrap).

    Questions about one group or image are not independent, so each is drawn with all its questions. A mean over
    records is then a ratio of two sums that both vary.

    Args:
        records (iterable of `tuple`):
            Cluster of each record, and its value in each figure that it counts in. Neither their order nor the names
            of the clusters affect the result.
        samples (`int`):
            Number of resamples. 1000 of 6,761 records in 858 clusters take about three seconds.
        seed (`int`):
            Seed of the draws.

    Returns:
        `dict`: figure to one mean per resample, None if no record of the figure was drawn. Resample i holds the same
        clusters for every figure, so figures may be subtracted from each other. Figures with a single cluster are left
        out: their spread is unknown.
    """
    values = defaultdict(lambda: defaultdict(list))
    for cluster, scores in records:
        for figure, value in scores.items():
            values[cluster][figure].append(value)
    # Clusters of equal content are interchangeable: they share one column entry, drawn as often as there are of them.
    kinds = Counter(
        tuple(sorted((figure, math.fsum(column), len(column)) for figure, column in by_figure.items()))
        for by_figure in values.values()
    )
    ordered = sorted(kinds)
    population = [index for index, kind in enumerate(ordered) for _ in range(kinds[kind])]
    columns = defaultdict(lambda: ([], [], []))
    clusters = Counter()
    for index, kind in enumerate(ordered):
        for figure, total, n in kind:
            for column, entry in zip(columns[figure], (index, total, n)):
                column.append(entry)
            clusters[figure] += kinds[kind]

    rng = random.Random(seed)
    means: dict[FigurePath, list[float | None]] = {figure: [] for figure in columns if clusters[figure] > 1}
    for _ in range(samples):
        drawn = [0] * len(ordered)
        for index, times in Counter(rng.choices(population, k=len(population))).items():
            drawn[index] = times
        for figure, found in means.items():
            indices, totals, ns = columns[figure]
            times = [drawn[index] for index in indices]
            n = sum(map(mul, ns, times))
            found.append(sum(map(mul, totals, times)) / n if n else None)
    return means


def interval(means: Iterable[float | None]) -> list[float] | None:
    """Return the percentile interval of resampled means at `LEVEL`, in percent; None if fewer than two are known."""
    found = sorted(mean for mean in means if mean is not None)
    if len(found) < 2:
        return None
    return [100 * _percentile(found, part) for part in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]


def _percentile(found: list[float], part: float) -> float:
    position = part * (len(found) - 1)
    low = math.floor(position)
    high = min(low + 1, len(found) - 1)
    return found[low] + (found[high] - found[low]) * (position - low)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Metrics: rules by which one answer is scored, with everything that help, tables, cards and charts say about them.

A metric of your own is one file, given to any command by `--plugins FILE`:

```python
from medst_trl.evaluation.metric import METRICS, Figure, Metric


def score(row, settings):
    return {("short",): float(len(row.prediction.split()) < 5)}


METRICS.register(
    Metric("brevity", summary="answers of fewer than five words", figures=(Figure(("short",)),), score=score)
)
```
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from medst_trl.base.errors import UserError
from medst_trl.base.registry import Registry


FigurePath = tuple[str, ...]
"""Where a figure is in a metric's scores, for example `("open", "f1")`."""


class Answered(NamedTuple):
    """A question with its answer and prediction, as metrics see it: checked, with strings for texts."""

    image_id: str | None
    question_type: str | None
    closed: bool
    answer: str
    prediction: str
    group_id: str | None = None


@dataclass(frozen=True)
class Figure:
    """
    One number that a metric reports: the mean of a score over records, in percent.

    Args:
        path (`tuple` of `str`):
            Its keys in the scores, one or two.
        label (`str`, *optional*):
            Its name in tables. Defaults to the path in words.
        in_card (`bool`, *optional*, defaults to `False`):
            Whether model cards list it.
        in_chart (`bool`, *optional*, defaults to `False`):
            Whether reports draw it.
        by_type (`bool`, *optional*, defaults to `False`):
            Whether tables also list it for each question type.
        higher_is_better (`bool`, *optional*, defaults to `True`):
            Direction of improvement.
    """

    path: FigurePath
    label: str = ""
    in_card: bool = False
    in_chart: bool = False
    by_type: bool = False
    higher_is_better: bool = True

    def __post_init__(self):
        object.__setattr__(self, "label", self.label or ": ".join(self.path).replace("_", " "))


@dataclass(frozen=True)
class Metric:
    """
    Rules that score one answer. A metric is pure: it sees one record at a time and calls no model.

    Args:
        name (`str`):
            Its name in `--variants` and in `scores.json`.
        summary (`str`):
            One line for `medst evaluate --help`.
        figures (`tuple` of [`Figure`]):
            What it reports, in the order of tables.
        score (`Callable`):
            Takes an [`Answered`] record and the settings. Returns a score from 0 to 1 for each figure in which the
            record counts, by path; an empty dict for a record that does not count.
        settings (`type`, *optional*):
            Dataclass of its settings. They become options of `medst evaluate`, so their names must be unique over all
            metrics, and each needs a default.
        majority (`Callable`, *optional*):
            Takes all records. Returns the percentage that always giving the most frequent answer would score, by path.
    """

    name: str
    summary: str
    figures: tuple[Figure, ...]
    score: Callable[[Answered, Any], dict[FigurePath, float]]
    settings: type | None = None
    majority: Callable[[Sequence[Answered]], dict[FigurePath, float | None]] | None = None


METRICS: Registry[Metric] = Registry(
    "metric",
    ("medst_trl.evaluation.metrics",),
    ("summary", "figures", "score"),
    order=lambda metrics: sorted(metrics, key=lambda metric: metric.name != "strict"),  # the one to judge a model by
)


def make_settings(metric: Metric, values: Mapping[str, Any]) -> Any:
    """
    Make the settings of a metric from keyword arguments, where None means the default. None for a metric without any.

    Raises:
        UserError: for a setting that the metric does not have, or an invalid value.
    """
    given = {name: value for name, value in values.items() if value is not None}
    known = setting_names(metric)
    if unknown := [name for name in given if name not in known]:
        raise UserError(
            f"{unknown[0]} is not a setting of the metric {metric.name!r}, which has {', '.join(known) or 'none'}."
        )
    return metric.settings(**given) if metric.settings else None


def setting_names(metric: Metric) -> list[str]:
    """Return the names of a metric's settings."""
    return [field.name for field in fields(metric.settings)] if metric.settings else []


def describe_figures(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the figures of metrics as `scores.json` lists them: `metric` and the fields of [`Figure`]."""
    found = ((name, figure) for name in names for figure in METRICS.get(name).figures)
    return [{"metric": name, **asdict(figure), "path": list(figure.path)} for name, figure in found]

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Charts as inline SVG: lines over steps, horizontal bars with error bars, and the curves of a training.

Each SVG is self-contained, drawn by `charts.svg.jinja`. Its colors are CSS variables with a default, so that a page
can set its own for a dark screen (`--ink`, `--muted`, `--grid`, `--halo`, `--series-1` to `--series-5`; the report's
template has both sets). No chart relies on color alone: lines are labeled and differ in dashes, and bars are labeled.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from markupsafe import Markup

from .text import clean, environment, is_number, number


WIDTH = 400  # units of the viewBox, about one pixel each: a phone shows a chart unscaled
MAX_POINTS = 200  # per line; longer ones are averaged
LETTER = 6.2  # width of a letter at 11 px, an upper estimate
ROW = 19  # height of a bar with the space below it

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """
    One bar of a [`bar_chart`].

    Args:
        name (`str`): Its label. Bars with the same name have the same color.
        value (`float`): Its length.
        interval (`(float, float)`, *optional*): Ends of its error bar.
        muted (`bool`, *optional*, defaults to `False`): Whether it is gray, as a baseline.
    """

    name: str
    value: float
    interval: Sequence[float] | None = None
    muted: bool = False


def line_chart(
    title: str, lines: Mapping[str, Points], *, x_label: str, y_label: str, level: tuple[float, str] | None = None
) -> Markup:
    """
    Draw lines over a common x axis, each labeled with its name and last value.

    Args:
        title (`str`): Heading of the chart.
        lines (`dict`): Name to points, sorted by x, of at most five lines. Points that are not finite are left out.
        x_label, y_label (`str`): What the axes show, with the unit.
        level (`tuple`, *optional*): A value of y to mark with a horizontal line, and its label.

    Returns:
        `Markup`: the `<svg>` element; empty if no line has a point.
    """
    lines = {name: thin for name, points in lines.items() if (thin := _thin(points))}
    if not lines:
        return Markup("")
    labels = [f"{clean(name)} {number(points[-1][1])}" for name, points in lines.items()]
    left, right, top, bottom = 46, WIDTH - min(150, 14 + LETTER * max(map(len, labels))), 46, 202
    xs, ys = zip(*chain(*lines.values()))
    levels = () if level is None else (level[0],)
    x = _Axis(min(xs), max(xs), left, right)
    y = _Axis(min(ys + levels), max(ys + levels), bottom, top, widen=True)
    paths = [[(x(a), y(b)) for a, b in points] for points in lines.values()]
    ends = _keep_apart([path[-1][1] for path in paths], 14, top, bottom)
    drawn = list(zip(lines.items(), paths, labels, ends))
    return _draw(title, y_label, 236, x, y=y, x_label=x_label, level=level, lines=drawn)


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    *,
    unit: str = "",
    limits: tuple[float, float] | None = None,
    mark: tuple[float, str] | None = None,
    digits: int | None = 1,
    axis: bool = True,
) -> Markup:
    """
    Draw horizontal bars with error bars and values.

    Args:
        title (`str`): Heading of the chart.
        bars (sequence of [`Bar`]): From top to bottom.
        unit (`str`, *optional*): What the axis shows.
        limits (`tuple`, *optional*): Ends of the axis. Defaults to 0 and the largest value.
        mark (`tuple`, *optional*): A value to mark across the bars, such as a baseline, and what it is.
        digits (`int`, *optional*, defaults to `1`): Decimals of the values beside the bars; None for whole numbers.
        axis (`bool`, *optional*, defaults to `True`): Whether to draw the axis.

    Returns:
        `Markup`: the `<svg>` element; empty if there is no bar.
    """
    if not bars:
        return Markup("")
    values = [value for bar in bars for value in (bar.value, *(bar.interval or ()))]
    left = min(150, 12 + LETTER * max(len(clean(bar.name)) for bar in bars))
    right = WIDTH - 14 - LETTER * max(len(number(bar.value, digits)) for bar in bars)
    low, high = limits or (min(0, *values), max(0, *values) or 1)
    x = _Axis(low, high, left, right, widen=limits is None and axis)
    top = 46 if unit else 30
    end = top + ROW * len(bars) + 7
    height = end + 20 * axis + 18 * bool(mark) + 2
    layout = {"top": top, "end": end, "row": ROW, "letters": int((x.start - 8) / LETTER) + 1, "axis": axis}
    return _draw(title, unit, height, x, bars=bars, mark=mark, digits=digits, **layout)


def _draw(title: str, unit: str, height: float, x: "_Axis", **values: Any) -> Markup:
    template = environment().get_template("charts.svg.jinja")
    return Markup(template.render(values, title=title, unit=unit, height=height, width=WIDTH, x=x))


class _Axis:
    """
    Maps values to positions, and has round values for its ticks.

    Args:
        low, high (`float`): Smallest and largest value. Other values are clipped.
        start, end (`float`): Their positions.
        widen (`bool`, *optional*, defaults to `False`): Whether the axis is extended to the ticks outside.
    """

    def __init__(self, low: float, high: float, start: float, end: float, widen: bool = False):
        first, last = (low, high) if low < high else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        rough = (last - first) / 4  # for about four ticks
        power = 10 ** math.floor(math.log10(rough))
        self.step = power * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * 0.999)
        first, last = math.floor(first / self.step + 1e-9), math.ceil(last / self.step - 1e-9)
        self.values = [place * self.step for place in range(first, last + 1)]
        self.low = min(self.values[0], low) if widen else low
        self.high = max(self.values[-1], high) if widen else high
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Positions and labels of the ticks."""
        for value in (value for value in self.values if self.low <= value <= self.high):
            yield self(value), f"{value:,g}".replace("-", "−")


def _keep_apart(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Positions near the wanted ones that are at least `gap` apart: pushed down from the top, then up from below."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    positions, limit = list(wanted), top
    for index in order:
        positions[index] = limit = max(wanted[index], limit)
        limit += gap
    limit = bottom
    for index in reversed(order):
        positions[index] = limit = min(positions[index], limit)
        limit -= gap
    return positions


def _thin(points: Points) -> Points:
    """Finite points, averaged in runs of equal length if there are more than can be seen."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(map(fmean, zip(*run))) for run in runs]


# --- Curves of a training, and what they show ------------------------------------------------------------------------

DISPLACED = 0.05  # nats: a smaller loss of log-probability is not called a displacement
LAST_PART = 0.2  # of the logged values, averaged for statements about the end of training

Log = Sequence[Mapping[str, Any]]

# Title, unit of y, keys of the log, and a level to draw with its name. The log of preference training has rewards.
_SUPERVISED = (
    ("Loss", "nats per token", ("loss", "loss_question", "loss_answer", "eval_loss"), None),
    ("Next-token accuracy", "share of tokens", ("question_accuracy", "answer_accuracy"), None),
)
_PREFERENCE = (
    ("Loss", "nats per pair", ("loss", "eval_loss"), (math.log(2), "ln 2: sigmoid loss before training")),
    ("Reward margin", "nats × beta", ("rewards/margins", "eval_rewards/margins"), (0.0, "")),
    ("Pairs in the judge's order", "share", ("rewards/accuracies", "eval_rewards/accuracies"), (0.5, "by chance")),
    ("Log-probability of an answer", "nats", ("logps/chosen", "logps/rejected"), None),
    ("Change from the reference", "nats", ("logratios/chosen", "logratios/rejected"), (0.0, "")),
    ("Length of an answer", "tokens", ("lengths/chosen", "lengths/rejected"), None),
)


def training_charts(log: Log) -> list[Markup]:
    """Draw the charts of supervised or preference training for which the log has values."""
    charts = []
    for title, unit, keys, level in _PREFERENCE if _points(log, "rewards/margins") else _SUPERVISED:
        lines = {key: _points(log, key) for key in keys}
        charts.append(line_chart(title, lines, x_label="optimizer step", y_label=unit, level=level))
    return [chart for chart in charts if chart]


def displacement(log: Log) -> str | None:
    """
    State whether the chosen answers became less likely than under the reference (likelihood displacement); None
    if the log does not show it.
    """
    keys = ("logratios/chosen", "logratios/rejected", "rewards/margins")
    chosen, rejected, margin = map(final_values(log, keys).get, keys)
    if chosen is None:
        return None
    if chosen >= -DISPLACED:
        likely = "no less likely than" if chosen >= 0 else "about as likely as"
        note = "" if chosen or rejected or margin else " The policy has not changed (is the warm-up too long?)."
        return f"The chosen answers are {likely} under the reference ({number(chosen, 3, '+')} nats).{note}"
    reason = ""
    if margin is not None and margin > 0 and rejected is not None and rejected < chosen:
        reason = "The margin grows because the rejected answers lose even more: it does not show a better model. "
    elif margin is not None and margin <= 0:
        reason = "The margin has not grown either: the rejected answers have not lost more. "
    return (
        "Likelihood displacement: at the end of training the chosen answers are less likely than under the reference, "
        f"by {number(-chosen, 3)} nats on average. {reason}Possible remedies: the sft term in the loss (loss_type: "
        "[sigmoid, sft]), a lower learning rate, a higher beta."
    )


def final_values(log: Log, keys: Iterable[str]) -> dict[str, float]:
    """Return the mean of each figure over the end of training."""
    logged = {key: [y for _, y in _points(log, key)] for key in keys}
    return {key: fmean(ys[-max(1, round(LAST_PART * len(ys))) :]) for key, ys in logged.items() if ys}


def _points(log: Log, key: str) -> list[tuple[float, float]]:
    pairs = [(entry.get("step"), entry.get(key)) for entry in log]
    return [pair for pair in pairs if all(is_number(value) and math.isfinite(value) for value in pair)]

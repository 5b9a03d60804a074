# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Charts as inline SVG: lines over steps, and horizontal bars with error bars.

Each SVG is self-contained. Its colours are CSS variables with a default, so that a page can set its own for a dark
screen (`--ink`, `--muted`, `--grid`, `--halo`, `--series-1` to `--series-5`; the report's template has both sets). No
chart relies on colour alone: lines are labelled and differ in dashes, and bars are labelled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from .text import clean, number


WIDTH = 400  # units of the viewBox, about one pixel each: a phone shows a chart unscaled
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
INK, MUTED, GRID = "var(--ink, #1d2530)", "var(--muted, #566170)", "var(--grid, #dfe3e8)"
COLOURS = tuple(
    f"var(--series-{place}, {colour})"
    for place, colour in enumerate(("#0068a8", "#c04a00", "#007a5a", "#9a4a86", "#6b6b6b"), start=1)
)
DASHES = ("none", "6 3", "2 3", "9 3 2 3", "1 4")
MAX_POINTS = 200  # per line; longer ones are averaged
LETTER = 6.2  # width of a letter at 11 px, an upper estimate


@dataclass(frozen=True)
class Line:
    """
    One line of a [`line_chart`].

    Args:
        name (`str`): Label at the end of the line.
        points (sequence of `(x, y)`): Sorted by x. Points that are not finite are left out.
        dashed (`bool`, *optional*): Whether it is dashed, such as a validation loss. By default, lines differ.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool | None = None


@dataclass(frozen=True)
class Bar:
    """
    One bar of a [`bar_chart`].

    Args:
        name (`str`): Its label. Bars with the same name have the same colour.
        value (`float`): Its length.
        low, high (`float`, *optional*): Ends of its error bar.
        muted (`bool`, *optional*, defaults to `False`): Whether it is grey, as a baseline.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    muted: bool = False

    def label(self, digits: int | None) -> str:
        """Name and value, with the interval if there is one."""
        interval = f" ({number(self.low, digits)} to {number(self.high, digits)})" if self.has_interval else ""
        return f"{clean(self.name)} {number(self.value, digits)}{interval}"

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


@dataclass(frozen=True)
class Group:
    """Bars under one heading, with an optional mark across them, such as a baseline."""

    name: str
    bars: Sequence[Bar]
    mark: float | None = None


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str, y_label: str, level: tuple[float, str] | None = None
) -> Markup:
    """
    Draw lines over a common x axis, each labelled with its name and last value.

    Args:
        title (`str`): Heading of the chart.
        lines (sequence of [`Line`]): At most five.
        x_label, y_label (`str`): What the axes show, with the unit.
        level (`tuple`, *optional*): A value of y to mark with a horizontal line, and its label.

    Returns:
        `Markup`: the `<svg>` element; empty if no line has a point.
    """
    lines = [replace(line, points=points) for line in lines if (points := _thin(line.points))]
    if not lines:
        return Markup("")
    labels = [f"{clean(line.name)} {number(line.points[-1][1])}" for line in lines]
    left, right, top, bottom = 46, WIDTH - min(150, 14 + LETTER * max(map(len, labels))), 46, 202
    xs, ys = zip(*(point for line in lines for point in line.points))
    levels = () if level is None else (level[0],)
    x = _Axis(min(xs), max(xs), left, right)
    y = _Axis(min(ys + levels), max(ys + levels), bottom, top, widen=True)

    chart = _Chart(title, y_label)
    for tick, text in y.ticks():
        chart.rule(left, y(tick), right, y(tick))
        chart.text(left - 6, y(tick) + 4, text, anchor="end")
    chart.x_ticks(x, bottom, bottom + 4, MUTED)
    chart.rule(left, bottom, right, bottom, MUTED)
    chart.text(right, bottom + 30, x_label, anchor="end")
    if level is not None:
        at = y(level[0])
        chart.rule(left, at, right, at, MUTED, dash="3 3")
        chart.text(right - 4, at + 12 if at < top + 14 else at - 4, level[1], anchor="end", halo=True)
    ends = _keep_apart([y(line.points[-1][1]) for line in lines], 14, top, bottom)
    for place, (line, label, end) in enumerate(zip(lines, labels, ends)):
        colour = COLOURS[place % len(COLOURS)]
        dash = DASHES[place % len(DASHES)] if line.dashed is None else "5 3" if line.dashed else "none"
        chart.line([(x(a), y(b)) for a, b in line.points], colour, dash)
        chart.text(right + 6, end + 4, label, colour)
    ends = [tuple(number(y) for _, y in (line.points[0], line.points[-1])) for line in lines]
    changes = (f"{clean(line.name)} from {first} to {last}" for line, (first, last) in zip(lines, ends))
    return chart.finish(236, f"{y_label} over {x_label}: {'; '.join(changes)}.")


def bar_chart(
    title: str,
    groups: Sequence[Group],
    *,
    unit: str = "",
    limits: tuple[float, float] | None = None,
    mark_name: str = "",
    digits: int | None = 1,
    axis: bool = True,
) -> Markup:
    """
    Draw horizontal bars in groups, with error bars and values.

    Args:
        title (`str`): Heading of the chart.
        groups (sequence of [`Group`]): From top to bottom.
        unit (`str`, *optional*): What the axis shows.
        limits (`tuple`, *optional*): Ends of the axis. Defaults to 0 and the largest value.
        mark_name (`str`, *optional*): What the marks of the groups are.
        digits (`int`, *optional*, defaults to `1`): Decimals of the values; None for whole numbers.
        axis (`bool`, *optional*, defaults to `True`): Whether to draw the axis. Every bar has its value beside it.

    Returns:
        `Markup`: the `<svg>` element; empty if there is no bar.
    """
    bars = [bar for group in groups for bar in group.bars]
    if not bars:
        return Markup("")
    names = list(dict.fromkeys(bar.name for bar in bars if not bar.muted))
    values = [value for bar in bars for value in (bar.value, bar.low, bar.high) if value is not None]
    left = min(150, 12 + LETTER * max(len(clean(bar.name)) for bar in bars))
    right = WIDTH - 14 - LETTER * max(len(number(bar.value, digits)) for bar in bars)
    low, high = limits or (min(0, *values), max(0, *values) or 1)
    x = _Axis(low, high, left, right, widen=limits is None and axis)

    chart = _Chart(title, unit)
    y = 46 if unit else 30
    if axis:  # the grid is drawn first, under the bars
        bottom = y + sum(7 + 19 * len(group.bars) + 18 * bool(group.name) for group in groups)
        chart.x_ticks(x, y, bottom, GRID)
    for group in groups:
        y = _draw_group(chart, group, y, x, names, digits)
    y += 20 if axis else 0
    if mark_name and any(group.mark is not None for group in groups):
        chart.rule(4, y + 2, 4, y + 14, INK, dash="3 2")
        chart.text(11, y + 12, mark_name)
        y += 18
    rows = [f"{clean(g.name) or title}: {', '.join(bar.label(digits) for bar in g.bars)}" for g in groups]
    return chart.finish(y + 2, f"{unit + '. ' if unit else ''}{'. '.join(rows)}.")


def _draw_group(chart: "_Chart", group: Group, y: float, x: "_Axis", names: list[str], digits: int | None) -> float:
    """Draw a group below `y` and return its lower end. The values are drawn last, over the mark."""
    if group.name:
        chart.text(0, y + 12, _short(clean(group.name), 58), INK)
        y += 18
    rows = [(y + 19 * place, bar) for place, bar in enumerate(group.bars)]
    end = y + 19 * len(rows)
    for top, bar in rows:
        chart.bar(bar, top, x, MUTED if bar.muted else COLOURS[names.index(bar.name) % len(COLOURS)])
    if group.mark is not None:
        chart.rule(x(group.mark), y - 1, x(group.mark), end - 2, INK, dash="3 2")
    for top, bar in rows:
        reach = max(0, bar.value, bar.value if bar.high is None else bar.high)
        chart.text(x(reach) + 5, top + 12, number(bar.value, digits), INK, halo=True)
    return end + 7


class _Axis:
    """
    Maps values to positions, and has round values for its ticks.

    Args:
        low, high (`float`): Smallest and largest value. Other values are clipped.
        start, end (`float`): Their positions.
        widen (`bool`, *optional*, defaults to `False`): Whether the axis is extended to the ticks outside.
    """

    def __init__(self, low: float, high: float, start: float, end: float, widen: bool = False):
        self.values, self.step = _round_values(low, high)
        self.low = min(self.values[0], low) if widen else low
        self.high = max(self.values[-1], high) if widen else high
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and their labels, with the decimals that the step needs."""
        digits = max(0, math.ceil(-math.log10(self.step) - 1e-9))
        if round(self.step, digits) != round(self.step, digits + 2):  # steps of 2.5
            digits += 1
        if self.step < 1e-4 or abs(self.values[-1]) >= 1e6:
            return [(value, f"{value:.1e}".replace("-", "−")) for value in self.values]
        return [(value, number(round(value, digits) + 0.0, digits)) for value in self.values]


class _Chart:
    """The elements of one chart, in drawing order."""

    def __init__(self, title: str, unit: str):
        self.title = clean(title)
        self.svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "font-family": FONT})
        self.svg.set("aria-label", self.title)
        SubElement(self.svg, "title").text = self.title
        self.description = SubElement(self.svg, "desc")
        self._add("text", f"font-size:13px;font-weight:600;fill:{INK}", x=0, y=14).text = self.title
        if unit:
            self.text(0, 31, unit)

    def _add(self, tag: str, style: str, **attributes: float | str) -> Element:
        shown = {key: str(round(v, 1) if isinstance(v, float) else v) for key, v in attributes.items()}
        return SubElement(self.svg, tag, shown | {"style": style})

    def text(
        self, x: float, y: float, text: str, colour: str = MUTED, anchor: str = "start", halo: bool = False
    ) -> None:
        around = ";paint-order:stroke;stroke:var(--halo, #ffffff);stroke-width:3px" if halo else ""
        element = self._add("text", f"font-size:11px;fill:{colour}{around}", x=x, y=y)
        element.set("text-anchor", anchor)
        element.text = clean(text)

    def rule(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1, dash: str = "none"
    ) -> None:
        self._add("line", f"stroke:{colour};stroke-width:{width};stroke-dasharray:{dash}", x1=x1, y1=y1, x2=x2, y2=y2)

    def line(self, points: Sequence[tuple[float, float]], colour: str, dash: str) -> None:
        style = f"fill:none;stroke:{colour};stroke-width:1.8;stroke-dasharray:{dash};stroke-linejoin:round"
        self._add("polyline", style, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))
        if len(points) == 1:  # a line of one point cannot be seen
            self._add("circle", f"fill:{colour}", cx=points[0][0], cy=points[0][1], r=3)

    def x_ticks(self, axis: _Axis, start: float, end: float, colour: str) -> None:
        """Vertical rules from `start` to `end` at the ticks of the x axis, with the values below."""
        for tick, text in axis.ticks():
            if axis.low <= tick <= axis.high:
                self.rule(axis(tick), start, axis(tick), end, colour)
                self.text(axis(tick), end + 13, text, anchor="middle")

    def bar(self, bar: Bar, y: float, x: _Axis, colour: str) -> None:
        """A bar of 13 units below `y`, from zero to its value, with its name to the left of the axis."""
        start, end = sorted((x(0), x(bar.value)))
        label_end = x.start - 8
        self.text(label_end, y + 12, _short(clean(bar.name), int(label_end / LETTER) + 1), anchor="end")
        style = f"fill:{colour};fill-opacity:{0.45 if bar.muted else 0.85}"
        self._add("rect", style, x=start, y=y + 1, width=max(end - start, 0.8), height=13, rx=1.5)
        if bar.has_interval:
            self.rule(x(bar.low), y + 7.5, x(bar.high), y + 7.5, INK, 1.3)
            for edge in (x(bar.low), x(bar.high)):
                self.rule(edge, y + 4.5, edge, y + 10.5, INK, 1.3)

    def finish(self, height: float, description: str) -> Markup:
        self.svg.set("viewBox", f"0 0 {WIDTH} {round(height)}")
        self.description.text = clean(description)
        return Markup(tostring(self.svg, encoding="unicode"))


def _round_values(low: float, high: float) -> tuple[list[float], float]:
    """About four round values from at or below `low` to at or above `high`, and the step between them."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)], step


def _keep_apart(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Positions near the wanted ones that are at least `gap` apart: pushed down from the top, then up from below."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places, limit = list(wanted), top
    for place in order:
        places[place] = limit = max(wanted[place], limit)
        limit += gap
    limit = bottom
    for place in reversed(order):
        places[place] = limit = min(places[place], limit)
        limit -= gap
    return places


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Finite points, averaged in runs of equal length if there are more than can be seen."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(math.fsum(values) / len(run) for values in zip(*run)) for run in runs]

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Charts as inline SVG: lines over steps, and bars with error bars.

An SVG stands by itself. Its colours are variables with a default, so that a page may set its own for a dark screen
(`--ink`, `--muted`, `--grid`, `--halo`, `--series-1` to `--series-5`; the report's template has both sets). The
colour-blind can tell the colours apart and do not have to: lines carry their names and differ in dashes, bars carry
their names.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .text import clean, number


WIDTH = 400  # units of the viewBox, about a pixel each: a phone shows a chart unscaled
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
INK, MUTED, GRID = "var(--ink, #1d2530)", "var(--muted, #566170)", "var(--grid, #dfe3e8)"
COLOURS = tuple(
    f"var(--series-{place}, {colour})"
    for place, colour in enumerate(("#0068a8", "#c04a00", "#007a5a", "#9a4a86", "#6b6b6b"), start=1)
)
DASHES = ("none", "6 3", "2 3", "9 3 2 3", "1 4")
MOST_POINTS = 200  # of a line; more are averaged
LETTER = 6.2  # width of a letter at 11 px, generously


@dataclass(frozen=True)
class Line:
    """
    One line of a [`line_chart`].

    Args:
        name (`str`): Stands at the end of the line.
        points (sequence of `(x, y)`): In the order of x. Those that are not finite are left out.
        dashed (`bool`, *optional*): For a line of another kind, such as a loss on validation data.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool | None = None


@dataclass(frozen=True)
class Bar:
    """
    One bar of a [`bar_chart`].

    Args:
        name (`str`): Bars of one name have one colour in the whole chart.
        value (`float`): Its length.
        low, high (`float`, *optional*): Ends of its error bar.
        muted (`bool`, *optional*, defaults to `False`): Grey, for what is only there to compare with.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    muted: bool = False


@dataclass(frozen=True)
class Group:
    """Bars under one heading, with a mark across them (a baseline) if there is one."""

    name: str
    bars: Sequence[Bar]
    mark: float | None = None


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
) -> Markup:
    """
    Lines over a common x axis, each with its name and last value at its end.

    Args:
        title (`str`): Stands above the chart.
        lines (sequence of [`Line`]): At most five.
        x_label, y_label (`str`): What the axes show, with the unit.
        level (`tuple`, *optional*): A value of y that is drawn through, and what it is.
        limits (`tuple`, *optional*): Least and greatest y; by default what there is to show.

    Returns:
        `Markup`: the `<svg>` element; empty where no line has a point.
    """
    lines = [Line(line.name, _thin(line.points), line.dashed) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    last = [f"{clean(line.name)} {number(float(line.points[-1][1]))}" for line in lines]
    height, top, bottom, left = 236, 46, 34, 46
    right = min(150, 14 + LETTER * max(map(len, last)))
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([] if level is None else [level[0]])
    x_ticks, (x_low, x_high) = _ticks(min(xs), max(xs), 4), (min(xs), max(xs))
    y_ticks = _ticks(*(limits or (min(ys), max(ys))), 4)
    y_low, y_high = min(y_ticks[0], *(limits or ys)), max(y_ticks[-1], *(limits or ys))
    x_at = _scale(x_low, x_high, left, WIDTH - right)
    y_at = _scale(y_low, y_high, height - bottom, top)

    parts = [_heading(title, y_label)]
    for tick in y_ticks:
        parts.append(_rule(left, y_at(tick), WIDTH - right, y_at(tick)))
        parts.append(_text(left - 6, y_at(tick) + 4, _tick(tick, y_ticks), anchor="end"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(_rule(x_at(tick), height - bottom, x_at(tick), height - bottom + 4, MUTED))
            parts.append(_text(x_at(tick), height - bottom + 16, _tick(tick, x_ticks), anchor="middle"))
    parts.append(_rule(left, height - bottom, WIDTH - right, height - bottom, MUTED))
    parts.append(_text(WIDTH - right, height - 4, x_label, anchor="end"))
    if level is not None:
        y = y_at(level[0])
        parts.append(_rule(left, y, WIDTH - right, y, MUTED, dash="3 3"))
        parts.append(_text(WIDTH - right - 4, y + 12 if y < top + 14 else y - 4, level[1], anchor="end", halo=True))
    ends = _spread([y_at(line.points[-1][1]) for line in lines], 14, top, height - bottom)
    for place, (line, label, end) in enumerate(zip(lines, last, ends)):
        colour = COLOURS[place % len(COLOURS)]
        dash = DASHES[place % len(DASHES)] if line.dashed is None else "5 3" if line.dashed else "none"
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        parts.append(
            Markup(
                '<polyline points="{}" style="fill:none;stroke:{};stroke-width:1.8;stroke-dasharray:{};'
                'stroke-linejoin:round"/>'
            ).format(path, Markup(colour), dash)
        )
        if len(line.points) == 1:
            x, y = line.points[0]
            parts.append(
                Markup('<circle cx="{}" cy="{}" r="3" style="fill:{}"/>').format(
                    round(x_at(x), 1), round(y_at(y), 1), Markup(colour)
                )
            )
        parts.append(_text(WIDTH - right + 6, end + 4, label, colour))
    told = "; ".join(
        f"{clean(line.name)} from {number(float(line.points[0][1]))} to {number(float(line.points[-1][1]))}"
        for line in lines
    )
    return _svg(height, title, f"{y_label} over {x_label}: {told}.", parts)


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
    Bars lying on their side, with error bars and their values, in groups.

    Args:
        title (`str`): Stands above the chart.
        groups (sequence of [`Group`]): From top to bottom.
        unit (`str`, *optional*): What the axis shows.
        limits (`tuple`, *optional*): Ends of the axis; by default from 0 to what there is to show.
        mark_name (`str`, *optional*): What the groups' marks are.
        digits (`int`, *optional*, defaults to `1`): Decimals of the values; None for whole numbers.
        axis (`bool`, *optional*, defaults to `True`): Whether to draw the axis; every bar has its value beside it.

    Returns:
        `Markup`: the `<svg>` element; empty where there is no bar.
    """
    names = list(dict.fromkeys(bar.name for group in groups for bar in group.bars if not bar.muted))
    bars = [bar for group in groups for bar in group.bars]
    if not bars:
        return Markup("")
    shown = [value for bar in bars for value in (bar.value, bar.low, bar.high) if value is not None]
    low, high = limits or (min(0, *shown), max(0, *shown) or 1)
    ticks = _ticks(low, high, 4)
    if limits is None and axis:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    labels = [clean(bar.name) for bar in bars]
    left = min(150, 12 + LETTER * max(map(len, labels)))
    right = 14 + LETTER * max(len(number(bar.value, digits)) for bar in bars)
    at = _scale(low, high, left, WIDTH - right)

    y, parts = 46 if unit else 30, []
    top = y
    for group in groups:
        if group.name:
            parts.append(_text(0, y + 12, _short(clean(group.name), 58), INK))
            y += 18
        begin, values = y, []
        for bar in group.bars:
            colour = MUTED if bar.muted else COLOURS[names.index(bar.name) % len(COLOURS)]
            parts += _bar(bar, y, at, min(max(0, low), high), colour, left)
            reach = at(max(0, bar.value, bar.value if bar.high is None else bar.high))
            values.append(_text(reach + 5, y + 12, number(bar.value, digits), INK, halo=True))
            y += 19
        if group.mark is not None:
            parts.append(_rule(at(group.mark), begin - 1, at(group.mark), y - 2, INK, dash="3 2"))
        parts += values
        y += 7
    grid = []
    if axis:
        grid = [_rule(at(tick), top, at(tick), y) for tick in ticks]
        grid += [_text(at(tick), y + 14, _tick(tick, ticks), anchor="middle") for tick in ticks]
        y += 20
    if any(group.mark is not None for group in groups) and mark_name:
        parts.append(_rule(4, y + 2, 4, y + 14, INK, dash="3 2"))
        parts.append(_text(11, y + 12, mark_name))
        y += 18
    told = ". ".join(
        f"{clean(group.name) or title}: "
        + ", ".join(
            f"{clean(bar.name)} {number(bar.value, digits)}{_told_interval(bar, digits)}" for bar in group.bars
        )
        for group in groups
    )
    return _svg(y + 2, title, f"{unit + '. ' if unit else ''}{told}.", [_heading(title, unit), *grid, *parts])


def _bar(bar: Bar, y: float, at: Callable[[float], float], zero: float, colour: str, left: float) -> list[Markup]:
    start, end = sorted((at(zero), at(bar.value)))
    parts = [
        _text(left - 8, y + 12, _short(clean(bar.name), int((left - 8) / LETTER) + 1), anchor="end"),
        Markup('<rect x="{}" y="{}" width="{}" height="13" rx="1.5" style="fill:{};fill-opacity:{}"/>').format(
            round(start, 1), y + 1, round(max(end - start, 0.8), 1), Markup(colour), 0.45 if bar.muted else 0.85
        ),
    ]
    if bar.low is not None and bar.high is not None:
        parts.append(_rule(at(bar.low), y + 7.5, at(bar.high), y + 7.5, INK, 1.3))
        parts += [_rule(at(edge), y + 4.5, at(edge), y + 10.5, INK, 1.3) for edge in (bar.low, bar.high)]
    return parts


def _told_interval(bar: Bar, digits: int | None) -> str:
    both = None not in (bar.low, bar.high)
    return f" ({number(bar.low, digits)} to {number(bar.high, digits)})" if both else ""


def _svg(height: float, title: str, told: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}" font-family="{}">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(WIDTH, round(height), clean(title), FONT, clean(title), clean(told), Markup("").join(parts))


def _heading(title: str, unit: str) -> Markup:
    head = Markup('<text x="0" y="14" style="font-size:13px;font-weight:600;fill:{}">{}</text>')
    return head.format(Markup(INK), clean(title)) + (_text(0, 31, unit) if unit else Markup(""))


def _text(x: float, y: float, text: str, colour: str = MUTED, anchor: str = "start", halo: bool = False) -> Markup:
    around = Markup(";paint-order:stroke;stroke:var(--halo, #ffffff);stroke-width:3px") if halo else ""
    return Markup('<text x="{}" y="{}" text-anchor="{}" style="font-size:11px;fill:{}{}">{}</text>').format(
        round(x, 1), round(y, 1), anchor, Markup(colour), around, clean(text)
    )


def _rule(x1, y1, x2, y2, colour: str = GRID, width: float = 1, dash: str = "none") -> Markup:
    return Markup(
        '<line x1="{}" y1="{}" x2="{}" y2="{}" style="stroke:{};stroke-width:{};stroke-dasharray:{}"/>'
    ).format(*(round(value, 1) for value in (x1, y1, x2, y2)), Markup(colour), width, dash)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1
    return lambda value: start + (min(max(value, low), high) - low) / span * (end - start)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round values that reach from at or under `low` to at or over `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    digits = max(0, math.ceil(-math.log10(step) - 1e-9))
    if round(step, digits) != round(step, digits + 2):  # steps of 2.5
        digits += 1
    if step < 1e-4 or abs(ticks[-1]) >= 1e6:
        return f"{value:.1e}".replace("-", "−")
    return number(round(value, digits) + 0.0, digits)


def _spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places near the wanted ones that keep a gap between them."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places = list(wanted)
    for before, place in zip([None, *order], order):
        places[place] = max(top, wanted[place]) if before is None else max(wanted[place], places[before] + gap)
    over = max(0.0, places[order[-1]] - bottom)
    for after, place in zip([None, *reversed(order)], reversed(order)):
        places[place] = min(places[place], bottom if after is None else places[after] - gap) if over else places[place]
    return places


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Finite points, averaged in equal runs where they are too many to see."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(points) / MOST_POINTS)
    runs = (
        [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    )
    return [(math.fsum(x for x, _ in run) / len(run), math.fsum(y for _, y in run) / len(run)) for run in runs]

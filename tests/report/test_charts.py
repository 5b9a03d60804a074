# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from medst_trl.report.charts import MAX_POINTS, WIDTH, Bar, bar_chart, displacement, line_chart


SVG = "{http://www.w3.org/2000/svg}"


def draw_lines(lines, **kwargs):
    return ET.fromstring(line_chart("A title", lines, x_label="step", y_label="nats", **kwargs))


def draw_bars(*bars, **kwargs):
    return ET.fromstring(bar_chart("A title", bars, **kwargs))


def texts(svg):
    return [element.text for element in svg.iter(f"{SVG}text")]


def polylines(svg):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in svg.iter(f"{SVG}polyline")
    ]


def test_points_are_drawn_to_scale_from_left_to_right():
    (points,) = polylines(draw_lines({"loss": [(0, 3.0), (50, 2.0), (100, 1.0)]}))
    xs, ys = zip(*points)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys)  # y grows downwards
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_lines_are_labelled_with_name_and_last_value_and_axes_with_units():
    svg = draw_lines({"loss": [(0, 3.0), (10, 0.25)], "other": [(0, 1.0), (10, 0.26)]})
    assert {"A title", "nats", "step", "loss 0.25", "other 0.26"} <= set(texts(svg))
    assert svg.find(f"{SVG}title").text == "A title"
    assert "loss from 3 to 0.25" in svg.find(f"{SVG}desc").text


def test_labels_of_close_lines_do_not_overlap():
    svg = draw_lines({f"line{n}": [(0, 0), (1, 1 + n / 1000)] for n in range(4)})
    positions = sorted(float(e.get("y")) for e in svg.iter(f"{SVG}text") if (e.text or "").startswith("line"))
    assert all(after - before >= 13 for before, after in pairwise(positions))


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)],
        [(1, 2.0), (2, 2.0)],
        [(1, 0.0), (2, 0.0)],
        [(1, 1e-9), (2, 2e-9)],
        [(1, -1e12), (2, 1e12)],
        [(5, 1.0), (5, 2.0)],
        [(1, math.nan), (2, 1.0), (3, math.inf)],
    ],
)
def test_all_points_are_inside_the_chart(points):
    svg = draw_lines({"x": points})
    assert all(0 <= x <= WIDTH and 0 <= y <= 240 for line in polylines(svg) for x, y in line)
    assert "nan" not in ET.tostring(svg, encoding="unicode") and "inf" not in ET.tostring(svg, encoding="unicode")


def test_no_chart_is_drawn_without_points():
    assert line_chart("t", {"x": [], "y": [(1, math.nan)]}, x_label="", y_label="") == ""
    assert bar_chart("t", []) == ""


def test_long_logs_are_averaged():
    (points,) = polylines(draw_lines({"x": [(x, x % 2) for x in range(10_000)]}))
    assert len(points) <= MAX_POINTS
    assert max(y for _, y in points) - min(y for _, y in points) < 1e-6


def test_the_length_of_a_bar_is_proportional_to_its_value():
    svg = draw_bars(Bar("a", 20), Bar("b", 40), limits=(0, 100))
    lengths = [float(rect.get("width")) for rect in svg.iter(f"{SVG}rect")]
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.3)


def test_error_bars_and_marks_are_drawn_to_scale():
    svg = draw_bars(Bar("a", 50, (25, 75)), limits=(0, 100), mark=(50, "baseline"))
    (rect,) = svg.iter(f"{SVG}rect")
    segments = [tuple(float(line.get(key)) for key in ("x1", "y1", "x2", "y2")) for line in svg.iter(f"{SVG}line")]
    left, width = float(rect.get("x")), float(rect.get("width"))
    assert any(
        x1 == pytest.approx(left + width / 2, abs=0.3) and x2 == pytest.approx(left + 1.5 * width, abs=0.3)
        for x1, _, x2, _ in segments
    )
    assert any(x1 == x2 == pytest.approx(left + width, abs=0.3) for x1, _, x2, _ in segments)
    assert "baseline" in texts(svg)
    assert "(25.0 to 75.0)" in svg.find(f"{SVG}desc").text


def test_negative_bars_are_on_the_other_side_of_zero():
    svg = draw_bars(Bar("loss", -10, (-12, -8)), Bar("gain", 10))
    loss, gain = svg.iter(f"{SVG}rect")
    assert float(loss.get("x")) + float(loss.get("width")) == pytest.approx(float(gain.get("x")), abs=0.2)


def test_bars_with_the_same_name_have_the_same_colour():
    svg = draw_bars(Bar("a", 1), Bar("b", 2), Bar("b", 1), Bar("a", 2))
    colors = [re.search(r"--series-\d", rect.get("style"))[0] for rect in svg.iter(f"{SVG}rect")]
    assert colors[0] == colors[3] != colors[1] == colors[2]


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</svg></style>", "\u202e"]
)
def test_names_from_data_cannot_become_markup(hostile):
    lines = line_chart(hostile, {hostile: [(0, 1), (1, 2)]}, x_label=hostile, y_label=hostile, level=(1.5, hostile))
    bars = bar_chart(hostile, [Bar(hostile, 1, (0, 2))], unit=hostile, mark=(1, hostile))
    for svg in (lines, bars):
        tags = {element.tag.removeprefix(SVG) for element in ET.fromstring(svg).iter()}
        assert tags <= {"svg", "title", "desc", "text", "line", "polyline", "rect", "circle"}
        assert "\u202e" not in svg


# --- Curves of a training --------------------------------------------------------------------------------------------


def log(chosen, rejected=None, margin=None):
    """Return a log of five entries, of which only the last belongs to the end of training."""
    figures = {"logratios/chosen": chosen, "logratios/rejected": rejected, "rewards/margins": margin}
    figures = {key: value for key, value in figures.items() if value is not None}
    return [{"step": step, **(figures if step == 5 else dict.fromkeys(figures, 99.0))} for step in range(1, 6)]


def test_displacement_with_a_growing_margin_is_explained():
    text = displacement(log(-0.4, -3.0, 0.26))
    assert text.startswith("Likelihood displacement") and "0.400 nats" in text
    assert "The margin grows because the rejected answers lose even more" in text


@pytest.mark.parametrize(("rejected", "margin"), [(-0.1, -0.03), (-0.4, 0.0), (None, 0.2), (-3.0, None), (None, None)])
def test_a_margin_is_called_growing_only_if_it_grows(rejected, margin):
    text = displacement(log(-0.4, rejected, margin))
    assert text.startswith("Likelihood displacement") and "margin grows" not in text
    assert ("has not grown" in text) == (margin is not None and margin <= 0)


@pytest.mark.parametrize("chosen", [-0.001, -0.049])
def test_a_small_loss_is_not_called_displacement(chosen):
    text = displacement(log(chosen, -0.002, -0.0001))
    assert "about as likely as" in text and "isplacement" not in text and "margin" not in text


def test_chosen_answers_more_likely_than_under_the_reference_are_reported():
    assert "no less likely than under the reference (+0.200 nats)" in displacement(log(0.2, -1.0, 0.12))


def test_a_policy_that_has_not_changed_is_reported():
    assert "The policy has not changed" in displacement(log(0.0, 0.0, 0.0))
    assert "The policy has not changed" not in displacement(log(0.0, -0.1, 0.01))


def test_a_log_without_the_change_of_the_chosen_answers_says_nothing():
    assert displacement([{"step": 1, "loss": 0.7}]) is None

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores as a plain-text table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from .metric import FigurePath, describe_figures, recorded_figures
from .scoring import figures


def format_scores(
    scores: Mapping[str, Any],
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    described: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """
    Format scores with one line per figure: n, value with its interval, the majority baseline, and each control with
    the difference to it.

    Question types have one line each, their exact match if the metric has it; their other figures are in the scores.

    Args:
        scores (`dict`):
            Result of [`~medst_trl.evaluation.scoring.score_vqa`].
        controls (`dict`, *optional*):
            Name of each control to the result of [`~medst_trl.evaluation.controls.compare_vqa`].
        described (sequence of `dict`, *optional*):
            Labels of the figures, as `scores.json` has them. Defaults to those of the registered metric.

    Returns:
        `str`: the table, without a final line break.
    """
    described = describe_figures([scores["variant"]]) if described is None else described
    labels = {tuple(figure["path"]): figure["label"] for figure in described if figure["metric"] == scores["variant"]}
    controls = controls or {}
    by_control = {name: dict(figures(result)) for name, result in controls.items()}
    shown = [
        (path, leaf)
        for path, leaf in figures(scores)
        if leaf["n"] and (path[0] != "question_types" or path[2:] == ("exact_match",))
    ]
    with_majority = any("majority" in leaf for _, leaf in shown)
    header = ["", "n", "%", "95% interval", *(["majority"] if with_majority else [])]
    for name in controls:
        header += [name, f"real - {name}"]
    rows = [header]
    for path, leaf in shown:
        row = [_label(path, labels), str(leaf["n"]), _number(leaf["value"]), _interval(leaf["interval"])]
        if with_majority:
            row.append(_number(leaf.get("majority")))
        for name in controls:
            other = by_control[name].get(path, {})
            difference = f"{_number(other.get('difference'), '+')} {_interval(other.get('difference_interval'), '+')}"
            row += [_number(other.get("value")), difference.strip()]
        rows.append(row)
    return "\n".join([_title(scores), *align(rows)])


def format_file(content: Mapping[str, Any]) -> str:
    """Format all tables of a `scores.json`, below a line that names the data."""
    data = content.get("data") or {}
    revision = data.get("revision") or data.get("sha256")
    source = [content.get("benchmark") or content.get("predictions") or "predictions"]
    source += [f"split {content['split']}"] if "split" in content else []
    source += [f"data {revision[:12]}"] if revision else []
    blocks = [", ".join(source)]
    for variant, scores in content["scores"].items():
        controls = {name: by_variant[variant] for name, by_variant in content["controls"].items()}
        blocks.append(format_scores(scores, controls, recorded_figures(content)))
    if cut_off := content["counts"]["cut_off"]:
        blocks.append(f"{cut_off} answers were cut off at max_new_tokens.")
    if refused := content["counts"].get("refused"):
        blocks.append(f"{refused} questions were refused and count as wrong.")
    return "\n\n".join(blocks)


def _title(scores: Mapping[str, Any]) -> str:
    settings = {
        name: value
        for name, value in scores.items()
        if name not in ("variant", "n", "n_images") and not isinstance(value, Mapping)
    }
    shown = "".join(f", {name.replace('_', ' ')} {value}" for name, value in settings.items())
    images = f" on {scores['n_images']} images" if scores["n_images"] is not None else ""
    return f"{scores['variant']}{shown}: {scores['n']} questions{images}"


def _label(path: FigurePath, labels: Mapping[FigurePath, str]) -> str:
    if path[0] == "question_types":
        return f"  {path[1]}: {labels.get(path[2:], path[-1])}".replace("_", " ")
    return labels.get(path) or ": ".join(path).replace("_", " ")


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1f}"


def _interval(bounds: Sequence[float] | None, sign: str = "") -> str:
    return f"[{_number(bounds[0], sign)}, {_number(bounds[1], sign)}]" if bounds else ""


def align(rows: list[list[str]]) -> list[str]:
    """Lines of a table of cells, the first column aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return lines

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores as a plain-text table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from .metrics import figures


def format_scores(scores: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """
    One line a figure: n, value with its interval, the majority baseline, and each control with the difference to it.

    Question types get one line each, their exact match, in the variant `strict`; the rest of them is in the scores.

    Args:
        scores (`dict`):
            What [`~medst_trl.evaluation.metrics.score_vqa`] returned.
        controls (`dict`, *optional*):
            Name of each control to what [`~medst_trl.evaluation.controls.compare_vqa`] returned.

    Returns:
        `str`: the table, without a final line break.
    """
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
        row = [_name(path), str(leaf["n"]), _number(leaf["value"]), _interval(leaf["interval"])]
        if with_majority:
            row.append(_number(leaf.get("majority")))
        for name in controls:
            other = by_control[name].get(path, {})
            difference = f"{_number(other.get('difference'), '+')} {_interval(other.get('difference_interval'), '+')}"
            row += [_number(other.get("value")), difference.strip()]
        rows.append(row)
    return "\n".join([_title(scores), *align(rows)])


def format_file(content: Mapping[str, Any]) -> str:
    """All tables of a `scores.json`, under the data they are about."""
    data = content.get("data") or {}
    revision = data.get("revision") or data.get("sha256")
    source = [content.get("benchmark") or content.get("predictions") or "predictions"]
    source += [f"split {content['split']}"] if "split" in content else []
    source += [f"data {revision[:12]}"] if revision else []
    blocks = [", ".join(source)]
    for variant, scores in content["scores"].items():
        blocks.append(format_scores(scores, {name: both[variant] for name, both in content["controls"].items()}))
    if cut_off := content["counts"]["cut_off"]:
        blocks.append(f"{cut_off} answers were cut off at max_new_tokens before they ended.")
    return "\n\n".join(blocks)


def _title(scores: Mapping[str, Any]) -> str:
    rule = f", closed rule {scores['closed_rule']}" if "closed_rule" in scores else ""
    images = f" on {scores['n_images']} images" if scores["n_images"] is not None else ""
    return f"{scores['variant']}{rule}: {scores['n']} questions{images}"


def _name(path: Sequence[str]) -> str:
    if path[0] == "question_types":
        return f"  {path[1]}: {path[2]}".replace("_", " ")
    return ": ".join(path).replace("_", " ")


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1f}"


def _interval(bounds: Sequence[float] | None, sign: str = "") -> str:
    return f"[{_number(bounds[0], sign)}, {_number(bounds[1], sign)}]" if bounds else ""


def align(rows: list[list[str]]) -> list[str]:
    """Lines of a table of cells, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return lines

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The rounds of a run, number by number side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .judging import Judging
from .scores import CHARTED, Comparison, figure_name
from .text import number, words


if TYPE_CHECKING:
    from .report import Lap


@dataclass
class Row:
    """A figure and its value in each round, as text; empty where the round has none."""

    name: str
    cells: list[str]


def judge_rows(laps: Sequence["Lap"]) -> list[Row]:
    """What the judge did in each round."""
    judgings = [lap.judging for lap in laps]
    reasons = dict.fromkeys(reason for judging in judgings if judging for reason in judging.dropped)

    def row(name: str, tell: Callable[[Judging], str]) -> Row:
        return Row(name, [tell(judging) if judging else "" for judging in judgings])

    def rate(name: str, key: str) -> Row:
        return row(name, lambda j: _percent(j.statistics[key]))

    rows = [
        row("judge", lambda j: "; ".join(f"{model}, prompt {version}" for model, version in j.models)),
        row("pairs of answers", lambda j: number(j.pairs)),
        row("judged", lambda j: _of(j.kept, j.pairs)),
        *(
            row(f"dropped: {words(reason)}", lambda j, reason=reason: _of(j.dropped.get(reason, 0), j.pairs))
            for reason in reasons
        ),
        rate("verdicts that flip with the order, of pairs with two", "flip_rate"),
        rate("ties, of replies that could be read", "tie_rate"),
        rate("answer shown first wins, of replies with a winner (fair: 50%)", "first_place_rate"),
        rate("longer answer wins, of judged pairs of unequal length", "longer_wins"),
        row("words of the chosen less the rejected answer, mean", lambda j: _signed(j.statistics["length_gap"])),
        row("score of the chosen less the rejected answer, mean", lambda j: _signed(j.statistics["mean_margin"])),
        row("replies", lambda j: number(j.statistics["usage"]["all"]["replies"])),
        row("tokens in prompts", lambda j: number(j.statistics["usage"]["all"]["prompt_tokens"])),
        row("tokens in replies", lambda j: number(j.statistics["usage"]["all"]["completion_tokens"])),
        row("cost", lambda j: "not known" if j.cost is None else f"${j.cost:,.4f}"),
    ]
    return [row for row in rows if any(row.cells)]


def side_by_side(laps: Sequence["Lap"], comparisons: Sequence[Comparison]) -> list[Row]:
    """Judge, training and scores of every round in brief; rows without any value are left out."""
    judgings, ends = [lap.judging for lap in laps], [lap.training.ends if lap.training else {} for lap in laps]
    rows = [
        Row("pairs kept", [number(j.kept) if j else "" for j in judgings]),
        Row("verdicts that flip with the order", [_percent(j.statistics["flip_rate"]) if j else "" for j in judgings]),
    ]
    trained = {
        "loss at the end, nats": "loss",
        "reward margin at the end": "rewards/margins",
        "pairs ordered as the judge has them at the end": "rewards/accuracies",
        "change of the chosen answers, nats": "logratios/chosen",
        "change of the rejected answers, nats": "logratios/rejected",
    }
    rows += [Row(name, [number(end[key], 3) if key in end else "" for end in ends]) for name, key in trained.items()]
    for comparison in comparisons:
        variant = comparison.variants[0]
        for path in CHARTED:
            leaves = [_leaf(comparison, variant, path, lap.round) for lap in laps]
            cells = ["" if leaf is None else number(leaf["value"], 1) for leaf in leaves]
            rows.append(Row(f"{figure_name(path)} on {comparison.benchmark}, %", cells))
    return [row for row in rows if any(row.cells)]


def _of(part: int, total: int) -> str:
    return f"{number(part)} of {number(total)} ({100 * part / total:.1f}%)" if total else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _signed(value: float | None) -> str:
    return number(value, 2, "+")


def _leaf(comparison: Comparison, variant: str, path: tuple[str, ...], round: int) -> dict | None:
    """The figure after a round: of the last policy that was evaluated in it."""
    found = [e.scores.get(variant, {}).get(path) for e in comparison.evaluations if e.stage.round == round]
    return next((leaf for leaf in reversed(found) if leaf and leaf["value"] is not None), None)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a judge did, from `judgements.jsonl`, read once and a line at a time."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from medst_trl.selftrain.judge.judgements import judge_statistics, warnings_of

from .run_folder import Run, StageRun


KEPT = "kept"


@dataclass
class Judging:
    """
    What one judge stage did.

    Attributes:
        statistics (`dict`): See [`~medst_trl.selftrain.judge.judgements.judge_statistics`].
        cost (`float`, *optional*): Of all its replies, in dollars, where the stage knew the prices.
        models (`Counter`): Judging model and prompt version.
        offsets (`dict`): `"kept"` or the reason to drop, to where in the file its lines begin.
    """

    statistics: dict[str, Any] = field(default_factory=dict)
    cost: float | None = None
    models: Counter = field(default_factory=Counter)
    offsets: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def pairs(self) -> int:
        return self.statistics["pairs"]

    @property
    def kept(self) -> int:
        return self.statistics["judged"]

    @property
    def dropped(self) -> dict[str, int]:
        return self.statistics["dropped"]

    @property
    def warnings(self) -> list[str]:
        return warnings_of(self.statistics)


def read_judging(run: Run, stage: StageRun) -> Judging | None:
    """What a judge stage did; None where its file is not there yet."""
    found = Judging()
    found.statistics = judge_statistics(_judgements(run, stage, found))
    usage = stage.counts.get("judge")
    for key in ("usage", "all", "cost"):
        usage = usage.get(key) if isinstance(usage, dict) else None
    found.cost = float(usage) if isinstance(usage, int | float) else None
    return found if found.pairs else None


def _judgements(run: Run, stage: StageRun, found: Judging) -> Iterator[dict[str, Any]]:
    odd = 0
    for offset, row in run.read_lines(stage.folder / "judgements.jsonl"):
        if is_judgement(row):
            found.offsets[row["dropped"] or KEPT].append(offset)
            found.models[str(row.get("model")), str(row.get("prompt_version"))] += 1
            yield row
        else:
            odd += 1
    if odd:
        run.notes.append(f"{stage.name}/judgements.jsonl: {odd:,} lines are no judgements and are left out.")


def is_judgement(row: Mapping[str, Any]) -> bool:
    """Whether a line has what the page reads of it, in the right kinds."""
    answers, scores, dropped, orders = (row.get(key) for key in ("answers", "scores", "dropped", "orders"))
    if not (isinstance(answers, list) and len(answers) == 2 and all(isinstance(answer, str) for answer in answers)):
        return False
    if dropped is None and (not _are_scores(scores) or not _is_place(row.get("verdict"))):
        return False
    known_reason = dropped is None or (isinstance(dropped, str) and dropped not in ("", KEPT))
    return known_reason and isinstance(orders, list) and all(map(_is_order, orders))


def _is_order(order: Any) -> bool:
    if not isinstance(order, dict) or order.get("shown") not in ([0, 1], [1, 0]):
        return False
    usage = order.get("usage", ())
    known_usage = usage is None or (isinstance(usage, dict) and all(type(count) is int for count in usage.values()))
    verdict = order.get("verdict", ())
    return known_usage and "cached" in order and (verdict is None or verdict == "tie" or _is_place(verdict))


def _are_scores(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(score) in (int, float) for score in value)


def _is_place(value: Any) -> bool:
    return type(value) is int and value in (0, 1)

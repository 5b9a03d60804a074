# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a set of judgements says about its judge: flips, ties, love of the first place and of length, cost."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from medst_trl.engines.cost import Prices


MANY_FLIPS = 0.25  # GPT-4 flips on 13% of pairs (lm-sys/FastChat#3911)


class _Bill:
    """What one request took, as an order of a judgement tells it."""

    def __init__(self, order: Mapping[str, Any]):
        self.order, self.cached = order, True


def judge_statistics(judgements: Iterable[Mapping[str, Any]], prices: Prices | None = None) -> dict[str, Any]:
    """
    Count what became of the pairs and how the judge behaves.

    Args:
        judgements (iterable of `dict`):
            As [`PairwiseJudge`] yields them.
        prices (`Prices`, *optional*):
            For the cost.

    Returns:
        `dict`:
        - `pairs`, `judged`, `dropped` (by reason)
        - `flip_rate`: of pairs whose two orders both have a winner, the share where it changes with the order
        - `tie_rate`: of orders that could be read, the share of ties
        - `first_place_rate`: of orders with a winner, the share won by the answer shown first (fair: about 0.5)
        - `length_gap`: words of the chosen less words of the rejected answer, mean over judged pairs
        - `longer_wins`: of judged pairs of unequal length, the share in which the longer answer wins
        - `mean_margin`: of judged pairs, the difference between the scores
        - `cut`, `neutralised`: pairs with a text that was cut, or whose marks were made harmless
        - `usage`: requests with their tokens and cost in dollars, each once however many pairs share it; of all, and
          of those that this run answered. The cost has calls without a reply, which may be on the bill, too.

        A rate without pairs to take it from is None.
    """
    dropped, counts, margins, gaps = Counter(), Counter(), [], []
    bills: dict[str, _Bill] = {}
    for judgement in judgements:
        counts["pairs"] += 1
        counts["cut"] += bool(judgement.get("cut"))
        counts["neutralised"] += bool(judgement.get("neutralised"))
        read = [order for order in judgement["orders"] if order["verdict"] is not None]
        decided = [order for order in read if order["verdict"] != "tie"]
        counts["read"] += len(read)
        counts["ties"] += len(read) - len(decided)
        counts["decided"] += len(decided)
        counts["first_place"] += sum(order["verdict"] == order["shown"][0] for order in decided)
        if len(decided) == 2:
            counts["decided_twice"] += 1
            counts["flips"] += decided[0]["verdict"] != decided[1]["verdict"]
        if judgement["dropped"]:
            dropped[judgement["dropped"]] += 1
        else:
            chosen = judgement["verdict"]
            margins.append(judgement["scores"][chosen] - judgement["scores"][1 - chosen])
            words = [len(answer.split()) for answer in judgement["answers"]]
            gaps.append(words[chosen] - words[1 - chosen])
        for order in judgement["orders"]:
            bill = bills.setdefault(str(order.get("request") or len(bills)), _Bill(order))
            bill.cached = bill.cached and order["cached"]
    unequal = [gap for gap in gaps if gap]
    return {
        "pairs": counts["pairs"],
        "judged": counts["pairs"] - dropped.total(),
        "dropped": dict(dropped.most_common()),
        "flip_rate": _share(counts["flips"], counts["decided_twice"]),
        "tie_rate": _share(counts["ties"], counts["read"]),
        "first_place_rate": _share(counts["first_place"], counts["decided"]),
        "length_gap": _share(sum(gaps), len(gaps)),
        "longer_wins": _share(sum(gap > 0 for gap in unequal), len(unequal)),
        "mean_margin": _share(sum(margins), len(margins)),
        "cut": counts["cut"],
        "neutralised": counts["neutralised"],
        "usage": {
            "all": _usage(list(bills.values()), prices),
            "this_run": _usage([bill for bill in bills.values() if not bill.cached], prices),
        },
    }


def warnings_of(statistics: Mapping[str, Any]) -> list[str]:
    """What in the statistics should make one distrust the judge, in words."""
    lines, first = [], statistics["first_place_rate"]
    if (statistics["flip_rate"] or 0) > MANY_FLIPS:
        place = "first" if first is not None and first > 0.5 else "second"
        lines.append(
            f"the judge changes its mind on {statistics['flip_rate']:.0%} of the pairs when the answers are swapped "
            f"(it prefers the {place} place). Those pairs are dropped; a stronger judge would save them."
        )
    elif statistics["flip_rate"] is None and first is not None and abs(first - 0.5) > 0.15:
        lines.append(
            f"the answer shown first wins {first:.0%} of the pairs and each pair was shown in one order only: with "
            "order=both this would not reach the data."
        )
    if (statistics["longer_wins"] or 0) > 0.75:
        lines.append(
            f"the longer answer wins {statistics['longer_wins']:.0%} of the pairs. A policy trained on them gets "
            "wordy: length_balanced evens it out."
        )
    return lines


def format_statistics(statistics: Mapping[str, Any]) -> str:
    """The statistics as a table for the terminal."""
    usage = statistics["usage"]
    rows = [
        ("pairs", f"{statistics['pairs']:,}"),
        ("judged", f"{statistics['judged']:,}"),
        *((f"dropped: {reason}", f"{number:,}") for reason, number in statistics["dropped"].items()),
        ("flips", _percent(statistics["flip_rate"])),
        ("ties", _percent(statistics["tie_rate"])),
        ("first place wins", _percent(statistics["first_place_rate"])),
        ("longer answer wins", _percent(statistics["longer_wins"])),
        ("length gap, words", "-" if statistics["length_gap"] is None else f"{statistics['length_gap']:+.1f}"),
        ("margin of scores", "-" if statistics["mean_margin"] is None else f"{statistics['mean_margin']:.2f}"),
        *((name, f"{statistics[name]:,}") for name in ("cut", "neutralised") if statistics[name]),
        ("replies (this run)", f"{usage['all']['replies']:,} ({usage['this_run']['replies']:,})"),
        ("tokens in, out", f"{usage['all']['prompt_tokens']:,}, {usage['all']['completion_tokens']:,}"),
    ]
    if usage["all"]["cost"] is not None:
        rows.append(("cost (this run)", f"${usage['all']['cost']:.4f} (${usage['this_run']['cost']:.4f})"))
    return "\n".join(f"  {name:28}{value:>20}" for name, value in rows)


def _usage(bills: list["_Bill"], prices: Prices | None) -> dict[str, Any]:
    tokens = Counter()
    for bill in bills:
        tokens.update(bill.order["usage"] or {})
    cost = None
    if prices is not None and prices.known:
        costs = [bill.order.get("cost") for bill in bills]
        told = zip(costs, bills, strict=True)
        cost = round(sum(prices.cost_of(bill.order) if cost is None else cost for cost, bill in told), 6)
    return {
        "replies": len(bills),
        "prompt_tokens": tokens["prompt_tokens"],
        "completion_tokens": tokens["completion_tokens"],
        "cost": cost,
    }


def _share(part: float, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"

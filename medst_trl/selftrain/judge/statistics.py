# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of a judge's verdicts, and messages about them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.data.source import list_reasons


MIN_UNEQUAL = 20  # fewer pairs of unequal length say nothing about the judge
MANY_FLIPS = 0.25  # GPT-4 flips on 13% of pairs (lm-sys/FastChat#3911)

_ADVICE = {
    "tie": "The judge sees no difference: generate answers at a higher temperature, or from more images.",
    "small_margin": "Lower --min_margin, or generate answers at a higher temperature.",
    "unparsable": "The judge's replies could not be read: choose a stronger judge (--model), or raise --max_tokens.",
    "content_filter": "The judge refuses the content: choose another one (--model).",
    "request_failed": "Calls to the judge failed: each judgement has the reason that its server gave.",
    "flip": "The judge's verdicts follow the order of the answers: choose a stronger judge (--model).",
    "image_in_benchmark": "The images are part of a benchmark: generate from others.",
    "near_copy_in_benchmark": "The images are copies of those of a benchmark: generate from others.",
    "group_in_benchmark": "The patients (or other groups) are part of a benchmark: generate from others.",
}


def judge_statistics(judgements: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Count the outcomes of the pairs, and measure the judge's biases.

    Args:
        judgements (iterable of `dict`):
            Judgements as [`PairwiseJudge`] yields them.

    Returns:
        `dict`:
        - `pairs`, `judged`, `dropped` (by reason)
        - `flip_rate`: of pairs whose two orders both have a winner, the share where it changes with the order
        - `tie_rate`: of orders with a readable reply, the share of ties
        - `first_place_rate`: of orders with a winner, the share won by the answer shown first (fair: about 0.5)
        - `length_gap`: words of the chosen minus words of the rejected answer, mean over judged pairs
        - `longer_wins`: of judged pairs of unequal length, the share in which the longer answer wins
        - `unequal_lengths`: number of those pairs
        - `mean_margin`: difference between the scores, mean over judged pairs
        - `cut`: pairs with a text that was cut
        - `usage`: number of requests with their tokens and cost in dollars, for all (`all`) and for those that this
          run sent (`this_run`). A request counts once, however many pairs share it. The cost includes calls without
          a reply, which may have been charged, too. It is None if the prices are unknown.

        A rate is None if there are no pairs to measure it on.
    """
    counts, dropped, margins, gaps = Counter(), Counter(), [], []
    requests: dict[str, dict[str, Any]] = {}
    for judgement in judgements:
        read = [order for order in judgement["orders"] if order["verdict"] is not None]
        decided = [order for order in read if order["verdict"] != "tie"]
        counts.update(pairs=1, cut=bool(judgement.get("cut")), read=len(read), decided=len(decided))
        counts.update(first_place=sum(order["verdict"] == order["shown"][0] for order in decided))
        if len(decided) == 2:
            counts.update(decided_twice=1, flips=decided[0]["verdict"] != decided[1]["verdict"])
        if judgement["dropped"]:
            dropped[judgement["dropped"]] += 1
        else:
            chosen = judgement["verdict"]
            margins.append(judgement["scores"][chosen] - judgement["scores"][1 - chosen])
            words = [len(answer.split()) for answer in judgement["answers"]]
            gaps.append(words[chosen] - words[1 - chosen])
        for order in judgement["orders"]:
            request = requests.setdefault(str(order.get("request") or len(requests)), {**order, "cached": True})
            request["cached"] = request["cached"] and order["cached"]
    unequal = [gap for gap in gaps if gap]
    return {
        "pairs": counts["pairs"],
        "judged": counts["pairs"] - dropped.total(),
        "dropped": dict(dropped.most_common()),
        "flip_rate": _share(counts["flips"], counts["decided_twice"]),
        "tie_rate": _share(counts["read"] - counts["decided"], counts["read"]),
        "first_place_rate": _share(counts["first_place"], counts["decided"]),
        "length_gap": _share(sum(gaps), len(gaps)),
        "longer_wins": _share(sum(gap > 0 for gap in unequal), len(unequal)),
        "unequal_lengths": len(unequal),
        "mean_margin": _share(sum(margins), len(margins)),
        "cut": counts["cut"],
        "usage": {
            "all": _usage(list(requests.values())),
            "this_run": _usage([request for request in requests.values() if not request["cached"]]),
        },
    }


def _usage(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens, costs = Counter(), [request.get("cost") for request in requests]
    for request in requests:
        tokens.update(request["usage"] or {})
    return {
        "replies": len(requests),
        "prompt_tokens": tokens["prompt_tokens"],
        "completion_tokens": tokens["completion_tokens"],
        "cost": None if None in costs else round(sum(costs), 6),
    }


def _share(part: float, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def warnings_of(statistics: Mapping[str, Any]) -> list[str]:
    """Return warnings about biases of the judge."""
    lines, first = [], statistics["first_place_rate"]
    if (statistics["flip_rate"] or 0) > MANY_FLIPS:
        place = "first" if first is not None and first > 0.5 else "second"
        lines.append(
            f"the judge changes its verdict on {statistics['flip_rate']:.0%} of the pairs when the answers are "
            f"swapped (it prefers the {place} place). Those pairs are dropped; a stronger judge would keep them."
        )
    elif statistics["flip_rate"] is None and first is not None and abs(first - 0.5) > 0.15:
        lines.append(
            f"the answer shown first wins {first:.0%} of the pairs, and each pair was shown in one order only. "
            "order=both keeps this bias out of the data."
        )
    unequal = statistics.get("unequal_lengths", MIN_UNEQUAL)  # missing in records of version 0.1.0
    if (statistics["longer_wins"] or 0) > 0.75 and unequal >= MIN_UNEQUAL:
        lines.append(
            f"the longer answer wins {statistics['longer_wins']:.0%} of the pairs with answers of different lengths, "
            "which teaches the policy to be verbose. length_balanced=true evens it out."
        )
    return lines


def format_statistics(statistics: Mapping[str, Any], left_out: Mapping[str, int] | None = None) -> str:
    """Return the statistics as a table for the terminal, with all pairs left out by reason if they are given."""
    usage = statistics["usage"]
    gap, margin = statistics["length_gap"], statistics["mean_margin"]
    rows = [
        ("pairs", f"{statistics['pairs']:,}"),
        ("judged", f"{statistics['judged']:,}"),
        *((f"dropped: {reason}", f"{number:,}") for reason, number in (left_out or statistics["dropped"]).items()),
        ("flips", _percent(statistics["flip_rate"])),
        ("ties", _percent(statistics["tie_rate"])),
        ("first answer wins", _percent(statistics["first_place_rate"])),
        ("longer answer wins", _percent(statistics["longer_wins"])),
        ("length gap (words)", "-" if gap is None else f"{gap:+.1f}"),
        ("score margin", "-" if margin is None else f"{margin:.2f}"),
        *([("cut", f"{statistics['cut']:,}")] if statistics["cut"] else []),
        ("replies (this run)", f"{usage['all']['replies']:,} ({usage['this_run']['replies']:,})"),
        ("tokens in, out", f"{usage['all']['prompt_tokens']:,}, {usage['all']['completion_tokens']:,}"),
    ]
    if usage["all"]["cost"] is not None:
        rows.append(("cost (this run)", f"${usage['all']['cost']:.4f} (${usage['this_run']['cost']:.4f})"))
    return "\n".join(f"  {name:42}{value:>20}" for name, value in rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def nothing_left(reasons: Mapping[str, int], pairs: int, judgements: Path) -> UserError:
    """
    Return the error for a run that leaves no pair to train on, with advice by the most frequent reason.

    Args:
        reasons (`dict[str, int]`): Number of dropped pairs by reason.
        pairs (`int`): Number of judged pairs.
        judgements (`Path`): The file of all judgements.
    """
    most = max(reasons, key=reasons.get, default="tie").replace("_and_question", "")
    counted = list_reasons(reasons) or "no candidate has two answers"
    return UserError(
        f"None of the {pairs:,} pairs is left to train on ({counted}). "
        f"{_ADVICE.get(most, 'Generate from more images.')} After changing settings or candidates, add "
        "--overwrite: replies that could be read are kept, and you do not pay for them again. The judgements are in "
        f"{judgements}."
    )

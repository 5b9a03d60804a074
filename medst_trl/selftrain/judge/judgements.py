# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers, the judgement on each, and statistics of a judge."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.data.schema import text_of
from medst_trl.data.source import list_reasons
from medst_trl.engines.client import Call, Outcome
from medst_trl.engines.cost import Prices

from .prompt import MAX_CHARS, JudgePrompt, fit


MANY_FLIPS = 0.25  # GPT-4 flips on 13% of pairs (lm-sys/FastChat#3911)

_ADVICE = {
    "tie": "The judge sees no difference: generate answers at a higher temperature, or from more images.",
    "small_margin": "Lower --min_margin, or generate answers at a higher temperature.",
    "flip": "The judge's verdicts follow the order of the answers: choose a stronger judge (--model).",
    "unparsable": "The judge's replies could not be read: choose a stronger judge, or raise --max_tokens.",
    "content_filter": "The judge refuses the content: choose another judge (--model).",
    "image_refused": "The judge refuses the images: choose a judge that accepts images (--model).",
    "request_failed": "Calls to the judge failed: check its server, and run the same command again.",
    "image_in_benchmark": "The images are part of a benchmark: generate from others.",
    "image_and_question_in_benchmark": "The images are part of a benchmark: generate from others.",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """
    Two answers to one question.

    Attributes:
        id (`str`): Id of the candidate, followed by `/<k>` if the candidate has more than two answers.
        candidate (`str`): Id of the candidate.
        image_ids (`tuple[str, ...]`): Image ids of the candidate.
        images (`tuple`): The images in any form that [`RequestImage.read`] accepts.
        history (`tuple[tuple[str, str], ...]`): Role and text of the turns before the question.
        question (`str`): The last user message.
        answers (`tuple[str, str]`): In the candidate's order.
    """

    id: str
    candidate: str
    image_ids: tuple[str, ...]
    images: tuple[Any, ...]
    history: tuple[tuple[str, str], ...]
    question: str
    answers: tuple[str, str]


def pairs_of(candidate: Mapping[str, Any]) -> Iterator[Pair]:
    """
    Yield the pairs of a candidate row: answers (0, 1), (2, 3) and so on. An odd answer is left over.

    The columns are those of [`~medst_trl.data.schema.candidate_features`]; `image_ids` may be missing.
    """
    answers, prompt = candidate["answers"], candidate["prompt"]
    for k in range(len(answers) // 2):
        yield Pair(
            id=candidate["id"] if len(answers) == 2 else f"{candidate['id']}/{k}",
            candidate=candidate["id"],
            image_ids=tuple(candidate.get("image_ids") or ()),
            images=tuple(candidate["images"]),
            history=tuple((message["role"], text_of(message["content"])) for message in prompt[:-1]),
            question=text_of(prompt[-1]["content"]),
            answers=(answers[2 * k], answers[2 * k + 1]),
        )


def make_judgement(
    pair: Pair,
    asked: Sequence[tuple[Call, Outcome]],
    *,
    model: str,
    prompt: JudgePrompt,
    prices: Prices,
    min_margin: float,
) -> dict[str, Any]:
    """
    Return one line of `judgements.jsonl`.

    Args:
        pair ([`Pair`]): The answers that were compared.
        asked (sequence of `(Call, Outcome)`): The outcome of each order; empty if the answers are equal or an image
            cannot be read.
        model (`str`): Name of the judge.
        prompt ([`JudgePrompt`]): How it was asked.
        prices ([`Prices`]): For the cost.
        min_margin (`float`): Minimum difference between the mean scores.
    """
    orders = [_order(call, outcome, prices) for call, outcome in asked]
    scores, verdict, dropped = _decide(orders, [outcome.reason for _, outcome in asked], min_margin)
    if not asked:
        dropped = "tie" if pair.answers[0] == pair.answers[1] else "image_unreadable"
    texts = (pair.question, *pair.answers)
    return {
        "id": pair.id,
        "candidate": pair.candidate,
        "image_ids": list(pair.image_ids),
        "question": pair.question,
        "answers": list(pair.answers),
        "scores": scores,
        "verdict": None if dropped else verdict,
        "dropped": dropped,
        "orders": orders,
        "cut": any(len(text) > MAX_CHARS for text in texts),
        "neutralised": _is_neutralised(prompt, texts),
        "model": model,
        "prompt_version": prompt.name,
    }


def _is_neutralised(prompt: JudgePrompt, texts: tuple[str, str, str]) -> bool:
    """Return whether the prompt changes a text before it shows it, apart from its length."""
    if prompt.shown is None:
        return False
    return prompt.shown(prompt.messages(texts[0], texts[1:], [], [], [])) != tuple(map(fit, texts))


def _order(call: Call, outcome: Outcome, prices: Prices) -> dict[str, Any]:
    """Return the outcome of one order, with scores and verdict by answer instead of by position."""
    last = outcome.attempts[-1] if outcome.attempts else {}
    usage = Counter()
    for charge in outcome.charges:
        usage.update(charge.get("usage") or {})
    order = {
        "shown": list(call.tag),
        "scores": None,
        "verdict": None,
        "reply": last.get("reply") or outcome.detail,
        "usage": dict(usage) or None,
        "cost": round(sum(map(prices.cost_of, outcome.charges)), 9) if prices.known else None,
        "finish_reason": last.get("finish_reason"),
        "cached": outcome.cached,
        "request": call.key,
    }
    if reading := outcome.reading:
        order["scores"] = _by_answer(reading.scores, call.tag)
        order["verdict"] = "tie" if reading.verdict == "tie" else call.tag[reading.verdict]
        if reading.criteria is not None:
            order["criteria"] = {name: _by_answer(pair, call.tag) for name, pair in reading.criteria.items()}
    return order


def _by_answer(scores: tuple[float, float], shown: tuple[int, int]) -> list[float]:
    return [scores[shown.index(answer)] for answer in (0, 1)]


def _decide(
    orders: list[dict[str, Any]], reasons: list[str | None], min_margin: float
) -> tuple[list[float] | None, int | None, str | None]:
    """Return scores, verdict and the reason for dropping the pair, over all its orders."""
    failed = next((reason for reason in reasons if reason), None)
    if failed or not orders:
        return None, None, failed
    scores = [sum(order["scores"][answer] for order in orders) / len(orders) for answer in (0, 1)]
    verdicts = {order["verdict"] for order in orders}
    if {0, 1} <= verdicts:
        return scores, None, "flip"
    if "tie" in verdicts:
        return scores, None, "tie"
    verdict = verdicts.pop()
    if scores[verdict] - scores[1 - verdict] < min_margin:
        return scores, None, "small_margin"
    return scores, verdict, None


def judge_statistics(judgements: Iterable[Mapping[str, Any]], prices: Prices | None = None) -> dict[str, Any]:
    """
    Count the outcomes of the pairs, and measure the judge's biases.

    Args:
        judgements (iterable of `dict`):
            Judgements as [`PairwiseJudge`] yields them.
        prices ([`Prices`], *optional*):
            For the cost.

    Returns:
        `dict`:
        - `pairs`, `judged`, `dropped` (by reason)
        - `flip_rate`: of pairs whose two orders both have a winner, the share where it changes with the order
        - `tie_rate`: of orders with a readable reply, the share of ties
        - `first_place_rate`: of orders with a winner, the share won by the answer shown first (fair: about 0.5)
        - `length_gap`: words of the chosen minus words of the rejected answer, mean over judged pairs
        - `longer_wins`: of judged pairs of unequal length, the share in which the longer answer wins
        - `mean_margin`: difference between the scores, mean over judged pairs
        - `cut`, `neutralised`: pairs with a text that was cut, or whose marks were neutralised
        - `usage`: number of requests with their tokens and cost in dollars, for all (`all`) and for those that this
          run sent (`this_run`). A request counts once, however many pairs share it. The cost includes calls without
          a reply, which may have been charged, too.

        A rate is None if there are no pairs to measure it on.
    """
    counts, dropped, margins, gaps = Counter(), Counter(), [], []
    requests: dict[str, dict[str, Any]] = {}
    for judgement in judgements:
        counts.update(pairs=1, cut=bool(judgement.get("cut")), neutralised=bool(judgement.get("neutralised")))
        counts.update(_count_verdicts(judgement["orders"]))
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
        "tie_rate": _share(counts["ties"], counts["read"]),
        "first_place_rate": _share(counts["first_place"], counts["decided"]),
        "length_gap": _share(sum(gaps), len(gaps)),
        "longer_wins": _share(sum(gap > 0 for gap in unequal), len(unequal)),
        "mean_margin": _share(sum(margins), len(margins)),
        "cut": counts["cut"],
        "neutralised": counts["neutralised"],
        "usage": {
            "all": _usage(list(requests.values()), prices),
            "this_run": _usage([request for request in requests.values() if not request["cached"]], prices),
        },
    }


def _count_verdicts(orders: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the verdicts of the orders of one pair."""
    read = [order for order in orders if order["verdict"] is not None]
    decided = [order for order in read if order["verdict"] != "tie"]
    twice = len(decided) == 2
    return {
        "read": len(read),
        "ties": len(read) - len(decided),
        "decided": len(decided),
        "first_place": sum(order["verdict"] == order["shown"][0] for order in decided),
        "decided_twice": twice,
        "flips": twice and decided[0]["verdict"] != decided[1]["verdict"],
    }


def _usage(requests: list[dict[str, Any]], prices: Prices | None) -> dict[str, Any]:
    tokens, costs = Counter(), []
    for request in requests:
        tokens.update(request["usage"] or {})
        if prices is not None and prices.known:
            costs.append(prices.cost_of(request) if request.get("cost") is None else request["cost"])
    return {
        "replies": len(requests),
        "prompt_tokens": tokens["prompt_tokens"],
        "completion_tokens": tokens["completion_tokens"],
        "cost": round(sum(costs), 6) if prices is not None and prices.known else None,
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
    if (statistics["longer_wins"] or 0) > 0.75:
        lines.append(
            f"the longer answer wins {statistics['longer_wins']:.0%} of the pairs, which teaches the policy to be "
            "verbose. length_balanced=true evens it out."
        )
    return lines


def format_statistics(statistics: Mapping[str, Any]) -> str:
    """Return the statistics as a table for the terminal."""
    usage = statistics["usage"]
    gap, margin = statistics["length_gap"], statistics["mean_margin"]
    rows = [
        ("pairs", f"{statistics['pairs']:,}"),
        ("judged", f"{statistics['judged']:,}"),
        *((f"dropped: {reason}", f"{number:,}") for reason, number in statistics["dropped"].items()),
        ("flips", _percent(statistics["flip_rate"])),
        ("ties", _percent(statistics["tie_rate"])),
        ("first answer wins", _percent(statistics["first_place_rate"])),
        ("longer answer wins", _percent(statistics["longer_wins"])),
        ("length gap (words)", "-" if gap is None else f"{gap:+.1f}"),
        ("score margin", "-" if margin is None else f"{margin:.2f}"),
        *((name, f"{statistics[name]:,}") for name in ("cut", "neutralised") if statistics[name]),
        ("replies (this run)", f"{usage['all']['replies']:,} ({usage['this_run']['replies']:,})"),
        ("tokens in, out", f"{usage['all']['prompt_tokens']:,}, {usage['all']['completion_tokens']:,}"),
    ]
    if usage["all"]["cost"] is not None:
        rows.append(("cost (this run)", f"${usage['all']['cost']:.4f} (${usage['this_run']['cost']:.4f})"))
    return "\n".join(f"  {name:28}{value:>20}" for name, value in rows)


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
    most = max(reasons, key=reasons.get, default="tie")
    counted = list_reasons(reasons) or "no candidate has two answers"
    return UserError(
        f"None of the {pairs:,} pairs is left to train on ({counted}). "
        f"{_ADVICE.get(most, 'Generate from more images.')} After changing settings or candidates, add "
        "--overwrite true: replies already paid for are kept, and judging the same pairs again costs nothing. The "
        f"judgements are in {judgements}."
    )

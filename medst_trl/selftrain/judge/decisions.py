# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""From the judge's answers to a judgement: the better answer, or the reason why the pair is dropped."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from medst_trl.engines.cost import Prices
from medst_trl.engines.requests import Answer, Request

from .pairs import Pair
from .prompt import MAX_CHARS, JudgePrompt, fit


if TYPE_CHECKING:
    from .pairwise import PairwiseJudge


def make_judgement(
    pair: Pair, asked: list[tuple[Request, Answer]], judge: "PairwiseJudge", problem: str | None = None
) -> dict[str, Any]:
    """
    One line of `judgements.jsonl`.

    Args:
        pair (`Pair`): What was compared.
        asked (`list` of `(Request, Answer)`): What became of each order.
        judge (`PairwiseJudge`): With its model, prompt version and least margin.
        problem (`str`, *optional*): Why nothing was asked.
    """
    orders = [_order(request, answer, judge.prices) for request, answer in asked]
    scores, verdict, dropped = _decide(orders, [answer.reason for _, answer in asked], judge.min_margin)
    if pair.answers[0] == pair.answers[1]:
        dropped = "tie"
    dropped = problem or dropped
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
        "neutralised": _is_neutralised(judge.prompt, texts),
        "model": judge.model,
        "prompt_version": judge.prompt.name,
    }


def _is_neutralised(prompt: JudgePrompt, texts: tuple[str, str, str]) -> bool:
    """Whether the prompt shows a text otherwise than it is, apart from the length."""
    if prompt.shown is None:
        return False
    return prompt.shown(prompt.messages(texts[0], texts[1:], [], [], [])) != tuple(map(fit, texts))


def _order(request: Request, answer: Answer, prices: Prices) -> dict[str, Any]:
    """One way of showing a pair, with scores and verdict by answer instead of by place."""
    last = answer.attempts[-1] if answer.attempts else {}
    usage = Counter()
    for call in answer.charges:
        usage.update(call.get("usage") or {})
    order = {
        "shown": list(request.shown),
        "scores": None,
        "verdict": None,
        "reply": last.get("reply") or answer.detail,
        "usage": dict(usage) or None,
        "cost": round(sum(map(prices.cost_of, answer.charges)), 9) if prices.known else None,
        "finish_reason": last.get("finish_reason"),
        "cached": answer.cached,
        "request": request.key,
    }
    if answer.reading is not None:
        reading = answer.reading
        order["scores"] = _by_answer(reading.scores, request.shown)
        order["verdict"] = "tie" if reading.verdict == "tie" else request.shown[reading.verdict]
        if reading.criteria is not None:
            order["criteria"] = {name: _by_answer(pair, request.shown) for name, pair in reading.criteria.items()}
    return order


def _by_answer(places: tuple[float, float], shown: tuple[int, int]) -> list[float]:
    return [places[shown.index(answer)] for answer in (0, 1)]


def _decide(
    orders: list[dict[str, Any]], reasons: list[str | None], min_margin: float
) -> tuple[list[float] | None, int | None, str | None]:
    """Scores, verdict and reason for dropping, over the orders of a pair."""
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

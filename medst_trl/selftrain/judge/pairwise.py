# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The pairwise judge: a stronger vision-language model compares two answers, in both orders."""

import asyncio
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from typing import Any

from medst_trl.base.errors import UserError, number_of
from medst_trl.base.settings import check_bounds, check_choice
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.schema import text_of
from medst_trl.engines.calls import Call, Outcome, api_key
from medst_trl.engines.client import Client
from medst_trl.engines.cost import Budget, ReplyCache, RequestSize, image_tokens
from medst_trl.engines.images import RequestImage
from medst_trl.engines.responses import AcceptedFields

from .prompt import JUDGE_PROMPTS, MAX_CHARS, fit
from .settings import JudgeSettings


ORDERS = {"both": ((0, 1), (1, 0)), "single": ((0, 1),)}
CALLS_PER_SLOT = 6  # calls in flight per concurrent call, so that slots stay busy while some wait for a retry
LOCAL_URL = "http://localhost/v1"  # of a judge in this process; nothing is sent there
# Messages for a run in which the judge refuses everything.
_ADVICE = {
    "content_filter": "The judge refuses every pair for its content. Choose another --model",
    "image_refused": "The judge refuses every image: {detail}. Choose a --model that accepts images",
    "bad_request": "The judge's server refuses every request: {detail}. Look at one with --dry_run",
    "unparsable": "None of the judge's replies could be read; the last one began with: {detail}. Choose a stronger "
    "--model, another --prompt_version, or more --max_tokens",
}
_AT_LEAST = {"image_size": 16, "max_tokens": 8, "min_margin": 0, "temperature": 0}


@dataclass(frozen=True)
class Estimate:
    """
    What judging will take, before the first call.

    Attributes:
        pairs (`int`): Pairs to compare.
        calls (`int`): Calls still to be made.
        cached (`int`): Requests whose replies are in the cache.
        input_tokens, output_tokens (`int`): Tokens of the calls still to be made.
        cost (`float` or `None`): Dollars for these calls; None if the prices are unknown.
        paid (`float`): Dollars that earlier calls for the same requests cost or, if the server did not report their
            usage, may have cost.
    """

    pairs: int
    calls: int
    cached: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    paid: float

    def __str__(self) -> str:
        cost = "cost unknown (set the judge's prices)" if self.cost is None else f"about ${self.cost:.2f}"
        return (
            f"{self.pairs:,} pairs, {number_of(f'{self.calls:,}', 'call')} to make ({self.cached:,} replies are "
            f"cached), about {self.input_tokens:,} tokens in and {self.output_tokens:,} out, {cost}"
        )


@dataclass(eq=False, repr=False, kw_only=True)
class PairwiseJudge(JudgeSettings):
    """
    Compare the answers of each candidate with a vision-language model behind an OpenAI-compatible API.

    By default each pair is shown in both orders, and only a verdict that both orders agree on counts. Ties, small
    margins, flips and refusals are dropped with their reason. Replies are cached, so that nothing is paid for twice.

    Args:
        model, base_url, prompt_version, order, min_margin, ...:
            The fields of [`JudgeSettings`]. Only `model` is required.
        captions (`dict`, *optional*):
            Reference captions by `image_id`, for prompts that show them.
        local (`Callable`, *optional*):
            A judge in this process that replaces the server: takes the body of a request, returns the reply. Its calls
            are free.
        held_out (`Callable`, *optional*):
            Takes a candidate and returns the reason to drop its pairs without asking about them, or None. See
            [`~medst_trl.selftrain.preferences.why_held_out`].
        http_client (`httpx2.AsyncClient`, *optional*):
            Replaces the client's own, for proxies and tests.

    Attributes:
        events (`Counter`):
            Calls of the last run, and their problems.

    Raises:
        UserError: for invalid settings.

    Example:

    ```python
    from medst_trl import PairwiseJudge

    judge = PairwiseJudge("gpt-4o", max_cost=5.0, cache_dir="runs/judge")
    for judgement in judge(candidates):  # rows with id, images, prompt, answers
        print(judgement["id"], judgement["verdict"], judgement["scores"], judgement["dropped"])
    ```
    """

    captions: Mapping[str, str] | None = None
    local: Callable[[dict[str, Any]], str] | None = None
    held_out: Callable[[Mapping[str, Any]], str | None] = lambda candidate: None
    http_client: Any = None

    def __post_init__(self):
        if not self.model:
            raise UserError("No judge model is set. Set model to its name on the server.")
        self.captions = dict(self.captions or {})
        self.prompt = JUDGE_PROMPTS.get(self.prompt_version)
        if self.local is not None:
            self.base_url = LOCAL_URL
            self.price_per_million_input_tokens = self.price_per_million_output_tokens = 0.0
        self.prices = self.prices_of(self.model)
        self.events: Counter[str] = Counter()
        check_choice("order", self.order, ORDERS)
        if self.captions and "captions" not in self.prompt.uses:
            able = [prompt.name for prompt in JUDGE_PROMPTS.values() if "captions" in prompt.uses]
            raise UserError(
                f"The judge prompt {self.prompt.name!r} does not show reference captions. Set prompt_version to one "
                f"of {', '.join(able)}, or leave out the captions."
            )
        check_bounds(self, at_least=_AT_LEAST)
        self.check_calls(self.model)
        self.cache = ReplyCache(self.cache_dir)

    def __call__(self, candidates: Iterable[Mapping[str, Any]], offline: bool = False) -> Iterator[dict[str, Any]]:
        """
        Judge candidates and yield the judgements in their order.

        Args:
            candidates (iterable of `dict`):
                Rows with `id`, `images` (PIL, bytes, paths or `{"bytes", "path"}`), `prompt` (messages, the question
                last), `answers` (two or more: (0, 1), (2, 3) and so on are compared), and optionally `image_ids`.
            offline (`bool`, *optional*, defaults to `False`):
                Make no calls: every reply must be in the cache, as after [`read_batch`].

        Yields:
            `dict`: a judgement. `id` (of the pair), `candidate`, `image_ids`, `question`, `answers`; `verdict` (0 or
            1: the better answer; None if the pair is dropped), `scores` (of both answers, means over the orders),
            `dropped` (None or a reason: `flip`, `tie`, `small_margin`, `content_filter`, `image_refused`,
            `image_unreadable`, `unparsable`, `request_failed`, or one of `held_out`); `orders`, one for each order in
            which the pair was shown (`shown`, `scores` and `verdict` by answer, `criteria`, `reply`, `usage`, `cost`,
            `finish_reason`, `cached`, and `request`, which pairs with the same request share); `cut`, `neutralised`
            (whether a text was); `model`, `prompt_version`.

        Raises:
            UserError: if the run has to stop: no key, no credit, unknown model, no server, the budget used up. All
                replies so far are in the cache.
        """
        if not offline:
            self.check_key()
        if offline or self.max_cost is not None:  # what earlier runs left is counted before the first call
            candidates = candidates if isinstance(candidates, Sized) else list(candidates)
        failures = BatchFailures(self, candidates) if offline else None
        spent = 0.0 if self.max_cost is None else self.estimate(candidates).paid
        try:
            yield from self._run(candidates, spent, failures)
        finally:
            self.cache.close()

    @property
    def parameters(self) -> dict[str, Any]:
        """The body of every request, with no messages yet. Bodies of earlier versions have the same order."""
        own = {"model": self.model, "messages": [], "temperature": self.temperature}
        format = {"response_format": self.prompt.response_format} if self.prompt.response_format else {}
        return {**self.prompt.defaults, **own, **format, "max_tokens": self.max_tokens}

    def check_key(self) -> None:
        """Raise a [`UserError`] if the API key is missing."""
        api_key(self.key_variable, self.base_url)

    def estimate(self, candidates: Iterable[Mapping[str, Any]]) -> Estimate:
        """Estimate what judging `candidates` will take."""
        pairs, likely, calls = 0, {}, set()  # tokens of each request by its key: pairs may share requests
        for _, requests in self.requests(candidates):
            pairs += 1
            likely |= {request.key: request.size.likely for request in requests}
            calls |= {request.key for request in requests if self.cache.is_open(request.key, request.read)}
        paid = sum(sum(map(self.prices.cost_of, self.cache.charges(key))) for key in likely)
        tokens = sum(likely[key] for key in calls)
        output = len(calls) * min(self.max_tokens, self.prompt.reply_tokens)
        cost = self.prices.cost(tokens, output) if self.prices.known else None
        return Estimate(pairs, len(calls), len(likely) - len(calls), tokens, output, cost, paid)

    def requests(self, candidates: Iterable[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], list[Call]]]:
        """
        Yield each pair with its requests, one for each order: none if its answers are equal, which is a tie, if an
        image cannot be read, or if `held_out` gives a reason, which is in `dropped`. A pair has the first keys of a
        judgement: `id`, `candidate`, `image_ids`, `question` and two `answers` in the candidate's order. Answers (0,
        1), (2, 3) and so on are a pair; an odd one is left over.
        """
        for candidate in candidates:
            answers, reason = candidate["answers"], self.held_out(candidate)
            for k in range(len(answers) // 2):
                pair = {
                    "id": candidate["id"] if len(answers) == 2 else f"{candidate['id']}/{k}",
                    "candidate": candidate["id"],
                    "image_ids": list(candidate.get("image_ids") or ()),
                    "question": text_of(candidate["prompt"][-1]["content"]),
                    "answers": list(answers[2 * k : 2 * k + 2]),
                }
                pair |= {"dropped": reason} if reason else {}
                requests = []
                if not reason and answers[2 * k] != answers[2 * k + 1]:
                    with suppress(ImageProblem):
                        images = [RequestImage.read(image, self.image_size) for image in candidate["images"]]
                        requests = [self._request(candidate, pair, shown, images) for shown in ORDERS[self.order]]
                yield pair, requests

    def _request(
        self, candidate: Mapping[str, Any], pair: dict[str, Any], shown: tuple[int, int], images: list[RequestImage]
    ) -> Call:
        answers = [pair["answers"][place] for place in shown]
        earlier = candidate["prompt"][:-1] if "history" in self.prompt.uses else ()
        history = [(turn["role"], text_of(turn["content"])) for turn in earlier]
        captions = [self.captions[name] for name in pair["image_ids"] if name in self.captions]
        tokens = sum(image_tokens(self.model, *image.size) for image in images)

        def body(urls: list[str]) -> dict[str, Any]:
            messages = self.prompt.messages(pair["question"], answers, urls, history, captions)
            return self.parameters | {"messages": messages}

        # The key is made of the body with the hashes of the images. Changing it loses every existing cache.
        named = body([f"{image.sha256}@{self.image_size}" for image in images])
        return Call(
            key=sha256(json.dumps(named, sort_keys=True).encode()).hexdigest(),
            reminder=self.prompt.reminder,
            tag=shown,
            body=lambda: body([image.data_url for image in images]),
            size=RequestSize.of(named["messages"], tokens),
            read=self.prompt.read,
        )

    def _run(
        self, candidates: Iterable[Mapping[str, Any]], spent: float, failures: "BatchFailures | None"
    ) -> Iterator[dict[str, Any]]:
        """Yield judgements in the order of the pairs, and raise an error after all that are finished."""
        client = Client(
            self.model, self, base_url=self.base_url, cache=self.cache, offline=failures is not None, advice=_ADVICE,
            budget=Budget(self.prices, self.max_cost, spent),
            http_client=self.http_client if self.local is None else _local_client(self.local),
        )  # fmt: skip
        self.events = client.events
        queue: deque[tuple[dict[str, Any], list[Call]]] = deque()  # pairs that are not judged yet, with their calls
        outcomes: dict[Call, Outcome] = {}
        missing: set[str] = set()  # keys of calls without a result
        is_read = False  # any reply

        def calls() -> Iterator[Call]:
            for pair, requests in self.requests(candidates):
                queue.append((pair, requests))
                yield from requests

        def finished() -> Iterator[dict[str, Any]]:
            while queue and outcomes.keys() >= set(queue[0][1]):
                pair, requests = queue.popleft()
                yield self._judgement(pair, [(call, outcomes.pop(call)) for call in requests])

        for call, outcome in client.run(calls(), at_once=CALLS_PER_SLOT * self.concurrency):
            outcomes[call] = outcome
            is_read = is_read or outcome.reading is not None
            if failures and outcome.reason == "request_failed":
                if error := failures.refused.get(call.key):
                    outcome.detail = error.detail
                else:
                    missing.add(call.key)
            yield from finished()
        yield from finished()
        if missing:
            raise failures.missing_results(missing, client)
        if failures and failures.refused and not is_read:
            raise failures.refused_twice()

    def _judgement(self, pair: dict[str, Any], asked: Sequence[tuple[Call, Outcome]]) -> dict[str, Any]:
        """Return one line of `judgements.jsonl` from the outcome of each order; there is none without requests."""
        if any(outcome.error and outcome.error.kind == "image_unreadable" for _, outcome in asked):
            asked = []
        orders = [self._order(call, outcome) for call, outcome in asked]
        scores, dropped = self._decide(orders, [outcome.reason for _, outcome in asked])
        if not asked:
            dropped = "tie" if pair["answers"][0] == pair["answers"][1] else pair.get("dropped", "image_unreadable")
        texts = (pair["question"], *pair["answers"])
        return pair | {
            "scores": scores,
            "verdict": None if dropped else orders[0]["verdict"],
            "dropped": dropped,
            "orders": orders,
            "cut": any(len(text) > MAX_CHARS for text in texts),
            "neutralised": self._is_neutralised(texts),
            "model": self.model,
            "prompt_version": self.prompt.name,
        }

    def _is_neutralised(self, texts: tuple[str, ...]) -> bool:
        """Return whether the prompt changes the question or an answer, apart from its length."""
        shown = self.prompt.shown and self.prompt.shown(self.prompt.messages(texts[0], texts[1:], [], [], []))
        return shown is not None and shown != tuple(map(fit, texts))

    def _order(self, call: Call, outcome: Outcome) -> dict[str, Any]:
        """Return the outcome of one order, with scores and verdict by answer instead of by position."""
        last = outcome.attempts[-1] if outcome.attempts else {}
        usage = Counter()
        for charge in outcome.charges:
            usage.update(charge.get("usage") or {})
        cost = sum(map(self.prices.cost_of, outcome.charges))
        reading = outcome.reading
        order = {
            "shown": list(call.tag),
            "scores": reading and _by_answer(reading.scores, call.tag),
            "verdict": reading and ("tie" if reading.verdict == "tie" else call.tag[reading.verdict]),
            "reply": last.get("reply") or outcome.detail,
            "usage": dict(usage) or None,
            "cost": round(cost, 9) if self.prices.known else None,
            "finish_reason": last.get("finish_reason"),
            "cached": outcome.cached,
            "request": call.key,
        }
        if reading and reading.criteria is not None:
            order["criteria"] = {name: _by_answer(pair, call.tag) for name, pair in reading.criteria.items()}
        return order

    def _decide(self, orders: list[dict], reasons: list[str | None]) -> tuple[list[float] | None, str | None]:
        """Return the mean scores, and the reason for dropping the pair, over all its orders."""
        failed = next(filter(None, reasons), None)
        if failed or not orders:
            return None, failed
        scores = [sum(order["scores"][answer] for order in orders) / len(orders) for answer in (0, 1)]
        verdicts = {order["verdict"] for order in orders}
        if len(verdicts) > 1 or "tie" in verdicts:
            return scores, "flip" if {0, 1} <= verdicts else "tie"
        winner = verdicts.pop()
        return scores, "small_margin" if scores[winner] - scores[1 - winner] < self.min_margin else None


class BatchFailures:
    """
    What the failed results of the Batch API say about a judge's requests.

    Args:
        judge ([`PairwiseJudge`]):
            The judge, with the results in its cache.
        candidates (sized iterable of `dict`):
            What it judges. Failures of other requests, perhaps to another model, do not count.

    Attributes:
        fields ([`AcceptedFields`]):
            The fields that the server takes.
        errors (`dict[str, CallError]`):
            The last error of each request by its key.
        refused (`dict[str, CallError]`):
            Those of requests that the server refused twice for the same reason: another file would not help.
    """

    def __init__(self, judge: PairwiseJudge, candidates: Iterable[Mapping[str, Any]]):
        self.fields, self.errors, self.refused = AcceptedFields(), {}, {}
        if not judge.cache.failures:
            return
        keys = {request.key for _, requests in judge.requests(candidates) for request in requests}
        failures, reasons = [item for item in judge.cache.failures.values() if item[1] in keys], set()
        for _, items in groupby(failures, key=itemgetter(0)):
            sent = self.fields.apply(judge.parameters)  # each file has what those before it taught
            for _, key, error in items:
                reason = key, re.sub(r"\w*\d\w*", "", error.detail)  # without ids
                is_final = not self.fields.learn(error, sent) and error.action == "drop" and reason in reasons
                if is_final and not judge.cache.attempts(key):
                    self.refused[key] = error
                self.errors[key] = error
                reasons.add(reason)
            # Models that refuse max_tokens refuse a temperature, too; a file to learn that takes up to a day.
            self.fields.no_temperature |= self.fields.renamed

    def missing_results(self, keys: Collection[str], client: Client) -> UserError:
        """Return the error for requests without a result."""
        errors = [self.errors[key] for key in keys if key in self.errors]
        reasons = Counter(error.detail.rstrip(".") for error in errors)
        reasons["not in these files"] += len(keys) - len(errors)
        listed = "; ".join(f"{number_of(number, 'time')}: {reason}" for reason, number in (+reasons).most_common(5))
        steps = dict.fromkeys(f"{client.explain(error)} " for error in errors if error.action == "stop")
        changes = f", which {self.fields}" if str(self.fields) else ""
        calls = f"{len(keys):,} calls have" if len(keys) > 1 else "1 call has"
        return UserError(
            f"{calls} no result yet ({listed}). {''.join(steps)}All replies are kept. Write the missing requests with "
            f"--write_batch{changes}, or send them live by leaving out --read_batch."
        )

    def refused_twice(self) -> UserError:
        """Return the error if the server has replied to no request, and refused the remaining ones."""
        reason = Counter(error.detail for error in self.refused.values()).most_common(1)[0][0]
        return UserError(
            f"The server refused {number_of(len(self.refused), 'request')} twice: {reason.rstrip('.')}. Another "
            "file would not help. Change the setting that it names (such as --max_tokens or --image_size), or choose "
            "another --model. Or send the requests live by leaving out --write_batch and --read_batch."
        )


def _by_answer(scores: tuple[float, float], shown: tuple[int, int]) -> list[float]:
    return [scores[shown.index(answer)] for answer in (0, 1)]


def _local_client(judge: Callable[[dict[str, Any]], str]) -> Any:
    """Return an HTTP client whose requests a function answers. Tokens are counted in words."""
    from httpx2 import AsyncClient, MockTransport, Response

    async def respond(request: Any) -> Response:
        body = json.loads(request.content)
        reply = await asyncio.to_thread(judge, body)
        words = sum(len(str(message["content"]).split()) for message in body["messages"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
        usage = {"prompt_tokens": words, "completion_tokens": len(reply.split())}
        return Response(200, json={"choices": [choice], "usage": usage})

    return AsyncClient(transport=MockTransport(respond))

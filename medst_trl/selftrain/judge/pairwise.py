# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The pairwise judge: a stronger vision-language model compares two answers, in both orders."""

import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from typing import Any

from medst_trl.base.errors import UserError, number_of
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.schema import text_of
from medst_trl.engines.calls import Budget, Call, Outcome, ReplyCache, RequestSize, api_key, image_tokens
from medst_trl.engines.client import Client
from medst_trl.engines.images import RequestImage
from medst_trl.engines.responses import AcceptedFields, CallError

from .judge import JUDGE_PROMPTS, MAX_CHARS, ORDERS, JudgeSettings, Reading, winner


CALLS_PER_SLOT = 6  # calls in flight per concurrent call, so that slots stay busy while some wait for a retry
# Messages for a run in which the judge refuses everything.
_ADVICE = {
    "content_filter": "The judge refuses every pair for its content. Choose another --model",
    "bad_request": "The judge's server refuses every request: {detail}. Look at one with --dry_run. If the server "
    "takes no images, choose another --model",
    "unparsable": "None of the judge's replies could be read; the last one began with: {detail}. Choose a stronger "
    "--model, another --prompt_version, or more --max_tokens",
}


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
            A judge in this process that replaces the server, see [`LocalJudge.open`]. Its calls are free.
        held_out (`Callable`, *optional*):
            Takes a candidate and returns the reason to drop its pairs without asking about them, or None. See
            [`~medst_trl.selftrain.preferences.benchmark_reason`].

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
    local: Callable[[Mapping[str, Any]], Sequence[float]] | None = None
    held_out: Callable[[Mapping[str, Any]], str | None] = lambda candidate: None

    def __post_init__(self):
        self.captions = dict(self.captions or {})
        self.prompt = JUDGE_PROMPTS.get(self.prompt_version)
        if self.local is not None:
            self.model = self.model or "local"
            self.price_per_million_input_tokens = self.price_per_million_output_tokens = 0.0
        self.check_judge(is_local=self.local is not None)
        self.prices = self.prices_of(self.model)
        self.events: Counter[str] = Counter()
        if self.captions and "captions" not in self.prompt.uses:
            able = [prompt.name for prompt in JUDGE_PROMPTS.values() if "captions" in prompt.uses]
            raise UserError(
                f"The judge prompt {self.prompt.name!r} does not show reference captions. Set prompt_version to one "
                f"of {', '.join(able)}, or leave out the captions."
            )
        self.cache = ReplyCache(self.cache_dir if self.local is None else None)

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
            `dropped` (None or a reason: `flip`, `tie`, `small_margin`, `content_filter`, `image_unreadable`,
            `unparsable`, `request_failed`, or one of `held_out`); `orders`, one for each order in
            which the pair was shown (`shown`, `scores` and `verdict` by answer, `criteria`, `reply`, `usage`, `cost`,
            `finish_reason`, `cached`, and `request`, which pairs with the same request share); `cut` (whether a text
            was); `model`, `prompt_version`.

        Raises:
            UserError: if the run has to stop: no key, no credit, unknown model, no server, the budget used up. All
                replies so far are in the cache.
        """
        if self.local is not None:
            yield from self._judge_here(candidates)
            return
        if not offline:
            self.check_key()
        if offline or self.max_cost is not None:  # what earlier runs left is counted before the first call
            candidates = candidates if isinstance(candidates, Sized) else list(candidates)
        yield from self._run(candidates, offline)

    @property
    def request_fields(self) -> dict[str, Any]:
        """The fields of every request, with empty `messages`."""
        own = {"model": self.model, "messages": [], "temperature": self.temperature}
        response_format = {"response_format": self.prompt.response_format} if self.prompt.response_format else {}
        return {**self.prompt.defaults, **own, **response_format, "max_tokens": self.max_tokens}

    def check_key(self) -> None:
        """Raise a [`UserError`] if the API key of a server is missing."""
        if self.local is None:
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
        Yield each pair with its requests, one for each order. There are no requests if the answers are equal (a tie),
        if an image cannot be read, or if `held_out` returns a reason, which the pair then has as `dropped`. A pair has
        the first keys of a judgement: `id`, `candidate`, `image_ids`, `question` and two `answers` in the candidate's
        order. Answers (0, 1), (2, 3) and so on are a pair; an odd one is left over.
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
            return self.request_fields | {"messages": messages}

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

    def _judge_here(self, candidates: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the judgements of a judge in this process."""
        for pair, requests in self.requests(candidates):
            asked = []
            for call in requests:
                scores = tuple(map(float, self.local(pair | {"answers": [pair["answers"][n] for n in call.tag]})))
                asked.append((call, Outcome(Reading(scores, winner(scores)), None, [], cached=False)))
            yield self._judgement(pair, asked)

    def _run(self, candidates: Iterable[Mapping[str, Any]], offline: bool) -> Iterator[dict[str, Any]]:
        """Yield judgements in the order of the pairs, and raise an error after all that are finished."""
        spent = 0.0 if self.max_cost is None else self.estimate(candidates).paid
        client = Client(
            self.model, self, base_url=self.base_url, cache=self.cache, offline=offline, advice=_ADVICE,
            budget=Budget(self.prices, self.max_cost, spent),
        )  # fmt: skip
        self.events = client.events
        fields, refused = self.batch_failures(candidates) if offline else (AcceptedFields(), {})
        queue: deque[tuple[dict[str, Any], list[Call]]] = deque()  # pairs that are not judged yet, with their calls
        outcomes: dict[Call, Outcome] = {}
        missing: dict[str, CallError] = {}  # of calls without a result

        def calls() -> Iterator[Call]:
            for pair, requests in self.requests(candidates):
                queue.append((pair, requests))
                yield from requests

        def finished() -> Iterator[dict[str, Any]]:
            while queue and outcomes.keys() >= set(queue[0][1]):
                pair, requests = queue.popleft()
                yield self._judgement(pair, [(call, outcomes.pop(call)) for call in requests])

        for call, outcome in client.run(calls(), max_in_flight=CALLS_PER_SLOT * self.concurrency):
            outcomes[call] = outcome
            if offline and outcome.reason == "request_failed" and call.key not in refused:
                missing[call.key] = outcome.error
            yield from finished()
        yield from finished()
        if missing:
            raise _missing_results(missing.values(), fields, client)
        if refused and not client.has_read:
            raise UserError(client.explain(next(iter(refused.values()))))

    def batch_failures(self, candidates: Iterable[Mapping[str, Any]]) -> tuple[AcceptedFields, dict[str, CallError]]:
        """
        Return what the failed results of the Batch API say about the requests for these candidates: the fields that
        the server accepts, and by key the errors of requests that it refused for another reason than a field.
        """
        fields, refused, failures = AcceptedFields(), {}, self.cache.failures
        requests = self.requests(candidates) if failures else ()
        for call in chain.from_iterable(calls for _, calls in requests):
            for error, without in failures.get(call.key, ()):
                if not fields.learn(error, self.request_fields.keys() - without) and error.action == "drop":
                    refused[call.key] = error
        # Models that refuse `max_tokens` also refuse `temperature`. Finding out would take another batch, up to a day.
        if "max_tokens" in fields.refused:
            fields.refused.add("temperature")
        return fields, refused

    def _judgement(self, pair: dict[str, Any], asked: Sequence[tuple[Call, Outcome]]) -> dict[str, Any]:
        """Return one line of `judgements.jsonl` from the outcomes of `asked`, which is empty without requests."""
        if any(outcome.error and outcome.error.kind == "image_unreadable" for _, outcome in asked):
            asked = []
        orders = [self._order(call, outcome) for call, outcome in asked]
        scores, dropped = self._decide(orders, [outcome.reason for _, outcome in asked])
        if not asked:
            dropped = "tie" if pair["answers"][0] == pair["answers"][1] else pair.get("dropped", "image_unreadable")
        return pair | {
            "scores": scores,
            "verdict": None if dropped else orders[0]["verdict"],
            "dropped": dropped,
            "orders": orders,
            "cut": any(len(text) > MAX_CHARS for text in (pair["question"], *pair["answers"])),
            "model": self.model,
            "prompt_version": self.prompt.name,
        }

    def _order(self, call: Call, outcome: Outcome) -> dict[str, Any]:
        """Return the outcome of one order, with scores and verdict by answer instead of by position."""
        last = outcome.attempts[-1] if outcome.attempts else {}
        usage = Counter()
        charges = self.cache.charges(call.key)
        for charge in charges:
            usage.update(charge.get("usage") or {})
        cost = sum(map(self.prices.cost_of, charges), 0.0)
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
        better = verdicts.pop()
        return scores, "small_margin" if scores[better] - scores[1 - better] < self.min_margin else None


def _by_answer(scores: tuple[float, float], shown: tuple[int, int]) -> list[float]:
    return [scores[shown.index(answer)] for answer in (0, 1)]


def _missing_results(errors: Collection[CallError], fields: AcceptedFields, client: Client) -> UserError:
    """Return the error for requests without a result of the Batch API."""
    reasons = Counter(error.detail.rstrip(".") for error in errors)
    listed = "; ".join(f"{number_of(number, 'time')}: {reason}" for reason, number in reasons.most_common(5))
    steps = dict.fromkeys(f"{client.explain(error)} " for error in errors if error.action == "stop")
    changes = f", which leaves out {', '.join(sorted(fields.refused))}" if fields.refused else ""
    calls = f"{len(errors):,} calls have" if len(errors) > 1 else "1 call has"
    return UserError(
        f"{calls} no result yet ({listed}). {''.join(steps)}All replies are kept. Write the missing requests with "
        f"--write_batch{changes}, or send them live by leaving out --read_batch."
    )

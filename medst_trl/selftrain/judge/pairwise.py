# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The pairwise judge: a stronger vision-language model compares two answers, in both orders."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from hashlib import sha256
from queue import SimpleQueue
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_bounds
from medst_trl.data.image_formats import ImageProblem
from medst_trl.engines.client import Call, Client, Stopped, api_key, open_portal
from medst_trl.engines.cost import Budget, ReplyCache, RequestSize, image_tokens, prices_of

from .images import JudgeImage
from .judgements import Pair, make_judgement, pairs_of
from .prompt import JUDGE_PROMPTS
from .server import JudgeSettings


ORDERS = {"both": ((0, 1), (1, 0)), "single": ((0, 1),)}
PAIRS_PER_SLOT = 3  # pairs in progress per concurrent call: those that wait for a retry leave no slot empty
# Messages for a run in which the judge refuses everything.
_ADVICE = {
    "content_filter": "The judge refuses every pair for its content. Choose another --model",
    "image_refused": "The judge refuses every image: {detail}. Choose a --model that sees images",
    "bad_request": "The judge's server refuses every request: {detail}. Look at one with --dry_run true",
    "unparsable": "None of the judge's replies could be read; the last one began with: {detail}. Choose a stronger "
    "--model, another --prompt_version, or more --max_tokens",
}
_AT_LEAST = {
    "concurrency": 1, "image_size": 16, "max_tokens": 8, "min_margin": 0, "temperature": 0, "max_cost": 0,
    "max_retries": 0, "timeout": 0.01,
}  # fmt: skip


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
            f"{self.pairs:,} pairs, {self.calls:,} calls to make ({self.cached:,} replies are cached), about "
            f"{self.input_tokens:,} tokens in and {self.output_tokens:,} out, {cost}"
        )


@dataclass(eq=False, repr=False)
class PairwiseJudge(JudgeSettings):
    """
    Compare the answers of each candidate with a vision-language model behind an OpenAI-compatible API.

    By default each pair is shown in both orders, and only a verdict that both orders agree on counts. Ties, small
    margins, flips and refusals are dropped with their reason. Replies are cached, so that nothing is paid for twice.

    Args:
        model, base_url, prompt_version, order, min_margin, ...:
            The fields of [`JudgeSettings`] in their order. Only `model` is required.
        captions (`dict`, *optional*):
            Reference captions by `image_id`, for prompts that show them.
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
    http_client: Any = None

    def __post_init__(self):
        if not self.model:
            raise UserError("The judge has no name. Set model to its name on the server.")
        self.captions = dict(self.captions or {})
        self.prompt = JUDGE_PROMPTS.get(self.prompt_version)
        prices = self.price_per_million_input_tokens, self.price_per_million_output_tokens
        self.prices = prices_of(self.model, *prices)
        self.events: Counter[str] = Counter()
        self._check()
        Budget(self.prices, self.max_cost)
        self.cache = ReplyCache(self.cache_dir)

    def _check(self) -> None:
        if self.order not in ORDERS:
            raise UserError(f"Unknown order {self.order!r}. Choose one of {', '.join(ORDERS)}.")
        if self.captions and "captions" not in self.prompt.uses:
            able = [prompt.name for prompt in JUDGE_PROMPTS.values() if "captions" in prompt.uses]
            raise UserError(
                f"The judge prompt {self.prompt.name!r} does not show reference captions. Set prompt_version to one "
                f"of {', '.join(able)}, or leave out the captions."
            )
        check_bounds(self, at_least=_AT_LEAST)

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
            `image_unreadable`, `unparsable`, `request_failed`); `orders`, one for each order in which the pair was
            shown (`shown`, `scores` and `verdict` by answer, `criteria`, `reply`, `usage`, `cost`, `finish_reason`,
            `cached`, and `request`, which pairs with the same request share); `cut`, `neutralised` (whether a text
            was); `model`, `prompt_version`.

        Raises:
            UserError: if the run has to stop: no key, no credit, unknown model, no server, the budget used up. All
                replies so far are in the cache.
        """
        spent = 0.0
        if not offline:
            self.check_key()
            if self.max_cost is not None:  # known before the first call, or earlier runs would be overlooked
                candidates = candidates if isinstance(candidates, Sized) else list(candidates)
                spent = self.estimate(candidates).paid
        try:
            yield from self._run(candidates, offline, spent)
        finally:
            self.cache.close()

    def check_key(self) -> None:
        """Raise a [`UserError`] if the API key is missing."""
        api_key(self.key_variable, self.base_url)

    def estimate(self, candidates: Iterable[Mapping[str, Any]]) -> Estimate:
        """Estimate what judging `candidates` will take."""
        counts, seen, paid = Counter(), set(), 0.0
        for _, requests in self.requests(candidates):
            counts["pairs"] += 1
            for request in requests:
                if request.key in seen:
                    continue
                seen.add(request.key)
                attempts = self.cache.attempts(request.key)
                counts["cached" if attempts else "calls"] += 1
                counts["input"] += 0 if attempts else request.size.likely
                paid += sum(map(self.prices.cost_of, self.cache.charges(request.key)))
        output = counts["calls"] * min(self.max_tokens, self.prompt.reply_tokens)
        cost = self.prices.cost(counts["input"], output) if self.prices.known else None
        return Estimate(counts["pairs"], counts["calls"], counts["cached"], counts["input"], output, cost, paid)

    def requests(self, candidates: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Pair, list[Call]]]:
        """Yield each pair with its requests, none if there is nothing to ask or an image cannot be read."""
        for candidate in candidates:
            for pair in pairs_of(candidate):
                try:
                    yield pair, self.requests_of(pair)
                except ImageProblem:
                    yield pair, []

    def requests_of(self, pair: Pair) -> list[Call]:
        """
        Return the requests of one pair, one for each order; none for two equal answers, which are a tie.

        Raises:
            ImageProblem: if an image cannot be opened.
        """
        if pair.answers[0] == pair.answers[1]:
            return []
        images = [JudgeImage.read(image, self.image_size) for image in pair.images]
        tokens = sum(image_tokens(self.model, *image.size) for image in images)
        return [self._request(pair, shown, images, tokens) for shown in ORDERS[self.order]]

    def _request(self, pair: Pair, shown: tuple[int, int], images: Sequence[JudgeImage], tokens: int) -> Call:
        answers = [pair.answers[place] for place in shown]
        history = pair.history if "history" in self.prompt.uses else ()
        captions = [self.captions[name] for name in pair.image_ids if name in self.captions]

        def body(urls: list[str]) -> dict[str, Any]:
            messages = self.prompt.messages(pair.question, answers, urls, history, captions)
            body = {"model": self.model, "messages": messages, "temperature": self.temperature}
            if self.prompt.response_format:
                body["response_format"] = self.prompt.response_format
            return {**self.prompt.defaults, **body, "max_tokens": self.max_tokens}

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

    def _run(self, candidates: Iterable[Mapping[str, Any]], offline: bool, spent: float) -> Iterator[dict[str, Any]]:
        """Yield judgements in the order of the pairs, and raise an error after all that are finished."""
        client = Client(
            self.model, self.cache, Budget(self.prices, self.max_cost, spent), base_url=self.base_url,
            key_variable=self.key_variable, concurrency=self.concurrency, timeout=self.timeout,
            max_retries=self.max_retries, offline=offline, advice=_ADVICE, http_client=self.http_client,
        )  # fmt: skip
        self.events = client.events
        pairs = enumerate(pair for candidate in candidates for pair in pairs_of(candidate))
        finished, waiting, in_flight, due = SimpleQueue(), {}, 0, 0
        with open_portal(client) as portal:
            while True:
                while in_flight < PAIRS_PER_SLOT * self.concurrency and client.stop_error is None:
                    index, pair = next(pairs, (None, None))
                    if pair is None:
                        break
                    future = portal.start_task_soon(self._judge, client, pair)
                    future.add_done_callback(lambda done, index=index: finished.put((index, done)))
                    in_flight += 1
                if not in_flight:
                    break
                index, done = finished.get()
                in_flight -= 1
                waiting[index] = done.result()
                while waiting.get(due) is not None:
                    yield waiting.pop(due)
                    due += 1
        if client.stop_error is not None:
            raise client.stop_error
        if client.missing:
            raise UserError(
                f"{client.missing:,} calls have no result yet. The others are kept: write the missing ones with "
                "--write_batch, or send them live by leaving out --read_batch."
            )

    async def _judge(self, client: Client, pair: Pair) -> dict[str, Any] | None:
        """Return the judgement on a pair, or `None` if the run is being stopped."""
        problem, calls, answers = None, [], []
        try:
            calls = await asyncio.to_thread(self.requests_of, pair)
            # Wait for all of them, even if one is stopped: calls in progress are paid for.
            answers = await asyncio.gather(*map(client.ask, calls), return_exceptions=True)
            if errors := [answer for answer in answers if isinstance(answer, BaseException)]:
                raise errors[0]
        except ImageProblem:
            problem, calls, answers = "image_unreadable", [], []
        except Stopped:
            return None
        return make_judgement(
            pair, list(zip(calls, answers, strict=True)), model=self.model, prompt=self.prompt, prices=self.prices,
            min_margin=self.min_margin, problem=problem,
        )  # fmt: skip

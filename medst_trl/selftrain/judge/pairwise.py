# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which of two answers is better? A stronger vision-language model says, both ways round."""

import json
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import ImageProblem
from medst_trl.engines.client import JudgeClient, api_key
from medst_trl.engines.cost import Budget, Prices, RequestSize, image_tokens, prices_of
from medst_trl.engines.reply_cache import ReplyCache
from medst_trl.engines.requests import Request

from .images import JudgeImage
from .pairs import Pair, pairs_of
from .prompt import JUDGE_PROMPTS
from .replies import parse_scores
from .run import JudgeRun, in_order


__all__ = ["Estimate", "PairwiseJudge", "parse_scores"]

ORDERS = {"both": ((0, 1), (1, 0)), "single": ((0, 1),)}


@dataclass(frozen=True)
class Estimate:
    """
    What judging will take, before the first call.

    Attributes:
        pairs (`int`): Pairs to compare.
        calls (`int`): Calls that are still to be made.
        cached (`int`): Replies that are there already.
        input_tokens, output_tokens (`int`): Of the calls to be made.
        cost (`float` or `None`): Dollars for them; None where the prices are unknown.
        paid (`float`): Dollars that earlier calls for these requests cost or, where no server told, may have cost.
    """

    pairs: int
    calls: int
    cached: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    paid: float

    def __str__(self) -> str:
        cost = "cost unknown (give the judge's prices)" if self.cost is None else f"about ${self.cost:.2f}"
        return (
            f"{self.pairs:,} pairs, {self.calls:,} calls to make ({self.cached:,} replies are there), about "
            f"{self.input_tokens:,} tokens in and {self.output_tokens:,} out, {cost}"
        )


class PairwiseJudge:
    """
    Compares the two answers of each candidate with a vision-language model behind an OpenAI-compatible API.

    By default each pair is shown in both orders, and only a verdict that survives the swap counts. Ties, small
    margins, flips and refusals are dropped with their reason. Replies are kept in a cache, so that what was paid for
    is never asked again.

    Args:
        model (`str`):
            Name of the judge at its server.
        base_url (`str`, *optional*):
            The server, for example `http://localhost:8000/v1` for vLLM. None: `OPENAI_BASE_URL`, else OpenAI.
        prompt_version (`str`, *optional*, defaults to `"rubric"`):
            `"rubric"`: a score for each criterion and a verdict, as JSON. `"paper"`: the prompt of STLLaVA-Med
            (https://huggingface.co/papers/2406.19973, Fig. 5), two scores on one line.
        order (`str`, *optional*, defaults to `"both"`):
            `"both"` or, as in the paper, `"single"`: candidates' first answer first.
        min_margin (`float`, *optional*, defaults to `1.0`):
            Pairs whose scores (means over the orders) lie closer together are dropped.
        captions (`dict`, *optional*):
            Reference captions by `image_id`, which the rubric shows to the judge.
        concurrency (`int`, *optional*, defaults to `16`):
            Calls under way at most; fewer while the server pushes back.
        max_cost (`float`, *optional*):
            US dollars that these judgements may cost, earlier runs included. Never overdrawn.
        price_per_million_input_tokens, price_per_million_output_tokens (`float`, *optional*):
            US dollars. None: the known prices of the model, if it is a known one.
        image_size (`int`, *optional*, defaults to `768`):
            Longest side in pixels of an image as sent.
        temperature (`float`, *optional*, defaults to `0.0`):
            Of the judge.
        max_tokens (`int`, *optional*, defaults to `600`):
            Of a reply.
        cache_dir (`str`, *optional*):
            Folder of `judge_cache.jsonl`. A reply is known by model name, prompt, images and settings, not by
            `base_url`: give different models different names. None keeps replies in memory.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds for one call.
        max_retries (`int`, *optional*, defaults to `6`):
            Repetitions of a call after 429, 5xx, a time-out or a broken connection.
        key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the API key. A server of one's own needs none.
        http_client (`httpx2.AsyncClient`, *optional*):
            Instead of the client's own, for proxies and tests.

    Attributes:
        events (`Counter`):
            Calls of the last run, and what went wrong with them.

    Raises:
        UserError: for settings that cannot work.

    Example:

    ```python
    from medst_trl import PairwiseJudge

    judge = PairwiseJudge("gpt-4o", max_cost=5.0, cache_dir="runs/judge")
    for judgement in judge(candidates):  # rows with id, images, prompt, answers
        print(judgement["id"], judgement["verdict"], judgement["scores"], judgement["dropped"])
    ```
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        prompt_version: str = "rubric",
        order: str = "both",
        min_margin: float = 1.0,
        captions: Mapping[str, str] | None = None,
        concurrency: int = 16,
        max_cost: float | None = None,
        price_per_million_input_tokens: float | None = None,
        price_per_million_output_tokens: float | None = None,
        image_size: int = 768,
        temperature: float = 0.0,
        max_tokens: int = 600,
        cache_dir: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 6,
        key_variable: str = "OPENAI_API_KEY",
        http_client: Any = None,
    ):
        self.model, self.prompt, self.order = model, JUDGE_PROMPTS.get(prompt_version), order
        self.min_margin, self.image_size = min_margin, image_size
        self.temperature, self.max_tokens, self.max_cost = temperature, max_tokens, max_cost
        self.captions = dict(captions or {})
        self.prices: Prices = prices_of(model, price_per_million_input_tokens, price_per_million_output_tokens)
        self.concurrency = concurrency
        self.events: Counter[str] = Counter()
        self._check(timeout, max_retries)
        Budget(self.prices, max_cost)
        self.cache = ReplyCache(cache_dir)
        self._connection = {
            "base_url": base_url, "key_variable": key_variable, "timeout": timeout, "max_retries": max_retries,
            "http_client": http_client,
        }  # fmt: skip

    def __call__(self, candidates: Iterable[Mapping[str, Any]], offline: bool = False) -> Iterator[dict[str, Any]]:
        """
        Judge candidates, in their order.

        Args:
            candidates (iterable of `dict`):
                Rows with `id`, `images` (PIL, bytes, paths or `{"bytes", "path"}`), `prompt` (messages, the question
                last), `answers` (two or more: (0, 1), (2, 3) and so on are compared), and perhaps `image_ids`.
            offline (`bool`, *optional*, defaults to `False`):
                Make no calls: every reply has to be in the cache, as after [`read_batch`].

        Yields:
            `dict`: a judgement. `id` (of the pair), `candidate`, `image_ids`, `question`, `answers`; `verdict` (0 or
            1: the better answer; None where the pair is dropped), `scores` (of both answers, means over the orders),
            `dropped` (None or a reason: `flip`, `tie`, `small_margin`, `content_filter`, `image_refused`,
            `image_unreadable`, `unparsable`, `request_failed`); `orders`, one for each way the pair was shown
            (`shown`, `scores` and `verdict` by answer, `criteria`, `reply`, `usage`, `cost`, `finish_reason`,
            `cached`, and `request`, which is the same where pairs share a request);
            `cut`, `neutralised` (whether a text was); `model`, `prompt_version`.

        Raises:
            UserError: if the run has to stop: no key, no credit, no such model, no server, the budget used up. Every
                reply so far is in the cache.
        """
        if not offline:
            self.check_key()
        spent = 0.0
        if (
            self.max_cost is not None and not offline
        ):  # known before the first call, or earlier runs could be overlooked
            candidates = candidates if isinstance(candidates, Sized) else list(candidates)
            spent = self.estimate(candidates).paid
        results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        run = JudgeRun(iter(candidates), lambda: self.client(offline, spent), self, results.put)
        thread = threading.Thread(target=run.start, name="medst-judge", daemon=True)
        thread.start()
        try:
            yield from in_order(results)
        finally:
            run.cancel()
            thread.join()
            self.cache.close()

    def check_key(self) -> None:
        """Raise the [`UserError`] of a missing API key before anything is done."""
        api_key(self._connection["key_variable"], self._connection["base_url"])

    def requests(self, candidates: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Pair, list[Request]]]:
        """What would be asked about each pair, in each order; nothing where no question is due."""
        for candidate in candidates:
            for pair in pairs_of(candidate):
                try:
                    yield pair, self.requests_of(pair)
                except ImageProblem:
                    yield pair, []

    def estimate(self, candidates: Iterable[Mapping[str, Any]]) -> Estimate:
        """What judging `candidates` will take."""
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

    def requests_of(self, pair: Pair) -> list[Request]:
        """
        The requests of one pair; none for two equal answers, which are a tie without asking.

        Raises:
            ImageProblem: if an image cannot be opened.
        """
        if pair.answers[0] == pair.answers[1]:
            return []
        images = [JudgeImage.read(image, self.image_size) for image in pair.images]
        tokens = sum(image_tokens(self.model, *image.size) for image in images)
        captions = [self.captions[name] for name in pair.image_ids if name in self.captions]
        return [self._request(pair, shown, images, tokens, captions) for shown in ORDERS[self.order]]

    def _request(
        self, pair: Pair, shown: tuple[int, int], images: list[JudgeImage], tokens: int, captions: list[str]
    ) -> Request:
        answers = [pair.answers[place] for place in shown]
        history = pair.history if "history" in self.prompt.uses else ()

        def body(urls: list[str]) -> dict[str, Any]:
            messages = self.prompt.messages(pair.question, answers, urls, history, captions)
            body = {"model": self.model, "messages": messages, "temperature": self.temperature}
            if self.prompt.response_format:
                body["response_format"] = self.prompt.response_format
            return {**self.prompt.defaults, **body, "max_tokens": self.max_tokens}

        named = body([f"{image.sha256}@{self.image_size}" for image in images])
        return Request(
            key=sha256(json.dumps(named, sort_keys=True).encode()).hexdigest(),
            reminder=self.prompt.reminder,
            shown=shown,
            body=lambda: body([image.data_url for image in images]),
            size=RequestSize.of(named["messages"], tokens),
            read=self.prompt.read,
        )

    def client(self, offline: bool = False, spent: float = 0.0) -> JudgeClient:
        """A client for one event loop, of whose budget so much is spent."""
        budget = Budget(self.prices, self.max_cost, spent)
        return JudgeClient(
            self.model, self.cache, budget, self.max_tokens, concurrency=self.concurrency, offline=offline,
            **self._connection,
        )  # fmt: skip

    def _check(self, timeout: float, max_retries: int) -> None:
        if not self.model:
            raise UserError("No judge is named: give model, as its server calls it.")
        if self.order not in ORDERS:
            raise UserError(f"Unknown order {self.order!r}. Choose one of {', '.join(ORDERS)}.")
        if self.captions and "captions" not in self.prompt.uses:
            able = [prompt.name for prompt in JUDGE_PROMPTS.values() if "captions" in prompt.uses]
            raise UserError(
                f"The judge prompt {self.prompt.name!r} does not show reference captions. Set prompt_version to one "
                f"of {', '.join(able)}, or leave out the captions."
            )
        least = {
            "concurrency": (self.concurrency, 1),
            "image_size": (self.image_size, 16),
            "max_tokens": (self.max_tokens, 8),
            "min_margin": (self.min_margin, 0),
            "temperature": (self.temperature, 0),
            "max_cost": (self.max_cost, 0),
            "max_retries": (max_retries, 0),
            "timeout": (timeout, 0.01),
        }
        for name, (value, lowest) in least.items():
            if value is not None and not value >= lowest:
                raise UserError(f"{name} is {value}; it has to be at least {lowest}.")

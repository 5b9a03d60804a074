# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Calls to the judge: each until it is answered, given up or the run has to stop; every answer paid for is kept."""

import asyncio
import json
import math
import os
import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .client_errors import Trouble, clean, trouble_of
from .cost import Budget, RequestSize
from .pace import Pace, wait_before
from .reply_cache import ReplyCache
from .requests import Answer, Dialect, Request, Stopped, row_of_body


if TYPE_CHECKING:
    from openai import AsyncOpenAI

RE_ASKS = 2  # further attempts at a request whose reply cannot be read
GIVE_UP_AFTER = 8  # calls given up in a row, all for one cause, before the run stops
RECENTLY = 10.0  # seconds; a server that answered others since is well, and a failed call need not wait long
LONGEST_RETRY_AFTER = 300.0  # seconds; a server that asks for more is told of, not waited for


class JudgeClient:
    """
    Asks a judge over an OpenAI-compatible API. One instance serves one event loop.

    Args:
        model (`str`):
            For messages; the bodies of requests carry it.
        cache (`ReplyCache`):
            Where replies are looked for and kept.
        budget (`Budget`):
            What may be spent.
        max_tokens (`int`):
            Of a reply, for the budget.
        base_url (`str`, *optional*):
            Of the API. None: `OPENAI_BASE_URL`, else OpenAI's.
        key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the API key.
        concurrency (`int`, *optional*, defaults to `16`):
            Calls under way at most.
        timeout (`float`, *optional*, defaults to `120`):
            Seconds for one call.
        max_retries (`int`, *optional*, defaults to `6`):
            Repetitions of a call that failed for a passing cause.
        offline (`bool`, *optional*, defaults to `False`):
            Make no calls: what the cache lacks is counted in `missing`.
        http_client (`httpx2.AsyncClient`, *optional*):
            For tests.
    """

    def __init__(
        self,
        model: str,
        cache: ReplyCache,
        budget: Budget,
        max_tokens: int,
        base_url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 6,
        offline: bool = False,
        http_client: Any = None,
    ):
        self.model, self.cache, self.budget, self.max_tokens = model, cache, budget, max_tokens
        self.variable, self.max_retries, self.offline, self.timeout = key_variable, max_retries, offline, timeout
        self.pace = Pace(concurrency)
        self.events: Counter[str] = Counter()  # calls, and what went wrong with them
        self.missing = 0
        self.stop_error: UserError | None = None
        self._stopping = asyncio.Event()
        self._settled = asyncio.Condition()
        self._locks: dict[str, asyncio.Lock] = {}
        self._dialect = Dialect()
        self._ever_read = False  # in this run or an earlier one
        self._works = False  # a reply was read in this run
        self._held: dict[str, list[dict[str, Any]]] = {}  # refusals until then, by the key of their request
        self._last_answer = -math.inf
        self._in_a_row: Counter[str] = Counter()
        self._secret = None if offline else api_key(key_variable, base_url)
        self._openai = None if offline else self._connect(base_url, http_client)
        self.base_url = clean(str(self._openai.base_url if self._openai else base_url))

    def _connect(self, base_url: str | None, http_client: Any) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        return AsyncOpenAI(
            api_key=self._secret, base_url=base_url, timeout=self.timeout, max_retries=0, http_client=http_client
        )

    async def close(self) -> None:
        if self._openai is not None:
            await self._openai.close()

    async def ask(self, request: Request) -> Answer:
        """
        The judge's answer, from the cache if it is there.

        Raises:
            Stopped: if the run has to end; `stop_error` says why.
        """
        lock = self._locks.setdefault(request.key, asyncio.Lock())
        async with lock:  # the same question twice at a time is asked once
            answer = await self._ask(request)
            answer.charges = self.cache.charges(request.key)
            return answer

    async def _ask(self, request: Request) -> Answer:
        attempts = self.cache.attempts(request.key) + self._held.get(request.key, [])
        cached = True
        while True:
            answer = self._settle(request, attempts, cached)
            if answer is not None:
                return answer
            if self.offline:
                self.missing += 1
                return Answer(None, "request_failed", attempts, cached, "no result")
            cached = False
            try:
                row = await self._call_until_answered(request, attempts)
            except Trouble as trouble:
                if trouble.reason == "request_failed":
                    return Answer(None, trouble.reason, attempts, cached, trouble.detail)
                row = {"error": trouble.reason, "detail": trouble.detail}
            row = {"key": request.key, "attempt": len(attempts)} | row
            self._keep(row)
            attempts = [*attempts, row]

    def _keep(self, row: dict[str, Any]) -> None:
        """Into the cache, but a refusal only once the server has shown that it can judge at all."""
        if "error" in row and not self._works:
            self._held[row["key"]] = [row]
        else:
            self.cache.add(row)

    def _keep_held(self) -> None:
        self._works = True
        for [row] in self._held.values():
            self.cache.add(row)
        self._held.clear()

    def _settle(self, request: Request, attempts: list[dict[str, Any]], cached: bool) -> Answer | None:
        """What the attempts so far amount to; None where another one is due."""
        if not attempts:
            return None
        if "error" in attempts[-1]:
            return Answer(None, attempts[-1]["error"], attempts, cached, attempts[-1].get("detail") or "")
        reading = request.read(attempts[-1]["reply"])
        if reading is None and len(attempts) <= RE_ASKS and not self.offline:
            return None
        if reading is None:
            if not cached:
                self._gave_up(Trouble("unparsable", clean(attempts[-1]["reply"][:100], self._secret)))
            return Answer(None, "unparsable", attempts, cached)
        self._ever_read = True
        if not cached:
            self._keep_held()
        return Answer(reading, None, attempts, cached)

    async def _call_until_answered(self, request: Request, attempts: list[dict[str, Any]]) -> dict[str, Any]:
        """One reply, whatever it says. Raises `Trouble` when the call is given up."""
        body = await asyncio.to_thread(request.body)
        at_most = request.size.at_most
        if attempts:  # told that its reply was no good, a judge at temperature 0 has a reason to write another
            last = {"role": "assistant", "content": attempts[-1]["reply"][:2000] or "(nothing)"}
            reminder = {"role": "user", "content": request.reminder}
            body = body | {"messages": [*body["messages"], last, reminder]}
            at_most = at_most + RequestSize.of([last, reminder], 0).at_most
        attempt = 0
        while True:
            sent = {}
            try:
                async with self.pace.slot():
                    sent = self._dialect.apply(body)
                    row = await self._paid_call(request.key, at_most, sent)
            except Trouble as trouble:
                if self._dialect.learn(trouble, sent):
                    continue
                self.events[trouble.kind] += 1
                if trouble.action == "stop":
                    await self._explain_and_stop(trouble)
                    raise Stopped from None
                if trouble.action == "drop" or attempt >= self.max_retries:
                    self._gave_up(trouble)
                    raise
                if (trouble.retry_after or 0) > LONGEST_RETRY_AFTER:
                    self._stop(
                        f"The judge's server asks to wait {trouble.retry_after / 60:.0f} minutes before the next call "
                        f"({trouble.detail}). What was judged is kept: run the same command again then."
                    )
                    raise Stopped from None
                well = time.monotonic() - self._last_answer < RECENTLY
                await self._sleep(wait_before(min(attempt, 1) if well else attempt, trouble.retry_after))
                attempt += 1
            else:
                return row

    async def _paid_call(self, key: str, input_tokens: int, body: dict[str, Any]) -> dict[str, Any]:
        """One HTTP call inside a slot, within the budget. What it cost is kept, so that later runs know of it."""
        if self._stopping.is_set():
            raise Stopped
        at_most = {"at_most": {"prompt_tokens": input_tokens, "completion_tokens": self.max_tokens}}
        reserved = self.budget.prices.cost_of(at_most)
        await self._reserve(reserved)
        try:
            row = await self._send(body)
        except Trouble as trouble:
            if trouble.usage:
                self._lost(key, trouble.kind, {"usage": trouble.usage}, reserved)
            elif trouble.charged:
                self._lost(key, trouble.kind, at_most, reserved)
            else:
                self.budget.settle(reserved, 0)
            if trouble.is_pushback:
                self.pace.pushed_back(trouble.retry_after)
            raise
        except BaseException:  # cancelled: the server may have been at work
            self._lost(key, "cancelled", at_most, reserved)
            raise
        else:
            row = row if row["usage"] else row | at_most
            self.budget.settle(reserved, self.budget.prices.cost_of(row))
            self.pace.went_well()
            self._last_answer = time.monotonic()
            self._in_a_row.pop("server", None)
            return row
        finally:
            async with self._settled:
                self._settled.notify_all()

    def _lost(self, key: str, kind: str, bill: dict[str, Any], reserved: float) -> None:
        """A call left no reply, but may be on the bill."""
        if "usage" in bill:
            self.budget.settle(reserved, self.budget.prices.cost_of(bill))
        else:
            self.budget.leave_open(reserved)
        self.cache.add_lost({"key": key, "lost": kind} | bill)

    async def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        import openai

        self.events["calls"] += 1
        try:
            response = await asyncio.wait_for(
                self._openai.chat.completions.with_raw_response.create(**body),
                self.timeout,  # httpx2's own limits start anew with every byte
            )
            content = response.content
        except TimeoutError:
            raise Trouble("timeout", f"no answer within {self.timeout:g} s", charged=True) from None
        except openai.APIError as error:
            raise trouble_of(error, self._secret) from None
        return self._row(content)

    def _row(self, content: bytes) -> dict[str, Any]:
        """A reply as the cache keeps it, or the trouble that came under status 200."""
        try:
            return row_of_body(json.loads(content), self._secret)
        except (ValueError, RecursionError):
            start = content[:60].decode("utf-8", "replace")
            detail = "an HTML page" if start.lstrip()[:1] == "<" else clean(start, self._secret) or "nothing"
            raise Trouble("not_json", f"it sends {detail}", charged=True) from None

    async def _reserve(self, amount: float) -> None:
        """Set money apart; where there is not enough, wait for what calls in flight give back."""
        async with self._settled:
            while not self.budget.reserve(amount):
                if self._stopping.is_set():
                    raise Stopped
                if self.budget.reserved <= 1e-12:
                    spent = self.budget.spent + self.budget.uncertain
                    self._stop(
                        f"The budget is used up: ${spent:.4f} of max_cost {self.budget.max_cost:g} are spent, and the "
                        f"next call may cost ${amount:.4f}. What was judged is kept: raise --max_cost and run the "
                        "same command again, it goes on from there."
                    )
                    self._settled.notify_all()
                    raise Stopped
                await self._settled.wait()

    def _gave_up(self, trouble: Trouble) -> None:
        """Stop the run where nothing but this ever happens."""
        cause = "server" if trouble.action == "retry" else trouble.kind
        self._in_a_row[cause] += 1
        if trouble.action == "retry":
            unreachable = trouble.kind in ("connection", "not_json", "error_body") and self._last_answer == -math.inf
            hopeless = self._in_a_row[cause] >= (1 if unreachable else GIVE_UP_AFTER)
        else:
            hopeless = not self._ever_read and self._in_a_row[cause] >= GIVE_UP_AFTER
        if hopeless:
            self._stop(trouble.next_step(self.model, self.base_url, self.variable))

    async def _explain_and_stop(self, trouble: Trouble) -> None:
        if self._stopping.is_set():  # another call met the same and is about to say so
            return
        self._stopping.set()
        offers = await self._offered_models() if trouble.kind == "model" else ""
        self._stop(trouble.next_step(self.model, self.base_url, self.variable, offers))

    async def _offered_models(self) -> str:
        try:
            page = await asyncio.wait_for(self._openai.models.list(), 10)
            names = [model.id for model in page.data]
        except Exception:  # a courtesy: many servers have no such list
            return ""
        return f"; the server has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""

    def _stop(self, message: str) -> None:
        self.stop_error = self.stop_error or UserError(message)
        self._stopping.set()

    async def _sleep(self, seconds: float) -> None:
        """Wait, unless the run is stopped meanwhile."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped


def api_key(variable: str, base_url: str | None) -> str:
    """
    The API key from the environment. A server of one's own needs none.

    Raises:
        UserError: if it is missing, or if the key itself was given in place of the variable's name.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", variable):
        raise UserError("key_variable has to be the name of an environment variable, not the key itself.")
    value = os.environ.get(variable, "").strip()
    if not value and base_url is None and not os.environ.get("OPENAI_BASE_URL"):
        raise UserError(
            f"There is no API key: put it into the environment variable {variable} (export {variable}=...), or give "
            "base_url for a server of your own."
        )
    if not value.isascii() or not value.isprintable():
        raise UserError(
            f"The API key in the environment variable {variable} holds characters no key has. Copy it anew."
        )
    return value or "none"

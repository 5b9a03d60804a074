# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The client for all calls to chat servers: those of the engine `server` and those of the judge.

It limits the number of concurrent calls, retries, adapts the request fields to the server, stays within a budget,
caches every reply that has a key, and stops the run with one clear message when nothing can succeed.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from anyio import CapacityLimiter
from anyio.from_thread import BlockingPortal, start_blocking_portal

from medst_trl.base.errors import UserError

from .calls import Budget, Call, CallSettings, Outcome, ReplyCache, RequestSize, api_key
from .responses import NEXT_STEPS, AcceptedFields, CallError, clean_message, error_of, row_of_body, row_of_content


FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a retry
RE_ASKS = 2  # further attempts at a request whose reply cannot be read
GIVE_UP_AFTER = 8  # consecutive calls that fail for one reason before the run stops
LONGEST_RETRY_AFTER = 300.0  # seconds; a longer wait is reported instead
MONEY_WAIT = 0.05  # seconds between two attempts to reserve money


class Stopped(Exception):
    """The run is being stopped; no further call is made."""


@dataclass(eq=False, repr=False)
class Client:
    """
    Calls a model over an OpenAI-compatible API. One instance serves one event loop.

    Args:
        model (`str`):
            Name of the model, for messages; the bodies of the calls carry it.
        settings ([`CallSettings`], *optional*):
            Key, concurrency, timeout and retries.
        base_url (`str`, *optional*):
            Address of the API. Defaults to `OPENAI_BASE_URL`, then to OpenAI's.
        cache (`ReplyCache`, *optional*):
            Where replies are looked up and kept, for calls with a key. By default in memory.
        budget (`Budget`, *optional*):
            What may be spent. By default there is no limit.
        offline (`bool`, *optional*, defaults to `False`):
            Make no calls. A request without a cached reply fails with its last error in the cache, or with
            `request_failed`.
        advice (`Mapping[str, str]`, *optional*):
            Messages that replace [`NEXT_STEPS`]. Refusals (`"content_filter"`, `"bad_request"`) stop the run only if
            they have a message here and every call is refused.
        setting (`str`, *optional*, defaults to `"model"`):
            Name of the setting that names the model, for messages.
        http_client (`httpx2.AsyncClient`, *optional*):
            Replaces the client's own, for proxies and tests.

    Attributes:
        events (`Counter`): Calls, and their problems.
        stop_error (`UserError` or `None`): Why the run has to stop.
        has_read (`bool`): Whether a reply could be read, in this run or an earlier one.
    """

    model: str
    settings: CallSettings = field(default_factory=CallSettings)
    _: KW_ONLY
    base_url: str | None = None
    cache: ReplyCache | None = None
    budget: Budget | None = None
    offline: bool = False
    advice: Mapping[str, str] = field(default_factory=dict)
    setting: str = "model"
    http_client: Any = None

    def __post_init__(self):
        from openai import AsyncOpenAI

        self.cache, self.budget = self.cache or ReplyCache(), self.budget or Budget()
        self.limit = CapacityLimiter(self.settings.concurrency)
        self.events: Counter[str] = Counter()
        self.stop_error: UserError | None = None
        self._stopping = asyncio.Event()  # no further call is made
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task] = set()  # of the calls in flight
        self._fields = AcceptedFields()
        self._failed: dict[str, Outcome] = {}  # of calls without a reading in this run, by their key
        self._has_answered = False
        self.has_read = False
        self._consecutive_failures: Counter[str] = Counter()
        self._secret = "none" if self.offline else api_key(self.settings.key_variable, self.base_url)
        self._openai = AsyncOpenAI(
            api_key=self._secret, base_url=self.base_url, timeout=self.settings.timeout, max_retries=0,
            http_client=self.http_client,
        )  # fmt: skip
        self.base_url = clean_message(str(self._openai.base_url)).rstrip("/")

    async def close(self) -> None:
        """Cancel the calls in flight and close the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._openai.close()

    @contextmanager
    def open_portal(self) -> Iterator[BlockingPortal]:
        """
        Run an event loop on its own thread, from which synchronous code (also in a notebook) starts calls.

        At the end, calls in flight are cancelled and the client is closed.
        """
        with start_blocking_portal() as portal:
            try:
                yield portal
            finally:
                portal.call(self.close)

    def run(
        self,
        first: Iterable[Call],
        then: Callable[[Call, Outcome], Iterable[Call]] = lambda call, outcome: (),
        max_in_flight: int | None = None,
    ) -> Iterator[tuple[Call, Outcome]]:
        """
        Make calls, and those that follow from their outcomes.

        When the run has to stop, no further call starts. Calls in flight, which may be paid for, are awaited for at
        most the client's `timeout`.

        Args:
            first (iterable of [`Call`]):
                The first calls. Consumed lazily, as soon as another call can start.
            then (`Callable`, *optional*):
                Maps a call and its outcome to further calls.
            max_in_flight (`int`, *optional*):
                Maximum number of calls in flight, including those that wait for a retry. Defaults to the client's
                concurrency.

        Yields:
            `tuple[Call, Outcome]`: each call with its outcome, in any order.

        Raises:
            UserError: if the run has to stop, after the outcomes of all calls in flight.
        """
        first = iter(first)
        limit = max_in_flight or self.settings.concurrency
        in_flight: dict[Future, Call] = {}
        with self.open_portal() as portal:
            while True:
                while len(in_flight) < limit and not self._is_stopping() and (call := next(first, None)) is not None:
                    in_flight[portal.start_task_soon(self.ask, call)] = call
                if not in_flight:
                    break
                wait(in_flight, return_when=FIRST_COMPLETED)
                done = next(future for future in in_flight if future.done())
                call = in_flight.pop(done)
                try:
                    outcome = done.result()
                except Stopped:
                    continue
                for following in then(call, outcome):
                    if not self._is_stopping():
                        in_flight[portal.start_task_soon(self.ask, following)] = following
                yield call, outcome
        if self.stop_error is not None:
            raise self.stop_error

    async def ask(self, call: Call) -> Outcome:
        """
        Return the outcome of a call, from the cache if it is there.

        Raises:
            Stopped: if the run has to stop; `stop_error` says why.
        """
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            # Calls with the same key are made once.
            async with self._locks.setdefault(call.key, asyncio.Lock()) if call.key else nullcontext():
                outcome = self._known(call) or await self._ask(call)
                if outcome.reading is None and call.key:
                    self._failed[call.key] = replace(outcome, cached=True)
                return outcome
        finally:
            self._tasks.discard(task)

    def _known(self, call: Call) -> Outcome | None:
        """Return the outcome of a call that needs no connection: the cache has it, or the same call has failed."""
        attempts, failures = self.cache.attempts(call.key), self.cache.failures.get(call.key)
        for row in reversed(attempts):
            if (reading := call.read(row["reply"])) is not None:
                self.has_read = True
                return Outcome(reading, None, [row], cached=True)
        if not self.offline:
            return self._failed.get(call.key)
        error = failures[-1][0] if failures else CallError("request_failed", "not in these files")
        reason = "unparsable" if attempts else error.reason
        return Outcome(None, reason, attempts, cached=True, detail=error.detail, error=error)

    async def _ask(self, call: Call) -> Outcome:
        """Return the outcome of a call, which is repeated a few times if its reply cannot be read."""
        attempts = self.cache.attempts(call.key)
        unfinished = len(attempts) % (RE_ASKS + 1)  # replies of a series of re-asks that was interrupted
        attempts = attempts[len(attempts) - unfinished :]
        while len(attempts) <= RE_ASKS:
            try:
                attempts.append({"key": call.key} | await self._call_until_answered(call, attempts))
            except CallError as error:
                return Outcome(None, error.reason, attempts, cached=False, detail=error.detail, error=error)
            if call.key is not None:
                self.cache.add(attempts[-1])
            if (reading := call.read(attempts[-1]["reply"])) is not None:
                self.has_read = True
                return Outcome(reading, None, attempts, cached=False)
        self._count_failure(CallError("unparsable", clean_message(attempts[-1]["reply"][:100], self._secret)))
        return Outcome(None, "unparsable", attempts, cached=False)

    async def _call_until_answered(self, call: Call, attempts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one reply, readable or not. Raises `CallError` if all retries fail."""
        from medst_trl.data.image_formats import ImageProblem

        try:
            body = await asyncio.to_thread(call.body)
        except ImageProblem as problem:
            raise CallError("image_unreadable", str(problem)) from None
        prompt_tokens = call.size.at_most
        if attempts:  # a model at temperature 0 needs a reason to write something else
            last = {"role": "assistant", "content": attempts[-1]["reply"][:2000] or "(nothing)"}
            reminder = {"role": "user", "content": call.reminder}
            body = body | {"messages": [*body["messages"], last, reminder]}
            prompt_tokens += RequestSize.of([last, reminder], 0).at_most
        at_most = {"prompt_tokens": prompt_tokens, "completion_tokens": body.get("max_tokens", call.max_tokens)}
        attempt = 0
        while True:
            async with self.limit:
                sent = self._fields.apply(body)
                try:
                    return await self._paid_call(call, {"at_most": at_most}, sent)
                except CallError as error:
                    if self._fields.learn(error, sent):
                        continue
                    await self._check_retry(error, attempt)
                    seconds, attempt = wait_before(attempt, error.retry_after), attempt + 1
                    if error.kind == "rate_limit" and attempt > 1:  # again: wait in the slot, so that fewer calls run
                        await self._sleep(seconds)
                        continue
            await self._sleep(seconds)

    async def _check_retry(self, error: CallError, attempt: int) -> None:
        """Return to retry the call, raise `Stopped` if the run has to stop, or the error if the call has failed."""
        self.events[error.kind] += 1
        if error.action == "stop":
            if not self._is_stopping():  # otherwise another call met the same error and explains it
                self._stopping.set()
                self._stop(self.next_step(error, await self._offered_models() if error.kind == "model" else ""))
            raise Stopped from None
        if error.action == "drop" or attempt >= self.settings.max_retries:
            self._count_failure(error)
            raise error
        if (error.retry_after or 0) > LONGEST_RETRY_AFTER:
            self._stop(
                f"The server at {self.base_url} asks to wait {error.retry_after / 60:.0f} minutes before the next "
                f"call ({error.detail}). Finished work is kept: run the same command again then."
            )
            raise Stopped from None

    async def _paid_call(self, call: Call, at_most: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """Make one HTTP call inside a slot, within the budget. Its cost is kept, so that later runs know it."""
        reserved = self.budget.prices.cost_of(at_most)
        await self._reserve(reserved)
        row, lost = None, "cancelled"
        charged = at_most  # if the call is cancelled, the server may have been at work
        try:
            row = await self._send(call, body)
            if not row["usage"]:
                row = row | at_most
            charged = row
        except CallError as error:
            lost = error.kind
            if error.usage:
                charged = {"usage": error.usage}
            elif not error.charged:
                charged = {}
            raise
        except UnicodeEncodeError:  # the body cannot be encoded: nothing was sent
            charged = {}
            raise
        finally:
            self.budget.settle(reserved, self.budget.prices.cost_of(charged))
            if row is None and charged and call.key is not None:
                self.cache.add({"key": call.key, "lost": lost} | charged)
        self._has_answered = True
        self._consecutive_failures.pop("server", None)
        return row

    async def _reserve(self, amount: float) -> None:
        """Reserve money. If there is not enough, wait for what calls in flight release."""
        await self._sleep(0)  # raises if the run is being stopped
        while not self.budget.reserve(amount):
            if self.budget.reserved <= 1e-12:
                self._stop(self.budget.used_up_message(amount))
            await self._sleep(MONEY_WAIT)

    async def _send(self, call: Call, body: dict[str, Any]) -> dict[str, Any]:
        import openai

        self.events["calls"] += 1
        pieces: list[str] = []
        try:
            async with asyncio.timeout(self.settings.timeout):  # httpx2's timeouts restart with every byte
                if call.on_piece is not None:
                    return await self._stream(call, body, pieces)
                response = await self._openai.chat.completions.with_raw_response.create(**body)
                return row_of_content(response.content, self._secret)
        except TimeoutError:
            problem = CallError("timeout", f"no answer within {self.settings.timeout:g} s", charged=True)
        except openai.APIError as error:
            problem = error_of(error, self._secret)
        if pieces:  # the caller may already have shown them, so the call is not retried
            problem = CallError("interrupted", problem.detail, charged=True)
        raise problem

    async def _stream(self, call: Call, body: dict[str, Any], pieces: list[str]) -> dict[str, Any]:
        finish_reason = None
        stream = await self._openai.chat.completions.create(**body, stream=True)
        try:
            async for chunk in stream:
                for choice in chunk.choices:
                    finish_reason = choice.finish_reason or finish_reason
                    if choice.delta.content:
                        pieces.append(choice.delta.content)
                        call.on_piece(choice.delta.content)
        except ValueError:  # a line that is not JSON
            kind = "interrupted" if pieces else "not_json"
            raise CallError(kind, "it sends a stream that cannot be read", charged=True) from None
        if not pieces and finish_reason is None:
            raise CallError("not_json", "it sends no stream", charged=True)
        return row_of_body({"choices": [{"message": {"content": "".join(pieces)}, "finish_reason": finish_reason}]})

    def _count_failure(self, error: CallError) -> None:
        """Count a failed call, and stop the run if every call fails in this way."""
        is_retried = error.action == "retry"
        cause = "server" if is_retried else error.kind
        self._consecutive_failures[cause] += 1
        unreachable = error.kind in ("connection", "not_json", "error_body") and not self._has_answered
        always = self._consecutive_failures[cause] >= (1 if unreachable else GIVE_UP_AFTER)
        if always and (is_retried or (cause in self.advice and not self.has_read)):
            self._stop(self.next_step(error))

    def next_step(self, error: CallError, offers: str = "") -> str:
        """Return the message of a run that an error stops. `offers` lists the models of the server."""
        step = self.explain(error, offers)
        return f"{step} Finished work is kept: run the same command again to resume."

    def explain(self, error: CallError, offers: str = "") -> str:
        """Return what an error means and what to do about it."""
        steps = NEXT_STEPS | dict(self.advice)
        text = steps.get(error.kind, "The server refuses every request: {detail}").format(
            model=self.model, base_url=self.base_url, variable=self.settings.key_variable, offers=offers,
            setting=self.setting, detail=error.detail or "no details",
            code=f" ({error.status})" if error.status else "",
        )  # fmt: skip
        return f"{text.rstrip('.')}."

    async def _offered_models(self) -> str:
        names = []
        with suppress(Exception):  # many servers have no such list
            names = [model.id for model in (await asyncio.wait_for(self._openai.models.list(), 10)).data]
        return f"; the server has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""

    def _is_stopping(self) -> bool:
        return self._stopping.is_set()

    def _stop(self, message: str) -> None:
        self.stop_error = self.stop_error or UserError(message)
        self._stopping.set()

    async def _sleep(self, seconds: float) -> None:
        """Wait, unless the run is stopped meanwhile."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._is_stopping():
            raise Stopped


def wait_before(attempt: int, retry_after: float | None) -> float:
    """Return the seconds before a retry: doubling from half a second, and at least what the server asks for."""
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
    return max(wait, (retry_after or 0.0) * random.uniform(1, 1.02))

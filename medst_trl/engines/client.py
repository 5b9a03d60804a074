# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The client for all calls to chat servers: those of the engine `server` and those of the judge.

It retries, adapts the number of concurrent calls and the request fields to the server, stays within a budget, caches
every reply that has a key, and stops the run with one clear message when nothing can succeed.
"""

import asyncio
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_bounds, documented

from .cost import Budget, Prices, ReplyCache, RequestSize, prices_of
from .pacing import AdaptiveLimit, wait_before
from .responses import NEXT_STEPS, AcceptedFields, CallError, clean_message, error_of, row_of_content


if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from openai import AsyncOpenAI

RE_ASKS = 2  # further attempts at a request whose reply cannot be read
GIVE_UP_AFTER = 8  # consecutive calls that fail for one reason before the run stops
RECENTLY = 10.0  # seconds; if the server answered another call within this time, a failed call is retried soon
LONGEST_RETRY_AFTER = 300.0  # seconds; a longer wait is reported instead

NO_SIZE = RequestSize(0, 0)  # of calls without a budget


@documented
@dataclass(kw_only=True, eq=False)
class CallSettings:
    """
    How a server is called, and what that may cost.

    Args:
        key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Name of the environment variable that holds the API key.
        concurrency (`int`, *optional*, defaults to `16`):
            Maximum number of concurrent calls.
        timeout (`float`, *optional*, defaults to `120.0`):
            Maximum duration of a call in seconds.
        max_retries (`int`, *optional*, defaults to `6`):
            Maximum number of retries of a call after 429, 5xx or a timeout.
        max_cost (`float`, *optional*):
            Budget in US dollars. It is a hard limit.
        price_per_million_input_tokens (`float`, *optional*):
            Price in US dollars. Known for gpt-4o, gpt-4.1 and their small versions.
        price_per_million_output_tokens (`float`, *optional*):
            Price in US dollars. Known for the same models.
    """

    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    max_retries: int = 6
    max_cost: float | None = None
    price_per_million_input_tokens: float | None = None
    price_per_million_output_tokens: float | None = None

    @property
    def limit(self) -> str:
        """The budget in words, for the plan of a run."""
        return "no max_cost is set" if self.max_cost is None else f"stops at {self.max_cost:g} US dollars"

    def prices_of(self, model: str) -> Prices:
        """Return the prices that are set, else the known prices of a model."""
        return prices_of(model, self.price_per_million_input_tokens, self.price_per_million_output_tokens)

    def check_calls(self, model: str) -> None:
        """Raise a `UserError` for numbers out of bounds, or for a budget if the prices of a model are unknown."""
        check_bounds(self, at_least=CALL_BOUNDS)
        Budget(self.prices_of(model), self.max_cost)


# These settings change how replies are obtained, not their content.
CALL_SETTINGS = frozenset({"base_url", *(item.name for item in fields(CallSettings))})
CALL_BOUNDS = {"concurrency": 1, "max_cost": 0, "max_retries": 0, "timeout": 0.01,
               "price_per_million_input_tokens": 0, "price_per_million_output_tokens": 0}  # fmt: skip
# In a recipe, shared values of these are for the judge; engines take them only by name. See `Stage.not_shared`.
NOT_SHARED = CALL_SETTINGS - {"base_url", "concurrency"}


@dataclass(eq=False)
class Call:
    """
    One request to a chat API. Compared by identity.

    Attributes:
        body (`Callable`): Makes the body of the request; images are encoded only then.
        key (`str`, *optional*): Hash of everything that decides the reply. None: the reply is not cached.
        size (`RequestSize`): Tokens of its prompt, for the budget.
        max_tokens (`int`): Maximum number of tokens of its reply, for the budget, if the body has no `max_tokens`.
        read (`Callable`): Maps a reply to its meaning, or to None if it cannot be read. By default the reply itself.
        reminder (`str`): User message after a reply that cannot be read.
        tag: Any value; the caller identifies the call by it.
        on_piece (`Callable`, *optional*): Called with each piece of the reply as the server sends it.
    """

    body: Callable[[], dict[str, Any]]
    key: str | None = None
    size: RequestSize = NO_SIZE
    max_tokens: int = 0
    read: Callable[[str], Any | None] = str
    reminder: str = ""
    tag: Any = None
    on_piece: Callable[[str], None] | None = None


@dataclass
class Outcome:
    """
    The outcome of a call.

    Attributes:
        reading: What [`Call.read`] made of the reply, or None.
        reason (`str` or `None`): Why there is no reading, in one word.
        attempts (`list[dict]`): The replies so far, as the cache keeps them.
        cached (`bool`): Whether no call had to be made.
        detail (`str`): The server's message, if there is no reply.
        error (`CallError` or `None`): The error that ended it, if the server gave no reply in this run.
        charges (`list[dict]`): All calls for it that may have been charged.
    """

    reading: Any | None
    reason: str | None
    attempts: list[dict[str, Any]]
    cached: bool
    detail: str = ""
    error: CallError | None = None
    charges: list[dict[str, Any]] = field(default_factory=list)


class Stopped(Exception):
    """The run is being stopped; no further call is made."""


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
            Make no calls: what the cache lacks is counted in `missing`.
        advice (`Mapping[str, str]`, *optional*):
            Messages that replace [`NEXT_STEPS`]. Refusals of single calls (`"content_filter"`, `"bad_request"` ...)
            stop the run only if they have one and every call meets them.
        setting (`str`, *optional*, defaults to `"model"`):
            Name of the setting that names the model, for messages.
        http_client (`httpx2.AsyncClient`, *optional*):
            Replaces the client's own, for proxies and tests.

    Attributes:
        events (`Counter`): Calls, and their problems.
        missing (`int`): Number of calls that were not made because of `offline`.
        stop_error (`UserError` or `None`): Why the run has to stop.
    """

    def __init__(
        self,
        model: str,
        settings: CallSettings | None = None,
        *,
        base_url: str | None = None,
        cache: ReplyCache | None = None,
        budget: Budget | None = None,
        offline: bool = False,
        advice: Mapping[str, str] | None = None,
        setting: str = "model",
        http_client: Any = None,
    ):
        self.model, self.settings = model, settings or CallSettings()
        self.setting, self.advice, self.offline = setting, advice or {}, offline
        self.cache = ReplyCache() if cache is None else cache
        self.budget = Budget(Prices(None, None)) if budget is None else budget
        self.limit = AdaptiveLimit(self.settings.concurrency, self._sleep)
        self.events: Counter[str] = Counter()
        self.missing = 0
        self.stop_error: UserError | None = None
        self._stopping = asyncio.Event()
        self._settled = asyncio.Condition()
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task] = set()
        self._fields = AcceptedFields()
        self._ever_read = False  # in this run or an earlier one
        self._works = False  # a reply was read in this run
        self._held: list[dict[str, Any]] = []  # refusals until then
        self._last_answer = -math.inf
        self._in_a_row: Counter[str] = Counter()
        self._secret = None if offline else api_key(self.settings.key_variable, base_url)
        self._openai = None if offline else self._connect(base_url, http_client)
        self.base_url = clean_message(str(self._openai.base_url if self._openai else base_url)).rstrip("/")

    def _connect(self, base_url: str | None, http_client: Any) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        timeout = self.settings.timeout
        return AsyncOpenAI(
            api_key=self._secret, base_url=base_url, timeout=timeout, max_retries=0, http_client=http_client
        )

    async def close(self) -> None:
        """Cancel the calls in flight and close the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._openai is not None:
            await self._openai.close()

    @property
    def is_stopping(self) -> bool:
        """Whether no further call is made."""
        return self._stopping.is_set()

    async def ask(self, call: Call) -> Outcome:
        """
        Return the outcome of a call, from the cache if it is there.

        Raises:
            Stopped: if the run has to stop; `stop_error` says why.
        """
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            if call.key is None:
                return await self._ask(call, [])
            async with self._locks.setdefault(call.key, asyncio.Lock()):  # calls with the same key are made once
                held = [row for row in self._held if row["key"] == call.key]
                outcome = await self._ask(call, self.cache.attempts(call.key) + held)
                outcome.charges = self.cache.charges(call.key)
                return outcome
        finally:
            self._tasks.discard(task)

    async def _ask(self, call: Call, attempts: list[dict[str, Any]]) -> Outcome:
        cached = True
        while True:
            outcome = self._settle(call, attempts, cached)
            if outcome is not None:
                return outcome
            if self.offline:
                self.missing += 1
                return Outcome(None, "request_failed", attempts, cached, "no result")
            cached = False
            try:
                row = await self._call_until_answered(call, attempts)
            except CallError as error:
                if call.key is None or error.reason == "request_failed":
                    return Outcome(None, error.reason, attempts, cached, error.detail, error)
                row = {"error": error.reason, "detail": error.detail}
            row = {"key": call.key, "attempt": len(attempts)} | row
            self._keep(row)
            attempts = [*attempts, row]

    def _keep(self, row: dict[str, Any]) -> None:
        """Add to the cache, but a refusal only once the server has shown that it can answer at all."""
        if "error" in row and not self._works:
            self._held.append(row)
        elif row["key"] is not None:
            self.cache.add(row)

    def _settle(self, call: Call, attempts: list[dict[str, Any]], cached: bool) -> Outcome | None:
        """Return the outcome that the attempts give, or None if another attempt is needed."""
        if not attempts:
            return None
        if "error" in attempts[-1]:
            return Outcome(None, attempts[-1]["error"], attempts, cached, attempts[-1].get("detail") or "")
        reading = call.read(attempts[-1]["reply"])
        if reading is None and len(attempts) <= RE_ASKS and not self.offline:
            return None
        if reading is None:
            if not cached:
                self._gave_up(CallError("unparsable", clean_message(attempts[-1]["reply"][:100], self._secret)))
            return Outcome(None, "unparsable", attempts, cached)
        self._ever_read = True
        if not cached:
            self._works = True
            for row in self._held:
                self.cache.add(row)
            self._held.clear()
        return Outcome(reading, None, attempts, cached)

    async def _call_until_answered(self, call: Call, attempts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one reply, readable or not. Raises `CallError` if all retries fail."""
        body = await asyncio.to_thread(_body_of, call)
        prompt_tokens = call.size.at_most
        if attempts:  # a model at temperature 0 needs a reason to write something else
            last = {"role": "assistant", "content": attempts[-1]["reply"][:2000] or "(nothing)"}
            reminder = {"role": "user", "content": call.reminder}
            body = body | {"messages": [*body["messages"], last, reminder]}
            prompt_tokens = prompt_tokens + RequestSize.of([last, reminder], 0).at_most
        at_most = {"prompt_tokens": prompt_tokens, "completion_tokens": body.get("max_tokens", call.max_tokens)}
        attempt = 0
        while True:
            sent = {}
            try:
                async with self.limit.slot():
                    sent = self._fields.apply(body)
                    return await self._paid_call(call, {"at_most": at_most}, sent)
            except CallError as error:
                if self._fields.learn(error, sent):
                    continue
                await self._check_retry(error, attempt)
                works = time.monotonic() - self._last_answer < RECENTLY
                await self._sleep(wait_before(min(attempt, 1) if works else attempt, error.retry_after))
                attempt += 1

    async def _check_retry(self, error: CallError, attempt: int) -> None:
        """Return to retry the call, raise `Stopped` if the run has to stop, or the error if the call has failed."""
        self.events[error.kind] += 1
        if error.action == "stop":
            if not self.is_stopping:  # otherwise another call met the same error and explains it
                self._stopping.set()
                self._stop(self.next_step(error, await self._offered_models() if error.kind == "model" else ""))
            raise Stopped from None
        if error.action == "drop" or attempt >= self.settings.max_retries:
            self._gave_up(error)
            raise error
        if (error.retry_after or 0) > LONGEST_RETRY_AFTER:
            self._stop(
                f"The server at {self.base_url} asks to wait {error.retry_after / 60:.0f} minutes before the next "
                f"call ({error.detail}). Finished work is kept: run the same command again then."
            )
            raise Stopped from None

    async def _paid_call(self, call: Call, at_most: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """Make one HTTP call inside a slot, within the budget. Its cost is kept, so that later runs know it."""
        if self.is_stopping:
            raise Stopped
        reserved = self.budget.prices.cost_of(at_most)
        await self._reserve(reserved)
        try:
            row = await self._send(body, call.on_piece)
        except CallError as error:
            bill = {"usage": error.usage} if error.usage else at_most if error.charged else {}
            self._lost(call.key, error.kind, bill, reserved)
            if error.is_pushback:
                self.limit.pushed_back(error.retry_after)
            raise
        except UnicodeEncodeError:  # of the body: nothing was sent
            self.budget.settle(reserved, 0)
            raise
        except BaseException:  # cancelled: the server may have been at work
            self._lost(call.key, "cancelled", at_most, reserved)
            raise
        else:
            row = row if row["usage"] else row | at_most
            self.budget.settle(reserved, self.budget.prices.cost_of(row))
            self.limit.went_well()
            self._last_answer = time.monotonic()
            self._in_a_row.pop("server", None)
            return row
        finally:
            async with self._settled:
                self._settled.notify_all()

    def _lost(self, key: str | None, kind: str, bill: dict[str, Any], reserved: float) -> None:
        """Account for a call that left no reply but may be charged. An empty bill: it was not charged."""
        if "at_most" in bill:
            self.budget.leave_open(reserved)
        else:
            self.budget.settle(reserved, self.budget.prices.cost_of(bill))
        if key is not None and bill:
            self.cache.add_lost({"key": key, "lost": kind} | bill)

    async def _send(self, body: dict[str, Any], on_piece: Callable[[str], None] | None) -> dict[str, Any]:
        import openai

        self.events["calls"] += 1
        pieces: list[str] = []
        try:
            async with asyncio.timeout(self.settings.timeout):  # httpx2's timeouts restart with every byte
                if on_piece is not None:
                    return await self._stream(body, pieces, on_piece)
                response = await self._openai.chat.completions.with_raw_response.create(**body)
                return row_of_content(response.content, self._secret)
        except TimeoutError:
            problem = CallError("timeout", f"no answer within {self.settings.timeout:g} s", charged=True)
        except openai.APIError as error:
            problem = error_of(error, self._secret)
        if pieces:  # the caller may already have shown them, so the call is not retried
            problem = CallError("interrupted", problem.detail, charged=True)
        raise problem

    async def _stream(
        self, body: dict[str, Any], pieces: list[str], on_piece: Callable[[str], None]
    ) -> dict[str, Any]:
        finish_reason = None
        stream = await self._openai.chat.completions.create(**body, stream=True)
        try:
            async for chunk in stream:
                for choice in chunk.choices:
                    finish_reason = choice.finish_reason or finish_reason
                    if choice.delta.content:
                        pieces.append(choice.delta.content)
                        on_piece(choice.delta.content)
        except ValueError:  # a line that is not JSON
            kind = "interrupted" if pieces else "not_json"
            raise CallError(kind, "it sends a stream that cannot be read", charged=True) from None
        if finish_reason == "content_filter":
            raise CallError("content_filter", "the reply was filtered", charged=True)
        if not pieces and finish_reason is None:
            raise CallError("not_json", "it sends no stream", charged=True)
        return {"reply": "".join(pieces), "finish_reason": finish_reason, "usage": None}

    async def _reserve(self, amount: float) -> None:
        """Reserve money. If there is not enough, wait for what calls in flight release."""
        async with self._settled:
            while not self.budget.reserve(amount):
                if self.is_stopping:
                    raise Stopped
                if self.budget.reserved <= 1e-12:
                    spent = self.budget.spent + self.budget.uncertain
                    self._stop(
                        f"The budget is used up: ${spent:.4f} of max_cost {self.budget.max_cost:g} are spent, and the "
                        f"next call may cost ${amount:.4f}. Finished work is kept: raise --max_cost and run the same "
                        "command again to resume."
                    )
                    self._settled.notify_all()
                    raise Stopped
                await self._settled.wait()

    def _gave_up(self, error: CallError) -> None:
        """Count a failed call, and stop the run if every call fails in this way."""
        cause = "server" if error.action == "retry" else error.kind
        self._in_a_row[cause] += 1
        if error.action == "retry":
            unreachable = error.kind in ("connection", "not_json", "error_body") and self._last_answer == -math.inf
            hopeless = self._in_a_row[cause] >= (1 if unreachable else GIVE_UP_AFTER)
        else:
            hopeless = cause in self.advice and not self._ever_read and self._in_a_row[cause] >= GIVE_UP_AFTER
        if hopeless:
            self._stop(self.next_step(error))

    def next_step(self, error: CallError, offers: str = "") -> str:
        """
        Return the message of a run that this error stops.

        Args:
            error ([`CallError`]): The error.
            offers (`str`, *optional*): The models that the server offers, as the end of a sentence.
        """
        steps = NEXT_STEPS | dict(self.advice)
        text = steps.get(error.kind, "The server refuses every request: {detail}").format(
            model=self.model, base_url=self.base_url, variable=self.settings.key_variable, offers=offers,
            setting=self.setting, detail=error.detail or "no details",
            code=f" ({error.status})" if error.status else "",
        )  # fmt: skip
        return f"{text.rstrip('.')}. Finished work is kept: run the same command again to resume."

    async def _offered_models(self) -> str:
        try:
            page = await asyncio.wait_for(self._openai.models.list(), 10)
            names = [model.id for model in page.data]
        except Exception:  # many servers have no such list
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


def _body_of(call: Call) -> dict[str, Any]:
    from medst_trl.data.image_formats import ImageProblem

    try:
        return call.body()
    except ImageProblem as problem:
        raise CallError("image_unreadable", str(problem)) from None


@contextmanager
def open_portal(client: Client) -> Iterator["BlockingPortal"]:
    """
    Run an event loop on its own thread, from which synchronous code (also in a notebook) starts a client's calls.

    At the end, calls in flight are cancelled and the client is closed.
    """
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal:
        try:
            yield portal
        finally:
            portal.call(client.close)


def run_calls(
    client: Client,
    first: Iterable[Call],
    then: Callable[[Call, Outcome], Iterable[Call]] = lambda call, outcome: (),
    at_once: int | None = None,
) -> Iterator[tuple[Call, Outcome]]:
    """
    Make calls, and those that follow from their outcomes.

    When the run has to stop, no further call starts. Calls in flight, which may be paid for, are awaited for at most
    the client's `timeout`.

    Args:
        client ([`Client`]):
            Makes the calls.
        first (iterable of [`Call`]):
            The first calls. Consumed lazily, as soon as another call can start.
        then (`Callable`, *optional*):
            Maps a call and its outcome to further calls.
        at_once (`int`, *optional*):
            Number of calls that are started or wait for a retry. Defaults to the client's concurrency.

    Yields:
        `tuple[Call, Outcome]`: each call with its outcome, in any order.

    Raises:
        UserError: if the run has to stop, after the outcomes of all calls in flight.
    """
    at_once, first, finished, in_flight = at_once or client.settings.concurrency, iter(first), SimpleQueue(), 0
    with open_portal(client) as portal:

        def start(call: Call) -> None:
            nonlocal in_flight
            in_flight += 1
            portal.start_task_soon(client.ask, call).add_done_callback(lambda done: finished.put((call, done)))

        while True:
            while in_flight < at_once and not client.is_stopping and (call := next(first, None)) is not None:
                start(call)
            if not in_flight:
                break
            call, done = finished.get()
            in_flight -= 1
            try:
                outcome = done.result()
            except Stopped:
                continue
            for following in then(call, outcome):
                if not client.is_stopping:
                    start(following)
            yield call, outcome
    if client.stop_error is not None:
        raise client.stop_error


def api_key(variable: str, base_url: str | None) -> str:
    """
    Return the API key from the environment. Your own server needs none.

    Raises:
        UserError: if it is missing, or if the key itself was given instead of the variable's name.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", variable):
        raise UserError("key_variable must be the name of an environment variable, not the key itself.")
    value = os.environ.get(variable, "").strip()
    if not value and base_url is None and not os.environ.get("OPENAI_BASE_URL"):
        raise UserError(
            f"No API key. Set the environment variable {variable} (export {variable}=...), or give base_url for your "
            "own server."
        )
    if not value.isascii() or not value.isprintable():
        raise UserError(f"The API key in the environment variable {variable} has invalid characters. Copy it again.")
    return value or "none"

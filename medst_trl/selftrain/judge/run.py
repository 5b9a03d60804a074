# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One run of a judge over candidates: many pairs at a time inside, one after the other outside."""

import asyncio
import queue
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import ImageProblem
from medst_trl.engines.client import JudgeClient
from medst_trl.engines.requests import Stopped

from .decisions import make_judgement
from .pairs import Pair, pairs_of


if TYPE_CHECKING:
    from .pairwise import PairwiseJudge

PAIRS_PER_SLOT = 3  # pairs begun for each call under way: those that wait to repeat a call leave no slot empty


class JudgeRun:
    """One run over the candidates: an event loop on a thread of its own, so that it also works in a notebook."""

    def __init__(
        self,
        candidates: Iterator[Mapping[str, Any]],
        make_client: Callable[[], JudgeClient],
        judge: "PairwiseJudge",
        put: Callable[[tuple[int, Any]], None],
    ):
        self.make_client, self.judge, self.put = make_client, judge, put
        self.pairs = (pair for candidate in candidates for pair in pairs_of(candidate))
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task | None = None
        self.cancelled = False

    def start(self) -> None:
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.put((-1, error))
        else:
            self.put((-1, None))

    def cancel(self) -> None:
        """End early: the consumer wants no more."""
        self.cancelled = True
        if self.loop is not None and not self.loop.is_closed():
            with suppress(RuntimeError):  # it ended meanwhile
                self.loop.call_soon_threadsafe(self.task.cancel)

    async def _main(self) -> None:
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        if self.cancelled:
            return
        client = self.make_client()
        room = asyncio.Semaphore(PAIRS_PER_SLOT * self.judge.concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                index = 0
                while client.stop_error is None:
                    await room.acquire()
                    pair = await asyncio.to_thread(next, self.pairs, None)
                    if pair is None:
                        break
                    group.create_task(self._pair(client, index, pair, room))
                    index += 1
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self.judge.events = client.events
            await client.close()
        if client.stop_error is not None:
            raise client.stop_error
        if client.missing:
            raise UserError(
                f"{client.missing:,} calls have no result yet. Those that have are kept: write the rest with "
                "--write_batch, or make them live by leaving out --read_batch."
            )

    async def _pair(self, client: JudgeClient, index: int, pair: Pair, room: asyncio.Semaphore) -> None:
        try:
            requests = await asyncio.to_thread(self.judge.requests_of, pair)
            # All of them to their end, also when one is stopped: what is under way is paid.
            answers = await asyncio.gather(*map(client.ask, requests), return_exceptions=True)
            if errors := [answer for answer in answers if isinstance(answer, BaseException)]:
                raise errors[0]
            self.put((index, make_judgement(pair, list(zip(requests, answers, strict=True)), self.judge)))
        except ImageProblem:
            self.put((index, make_judgement(pair, [], self.judge, "image_unreadable")))
        except Stopped:
            pass
        finally:
            room.release()


def in_order(results: "queue.SimpleQueue[tuple[int, Any]]") -> Iterator[dict[str, Any]]:
    """Results as they come, each held back until those before it are there. An error comes after all of them."""
    waiting, due = {}, 0
    while True:
        index, result = results.get()
        if index < 0:
            if result is not None:
                raise result
            return
        waiting[index] = result
        while due in waiting:
            yield waiting.pop(due)
            due += 1

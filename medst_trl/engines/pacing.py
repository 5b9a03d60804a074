# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How many calls to a server run at once, and how long a failed one waits."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager


TOO_MANY = 0.35  # if a larger share of recent calls is rejected, the server counts as overloaded
MIN_SEEN = 10  # number of calls that the share is taken of; two for each slot if that is more
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a retry, if the server names none


class AdaptiveLimit:
    """
    Limit of concurrent calls: halved when the server rejects many calls, and raised by one after each round of
    successful calls.

    A single 429 among successes holds back only its own call: a server that fails now and then is not overloaded, and
    slowing down would not help it. When a good part of recent calls is rejected, the number of slots is halved, and no
    call starts before the time that the server named.

    Args:
        most (`int`):
            Number of slots at the start, which is never exceeded.
        sleep (`Callable`, *optional*):
            Waits for a number of seconds. It may raise an error to end the wait of a call.
    """

    def __init__(self, most: int, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep):
        self.most, self._sleep = most, sleep
        self.slots = float(most)
        self._active = 0
        self._pause_until = 0.0
        self._recent: deque[bool] = deque(maxlen=max(MIN_SEEN, 2 * most))
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self):
        """Wait for a slot and hold it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._active < int(self.slots))
            self._active += 1
        try:
            while (wait := self._pause_until - time.monotonic()) > 0:
                await self._sleep(wait)
            yield
        finally:
            self._active -= 1
            async with self._changed:
                self._changed.notify(max(0, int(self.slots) - self._active))

    def went_well(self) -> None:
        """Record that the server answered."""
        self._recent.append(False)
        if self.slots < self.most:
            self.slots = min(self.most, self.slots + 1 / self.slots)

    def pushed_back(self, retry_after: float | None) -> None:
        """Record that the server rejected a call: 429, overloaded, or no answer in time."""
        self._recent.append(True)
        if sum(self._recent) / self._recent.maxlen > TOO_MANY:  # in a small sample, many failures can be chance
            self.slots = max(1.0, self.slots / 2)
            self._pause_until = max(self._pause_until, time.monotonic() + (retry_after or 0))
            self._recent.clear()  # the calls in flight say nothing about the new limit


def wait_before(attempt: int, retry_after: float | None) -> float:
    """Return the seconds before a retry: what the server asks for, else doubling from half a second, with jitter."""
    if retry_after is not None:
        return retry_after + random.uniform(0, 0.1)
    return min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)

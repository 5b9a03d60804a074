# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How many calls may be under way: as many as asked for while the server keeps up, fewer when it pushes back."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime


TOO_MANY = 0.35  # share of recent calls turned away from which the server counts as overloaded
LEAST_SEEN = 10  # calls that the share is taken of, at least; two for each slot where that is more
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a repeated call, where the server names none


class Pace:
    """
    A number of slots that adapts: halved when the server turns away many calls, one more for each round that it takes.

    A single 429 among successes holds back its own call only: a server that fails now and then is not overloaded, and
    slowing down would not help it. When a good part of recent calls is turned away, the number of slots is halved, and
    no call starts before the time the server named.

    Args:
        most (`int`):
            Slots to begin with and never to exceed.
    """

    def __init__(self, most: int):
        self.most = most
        self.slots = float(most)
        self._active = 0
        self._pause_until = 0.0
        self._recent: deque[bool] = deque(maxlen=max(LEAST_SEEN, 2 * most))
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self):
        """Wait for a slot and hold it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._active < int(self.slots))
            self._active += 1
        try:
            while (left := self._pause_until - time.monotonic()) > 0:
                await asyncio.sleep(left)
            yield
        finally:
            self._active -= 1
            async with self._changed:
                self._changed.notify(max(0, int(self.slots) - self._active))

    def went_well(self) -> None:
        """The server answered."""
        self._recent.append(False)
        if self.slots < self.most:
            self.slots = min(self.most, self.slots + 1 / self.slots)

    def pushed_back(self, retry_after: float | None) -> None:
        """The server turned a call away: 429, overloaded, or no answer in time."""
        self._recent.append(True)
        if sum(self._recent) / self._recent.maxlen > TOO_MANY:  # of few calls, chance alone can fail many
            self.slots = max(1.0, self.slots / 2)
            self._pause_until = max(self._pause_until, time.monotonic() + (retry_after or 0))
            self._recent.clear()  # the calls under way say nothing about the new pace


def wait_before(attempt: int, retry_after: float | None) -> float:
    """Seconds before a call is repeated: what the server asks for, else doubling from half a second, with jitter."""
    if retry_after is not None:
        return retry_after + random.uniform(0, 0.1)
    return min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` (or OpenAI's `retry-after-ms`) asks for, given as a number or as a date."""
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        pass
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
        return max(0.0, seconds) if seconds < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None

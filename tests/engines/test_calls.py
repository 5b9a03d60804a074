# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import asyncio
import time

from medst_trl.engines.calls import AdaptiveLimit, wait_before


def test_waits_grow_up_to_a_limit():
    waits = [max(wait_before(attempt, None) for _ in range(50)) for attempt in range(12)]
    assert waits[0] <= 0.5 < waits[3] and max(waits) <= 30
    assert 7 <= wait_before(0, 7.0) < 7.2


def test_the_pace_falls_when_many_calls_are_refused_and_rises_again():
    pace = AdaptiveLimit(32)
    for _ in range(100):  # one call in ten fails: the server is not overloaded
        pace.pushed_back(None)
        for _ in range(9):
            pace.went_well()
    assert pace.slots == 32
    for _ in range(200):
        pace.pushed_back(None)
    assert pace.slots == 1
    for _ in range(2000):
        pace.went_well()
    assert pace.slots == 32


def test_no_call_starts_before_an_overloaded_server_allows_it():
    async def run():
        pace, start = AdaptiveLimit(4), time.monotonic()
        for _ in range(10):
            pace.pushed_back(0.2)
        async with pace.slot():
            return time.monotonic() - start

    assert asyncio.run(run()) >= 0.2


def test_slots_are_neither_exceeded_nor_leaked():
    async def run():
        pace, active, maximum = AdaptiveLimit(5), 0, 0

        async def call(number):
            nonlocal active, maximum
            async with pace.slot():
                active += 1
                maximum = max(maximum, active)
                await asyncio.sleep(0.001)
                active -= 1
                if number % 7 == 0:
                    raise ValueError

        tasks = [asyncio.create_task(call(number)) for number in range(100)]
        await asyncio.sleep(0.002)
        for task in tasks[20:60:3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(5):
            await asyncio.gather(*(call(1) for _ in range(20)))
        return maximum

    assert asyncio.run(run()) == 5


def test_no_call_starts_while_more_calls_run_than_there_are_slots():
    """After the number of slots was halved, the calls that already run keep theirs."""

    async def run():
        pace, started, may_end = AdaptiveLimit(16), 0, asyncio.Event()

        async def call():
            nonlocal started
            async with pace.slot():
                started += 1
                await may_end.wait()

        tasks = [asyncio.create_task(call()) for _ in range(40)]
        await asyncio.sleep(0.01)
        for _ in range(12):
            pace.pushed_back(None)
        assert started == 16 and pace.slots == 8
        for _ in range(40):
            pace.went_well()
        assert 8 < pace.slots < 16
        await asyncio.sleep(0.01)
        assert started == 16
        may_end.set()
        await asyncio.gather(*tasks)
        return started

    assert asyncio.run(run()) == 40

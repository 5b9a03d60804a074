# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Threads for work that leaves Python: decoding and hashing release its global lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def ordered_map(
    function: Callable[[Any], Any], items: Iterable[Any], num_workers: int, ahead: int | None = None
) -> Iterator[Any]:
    """
    Map a function over items on several threads, and yield the results in order.

    Unlike `Executor.map` it looks only a few items ahead, so that memory stays small and an error ends it soon.
    (`buffersize` of Python 3.14's `Executor.map` does the same.)

    Args:
        function (`Callable`): Called for each item.
        items (iterable): The items.
        num_workers (`int`): Number of threads.
        ahead (`int`, *optional*): Number of items that are begun before their results are needed; 4 per thread.
    """
    ahead = 4 * num_workers if ahead is None else ahead
    pending = deque()
    with ThreadPoolExecutor(num_workers) as executor:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Threads for work that leaves Python: decoding and hashing release its global lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def ordered_map(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """
    `map` on several threads, with results in order.

    Unlike `Executor.map` it looks only a few items ahead, so that memory stays small and an error ends it soon.
    (`buffersize` of Python 3.14's `Executor.map` does the same.)
    """
    pending = deque()
    with ThreadPoolExecutor(num_workers) as executor:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 4 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
from medst_trl.engines.calls import wait_before


def test_waits_grow_up_to_a_limit():
    waits = [max(wait_before(attempt, None) for _ in range(50)) for attempt in range(12)]
    assert waits[0] <= 0.5 < waits[3] and max(waits) <= 30
    assert 7 <= wait_before(0, 7.0) < 7.2
    assert wait_before(6, 0.1) > 10  # a server that goes on refusing calls is asked less often

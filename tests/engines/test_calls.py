# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.base.errors import UserError
from medst_trl.engines.calls import CACHE_FILE, Budget, Prices, ReplyCache, RequestSize, image_tokens, prices_of


def row(key, reply="8 9"):
    return {"key": key, "reply": reply, "finish_reason": "stop", "usage": None}


def test_known_prices_are_found():
    assert prices_of("gpt-4o").input == 2.5
    assert prices_of("gpt-4o-2024-08-06") == prices_of("gpt-4o")
    assert prices_of("gpt-4o-mini-2024-07-18") == prices_of("gpt-4o-mini") != prices_of("gpt-4o")
    assert prices_of("gpt-4o", 1.0, 2.0) == Prices(1.0, 2.0)
    assert prices_of("gpt-4o", 0.0).input == 0.0
    for unknown in ("qwen", "gpt-4o-audio-preview", "gpt-4", ""):
        assert not prices_of(unknown).known


def test_max_cost_needs_prices():
    with pytest.raises(UserError, match="price_per_million_input_tokens"):
        Budget(prices_of("qwen"), max_cost=1.0)
    Budget(prices_of("qwen"))
    Budget(prices_of("qwen", 0, 0), max_cost=1.0)


def test_image_tokens_are_counted_as_openai_does():
    assert image_tokens("gpt-4o", 512, 512) == 85 + 170
    assert image_tokens("gpt-4o", 1024, 1024) == 85 + 4 * 170  # the shorter side is resized to 768
    assert image_tokens("gpt-4o", 2048, 4096) == 85 + 6 * 170
    assert image_tokens("qwen", 768, 768) > image_tokens("qwen", 336, 336) > 0


@given(st.text(max_size=500))
def test_a_text_has_at_most_as_many_tokens_as_bytes(text):
    size = RequestSize.of([{"role": "user", "content": [{"type": "text", "text": text}]}], 100)
    assert size.at_most >= len(text.encode("utf-8", "replace")) + 100
    assert size.likely <= size.at_most


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["cost", "nothing", "unknown"])), max_size=60))
def test_a_budget_is_never_exceeded(calls):
    budget, reservations = Budget(Prices(1, 1), max_cost=2.0), []
    for amount, outcome in calls:
        if budget.reserve(amount):
            reservations.append((amount, outcome))
        assert budget.spent + budget.reserved <= 2.0 + 1e-9
        if len(reservations) > 3:
            reserved, outcome = reservations.pop(0)
            budget.settle(reserved, {"cost": reserved / 2, "nothing": 0, "unknown": reserved}[outcome])
    assert budget.spent <= 2.0 + 1e-9


def test_cache_keeps_attempts_in_order(tmp_path):
    cache = ReplyCache(tmp_path)
    cache.add(row("a", "nonsense"))
    cache.add(row("a", "8 9"))
    cache.add({"key": "b", "failed": "bad_request", "status": 400, "detail": "no", "without": ["max_tokens"]})
    reloaded = ReplyCache(tmp_path)
    assert [attempt["reply"] for attempt in reloaded.attempts("a")] == ["nonsense", "8 9"]
    assert reloaded.attempts("b") == reloaded.attempts("c") == []
    [(error, without)] = reloaded.failures["b"]
    assert (error.kind, error.status, error.detail, without) == ("bad_request", 400, "no", ["max_tokens"])


def test_the_cache_of_version_0_1_0_is_read(tmp_path):
    rows = [
        row("a", "nonsense") | {"attempt": 0}, row("a") | {"attempt": 1},
        {"key": "b", "attempt": 0, "error": "content_filter", "detail": "no"},  # is requested again
        {"key": "c", "lost": "timeout", "at_most": {"prompt_tokens": 1, "completion_tokens": 2}}, {"batch": 1},
        {"key": "d", "failed": "server_error", "status": 500, "detail": "oops", "result": "0123"},
    ]  # fmt: skip
    (tmp_path / CACHE_FILE).write_text("".join(json.dumps(item) + "\n" for item in rows))
    cache = ReplyCache(tmp_path)
    assert cache.attempts("a") == rows[:2] and cache.attempts("b") == [] and cache.charges("c") == rows[3:4]
    assert cache.failures["d"][0][0].detail == "oops" and cache.failures["d"][0][1] == []


def test_cache_records_the_charges_of_calls_without_a_reply(tmp_path):
    cache = ReplyCache(tmp_path)
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    cache.add(row("a") | {"at_most": usage})
    for _ in range(2):
        cache.add({"key": "a", "lost": "timeout", "at_most": usage})
    cache.add({"key": "b", "lost": "content_filter", "usage": usage})
    for current in (cache, ReplyCache(tmp_path)):
        assert len(current.attempts("a")) == 1 and current.attempts("b") == []
        assert [len(current.charges(key)) for key in "abc"] == [3, 1, 0]
        assert {Prices(1e6, 1e6).cost_of(call) for key in "ab" for call in current.charges(key)} == {120}


@pytest.mark.parametrize("missing_bytes", range(1, 40, 6))
def test_cache_survives_an_incomplete_line(tmp_path, missing_bytes):
    cache = ReplyCache(tmp_path)
    for key in "ab":
        cache.add(row(key))
    path = tmp_path / CACHE_FILE
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    reloaded = ReplyCache(tmp_path)
    assert reloaded.attempts("a") and (missing_bytes == 1) == bool(reloaded.attempts("b"))
    reloaded.add(row("c"))
    last = ReplyCache(tmp_path)
    assert last.attempts("a") and last.attempts("c")


def test_cache_skips_invalid_lines(tmp_path):
    lines = [b"\xff\xfe", b"[]", b"7", b"{}", b'{"key": 1, "attempt": 0, "reply": ""}', json.dumps(row("a")).encode()]
    (tmp_path / CACHE_FILE).write_bytes(b"\n".join(lines))
    assert ReplyCache(tmp_path).attempts("a")


def test_two_caches_can_write_to_the_same_file(tmp_path):
    first, second = ReplyCache(tmp_path), ReplyCache(tmp_path)
    for number in range(20):
        (first if number % 2 else second).add(row(str(number), reply="x" * 10_000))
    assert all(ReplyCache(tmp_path).attempts(str(number)) for number in range(20))


WRITER = """\
import sys
from medst_trl.engines.calls import ReplyCache
cache = ReplyCache(sys.argv[1])
print("ready", flush=True)
input()  # both processes start to write at the same time
for number in range(1000):
    key = f"{sys.argv[2]}{number}"
    cache.add({"key": key, "attempt": 0, "reply": key * 2_000, "finish_reason": "stop", "usage": None})
"""


def test_two_processes_can_write_to_the_same_file_at_once(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert sum(map(bool, (tmp_path / CACHE_FILE).read_bytes().splitlines())) == 2000  # empty lines are allowed
    cache = ReplyCache(tmp_path)
    for key in (f"{name}{number}" for name in "ab" for number in range(1000)):
        assert [attempt["reply"] for attempt in cache.attempts(key)] == [key * 2_000]


def test_cache_without_a_directory_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = ReplyCache()
    cache.add(row("a"))
    assert cache.attempts("a") and not list(tmp_path.iterdir())

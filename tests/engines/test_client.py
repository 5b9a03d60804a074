# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test the client with a scripted transport, one call after another."""

import asyncio
import json
import re
import time
from collections import Counter
from email.utils import formatdate

import httpx2
import pytest

from medst_trl.base.errors import UserError
from medst_trl.engines import client as judge_client
from medst_trl.engines.calls import Budget, Call, CallSettings, Prices, ReplyCache, RequestSize, api_key
from medst_trl.engines.client import Client, Stopped, wait_before
from medst_trl.engines.responses import CallError, error_of_status, retry_after_of, row_of_body
from medst_trl.selftrain.judge.prompts.paper import read_paper


ADVICE = dict.fromkeys(["content_filter", "bad_request", "unparsable"], "Nothing works: {detail}")
KEY = "sk-a-very-secret-key-0123456789"


def completion(text="8 5", **message):
    return {
        "choices": [{"message": {"content": text} | message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


def request(key="k", **body):
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "temperature": 0.0, "max_tokens": 50} | body
    size, reminder = RequestSize(100, 100), "Two numbers, please."
    return Call(lambda: body, key=key, size=size, read=read_paper, reminder=reminder)


@pytest.fixture(autouse=True)
def key_and_short_waits(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("medst_trl.engines.client.FIRST_WAIT", 0.001)


def ask(responses, requests=None, cache=None, budget=None, **settings):
    """Make the calls one after another. The transport returns `responses` in order and repeats the last one."""
    sent = []

    def respond(http_request):
        if http_request.method == "GET":
            return httpx2.Response(200, json={"object": "list", "data": [{"id": "judge-1"}]})
        sent.append(json.loads(http_request.content))
        response = responses[min(len(sent), len(responses)) - 1]
        if isinstance(response, Exception):
            raise response
        if isinstance(response, bytes):
            return httpx2.Response(200, content=response)
        if isinstance(response, httpx2.Response):
            return response
        if isinstance(response, tuple):
            status, error, *headers = response
            return httpx2.Response(status, json={"error": error}, headers=headers[0] if headers else {})
        return httpx2.Response(200, json=response)

    async def run():
        http = httpx2.AsyncClient(transport=httpx2.MockTransport(respond))
        calls = CallSettings(**{name: settings.pop(name) for name in ("max_retries",) if name in settings})
        client = Client("m", calls, cache=cache, budget=budget, http_client=http, **{"advice": ADVICE} | settings)
        answers = []
        for item in requests or [request()]:
            try:
                answers.append(await client.ask(item))
            except Stopped:
                break
        await client.close()
        return client, answers

    client, answers = asyncio.run(run())
    return client, answers, sent


def test_a_reply_is_read():
    client, [answer], sent = ask([completion()])
    assert answer.reading.scores == (8, 5) and answer.reason is None and not answer.cached
    assert sent == [request().body()] and client.events == {"calls": 1}


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"message": "slow down"}), (500, {"message": "oops"}), (503, {"message": "busy"}), (529, {}), (408, {}),
        httpx2.ConnectError("refused"), httpx2.ReadTimeout("slow"), httpx2.RemoteProtocolError("cut off"),
        httpx2.ReadError("reset"), b"", b"<html>", b'{"choices": [{"mes', b"[]", b"{}", b'{"choices": []}',
        {"error": {"message": "upstream", "code": 502}}, {"error": "busy"},
    ],
)  # fmt: skip
def test_transient_failures_are_retried_a_limited_number_of_times(failure):
    _, [answer], sent = ask([failure, failure, completion()])
    assert answer.reading.scores == (8, 5) and len(sent) == 3
    cache = ReplyCache()
    client, answers, sent = ask([failure], [request()], cache, max_retries=2)
    assert len(sent) == 3 and cache.attempts("k") == []  # so a later run tries it again
    assert client.stop_error or answers[0].reason == "request_failed"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ((401, {"message": f"Incorrect API key provided: {KEY}"}), "OPENAI_API_KEY"),
        ((403, {"message": "no"}), "OPENAI_API_KEY"),
        ((429, {"message": "quota", "code": "insufficient_quota"}), "credit"),
        ((402, {"message": "pay"}), "credit"),
        ((404, {"message": "The model `m` does not exist", "code": "model_not_found"}), "'m'.*judge-1"),
        ((404, {"message": "Not Found"}), "no chat API.*Not Found.*base_url"),
        ((404, {"message": "No endpoints found that support image input"}), "support image input"),
        ({"error": {"message": "no such key", "code": "invalid_api_key"}}, "OPENAI_API_KEY"),
        ({"error": {"message": "quota", "code": "insufficient_quota"}}, "credit"),
        ((429, {"message": "daily limit"}, {"Retry-After": "3600"}), "60 minutes"),
    ],
)  # fmt: skip
def test_permanent_failures_stop_the_run_immediately(failure, expected):
    client, answers, sent = ask([failure])
    assert answers == [] and len(sent) == 1
    message = str(client.stop_error)
    assert re.search(expected, message) and "kept" in message and KEY not in message


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ((400, {"message": "content management policy", "code": "content_filter"}), "content_filter"),
        (completion(None, refusal="I cannot"), "content_filter"),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}, "content_filter"),
        ((400, {"message": "Could not process image"}), "request_failed"),
        ((400, {"message": "bad", "code": "invalid_image_format"}), "request_failed"),
    ],
)  # fmt: skip
def test_a_refusal_drops_the_call_and_others_with_its_key(failure, reason):
    _, [answer, _, same], sent = ask([failure, completion()], [request(), request("b"), request()])
    assert answer.reason == same.reason == reason and len(sent) == 2
    assert not answer.cached and same.cached and same.detail == answer.detail


@pytest.mark.parametrize("failure", [(400, {"message": "no image"}), (400, {"message": "flagged"})])
@pytest.mark.parametrize("number", [3, 50])
def test_refusals_are_not_cached(tmp_path, failure, number):
    requests = [request(str(n)) for n in range(number)] + [request("0")]
    client, answers, sent = ask([failure], requests, ReplyCache(tmp_path))
    assert len(sent) == min(number, judge_client.GIVE_UP_AFTER) and not any(answer.reading for answer in answers)
    assert bool(client.stop_error) == (number == 50)
    _, answers, _ = ask([completion()], requests, ReplyCache(tmp_path))  # the server has been fixed
    assert len(answers) == number + 1 and all(answer.reading for answer in answers)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "At most 0 image(s) may be provided in one request.", "bad_request"),
        (400, "Invalid image_url", "bad_request"),
        (400, "This model's maximum context length is 4096 tokens. However, your prompt (with images) has 5000",
         "bad_request"),
        (404, "The model `llava-1.5` does not exist.", "model"),
        (404, "Not Found", "address"),
    ],
)  # fmt: skip
def test_error_messages_of_servers_are_classified(status, message, kind):
    assert error_of_status(status, {"message": message}).kind == kind


@pytest.mark.parametrize(
    "body",
    [
        {"error": None, "message": "temperature is not supported"},
        {"error": "", "message": "temperature is not supported"},
        {"error": "temperature is not supported"},
        [{"error": {"message": "temperature is not supported"}}],
    ],
)
def test_an_error_without_an_error_object_is_understood(body, caplog):
    _, [answer], sent = ask([httpx2.Response(400, json=body), completion()])
    assert caplog.messages == ["The server does not accept a temperature. It samples with its own settings."]
    assert answer.reading and "temperature" in sent[0] and "temperature" not in sent[1]


def test_an_error_in_a_list_is_shown_as_it_was_sent():
    text = '[{"error": {"message": "context length exceeded"}}]'
    _, [answer], _ = ask([httpx2.Response(400, text=text, headers={"content-type": "application/json"})])
    assert answer.detail == text


def test_lone_surrogates_are_replaced_in_replies_and_messages(tmp_path):
    """Servers send one if the limit of tokens cuts an emoji. It cannot be written to a file."""
    cut_off = json.dumps(completion("8 5\nGood \ud83d")).encode()
    _, [answer], _ = ask([cut_off], cache=ReplyCache(tmp_path))
    _, [again], _ = ask([cut_off], cache=ReplyCache(tmp_path))
    assert answer.attempts[-1]["reply"] == again.attempts[-1]["reply"] == "8 5\nGood ?"
    _, [answer], _ = ask([json.dumps(completion(None, refusal="Sorry \ud83d")).encode()])
    assert answer.reason == "content_filter" and answer.detail == "Sorry ?"


def test_closing_the_client_cancels_only_calls_in_flight():
    async def respond(_):
        await asyncio.sleep(0 if not calls.is_set() else 60)
        return httpx2.Response(200, json=completion())

    async def work(client, key):
        await client.ask(request(key))
        calls.set()
        await asyncio.sleep(0.1)
        return "finished"

    async def run():
        client = Client("m", http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(respond)))
        after_a_call = asyncio.create_task(work(client, "a"))
        await calls.wait()
        in_flight = asyncio.create_task(work(client, "b"))
        await asyncio.sleep(0.02)
        await client.close()
        return await asyncio.gather(after_a_call, in_flight, return_exceptions=True)

    calls = asyncio.Event()
    after_a_call, in_flight = asyncio.run(run())
    assert after_a_call == "finished" and isinstance(in_flight, asyncio.CancelledError)


def test_no_message_contains_a_key_from_the_url():
    url = "http://h/v1?api_key=abcdefsecret"
    client, _, _ = ask([httpx2.ConnectError(f"no route to {url}")], base_url=url, max_retries=0)
    assert "cannot be reached" in str(client.stop_error) and "abcdefsecret" not in str(client.stop_error)
    client, _, _ = ask([completion()], base_url=url, offline=True)
    assert "abcdefsecret" not in client.base_url


def test_a_bad_request_is_not_retried():
    _, [answer], sent = ask([(400, {"message": "context length exceeded"})])
    assert answer.reason == "request_failed" and "context length" in answer.detail and len(sent) == 1


def test_an_unreadable_reply_is_retried_with_a_reminder():
    cache = ReplyCache()
    _, [answer], sent = ask([completion("Lovely."), completion("8 5")], cache=cache)
    assert answer.reading.scores == (8, 5) and len(cache.attempts("k")) == 2
    assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert sent[1]["messages"][1]["content"] == "Lovely."


def test_a_call_is_given_up_after_several_unreadable_replies():
    cache = ReplyCache()
    _, [answer], sent = ask([completion("Lovely.")], cache=cache)
    assert answer.reason == "unparsable" and len(sent) == judge_client.RE_ASKS + 1
    _, [first, again], sent = ask([completion("Lovely.")], [request(), request()])
    assert first.reason == again.reason == "unparsable" and again.cached and len(sent) == judge_client.RE_ASKS + 1


def test_a_later_run_asks_anew_what_earlier_ones_could_not_read(tmp_path):
    for runs in (1, 2):
        _, [answer], sent = ask([completion("Lovely.")], cache=ReplyCache(tmp_path))
        assert answer.reason == "unparsable" and len(sent) == 3 and len(sent[0]["messages"]) == 1
        assert len(ReplyCache(tmp_path).charges("k")) == 3 * runs
    cache = ReplyCache(tmp_path)
    assert cache.is_open("k", read_paper) and not cache.is_open("k", str)
    _, [first, second], sent = ask([completion("Lovely."), completion("8 5")], [request(), request()], cache=cache)
    assert first.reading == second.reading is not None and len(sent) == 2 and len(sent[1]["messages"]) == 3
    cache = ReplyCache(tmp_path)
    assert not cache.is_open("k", read_paper) and ask([completion()], cache=cache)[2] == []


def test_a_better_reader_reads_the_replies_of_earlier_runs(tmp_path):
    for text in ("8 5", "Lovely.", "Lovely."):
        ReplyCache(tmp_path).add({"key": "k", "reply": text, "finish_reason": "stop", "usage": None})
    _, [answer], sent = ask([completion()], cache=ReplyCache(tmp_path))
    assert answer.reading.scores == (8, 5) and answer.attempts[-1]["reply"] == "8 5" and sent == []


def test_an_interrupted_run_resumes_after_the_last_attempt():
    cache = ReplyCache()
    cache.add({"key": "k", "reply": "Lovely.", "finish_reason": "stop", "usage": None})
    _, [answer], sent = ask([completion()], cache=cache)
    assert answer.reading and len(sent) == 1 and len(sent[0]["messages"]) == 3


@pytest.mark.parametrize(
    ("message", "replacement"),
    [
        ("Invalid parameter: 'response_format' of type 'json_schema' is not supported", None),
        ("Use 'max_completion_tokens' instead of 'max_tokens'", 50),
        ("'temperature' does not support 0 with this model", None),
    ],
)
def test_refused_fields_are_replaced_or_left_out(message, replacement):
    body = {"response_format": {"type": "json_schema", "json_schema": {}}}
    requests = [request("a", **body), request("b", **body)]
    _, answers, sent = ask([(400, {"message": message}), completion()], requests)
    assert all(answer.reading for answer in answers) and len(sent) == 3  # each field is refused only once
    for body in sent[1:]:
        if "max_completion" in message:
            assert body["max_completion_tokens"] == replacement and "max_tokens" not in body
        elif "temperature" in message:
            assert "temperature" not in body
        else:
            assert "response_format" not in body


@pytest.mark.parametrize(
    ("failure", "calls"),
    [
        (httpx2.ConnectError("refused"), 1),
        (b"<html>Welcome</html>", 1),
        ({"error": {"message": "no backend"}}, 1),
        ((500, {"message": "oops"}), judge_client.GIVE_UP_AFTER),
        ((400, {"message": "bad"}), judge_client.GIVE_UP_AFTER),
        ((400, {"message": "this model takes no images"}), judge_client.GIVE_UP_AFTER),
        (completion("Lovely."), judge_client.GIVE_UP_AFTER),
    ],
)
def test_a_run_stops_if_every_call_fails(failure, calls):
    client, answers, sent = ask([failure], [request(str(n)) for n in range(50)], max_retries=1)
    assert client.stop_error and len(answers) == calls and len(sent) <= 3 * calls


def test_a_run_stops_when_the_server_becomes_unreachable():
    requests = [request(str(n)) for n in range(50)]
    client, answers, _ = ask([completion()] * 5 + [httpx2.ConnectError("refused")], requests, max_retries=1)
    assert len([answer for answer in answers if answer.reading]) == 5
    assert len(answers) == 5 + judge_client.GIVE_UP_AFTER and "cannot be reached" in str(client.stop_error)


def test_bad_requests_among_good_ones_do_not_stop_the_run():
    requests = [request(str(n)) for n in range(40)]
    client, answers, _ = ask([completion()] + [(400, {"message": "bad"})] * 20 + [completion()], requests)
    assert client.stop_error is None and len(answers) == 40


def test_a_call_to_a_hanging_server_times_out():
    async def run():
        async def hang(_):
            await asyncio.sleep(60)

        http = httpx2.AsyncClient(transport=httpx2.MockTransport(hang))
        client = Client("m", CallSettings(timeout=0.05, max_retries=1), budget=Budget(Prices(1, 1)), http_client=http)
        return client, await client.ask(request())

    client, answer = asyncio.run(run())
    assert answer.reason == "request_failed" and client.events["timeout"] == 2
    assert client.budget.spent > 0  # it may have been charged


def test_the_budget_stops_the_run_before_it_is_exceeded():
    prices = Prices(1e3, 1e3)  # a call costs $0.11, and at most $0.15
    requests = [request(str(n)) for n in range(50)]
    client, answers, sent = ask([completion()], requests, budget=Budget(prices, 1.0))
    assert "max_cost 1" in str(client.stop_error) and "raise --max_cost" in str(client.stop_error)
    assert len(sent) == len(answers) == 8 and client.budget.spent == pytest.approx(0.88)


def test_a_reply_without_usage_costs_the_upper_bound():
    client, _, sent = ask(
        [{"choices": [{"message": {"content": "8 5"}}]}],
        [request(str(n)) for n in range(9)],
        budget=Budget(Prices(1e3, 1e3), 1.0),
    )
    assert len(sent) == 6 and client.budget.spent == pytest.approx(0.9)


def test_the_reservation_includes_the_reminder():
    budget = Budget(Prices(1e3, 1e3), 100.0)
    long = completion("Lovely. " * 500) | {"usage": None}
    _, [answer], _ = ask([long, completion() | {"usage": None}], budget=budget)
    assert answer.reading and budget.spent > 2 * 0.15 + 2.0


def test_offline_a_missing_reply_is_a_failed_request():
    _, [answer], sent = ask([completion()], offline=True)
    assert answer.reason == "request_failed" and answer.reading is None and sent == []


@pytest.mark.parametrize("value", ["", "  "])
def test_a_missing_key_is_refused_unless_there_is_a_base_url(monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="environment variable OPENAI_API_KEY"):
        api_key("OPENAI_API_KEY", None)
    assert api_key("OPENAI_API_KEY", "http://localhost:8000/v1")


def test_an_invalid_variable_name_or_key_is_refused_but_not_printed(monkeypatch):
    with pytest.raises(UserError) as error:
        api_key(KEY, None)
    assert KEY not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\u2019")
    with pytest.raises(UserError) as error:
        api_key("OPENAI_API_KEY", None)
    assert KEY not in str(error.value)


def test_no_message_contains_the_key():
    for text in (f"bad key {KEY}", f"Bearer {KEY}!", "https://user:word@host/v1"):
        with pytest.raises(CallError) as in_body:
            row_of_body({"error": text}, KEY)
        for error in (error_of_status(500, {"message": text}, secret=KEY), in_body.value):
            message = f"{error} {error.detail} {Client('m', base_url='http://x').next_step(error)}"
            assert KEY not in message and "user:word" not in message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7), ({"retry-after": "0.5"}, 0.5), ({"retry-after": "-3"}, 0), ({}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None), ({"retry-after": "inf"}, None), ({"retry-after": ""}, None),
    ],
)  # fmt: skip
def test_retry_after_is_read_as_a_number(headers, seconds):
    assert retry_after_of(headers) == seconds


def test_retry_after_is_read_as_a_date():
    assert retry_after_of({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=3)
    assert retry_after_of({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0


def test_a_run_that_stops_does_not_wait_for_an_overloaded_server(monkeypatch):
    monkeypatch.setattr(judge_client, "LONGEST_RETRY_AFTER", 10)
    sent = []

    async def respond(http_request):
        sent.append(http_request)
        await asyncio.sleep(0.3)  # meanwhile, the other calls wait for a slot
        return httpx2.Response(429, json={"error": {"message": "busy"}}, headers={"Retry-After": "20"})

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(respond))
    client, start = Client("m", CallSettings(concurrency=4), http_client=http), time.monotonic()
    with pytest.raises(UserError, match="asks to wait"):
        list(client.run([request(str(number)) for number in range(8)], max_in_flight=8))
    assert len(sent) == 4 and time.monotonic() - start < 10


def test_a_call_that_is_refused_again_for_its_rate_keeps_its_slot_while_it_waits():
    """A server with a rate limit would otherwise refuse all calls of a run in turn, until they give up."""
    sent, times = Counter(), []

    def respond(http_request):
        key = json.loads(http_request.content)["messages"][0]["content"]
        sent[key] += 1
        times.append(time.monotonic())
        if sent[key] < 3:
            return httpx2.Response(429, json={"error": {"message": "busy"}}, headers={"Retry-After": "0.3"})
        return httpx2.Response(200, json=completion())

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(respond))
    client = Client("m", CallSettings(concurrency=1), http_client=http)
    calls = [request(key, messages=[{"role": "user", "content": key}]) for key in "ab"]
    assert all(outcome.reading for _, outcome in client.run(calls, max_in_flight=2)) and sent == {"a": 3, "b": 3}
    assert times[1] - times[0] < 0.3 <= min(times[3] - times[2], times[4] - times[3])


def test_a_run_that_stops_starts_no_follow_ups():
    client, asked = Client("m", base_url="http://localhost/v1"), []

    async def answer(call):
        client._stop("No more.")
        asked.append(call.key)
        return "answer"

    def follow(call, outcome):
        return [request("b")] if call.key == "a" else []

    client.ask = answer
    outcomes = []
    with pytest.raises(UserError, match="No more"):
        for call, outcome in client.run([request("a")], follow):
            outcomes.append((call.key, outcome))
    assert asked == ["a"] and outcomes == [("a", "answer")]


def test_an_error_of_the_caller_is_raised_as_it_is():
    """An invalid text is not an error of the server, and nothing was sent that could be charged."""
    cache, budget = ReplyCache(), Budget(Prices(1.0, 1.0), max_cost=1.0)
    with pytest.raises(UnicodeEncodeError):
        ask([completion()], [request(messages=[{"role": "user", "content": "\ud800"}])], cache, budget)
    assert budget.spent == budget.reserved == 0 and cache.charges("k") == []


def test_waits_grow_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("medst_trl.engines.client.FIRST_WAIT", 0.5)
    waits = [max(wait_before(attempt, None) for _ in range(50)) for attempt in range(12)]
    assert waits[0] <= 0.5 < waits[3] and max(waits) <= 30
    assert 7 <= wait_before(0, 7.0) < 7.2
    assert wait_before(6, 0.1) > 10  # a server that keeps refusing calls is called less often

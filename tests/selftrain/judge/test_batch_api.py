# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test files of the Batch API against servers that refuse, fail or forget requests. Each step is a new process."""

import io
import json
import re
from base64 import urlsafe_b64decode
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import prefers_longer
from random_images import random_image

from medst_trl.base.errors import UserError
from medst_trl.selftrain.judge.batch_api import read_batch, write_batch
from medst_trl.selftrain.judge.pairwise import PairwiseJudge


UNSUPPORTED = "Unsupported {}: '{}' is not supported with this model."
REFUSALS = {
    "max_tokens": UNSUPPORTED.format("parameter", "max_tokens") + " Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0.0 with this model. Only 1 is supported.",
    "response_format": "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
}
EXPIRED = {"code": "batch_expired", "message": "This request could not be executed before the window expired."}


def candidates(n):
    rows = []
    for number in range(n):
        file = io.BytesIO()
        random_image(number).save(file, "PNG")
        text = {"type": "text", "text": f"What is {number}?"}
        content = [{"type": "image", "text": None}, text]
        images, prompt = [{"bytes": file.getvalue(), "path": None}], [{"role": "user", "content": content}]
        rows.append({"id": f"r{number}", "images": images, "prompt": prompt, "answers": ["it is dark", "it is"]})
    return rows


ROWS = candidates(2)
IDS = map("batch_req_{}".format, count())


def judge_in(directory, **settings):
    return PairwiseJudge("gpt-5", cache_dir=directory / "cache", **settings)


def write(directory, name="requests.jsonl", rows=ROWS):
    """Return the bodies that are written, by custom_id."""
    files = write_batch(judge_in(directory), rows, directory / name)
    return {line["custom_id"]: line["body"] for file in files for line in map(json.loads, file.open())}


def reply(key, text):
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}
    return {
        "id": next(IDS),
        "custom_id": key,
        "error": None,
        "response": {"status_code": 200, "body": body},
    }


def refusal(key, message, status=400):
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return {
        "id": next(IDS),
        "custom_id": key,
        "error": None,
        "response": {"status_code": status, "body": body},
    }


def read(directory, lines, name="results.jsonl", rows=ROWS):
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = judge_in(directory)
    read_batch(judge.cache, [directory / name])
    return list(judge(rows, offline=True))


def refused_field(body, strict):
    """Return the first field of a request that a model refuses."""
    return next((name for name in strict if name in body), None)


@given(st.permutations(list(REFUSALS)), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_each_file_has_the_fields_that_the_model_takes(tmp_path_factory, strict, number):
    """A model that names one field at a time gives its judgements after as many files as it refuses fields at most."""
    directory, strict = tmp_path_factory.mktemp("batch"), strict[:number]
    implied = "max_tokens" in strict  # a model that refuses max_tokens is not asked whether it takes a temperature
    for name in strict:
        if name == "temperature" and implied and strict.index("max_tokens") < strict.index(name):
            continue
        bodies = write(directory)
        assert {refused_field(body, strict) for body in bodies.values()} == {name} and len(bodies) == 4
        with pytest.raises(UserError, match="4 calls have no result") as caught:
            read(directory, [refusal(key, REFUSALS[name]) for key in bodies])
        assert REFUSALS[name].rstrip(".") in str(caught.value)
        assert re.search(f"--write_batch, which leaves out [a-z_, ]*{name}", str(caught.value))
    bodies = write(directory)
    for body in bodies.values():
        assert refused_field(body, strict) is None
        assert ("temperature" in body) == ("temperature" not in strict and not implied)
        assert body.get("max_completion_tokens") == (600 if "max_tokens" in strict else None)
    judgements = read(directory, [reply(key, prefers_longer(body)) for key, body in bodies.items()])
    assert [judgement["verdict"] for judgement in judgements] == [0, 0] and write(directory) == {}


@pytest.mark.parametrize(
    ("message", "files"),
    [*((message, 2) for message in REFUSALS.values()), ("Input is too long: 9125 tokens (request req_a1b2).", 1)],
)
def test_a_refusal_that_no_field_explains_ends_with_the_reason_and_what_to_do(tmp_path, message, files):
    for _ in range(files):
        with pytest.raises(UserError) as caught:
            read(tmp_path, [refusal(key, message) for key in write(tmp_path)])
    words = str(caught.value)
    assert "refuses every request" in words and message[:20] in words and "--model" in words
    (tmp_path / "requests.jsonl").unlink()
    assert write(tmp_path) == {} and not (tmp_path / "requests.jsonl").exists()


def test_a_request_that_is_refused_does_not_hold_up_the_others(tmp_path):
    first = next(iter(write(tmp_path)))
    for number in range(2):
        bodies = write(tmp_path)
        assert (first in bodies) == (number == 0) and len(bodies) == 4 - number
        lines = [
            refusal(key, "Cannot decode this.") if key == first else
            reply(key, prefers_longer(bodies[key])) if number == 1 else {"custom_id": key, "error": EXPIRED}
            for key in bodies
        ]  # fmt: skip
        if number == 0:
            with pytest.raises(UserError, match="3 calls have no result"):
                read(tmp_path, lines)
    judgements = read(tmp_path, lines)
    assert [judgement["dropped"] for judgement in judgements] == ["request_failed", None]
    assert "Cannot decode this." in [order["reply"] for order in judgements[0]["orders"]]
    assert write(tmp_path) == {}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"response": None, "error": EXPIRED}, "window expired"),
        ({"response": None, "error": {"code": "batch_cancelled", "message": "The batch was cancelled."}}, "cancelled"),
        ({"response": {"status_code": 500, "body": {"error": {"message": "It had an error"}}}}, "had an error"),
        ({"response": {"status_code": 503, "body": "<html>busy</html>"}}, "busy"),
        ({"response": {"status_code": 503, "body": None}, "error": "overloaded"}, "overloaded"),
        ({"response": {"status_code": 429, "body": {"error": {"message": "Rate limit reached"}}}}, "Rate limit"),
        ({"response": {"status_code": 200, "body": None}}, "no choices"),
        ({"response": {"status_code": 200, "body": {"error": {"message": "upstream", "code": 502}}}}, "upstream"),
        ({"response": None, "error": {"error": {"message": "Broken pipe", "code": 503}}}, "Broken pipe"),  # vLLM
    ],
)  # fmt: skip
def test_a_failure_of_the_server_is_shown_and_requested_again(tmp_path, line, reason):
    for _ in range(4):  # as often as it happens
        bodies = write(tmp_path)
        assert len(bodies) == 4 and all("max_tokens" in body for body in bodies.values())
        with pytest.raises(UserError, match=rf"4 calls have no result yet \(4 times: .*{reason}.*--write_batch"):
            read(tmp_path, [{"custom_id": key} | line for key in bodies])
    assert read(tmp_path, [reply(key, prefers_longer(body)) for key, body in write(tmp_path).items()])


def test_all_kinds_of_lines_are_told_apart(tmp_path):
    """Output and error file in any order, with missing and foreign lines, each read several times."""
    rows = candidates(4)
    keys = list(bodies := write(tmp_path, rows=rows))
    good = [reply(key, prefers_longer(bodies[key])) for key in keys[:3]]
    filtered = refusal(keys[3], "Rejected by the content management policy")
    bad = [refusal(keys[4], REFUSALS["max_tokens"]), {"custom_id": keys[5], "response": None, "error": EXPIRED}]
    foreign = reply("of another run", "8 5")
    reasons = ["1 time: Unsupported parameter", "1 time: This request could not", "2 times: not in these files"]
    for lines, number in (([filtered, *bad], 7), ([*good, foreign], 4), ([*bad, *good, filtered], 4)):
        with pytest.raises(UserError, match=f"{number} calls have no result") as caught:
            read(tmp_path, lines, rows=rows)
    assert all(part in str(caught.value) for part in reasons)
    again = write(tmp_path, rows=rows)
    assert {urlsafe_b64decode(name.removesuffix(".m.t")).hex() for name in again} == set(keys[4:])
    assert max(map(len, again)) <= 64  # Batch APIs refuse longer names
    assert all("max_completion_tokens" in body for body in again.values())
    judgements = read(tmp_path, [reply(key, prefers_longer(body)) for key, body in again.items()], rows=rows)
    assert [judgement["dropped"] for judgement in judgements] == [None, "content_filter", None, None]


@given(st.lists(st.sampled_from(["again", "write"]), max_size=5))
@settings(max_examples=15, deadline=None)
def test_a_refusal_counts_once_however_often_its_file_is_read(tmp_path_factory, steps):
    """All files of results together, in any order and several times, are what people give to a glob."""
    directory = tmp_path_factory.mktemp("batch")
    keys = list(bodies := write(directory))
    lines = [refusal(key, REFUSALS["max_tokens"]) for key in keys]
    for step in ["again", *steps]:
        if step == "write":
            assert len(write(directory)) == 4
        else:
            with pytest.raises(UserError, match="4 calls have no result"):
                read(directory, lines)
    lines += [reply(key, prefers_longer(bodies[key])) for key in keys[:3]]
    with pytest.raises(UserError, match="1 call has no result"):
        read(directory, lines)
    [body] = write(directory).values()
    assert "max_completion_tokens" in body and "max_tokens" not in body


@pytest.mark.parametrize(
    ("status", "message", "step"),
    [
        (429, "You exceeded your current quota, please check your plan and billing details.", "Top it up"),
        (404, "The model `gpt-5` does not exist or you do not have access to it.", "Correct --model"),
        (401, "Incorrect API key provided.", "Set a valid one in the environment variable OPENAI_API_KEY"),
    ],
)
def test_a_problem_of_the_account_is_explained_and_another_file_can_be_written(tmp_path, status, message, step):
    for _ in range(3):
        lines = [refusal(key, message, status) for key in write(tmp_path)]
        for line in lines:
            line["response"]["body"]["error"]["code"] = "insufficient_quota" if status == 429 else None
        with pytest.raises(UserError, match="4 calls have no result") as caught:
            read(tmp_path, lines)
        assert message.rstrip(".") in str(caught.value) and step in str(caught.value)
        assert "None" not in str(caught.value)
    assert read(tmp_path, [reply(key, prefers_longer(body)) for key, body in write(tmp_path).items()])


def test_the_same_file_sent_twice_is_not_refused_for_a_field_that_can_change(tmp_path):
    keys = list(write(tmp_path))
    for _ in range(2):
        with pytest.raises(UserError, match="4 calls have no result"):
            read(tmp_path, [refusal(key, REFUSALS["max_tokens"]) for key in keys])
    assert all("max_completion_tokens" in body for body in write(tmp_path).values())


def test_what_another_model_refuses_is_no_lesson_for_this_one(tmp_path):
    with pytest.raises(UserError):
        read(tmp_path, [refusal(key, REFUSALS["max_tokens"]) for key in write(tmp_path)])
    other = PairwiseJudge("gpt-4o", cache_dir=tmp_path / "cache")
    [file] = write_batch(other, iter(ROWS), tmp_path / "other.jsonl")
    assert {"max_tokens", "temperature"} <= json.loads(file.read_text().splitlines()[0])["body"].keys()


def test_what_was_learned_holds_for_pairs_that_are_added(tmp_path):
    with pytest.raises(UserError):
        read(tmp_path, [refusal(key, REFUSALS["max_tokens"]) for key in write(tmp_path)])
    read(tmp_path, [reply(key, prefers_longer(body)) for key, body in write(tmp_path).items()])
    bodies = write(tmp_path, rows=candidates(5))
    assert len(bodies) == 6 and all("max_completion_tokens" in body for body in bodies.values())


def test_a_reply_that_could_not_be_read_is_requested_again_in_a_later_run(tmp_path):
    keys = list(bodies := write(tmp_path))
    texts = ["Lovely.", *(prefers_longer(bodies[key]) for key in keys[1:])]
    for _ in range(2):
        judgements = read(tmp_path, map(reply, keys, texts))
        assert [judgement["dropped"] for judgement in judgements] == ["unparsable", None]
    assert list(write(tmp_path)) == keys[:1]
    judgements = read(tmp_path, [reply(keys[0], prefers_longer(bodies[keys[0]]))])
    assert [judgement["dropped"] for judgement in judgements] == [None, None] and write(tmp_path) == {}


@pytest.mark.parametrize(
    "line",
    [
        {"custom_id": ["a"], "response": {"status_code": 500}}, {"custom_id": None},
        {"response": {"status_code": 400}}, ["a"], 5, None, {"custom_id": "a", "method": "POST", "body": {}},
        {"custom_id": "a", "response": "broken"}, {"custom_id": "a", "response": {"status_code": float("inf")}},
    ],
)  # fmt: skip
def test_a_line_that_is_no_result_is_counted(tmp_path, line):
    key = next(iter(write(tmp_path)))
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(reply(key, '8 5'))}\n")
    counts = read_batch(judge_in(tmp_path).cache, [tmp_path / "results.jsonl"])
    assert counts in ({"replies": 1, "unreadable": 1}, {"replies": 1, "failed": 1})

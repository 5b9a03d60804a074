# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test the engine `server` with a server that fails on request and with a real `transformers serve`."""

import base64
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from datasets import Dataset
from PIL import Image
from random_images import random_image
from serving import serve
from tiny_run import small_policy

from medst_trl import CandidateGenerator, adapter_config
from medst_trl.base.errors import UserError
from medst_trl.data.schema import instruct_features, message, text_part
from medst_trl.engines import images
from medst_trl.engines.engine import (
    DESCRIBE,
    ENGINES,
    OpenedImage,
    Prompt,
    Request,
    Sampling,
    open_images,
    to_answer,
    to_ask,
)
from medst_trl.engines.kinds.server import ServerEngine, ServerSettings
from medst_trl.engines.kinds.transformers import TransformersEngine
from medst_trl.policy.vusr import VUSR, add_vusr
from medst_trl.selftrain.filters import QuestionFilter


def stored_image(seed, format="PNG"):
    file = io.BytesIO()
    random_image(seed).save(file, format)
    return {"bytes": file.getvalue(), "path": None}


def prompt(messages, number=0, format="PNG"):
    return Prompt(messages, open_images([stored_image(number, format)]))


def chat_completion(text, finish_reason="stop"):
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}],
    }  # fmt: skip


def server_engine(*args, **settings):
    return ServerEngine(*args, **{"max_retries": 1} | settings)


@pytest.fixture
def fake_server(monkeypatch):
    """Start a server that records its requests and replies with the (status, body) of its attribute `reply(body)`."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            status, answer = http.reply(body)
            kind = "text/html" if isinstance(answer, str) else "application/json"
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", http.kind or kind)
            self.send_header("Content-Length", str(len(content)))
            for name, value in http.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.requests, http.reply, http.kind = [], lambda body: (200, chat_completion(" Where is it? ")), None
    http.headers = {}
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_messages_and_images_are_sent(fake_server, format):
    history = [*to_answer([], 1, "What <image> is </s> this?"), message("assistant", [text_part(f"A {VUSR} scan.")])]
    ask = prompt(to_ask(history, 1), format=format)
    (reply,) = server_engine(fake_server.url, "m").write([ask], Sampling(max_new_tokens=9))
    assert (reply.text, reply.ended, reply.problem) == ("Where is it?", True, None)
    ((path, headers, body),) = fake_server.requests
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer none"
    image, text = body["messages"][0]["content"]
    kind, _, content = image["image_url"]["url"].partition(";base64,")
    assert kind == f"data:image/{format.lower()}"
    assert base64.b64decode(content) == stored_image(0, format)["bytes"]
    assert body["messages"][1]["role"] == "assistant" and "scan" in body["messages"][1]["content"]
    assert body["messages"][2] == {"role": "user", "content": [{"type": "text", "text": VUSR}]}
    for word in ("<image>", "</s>", VUSR):
        assert word not in text["text"] + body["messages"][1]["content"], "control tokens in a text are sent unescaped"
    assert text["text"].replace("\u200c", "") == "What <image> is </s> this?"


@pytest.mark.parametrize(
    ("kind", "sampling", "sent"),
    [
        ("vllm", Sampling(), {"temperature": 1.2, "top_p": 0.95, "top_k": 100, "max_tokens": 256}),
        ("sglang", Sampling(top_k=0), {"temperature": 1.2, "top_p": 0.95, "top_k": -1, "max_tokens": 256}),
        ("vllm", Sampling(temperature=0.0), {"temperature": 0.0, "max_tokens": 256}),
        ("transformers", Sampling(), {"generation_config": {
            "do_sample": True, "max_new_tokens": 256, "temperature": 1.2, "top_k": 100, "top_p": 0.95}}),
        ("transformers", Sampling(temperature=0.0), {"generation_config": {
            "do_sample": False, "max_new_tokens": 256}}),
    ],
)  # fmt: skip
def test_each_server_kind_gets_its_own_fields(fake_server, kind, sampling, sent):
    server_engine(fake_server.url, "m", kind).write([prompt(to_ask([], 1))], sampling)
    body = {key: value for key, value in fake_server.requests[0][2].items() if key not in ("model", "messages")}
    if "generation_config" in body:
        body["generation_config"] = json.loads(body["generation_config"])
    assert body == sent


def test_replies_are_in_order_and_tell_whether_they_ended(fake_server):
    def reply(body):
        time.sleep(0.02 * (body["messages"][0]["content"][-1]["text"] == "0"))
        return 200, chat_completion(body["messages"][0]["content"][-1]["text"], "length")

    fake_server.reply = reply
    replies = server_engine(fake_server.url, "m", concurrency=4).write(
        [prompt(to_answer([], 1, str(number))) for number in range(9)], Sampling()
    )
    assert [reply.text for reply in replies] == list("012345678")
    assert not any(reply.ended for reply in replies)


def test_empty_and_invalid_texts_are_accepted(fake_server):
    fake_server.reply = lambda body: (200, chat_completion(None))
    assert server_engine(fake_server.url, "m").write([prompt(to_ask([], 1))], Sampling())[0].text == ""
    fake_server.reply = lambda body: (200, chat_completion("half a character: \ud800"))
    server_engine(fake_server.url, "m").write([prompt(to_ask([], 1))], Sampling())[0].text.encode()


def test_transient_failures_are_retried(fake_server):
    fake_server.reply = lambda body: (
        (503, {"error": "busy"}) if len(fake_server.requests) == 1 else (200, chat_completion("ok?"))
    )
    assert server_engine(fake_server.url, "m").write([prompt(to_ask([], 1))], Sampling())[0].text == "ok?"
    assert len(fake_server.requests) == 2


def test_a_refused_request_gives_a_reply_with_a_problem(fake_server):
    fake_server.reply = lambda body: (
        (400, {"error": {"message": "image too large"}})
        if "b'" in body["messages"][0]["content"][-1]["text"]
        else (200, chat_completion("Yes"))
    )
    replies = server_engine(fake_server.url, "m").write(
        [prompt(to_answer([], 1, text)) for text in ("a", "b'", "c")], Sampling()
    )
    assert [reply.problem for reply in replies] == [None, "request_failed", None]
    assert replies[1].text == "400: image too large"


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        ((200, "<html>login</html>"), None, "is not a chat API"),
        ((200, "<html>"), "application/json", "is not a chat API"),
        ((200, {"error": "quota is used up"}), None, "quota is used up"),
        ((200, {"choices": []}), None, "no choices.*its log"),
        ((401, {"error": {"message": "bad key sk-abcdefghijklmnopqrstuv"}}), None, "OPENAI_API_KEY"),
        ((403, {}), None, "OPENAI_API_KEY"),
        ((404, {"error": {"message": "The model `m` does not exist."}}), None, "has no model 'm'.*does not exist"),
        ((500, {"error": "boom"}), None, "500.*its log"),
        ((502, "<html>Bad gateway</html>"), None, "502.*its log"),
        ((400, {"detail": "unknown field top_k, key sk-abcdefghijklmnopqrstuv"}), None, "unknown field top_k"),
    ],
)
def test_permanent_failures_stop_the_run(fake_server, reply, kind, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abcdefghijklmnopqrstuv")
    fake_server.reply, fake_server.kind = lambda body: reply, kind
    with pytest.raises(UserError, match=message) as error:
        server_engine(fake_server.url, "m").check()
    assert "sk-abc" not in str(error.value) and error.value.__cause__ is None
    assert fake_server.requests[0][1]["authorization"] == "Bearer sk-abcdefghijklmnopqrstuv"
    if reply[0] != 400:
        with pytest.raises(UserError):
            server_engine(fake_server.url, "m").write([prompt(to_ask([], 1))], Sampling())


def test_one_permanent_failure_stops_all_requests(fake_server):
    """A refused key is not sent again for each image."""
    fake_server.reply = lambda body: (401, {})
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        server_engine(fake_server.url, "m", concurrency=2).write([prompt(to_ask([], 1))] * 50, Sampling())
    assert len(fake_server.requests) <= 2


def test_retry_after_is_respected(fake_server):
    def reply(body):
        times.append(time.monotonic())
        return (429, {"error": "busy"}) if len(times) == 1 else (200, chat_completion("ok?"))

    times, fake_server.reply, fake_server.headers = [], reply, {"Retry-After": "0.7"}
    assert server_engine(fake_server.url, "m").write([prompt(to_ask([], 1))], Sampling())[0].text == "ok?"
    assert 0.7 <= times[1] - times[0] < 1.5


def test_fields_that_a_hosted_model_refuses_are_replaced_or_left_out(fake_server, caplog):
    def reply(body):
        if "max_tokens" in body:
            return 400, {"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."}}
        if "temperature" in body:
            return 400, {"error": {"message": "temperature: only the default (1) is supported"}}
        return 200, chat_completion("Yes")

    fake_server.reply = reply
    replies = server_engine(fake_server.url, "m", "openai", concurrency=1).write(
        [prompt(to_answer([], 1, text)) for text in "ab"], Sampling(temperature=0.0, max_new_tokens=8)
    )
    assert "not accept a temperature" in caplog.text
    assert [reply.text for reply in replies] == ["Yes", "Yes"]
    assert len(fake_server.requests) == 4, "a field is sent again after its refusal"
    assert fake_server.requests[-1][2]["max_completion_tokens"] == 8


def test_follow_up_requests_start_as_soon_as_their_reply_arrives(fake_server):
    """They do not wait for the slowest of the first requests."""
    last = threading.Event()

    def reply(body):
        text = body["messages"][0]["content"][-1]["text"]
        if text == "slow":
            assert last.wait(10), "the other requests wait for the slow one"
        if text == "fast again and again":
            last.set()
        return 200, chat_completion(text)

    def then(request, reply):
        words = reply.text.split()
        again = {1: " again", 2: " and again"}.get(len(words)) if words[0] == "fast" else None
        return [ask(reply.text + again)] if again else []

    def ask(text):
        return Request(prompt(to_answer([], 1, text)), Sampling(), text)

    fake_server.reply = reply
    run = server_engine(fake_server.url, "m", concurrency=2).run([map(ask, ["slow", "fast"])], then)
    assert sorted(request.tag for request, _ in run) == ["fast", "fast again", "fast again and again", "slow"]


def test_requests_are_made_only_when_there_is_room_for_them(fake_server):
    made = []

    def requests():
        for number in range(20):
            made.append(number)
            yield Request(prompt(to_ask([], 1)), Sampling())

    run = server_engine(fake_server.url, "m", concurrency=3).run([requests()])
    next(run)
    assert len(made) == 3
    run.close()
    assert len(fake_server.requests) <= 3


def test_an_image_is_encoded_once_for_all_its_requests(fake_server, monkeypatch):
    stored, store = [], images.store_image
    monkeypatch.setattr(images, "store_image", lambda image: stored.append(image) or store(image))
    engine, opened = server_engine(fake_server.url, "m"), OpenedImage(b"", Image.new("RGB", (4, 3)))
    engine.write([Prompt(to_answer([], 1, text), [opened]) for text in "abc"], Sampling())
    assert len(stored) == 1
    engine.write([Prompt(to_ask([], 1), [OpenedImage(b"", Image.new("RGB", (4, 3)))])], Sampling())
    assert len(stored) == 2


def test_an_image_without_a_file_is_sent_as_png(fake_server):
    image = Image.new("RGB", (4, 3), (128, 128, 128))
    server_engine(fake_server.url, "m").write([Prompt(to_ask([], 1), [OpenedImage(b"", image)])], Sampling())
    url = fake_server.requests[0][2]["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))).size == (4, 3)


@pytest.mark.parametrize("format", ["TIFF", "BMP", "GIF", "WEBP"])
def test_an_image_that_servers_do_not_read_is_sent_as_png(fake_server, format):
    server_engine(fake_server.url, "m").write([prompt(to_ask([], 1), format=format)], Sampling())
    url = fake_server.requests[0][2]["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, content = url.partition(";base64,")
    sent, stored = Image.open(io.BytesIO(base64.b64decode(content))), stored_image(0, format)["bytes"]
    assert kind == "data:image/png" and sent.format == "PNG"
    assert sent.convert("RGB").tobytes() == Image.open(io.BytesIO(stored)).convert("RGB").tobytes()


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="Unknown server_kind 'vlm'. Did you mean 'vllm'"):
        ServerEngine("http://localhost/v1", "m", "vlm")


def test_the_first_test_leaves_room_for_a_model_that_thinks(fake_server):
    server_engine(fake_server.url, "m").check()
    assert fake_server.requests[0][2]["max_tokens"] == 16


def priced_engine(url, **settings):
    prices = {"price_per_million_input_tokens": 1e3, "price_per_million_output_tokens": 1e3}
    return server_engine(url, "m", **prices | settings)


def test_the_budget_of_an_engine_is_never_exceeded(fake_server):
    usage = {"prompt_tokens": 200, "completion_tokens": 10, "total_tokens": 210}  # $0.21 each
    fake_server.reply = lambda body: (200, chat_completion("Yes") | {"usage": usage})
    engine, replies = priced_engine(fake_server.url, max_cost=2.0, concurrency=3), []
    engine.check()
    sampling = Sampling(max_new_tokens=10)
    requests = [Request(prompt(to_answer([], 1, "Where is it?")), sampling, number) for number in range(50)]
    with pytest.raises(UserError, match="budget is used up.*max_cost 2.*raise --max_cost"):
        for item in engine.run([requests]):
            replies.append(item)
    paid = len(fake_server.requests) * 0.21
    assert 1 < paid <= 2 and engine.budget.spent == pytest.approx(paid)
    assert len(replies) == len(fake_server.requests) - 1, "replies in flight are kept"
    before = len(fake_server.requests)
    with pytest.raises(UserError, match="budget is used up"):
        engine.write([requests[0].prompt], Sampling(max_new_tokens=2000))
    assert len(fake_server.requests) == before, "the budget is one for all calls of an engine"


@pytest.mark.parametrize("kind", ["vllm", "transformers", "openai"])
def test_a_reply_without_usage_costs_its_maximum(fake_server, kind):
    engine = priced_engine(fake_server.url, kind=kind, max_cost=100.0)
    engine.write([prompt(to_ask([], 1))], Sampling(max_new_tokens=5000))
    assert 5 < engine.budget.spent < 6


def test_a_call_that_may_have_been_charged_counts_in_the_budget(fake_server):
    fake_server.reply = lambda body: time.sleep(0.5) or (200, chat_completion("late"))
    engine = priced_engine(fake_server.url, max_cost=100.0, timeout=0.05, max_retries=0)
    with pytest.raises(UserError, match="in time.*raise --timeout"):
        engine.write([prompt(to_ask([], 1))], Sampling())
    assert 0.256 < engine.budget.spent < 100


def test_a_budget_needs_prices():
    with pytest.raises(UserError, match="max_cost needs prices"):
        ServerEngine("http://localhost/v1", "m", max_cost=1.0)
    assert ServerEngine("http://localhost/v1", "gpt-4o", "openai", max_cost=1.0).budget.max_cost == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_cost": 1.0}, "max_cost needs prices"),
        ({"price_per_million_input_tokens": -1.0}, "price_per_million_input_tokens is -1.0"),
        ({"price_per_million_output_tokens": -1.0}, "price_per_million_output_tokens is -1.0"),
    ],
)
def test_missing_and_negative_prices_are_refused_before_a_run(settings, message):
    with pytest.raises(UserError, match=message):
        ENGINES.get("server").check(ServerSettings(base_url="http://localhost/v1", **settings), "m")


def test_processes_share_the_budget(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = ServerSettings(base_url="http://localhost/v1", max_cost=2.0)
    assert ENGINES.get("server").open("gpt-4o", settings).budget.max_cost == 0.5


def test_the_key_comes_from_the_variable_that_is_set(fake_server, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "sk-abcdefghijklmnopqrstuv")
    server_engine(fake_server.url, "m", key_variable="THEIR_KEY").check()
    assert fake_server.requests[0][1]["authorization"] == "Bearer sk-abcdefghijklmnopqrstuv"


def event_stream(*texts):
    """Return the texts as a stream of server-sent events."""
    lines = [
        {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m",
         "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        for text in texts
    ]  # fmt: skip
    return "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"


def test_a_reply_is_streamed(fake_server):
    fake_server.reply, fake_server.kind = (
        lambda body: (200, event_stream(" ", "Where ", "is it?", " ", "\n")),
        "text/event-stream",
    )
    assert list(server_engine(fake_server.url, "m").stream(prompt(to_ask([], 1)), Sampling())) == ["Where", " is it?"]
    assert fake_server.requests[0][2]["stream"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>login</html>", "is not a chat API"),
        ("data: {broken\n\n", "is not a chat API"),
        (event_stream("Wh").replace("null", '"content_filter"'), "refuses the request: the reply was filtered"),
    ],
)
def test_a_stream_without_a_complete_reply_is_an_error(fake_server, text, message):
    fake_server.reply, fake_server.kind = lambda body: (200, text), "text/event-stream"
    with pytest.raises(UserError, match=message):
        list(server_engine(fake_server.url, "m").stream(prompt(to_ask([], 1)), Sampling()))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, {"error": {"message": "image too large"}}), "refuses the request: 400: image too large"),
        ((401, {}), "OPENAI_API_KEY"),
        ((500, {"error": "boom"}), "500.*its log"),
    ],
)
def test_permanent_failures_stop_a_stream(fake_server, reply, message):
    fake_server.reply = lambda body: reply
    with pytest.raises(UserError, match=message):
        list(server_engine(fake_server.url, "m").stream(prompt(to_ask([], 1)), Sampling()))


def test_an_unreachable_server_is_reported_without_its_password():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=f"The server at http://<hidden>@127.0.0.1:{port}/v1 cannot be reached"):
        server_engine(f"http://user:secret@127.0.0.1:{port}/v1", "m", max_retries=0).check()


def test_a_hanging_server_times_out(fake_server):
    fake_server.reply = lambda body: time.sleep(0.5) or (200, chat_completion("late"))
    with pytest.raises(UserError, match="did not answer in time"):
        server_engine(fake_server.url, "m", timeout=0.05).check()


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Return the directory, the model and the processor of a tiny policy with a merged adapter."""
    from peft import get_peft_model

    directory = tmp_path_factory.mktemp("merged")
    model, processor = small_policy()
    ranks = {"r": 4, "lora_alpha": 8, "vision_r": 2, "vision_lora_alpha": 4}
    model = get_peft_model(model, adapter_config(model, vusr_token_id=add_vusr(processor), **ranks))
    model = model.merge_and_unload().eval()
    model.generation_config.eos_token_id = [*model.generation_config.eos_token_id, *range(5, 400, 10)]
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory), model, processor


@pytest.fixture(scope="module")
def served(merged):
    with serve(merged[0]) as url:
        yield url


def test_a_real_server_writes_the_same_texts(merged, served):
    """Greedy texts equal those of the model in this process, for questions and answers, with and without a history.

    The server also respects top-k.
    """
    directory, model, processor = merged
    described = [*to_answer([], 1, DESCRIBE), message("assistant", [text_part("It is dark.")])]
    kinds = (to_ask([], 1), to_answer([], 1, "Where is it?"), to_ask(described, 1), to_answer(described, 1, "Is it?"))
    prompts = [prompt(messages, number) for number in range(2) for messages in kinds]
    server, local = (
        ServerEngine(served, directory, "transformers", concurrency=3),
        TransformersEngine(model, processor),
    )
    server.check()
    for sampling in (Sampling(temperature=0.0, max_new_tokens=12), Sampling(top_k=1, max_new_tokens=12)):
        replies = server.write(prompts, sampling)
        assert replies == local.write(prompts, sampling)
    assert len({reply.text for reply in replies}) > 3
    sampled = Sampling(max_new_tokens=12)
    assert server.write(prompts[:1] * 4, sampled) != server.write(
        prompts[:1] * 4, Sampling(top_k=1, max_new_tokens=12)
    )


def test_a_real_server_generates_candidates(merged, served):
    rows = [{"id": f"r{n}", "images": [stored_image(n)], "image_ids": [str(n)], "messages": []} for n in range(4)]
    short = Sampling(max_new_tokens=16)
    generate = CandidateGenerator(
        ServerEngine(served, merged[0], "transformers"),
        num_questions=3,
        question_sampling=short,
        answer_sampling=short,
        question_filter=QuestionFilter(min_words=1, english=False),
    )
    candidates = list(generate(Dataset.from_list(rows, features=instruct_features())))
    assert len(candidates) + len(generate.rejected) == 12
    assert candidates and all(len(set(row["answers"])) == 2 for row in candidates)
    assert {json.loads(row["generation"])["engine"] for row in candidates} == {"server"}
    assert "request_failed" not in {row["reason"] for row in generate.rejected}


def test_a_real_server_streams_the_text_that_it_writes(merged, served):
    """The text also equals that of the model in this process."""
    directory, model, processor = merged
    greedy, local = Sampling(temperature=0.0, max_new_tokens=12), TransformersEngine(model, processor)
    prompts = [prompt(to_answer([], 1, f"Where is {number}?"), number) for number in range(6)]
    expected = [reply.text for reply in local.write(prompts, greedy)]
    streamed = [list(local.stream(one, greedy)) for one in prompts]
    assert list(map("".join, streamed)) == expected
    assert max(map(len, streamed)) > 1
    served_pieces = [list(ServerEngine(served, directory, "transformers").stream(one, greedy)) for one in prompts]
    # `transformers serve` omits an incomplete character at the end of a stream.
    assert list(map("".join, served_pieces)) == [text.rstrip("\ufffd") for text in expected]
    assert max(map(len, served_pieces)) > 1


def test_a_real_server_refuses_wrong_settings(merged, served):
    with pytest.raises(UserError, match="the model 'other'"):
        ServerEngine(served, "other", "transformers").check()
    with pytest.raises(UserError, match="top_k"):
        ServerEngine(served, merged[0], "vllm").check()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A judge on localhost: an OpenAI-compatible HTTP server. A test selects the fault of each call.

```python
with JudgeServer(fault=lambda number, body: "500" if number == 0 else None) as server:
    judge = PairwiseJudge("judge", base_url=server.base_url)
```
"""

import asyncio
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from typing import Any


TEXTS = {
    "paper": r"\[Question\]\n(.*)\n\n\[Answer 1\]\n(.*)\n\[End Answer 1\]\n\n\[Answer 2\]\n(.*)\n\[End Answer 2\]",
    "rubric": "\n\n".join(rf"<{name} \w+>\n(.*)\n</{name} \w+>" for name in ("question", "answer_1", "answer_2")),
}
CRITERIA = ("accuracy", "relevance", "completeness", "safety", "overall")
USAGE = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
STATUSES = {
    "400": (400, {"message": "bad request", "type": "invalid_request_error"}),
    "401": (401, {"message": "Incorrect API key provided: sk-secretsecretsecretsecret", "code": "invalid_api_key"}),
    "403": (403, {"message": "Country not supported", "code": "unsupported_country"}),
    "404_model": (404, {"message": "The model `nothing` does not exist", "code": "model_not_found"}),
    "404": (404, {"message": "Not Found"}),
    "429": (429, {"message": "Rate limit reached", "code": "rate_limit_exceeded"}),
    "quota": (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}),
    "500": (500, {"message": "The server had an error", "type": "server_error"}),
    "503": (503, {"message": "overloaded", "type": "server_error"}),
    "filter": (400, {"message": "Rejected by the content management policy", "code": "content_filter"}),
    "image": (400, {"message": "Could not process image", "code": "image_parse_error"}),
    "no_format": (400, {"message": "response_format is not supported", "param": "response_format"}),
    "no_max_tokens": (400, {"message": "Use 'max_completion_tokens' instead of 'max_tokens'.", "param": "max_tokens"}),
    "no_temperature": (400, {"message": "temperature: only the default (1) is supported", "param": "temperature"}),
    "error_body": (200, {"message": "upstream failed", "code": 502}),
}


def reply_with(version: str, scores: tuple[float, float]) -> str:
    """Return a well-formed reply that gives these scores to the first and second answer shown."""
    if version == "paper":
        return f"{scores[0]:g} {scores[1]:g}\nBoth answers address the question."
    answers = {f"answer_{place + 1}": dict.fromkeys(CRITERIA, score) for place, score in enumerate(scores)}
    verdict = "tie" if scores[0] == scores[1] else "answer_1" if scores[0] > scores[1] else "answer_2"
    return json.dumps({"comparison": "Both answers address the question.", **answers, "verdict": verdict})


def shown_texts(messages: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    """Return the name of the prompt, the question, and the first and second answer of a request."""
    text = next(message for message in messages if message["role"] == "user")["content"][-1]["text"]
    found = ((version, re.search(pattern, text, re.DOTALL)) for version, pattern in TEXTS.items())
    return next((version, *match.groups()) for version, match in found if match)


def prefers_longer(body: dict[str, Any]) -> str:
    """Reply as a judge whose verdict does not depend on the order."""
    version, _, first, second = shown_texts(body["messages"])
    return reply_with(version, (5, 5) if len(first) == len(second) else (8, 5) if len(first) > len(second) else (5, 8))


def prefers_first(body: dict[str, Any]) -> str:
    """Reply as a judge that always prefers the answer shown first."""
    return reply_with(shown_texts(body["messages"])[0], (9, 4))


class RandomFaults:
    """Random faults with these rates, for example `{"429": 0.1, "500": 0.05}`."""

    def __init__(self, rates: dict[str, float], seed: int = 0):
        self.rates, self.random = rates, random.Random(seed)

    def __call__(self, number: int, body: dict[str, Any]) -> str | None:
        draw = self.random.random()
        for name, rate in self.rates.items():
            draw -= rate
            if draw < 0:
                return name
        return None


class JudgeServer:
    """
    Judge server that runs in a thread while the context is open.

    Attributes:
        base_url: URL for the client.
        bodies: Bodies of the requests.
        headers: Headers of the requests.
        times: Start times of the requests.
        delivered: Number of complete replies by request (a hash of its messages).
        outcomes: Number of calls by fault (`"ok"` without a fault).
        busy_seconds: Total duration of all calls.
        in_flight: Number of calls that are being answered.
        max_concurrent: Largest number of concurrent calls.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str] = prefers_longer,
        fault: Callable[[int, dict[str, Any]], str | None] = lambda number, body: None,
        latency: float = 0.0,
        retry_after: str | None = None,
        usage: dict[str, int] | None = USAGE,
    ):
        self.answer, self.fault, self.latency, self.retry_after = answer, fault, latency, retry_after
        self.usage = usage
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.times: list[float] = []
        self.delivered: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.busy_seconds = 0.0
        self.in_flight = self.max_concurrent = 0

    def __enter__(self) -> "JudgeServer":
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 24, backlog=512)
        self.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        started.set()
        await self._ended.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
                length = next((int(v) for k, _, v in self._fields(head) if k == "content-length"), 0)
                body = await reader.readexactly(length)
                if head.startswith("GET"):
                    await self._send(writer, 200, json.dumps({"object": "list", "data": [{"id": "judge-1"}]}))
                elif not await self._call(head, json.loads(body), reader, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client closed the connection or was killed, or the test has ended
        finally:
            writer.close()

    @staticmethod
    def _fields(head: str):
        return [
            (k.strip().lower(), ":", v.strip()) for k, _, v in (line.partition(":") for line in head.split("\r\n"))
        ]

    async def _call(self, head: str, body: dict[str, Any], reader, writer) -> bool:
        """Answer one call. False closes the connection."""
        started = time.monotonic()
        self.in_flight += 1
        self.max_concurrent = max(self.max_concurrent, self.in_flight)
        fault = self.fault(len(self.bodies), body)
        self.bodies.append(body)
        self.headers.append(head)
        self.times.append(started)
        self.outcomes[fault or "ok"] += 1
        try:
            return await self._answer(fault, body, reader, writer)
        finally:
            self.in_flight -= 1
            self.busy_seconds += time.monotonic() - started

    async def _answer(self, fault: str | None, body: dict[str, Any], reader, writer) -> bool:
        if fault == "hang":
            await reader.read(1)  # until the client times out
            return False
        await asyncio.sleep(self.latency)
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault in STATUSES:
            status, error = STATUSES[fault]
            retry = f"Retry-After: {self.retry_after}\r\n" if self.retry_after and status == 429 else ""
            await self._send(writer, status, json.dumps({"error": error}), retry)
            return True
        if fault == "html":
            await self._send(writer, 200, "<html><body>Welcome</body></html>", "", "text/html")
            return True
        if fault == "garbage":
            await self._send(writer, 200, '{"choices": [{"mess\x00', "")
            return True
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.answer(body)}}
        if fault == "nonsense":
            choice["message"]["content"] = "Both answers are lovely."
        elif fault == "refusal":
            choice["message"] |= {"content": None, "refusal": "I cannot help with this image."}
        elif fault == "filtered_reply":
            choice |= {"finish_reason": "content_filter"}
        elif fault == "no_choices":
            choice = None
        completion = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"],
                      "choices": [choice] if choice else [], "usage": self.usage}  # fmt: skip
        text = json.dumps(completion)
        if fault == "truncate":
            data = text.encode()
            writer.write(self._head(200, len(data)) + data[: len(data) // 2])
            await writer.drain()
            return False
        await self._send(writer, 200, text)
        self.delivered[sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()] += 1
        return True

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, text: str, fields: str = "", kind: str = "application/json"
    ) -> None:
        data = text.encode()
        writer.write(self._head(status, len(data), fields, kind) + data)
        await writer.drain()

    @staticmethod
    def _head(status: int, length: int, fields: str = "", kind: str = "application/json") -> bytes:
        return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{fields}\r\n".encode()

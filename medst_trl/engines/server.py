# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine `server`: any OpenAI-compatible server that runs the policy with its `<vusr>` chat template."""

import base64
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError, closest
from medst_trl.base.settings import check_bounds, documented
from medst_trl.data.source import printable
from medst_trl.policy.chat_template import VUSR

from .client import Answer, Call, Client, Stopped, open_portal
from .engine import (
    ENGINES,
    Engine,
    EngineKind,
    OpenedImage,
    Prompt,
    Reply,
    Request,
    Sampling,
    nothing_follows,
    without_margins,
)


if TYPE_CHECKING:
    from concurrent.futures import Future

    from anyio.from_thread import BlockingPortal

RETRIES = 5  # of a request that fails for a passing cause

# The server's tokenizer is not known here, so whatever looks like a control token is kept from becoming one.
_CONTROL = re.compile(r"<(?=[|/]?\w[^<>\s]*>)|\[(?=/?[A-Z_]+\])")


@documented
@dataclass
class ServerSettings:
    """
    Settings of the engine `server`.

    Args:
        base_url (`str`, *optional*):
            URL of the server's API. The API key is read from the environment variable OPENAI_API_KEY.
        server_kind (`str`, *optional*, defaults to `"vllm"`):
            Kind of server, which decides how sampling settings are sent: vllm, sglang, transformers or openai.
        concurrency (`int`, *optional*, defaults to `32`):
            Maximum number of requests in flight on each process.
    """

    base_url: str | None = None
    server_kind: str = "vllm"
    concurrency: int = 32


def _openai(sampling: Sampling) -> dict[str, Any]:
    """OpenAI's own fields. There is no top-k among them."""
    if sampling.temperature == 0:
        return {"temperature": 0.0, "max_tokens": sampling.max_new_tokens}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}


def _vllm(sampling: Sampling) -> dict[str, Any]:
    """vLLM and SGLang: OpenAI's fields, and top-k beside them."""
    top_k = {} if sampling.temperature == 0 else {"extra_body": {"top_k": sampling.top_k or -1}}
    return _openai(sampling) | top_k


def _transformers(sampling: Sampling) -> dict[str, Any]:
    """`transformers serve` has no field for top-k and never starts to sample: it gets a generation config."""
    config = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_new_tokens}
    if sampling.temperature > 0:
        config |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return {"extra_body": {"generation_config": json.dumps(config)}}


SERVER_KINDS = {"vllm": _vllm, "sglang": _vllm, "transformers": _transformers, "openai": _openai}


class ServerEngine(Engine):
    """
    Writes texts by requests to a server. The seed of a run does not decide what it samples.

    Args:
        base_url (`str`):
            Address of its API, for example `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the policy on the server.
        kind (`str`, *optional*, defaults to `"vllm"`):
            How it takes sampling settings: `"vllm"`, `"sglang"`, `"transformers"` (`transformers serve`), `"openai"`.
        concurrency (`int`, *optional*, defaults to `32`):
            Maximum number of requests in flight.
        timeout (`float`, *optional*, defaults to `600`):
            Seconds after which a request is retried.

    Servers that need an API key get `OPENAI_API_KEY` of the environment.

    Example:

    ```python
    >>> server = ServerEngine("http://localhost:8000/v1", model="runs/demo/merged", kind="vllm")
    >>> candidates = list(CandidateGenerator(server, num_questions=2)(images))
    ```
    """

    name = "server"

    def __init__(self, base_url: str, model: str, kind: str = "vllm", concurrency: int = 32, timeout: float = 600):
        self.base_url = base_url
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self._settings = SERVER_KINDS[kind]

    def check(self) -> None:
        """
        Ask for one token to test whether the server is there, knows the model and takes the settings.

        Raises:
            UserError: if not.
        """
        with self._connection() as (client, portal):
            body = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}]}
            call = Call(lambda: body | self._settings(Sampling(max_new_tokens=1)))
            reply = self._reply(client, portal.start_task_soon(client.ask, call))
        if reply.problem:
            raise UserError(
                f"The server at {client.base_url} does not answer as model {self.model!r} ({reply.text}). Set "
                f"model_name_or_path to the name under which it serves the model, and server_kind to its kind "
                f"({', '.join(SERVER_KINDS)})."
            )

    def run(self, first, then=nothing_follows):
        """
        Answer requests, and what follows from their replies, as soon as the server has room. See [`Engine.run`].

        A request that the server refuses has a reply with the problem `request_failed`.

        Raises:
            UserError: if the server cannot be reached, refuses the API key, has no such model, or keeps failing.
        """
        first, finished, in_flight = iter(first), SimpleQueue(), 0
        with self._connection() as (client, portal):

            def start(request: Request) -> None:
                nonlocal in_flight
                in_flight += 1
                future = portal.start_task_soon(client.ask, Call(lambda: self._body(request.prompt, request.sampling)))
                future.add_done_callback(lambda done: finished.put((request, done)))

            while True:
                while in_flight < self.concurrency and (request := next(first, None)) is not None:
                    start(request)
                if not in_flight:
                    return
                request, done = finished.get()
                in_flight -= 1
                reply = self._reply(client, done)
                for following in then(request, reply):
                    start(following)
                yield request, reply

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the text of one prompt as the server sends it. Closing the iterator ends the request."""
        pieces = SimpleQueue()
        with self._connection() as (client, portal):
            call = Call(lambda: self._body(prompt, sampling), on_piece=pieces.put)
            done = portal.start_task_soon(client.ask, call)
            done.add_done_callback(lambda _: pieces.put(None))
            yield from without_margins(map(printable, iter(pieces.get, None)))
            reply = self._reply(client, done)
        if reply.problem:
            raise UserError(f"The server at {client.base_url} refuses the request: {reply.text}.")

    def describe(self) -> dict[str, Any]:
        return {"model": self.model, "engine": self.name}

    @contextmanager
    def _connection(self) -> "Iterator[tuple[Client, BlockingPortal]]":
        client = Client(
            self.model, base_url=self.base_url, concurrency=self.concurrency, timeout=self.timeout,
            max_retries=RETRIES, setting="model_name_or_path",
        )  # fmt: skip
        with open_portal(client) as portal:
            try:
                yield client, portal
            except Stopped:
                raise portal.call(client.why_stopped) from None

    def _reply(self, client: Client, done: "Future[Answer]") -> Reply:
        """Return the reply of a call. Raises `Stopped` or a `UserError` if no call can succeed."""
        answer = done.result()
        if answer.trouble is None:
            finish_reason = answer.attempts[-1]["finish_reason"]
            return Reply(printable(answer.reading).strip(), ended=finish_reason != "length")
        if answer.trouble.action == "drop":
            status = f"{answer.trouble.status}: " if answer.trouble.status else ""
            return Reply(f"{status}{answer.detail}", problem="request_failed")
        raise UserError(client.next_step(answer.trouble))

    def _body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        return {"model": self.model, "messages": _messages(prompt), **self._settings(sampling)}


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as the API takes it, each image in its place as a data URL."""
    images, messages = iter(prompt.images), []
    for turn in prompt.messages:
        content = [
            {"type": "text", "text": _neutralised(part["text"])} if part["type"] == "text" else _image(next(images))
            for part in turn["content"]
        ]
        if turn.get("vusr"):
            content.append({"type": "text", "text": VUSR})
        # The API has assistant messages as text.
        text = "".join(part.get("text", "") for part in content)
        messages.append({"role": turn["role"], "content": text if turn["role"] == "assistant" else content})
    return messages


def _image(opened: OpenedImage) -> dict[str, Any]:
    from PIL import Image

    content = opened.bytes
    if not content:
        file = io.BytesIO()
        opened.image.save(file, "PNG")
        content = file.getvalue()
    with Image.open(io.BytesIO(content)) as image:
        kind = image.get_format_mimetype()
    url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _neutralised(text: str) -> str:
    from medst_trl.policy.vusr import ZERO_WIDTH_NON_JOINER

    return _CONTROL.sub(lambda match: match[0] + ZERO_WIDTH_NON_JOINER, text)


def _check(settings: ServerSettings) -> None:
    if settings.server_kind not in SERVER_KINDS:
        near = closest(settings.server_kind, SERVER_KINDS)
        raise UserError(
            f"Unknown server_kind {settings.server_kind!r}.{near} Choose one of {', '.join(SERVER_KINDS)}."
        )
    if not settings.base_url:
        raise UserError("The engine `server` needs base_url, for example --base_url http://localhost:8000/v1.")
    check_bounds(settings, at_least={"concurrency": 1})


def _open(model_name_or_path: str, settings: ServerSettings) -> ServerEngine:
    return ServerEngine(settings.base_url, model_name_or_path, settings.server_kind, settings.concurrency)


ENGINES.register(
    EngineKind(
        name="server",
        summary="an OpenAI-compatible server",
        settings=ServerSettings,
        open=_open,
        check=_check,
        address=lambda settings: f"{settings.base_url} ({settings.server_kind})",
        operational=frozenset({"base_url", "concurrency"}),
    )
)

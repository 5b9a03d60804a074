# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine `server`: any OpenAI-compatible server that runs the policy with its `<vusr>` chat template."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from queue import SimpleQueue
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.processes import world_size
from medst_trl.base.settings import check_choice, check_url, documented
from medst_trl.data.cells import printable
from medst_trl.data.schema import message, text_part
from medst_trl.engines.calls import CALL_SETTINGS, Budget, Call, CallSettings, Outcome, RequestSize, image_tokens
from medst_trl.engines.client import Client, Stopped
from medst_trl.engines.engine import ENGINES, Engine, EngineKind, Prompt, Reply, Request, Sampling, sent_parts
from medst_trl.policy.vusr import ZERO_WIDTH_NON_JOINER


# The server's tokenizer is not known here, so whatever looks like a control token is kept from becoming one.
_CONTROL = re.compile(r"<(?=[|/]?\w[^<>\s]*>)|\[(?=/?[A-Z_]+\])")


@documented
@dataclass(kw_only=True)
class ServerSettings(CallSettings):
    """
    Settings of the engine `server`.

    Args:
        base_url (`str`, *optional*):
            URL of the server's API.
        server_kind (`str`, *optional*, defaults to `"vllm"`):
            Kind of server, which decides how sampling settings are sent: vllm, sglang, transformers or openai.
        concurrency (`int`, *optional*, defaults to `32`):
            Maximum number of concurrent calls of each process.
        timeout (`float`, *optional*, defaults to `600.0`):
            Maximum duration of a call in seconds.
        max_retries (`int`, *optional*, defaults to `5`):
            Maximum number of retries of a call after 429, 5xx or a timeout.
        max_cost (`float`, *optional*):
            Budget in US dollars for one run of the command. It is a hard limit, divided equally among the processes. A
            resumed run has the whole budget again: what earlier runs spent is not counted. It repeats, and pays again
            for, all calls about an image whose candidates were not complete.
    """

    base_url: str | None = None
    server_kind: str = "vllm"
    concurrency: int = 32
    timeout: float = 600.0
    max_retries: int = 5
    max_cost: float | None = None


def _openai(sampling: Sampling) -> dict[str, Any]:
    """Return OpenAI's fields, which have no top-k."""
    top_p = {} if sampling.temperature == 0 else {"top_p": sampling.top_p}
    return {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens} | top_p


def _vllm(sampling: Sampling) -> dict[str, Any]:
    """Return the fields of vLLM and SGLang: OpenAI's and top-k."""
    top_k = {} if sampling.temperature == 0 else {"extra_body": {"top_k": sampling.top_k or -1}}
    return _openai(sampling) | top_k


def _transformers(sampling: Sampling) -> dict[str, Any]:
    """
    Return the field of `transformers serve`: it has none for top-k and decodes greedily by default, so it gets a
    generation config.
    """
    config = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_new_tokens}
    if sampling.temperature > 0:
        config |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return {"extra_body": {"generation_config": json.dumps(config)}}


SERVER_KINDS = {"vllm": _vllm, "sglang": _vllm, "transformers": _transformers, "openai": _openai}


class ServerEngine(Engine):
    """
    Writes texts by requests to a server. Its samples do not depend on the seed of the run.

    Args:
        base_url (`str`):
            Address of its API, for example `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the policy on the server.
        kind (`str`, *optional*, defaults to `"vllm"`):
            How sampling settings are sent: `"vllm"`, `"sglang"`, `"transformers"` (`transformers serve`), `"openai"`.
        **settings:
            Further fields of [`ServerSettings`]. `max_cost` is the budget of all calls of this engine. Only the
            commands divide it among processes.

    Raises:
        UserError: for an unknown kind, or a budget without prices.

    Example:

    ```python
    >>> server = ServerEngine("http://localhost:8000/v1", model="runs/demo/merged", kind="vllm")
    >>> candidates = list(CandidateGenerator(server, num_questions=2)(images))
    ```
    """

    name = "server"

    def __init__(self, base_url: str, model: str, kind: str = "vllm", **settings: Any):
        check_choice("server_kind", kind, SERVER_KINDS)
        self.model_name = model
        self.settings = ServerSettings(base_url=base_url, server_kind=kind, **settings)
        self.budget = Budget(self.settings.prices_of(model), self.settings.max_cost)
        self._fields_of = SERVER_KINDS[kind]

    def check(self) -> None:
        """
        Ask for a few tokens to test whether the server responds, has the model and accepts the settings.

        Raises:
            UserError: if not.
        """
        hello = Prompt([message("user", [text_part("Hello")])], [])
        # More than one token: hosted models that think before they answer may refuse a shorter reply.
        (reply,) = self.write([hello], Sampling(max_new_tokens=16))
        if reply.problem:
            raise UserError(
                f"The server cannot run the model {self.model_name!r} ({reply.text}). Set model_name_or_path to "
                f"its name there, and server_kind to one of {', '.join(SERVER_KINDS)}."
            )

    def run(self, first, then=lambda request, reply: ()):
        """
        Answer requests, and what follows from their replies, as soon as the server has room. See [`Engine.run`].

        A request that the server refuses has a reply with the problem `request_failed`.

        Raises:
            UserError: if the server cannot be reached, refuses the API key, has no such model, or keeps failing, or if
                the budget is used up.
        """
        client = self._client()

        def follow(call: Call, outcome: Outcome) -> Iterator[Call]:
            return map(self._call, then(call.tag, self._reply(client, outcome)))

        for call, outcome in client.run(map(self._call, chain.from_iterable(first)), follow):
            yield call.tag, self._reply(client, outcome)

    def pieces(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the text of one prompt as the server sends it. Closing the iterator ends the request."""
        client, pieces = self._client(), SimpleQueue()
        call = replace(self._call(Request(prompt, sampling)), on_piece=pieces.put)
        with client.open_portal() as portal:
            done = portal.start_task_soon(client.ask, call)
            done.add_done_callback(lambda _: pieces.put(None))
            yield from map(printable, iter(pieces.get, None))
            try:
                reply = self._reply(client, done.result())
            except Stopped:
                raise client.stop_error from None
        if reply.problem:
            raise UserError(f"The server at {client.base_url} refuses the request: {reply.text}.")

    def _client(self) -> Client:
        url = self.settings.base_url
        return Client(self.model_name, self.settings, base_url=url, budget=self.budget, setting="model_name_or_path")

    def _reply(self, client: Client, outcome: Outcome) -> Reply:
        """Return the reply of a call. Raises a `UserError` if no call can succeed."""
        if outcome.error is None:
            finish_reason = outcome.attempts[-1]["finish_reason"]
            return Reply(outcome.reading.strip(), ended=finish_reason != "length")
        if outcome.error.action == "drop":
            status = f"{outcome.error.status}: " if outcome.error.status else ""
            return Reply(f"{status}{outcome.detail}", problem="request_failed")
        raise UserError(client.next_step(outcome.error))

    def _call(self, request: Request) -> Call:
        images = [opened.as_sent for opened in request.prompt.images]

        def body(urls: list[str]) -> dict[str, Any]:
            messages = _messages(request.prompt.messages, iter(urls))
            return {"model": self.model_name, "messages": messages, **self._fields_of(request.sampling)}

        tokens = sum(image_tokens(self.model_name, *image.size) for image in images)
        size = RequestSize.of(body([""] * len(images))["messages"], tokens)
        most = request.sampling.max_new_tokens
        return Call(lambda: body([image.data_url for image in images]), size, max_tokens=most, tag=request)


def _messages(turns: list[dict[str, Any]], urls: Iterator[str]) -> list[dict[str, Any]]:
    """Return messages as the API accepts them, each image in its place as a data URL."""

    def neutralise(texts: list[str]) -> list[str]:
        return [_CONTROL.sub(rf"\g<0>{ZERO_WIDTH_NON_JOINER}", text) for text in texts]

    messages = []
    for turn in turns:
        content = sent_parts(turn, neutralise, lambda: {"type": "image_url", "image_url": {"url": next(urls)}})
        # In the API, assistant messages are plain strings.
        text = "".join(part.get("text", "") for part in content)
        messages.append({"role": turn["role"], "content": text if turn["role"] == "assistant" else content})
    return messages


def _check(settings: ServerSettings, model_name_or_path: str) -> None:
    check_choice("server_kind", settings.server_kind, SERVER_KINDS)
    check_url("base_url", settings.base_url or "")  # this engine needs it
    settings.check_calls(model_name_or_path)


def _open(model_name_or_path: str, settings: ServerSettings) -> ServerEngine:
    own = vars(settings) | {"max_cost": settings.max_cost and settings.max_cost / world_size()}
    return ServerEngine(own.pop("base_url"), model_name_or_path, own.pop("server_kind"), **own)


ENGINES.register(
    EngineKind(
        name="server",
        summary="an OpenAI-compatible server",
        settings=ServerSettings,
        open=_open,
        check=_check,
        address=lambda settings: f"{settings.base_url} ({settings.server_kind})",
        operational=CALL_SETTINGS,
    )
)

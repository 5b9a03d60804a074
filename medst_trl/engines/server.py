# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine `server`: any OpenAI-compatible server that runs the policy with its `<vusr>` chat template."""

import base64
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError, closest
from medst_trl.base.redaction import hide_secrets
from medst_trl.data.source import printable
from medst_trl.policy.chat_template import VUSR

from .engine import ENGINES, Engine, EngineKind, OpenedImage, Prompt, Reply, Request, Sampling, nothing_follows


if TYPE_CHECKING:
    import openai

RETRIES = 5  # by the openai client: connection errors, time-outs, 408, 409, 429 and 5xx, heeding Retry-After
REFUSED = (400, 413, 422)  # statuses of a request that the server could read and will not answer

# The server's tokenizer is not known here, so whatever looks like a control token is kept from becoming one.
_CONTROL = re.compile(r"<(?=[|/]?\w[^<>\s]*>)|\[(?=/?[A-Z_]+\])")


@dataclass
class ServerSettings:
    """Settings of the engine `server`."""

    base_url: str | None = field(
        default=None, metadata={"help": "Address of its API. Its key is OPENAI_API_KEY in the environment."}
    )
    server_kind: str = field(
        default="vllm", metadata={"help": "How it takes sampling settings: vllm, sglang, transformers, openai."}
    )
    concurrency: int = field(default=32, metadata={"help": "Requests under way at the same time, on each process."})


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
            Where its API begins, for example `"http://localhost:8000/v1"`.
        model (`str`):
            The policy's name there.
        kind (`str`, *optional*, defaults to `"vllm"`):
            How it takes sampling settings: `"vllm"`, `"sglang"`, `"transformers"` (`transformers serve`).
        concurrency (`int`, *optional*, defaults to `32`):
            Requests at a time.
        timeout (`float`, *optional*, defaults to `600`):
            Seconds after which a request is tried again.

    The API key is `OPENAI_API_KEY` of the environment, for servers that want one.

    Example:

    ```python
    >>> server = ServerEngine("http://localhost:8000/v1", model="runs/demo/merged", kind="vllm")
    >>> candidates = list(CandidateGenerator(server, num_questions=2)(images))
    ```
    """

    name = "server"

    def __init__(self, base_url: str, model: str, kind: str = "vllm", concurrency: int = 32, timeout: float = 600):
        import openai

        self.base_url = base_url
        self.model = model
        self.concurrency = concurrency
        self._settings = SERVER_KINDS[kind]
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=RETRIES,
            timeout=timeout,
        )

    def check(self) -> None:
        """
        Ask for one token, to see that the server is there, knows the model and takes the settings.

        Raises:
            UserError: if not.
        """
        import openai

        try:
            self._complete([{"role": "user", "content": "Hello"}], Sampling(max_new_tokens=1))
        except openai.APIStatusError as error:
            if error.status_code not in REFUSED:
                raise self._failed(error) from None
            raise UserError(
                f"The server at {self._where()} does not answer as model {self.model!r} ({_status(error)}). Give the "
                "name it serves the model under as model_name_or_path, and its kind as server_kind "
                f"({', '.join(SERVER_KINDS)})."
            ) from None

    def run(self, first, then=nothing_follows):
        """
        Answer requests, and what follows from their replies, as soon as the server has room. See [`Engine.run`].

        A request that the server refuses has a reply with the problem `request_failed`.

        Raises:
            UserError: if the server cannot be reached, refuses the API key, or is no chat API.
        """
        first, finished, under_way = iter(first), SimpleQueue(), 0
        with ThreadPoolExecutor(self.concurrency) as executor:

            def start(request: Request) -> None:
                future = executor.submit(self._write_one, request.prompt, request.sampling)
                future.add_done_callback(lambda done: finished.put((request, done)))

            try:
                while True:
                    while under_way < self.concurrency and (request := next(first, None)) is not None:
                        start(request)
                        under_way += 1
                    if not under_way:
                        return
                    request, done = finished.get()
                    reply = done.result()
                    under_way -= 1
                    for following in then(request, reply):
                        start(following)
                        under_way += 1
                    yield request, reply
            finally:
                executor.shutdown(
                    cancel_futures=True
                )  # after an error, waiting requests shall not each try for themselves

    def describe(self) -> dict[str, Any]:
        return {"model": self.model, "engine": self.name}

    def _write_one(self, prompt: Prompt, sampling: Sampling) -> Reply:
        import openai

        try:
            completion = self._complete(_messages(prompt), sampling)
        except openai.APIStatusError as error:
            if error.status_code in REFUSED:
                return Reply(_status(error), problem="request_failed")
            raise self._failed(error) from None
        choice = completion.choices[0]
        return Reply(printable(choice.message.content or "").strip(), ended=choice.finish_reason != "length")

    def _complete(self, messages: list[dict[str, Any]], sampling: Sampling) -> "openai.types.chat.ChatCompletion":
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=messages, **self._settings(sampling)
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"The server at {self._where()} does not let us in ({error.status_code}). Put its key into the "
                "environment as OPENAI_API_KEY."
            ) from None
        except openai.NotFoundError as error:
            raise UserError(
                f"The server at {self._where()} has no model {self.model!r}, or base_url is wrong ({_status(error)}; "
                "most end in /v1). Give the name that the server lists under /v1/models as model_name_or_path."
            ) from None
        except openai.APIConnectionError as error:  # time-outs too
            raise UserError(
                f"No server answers at {self._where()} ({type(error.__cause__ or error).__name__}). Start it, or "
                "correct base_url; what is finished is kept."
            ) from None
        except (openai.APIResponseValidationError, json.JSONDecodeError):
            completion = None
        if not getattr(completion, "choices", None) or completion.choices[0].message is None:
            error = hide_secrets(printable(str(getattr(completion, "error", None) or "")))[:200]
            raise UserError(
                f"What answers at {self._where()} does not send a chat completion{error and f' but {error}'}. Correct "
                "base_url (most end in /v1), and look at the server's own log."
            )
        return completion

    def _failed(self, error: "openai.APIStatusError") -> UserError:
        return UserError(
            f"The server at {self._where()} failed {RETRIES + 1} times ({_status(error)}). What is finished is kept: "
            "look at the server's own log, and run the same command again."
        )

    def _where(self) -> str:
        return hide_secrets(self.base_url)


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as the API has it, each image in its place as a data URL."""
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


def _status(error: "openai.APIStatusError") -> str:
    """What the server says, short and without secrets."""
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail") or error.message
    return f"{error.status_code}: {hide_secrets(printable(str(said)))[:200]}"


def _check(settings: ServerSettings) -> None:
    if settings.server_kind not in SERVER_KINDS:
        near = closest(settings.server_kind, SERVER_KINDS)
        raise UserError(
            f"Unknown server_kind {settings.server_kind!r}.{near} Choose one of {', '.join(SERVER_KINDS)}."
        )
    if not settings.base_url:
        raise UserError("The engine `server` needs base_url, for example --base_url http://localhost:8000/v1.")
    if settings.concurrency < 1:
        raise UserError(f"concurrency is {settings.concurrency}; it has to be at least 1.")


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

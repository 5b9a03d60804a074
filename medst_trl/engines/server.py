# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine `server`: any OpenAI-compatible server that runs the policy with its `<vusr>` chat template."""

import base64
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import openai
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.base.redaction import hide_secrets
from medst_trl.data.parallel import ordered_map
from medst_trl.data.source import printable
from medst_trl.policy.chat_template import VUSR

from .prompts import OpenedImage, Prompt, Reply, Sampling


RETRIES = 5  # by the openai client: connection errors, time-outs, 408, 409, 429 and 5xx, heeding Retry-After
REFUSED = (400, 413, 422)  # what a server says to a request that it could read and will not answer

# The server's tokenizer is not known here, so whatever looks like a control token is kept from becoming one.
_CONTROL = re.compile(r"<(?=[|/]?\w[^<>\s]*>)|\[(?=/?[A-Z_]+\])")


def _vllm(sampling: Sampling) -> dict[str, Any]:
    """vLLM and SGLang: OpenAI's fields, and top-k beside them."""
    if sampling.temperature == 0:
        return {"temperature": 0.0, "max_tokens": sampling.max_new_tokens}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "extra_body": {"top_k": sampling.top_k or -1},
    }


def _transformers(sampling: Sampling) -> dict[str, Any]:
    """`transformers serve` reads no top-k of its own and never starts to sample: it gets a generation config."""
    config = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_new_tokens}
    if sampling.temperature > 0:
        config |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return {"extra_body": {"generation_config": json.dumps(config)}}


SERVER_KINDS = {"vllm": _vllm, "sglang": _vllm, "transformers": _transformers}


class ChatServer:
    """
    Writes texts by requests to a server. The seed of a run has no say in what it draws.

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
    >>> server = ChatServer("http://localhost:8000/v1", model="runs/demo/merged", kind="vllm")
    >>> candidates = list(CandidateGenerator(server, num_questions=2)(images))
    ```
    """

    name = "server"

    def __init__(self, base_url: str, model: str, kind: str = "vllm", concurrency: int = 32, timeout: float = 600):
        if kind not in SERVER_KINDS:
            raise UserError(f"There is no server_kind {kind!r}; choose from {', '.join(SERVER_KINDS)}.")
        self.base_url = base_url
        self.model = model
        self.batch_size = concurrency
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

    def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        """
        One text for each prompt; a request that the server refuses is a reply with the problem `request_failed`.

        Raises:
            UserError: if the server cannot be reached, does not let us in, or speaks something else.
        """
        failed = []

        def write_one(prompt: Prompt) -> Reply:
            if failed:  # the requests that are waiting shall not each try for themselves
                raise failed[0]
            try:
                return self._write_one(prompt, sampling)
            except UserError as error:
                failed.append(error)
                raise

        return list(ordered_map(write_one, prompts, self.batch_size))

    def _write_one(self, prompt: Prompt, sampling: Sampling) -> Reply:
        try:
            completion = self._complete(_messages(prompt), sampling)
        except openai.APIStatusError as error:
            if error.status_code in REFUSED:
                return Reply(_status(error), problem="request_failed")
            raise self._failed(error) from None
        choice = completion.choices[0]
        return Reply(printable(choice.message.content or "").strip(), ended=choice.finish_reason != "length")

    def _complete(self, messages: list[dict[str, Any]], sampling: Sampling) -> "openai.types.chat.ChatCompletion":
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

    def _failed(self, error: openai.APIStatusError) -> UserError:
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
    with Image.open(io.BytesIO(opened.bytes)) as image:
        kind = image.get_format_mimetype()
    url = f"data:{kind};base64,{base64.b64encode(opened.bytes).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _neutralised(text: str) -> str:
    from medst_trl.policy.vusr import ZERO_WIDTH_NON_JOINER

    return _CONTROL.sub(lambda match: match[0] + ZERO_WIDTH_NON_JOINER, text)


def _status(error: openai.APIStatusError) -> str:
    """What the server says, short and without secrets."""
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail") or error.message
    return f"{error.status_code}: {hide_secrets(printable(str(said)))[:200]}"

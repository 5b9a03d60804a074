# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One question to the judge, the words its server takes it in, and what comes back."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .client_errors import Trouble, clean, trouble_in_body
from .cost import RequestSize


@dataclass
class Request:
    """
    One question to the judge.

    Attributes:
        key (`str`): Hash of all that decides the reply.
        reminder (`str`): User message after a reply that cannot be read.
        shown (`tuple[int, int]`): Which answer stands first, and which second.
        body (`Callable`): Makes the body of the request; images are encoded only then.
        size (`RequestSize`): Tokens of its prompt.
        read (`Callable`): Understands a reply.
    """

    key: str
    reminder: str
    shown: tuple[int, int]
    body: Callable[[], dict[str, Any]]
    size: RequestSize
    read: Callable[[str], Any | None]


@dataclass
class Answer:
    """What became of a request: a reading, or the reason why there is none."""

    reading: Any | None
    reason: str | None
    attempts: list[dict[str, Any]]
    cached: bool
    detail: str = ""
    charges: list[dict[str, Any]] = field(default_factory=list)  # all calls for it that may be on the bill


class Stopped(Exception):
    """The run is being stopped; nothing new is asked."""


@dataclass
class Dialect:
    """What this server turned out not to take."""

    formats: list[str | None] = field(default_factory=lambda: ["json_schema", "json_object", None])
    renamed: bool = False
    no_temperature: bool = False

    def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request in the words of this server."""
        body = dict(body)
        if "response_format" in body and self.formats[0] != "json_schema":
            body["response_format"] = {"type": self.formats[0]}
        if "response_format" in body and self.formats[0] is None:
            del body["response_format"]
        if self.renamed:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if self.no_temperature:
            del body["temperature"]
        return body

    def learn(self, trouble: Trouble, sent: dict[str, Any]) -> bool:
        """Whether a refused request can be put another way. The calls that were under way meanwhile agree."""
        if trouble.status not in (400, 422):
            return False
        text = trouble.detail
        if "response_format" in sent and re.search(r"response_format|json_schema|json_object|structured|guided", text):
            if self.apply(sent).get("response_format") == sent["response_format"]:
                self.formats.pop(0)
            return True
        if "max_tokens" in sent and "max_completion_tokens" in text:
            self.renamed = True
            return True
        if "temperature" in sent and "temperature" in text:
            if not self.no_temperature:
                warnings.warn("The judge takes no temperature: replies are sampled as its server does.", stacklevel=2)
            self.no_temperature = True
            return True
        return False


def row_of_body(body: Any, secret: str | None = None) -> dict[str, Any]:
    """
    Reply, finish reason and usage of a chat completion.

    Raises:
        Trouble: if the body is an error or a refusal in disguise.
    """
    if isinstance(body, dict) and body.get("error"):
        raise trouble_in_body(body["error"], secret)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        usage = _usage(body.get("usage")) if isinstance(body, dict) else None
        said = f"no choices in {clean(json.dumps(body)[:100], secret)}"
        raise Trouble("error_body", said, charged=True, usage=usage) from None
    usage = _usage(body.get("usage"))
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    finish_reason = choice.get("finish_reason")
    if refusal or finish_reason == "content_filter":
        said = clean(str(refusal or "the reply was filtered"), secret)
        raise Trouble("content_filter", said, charged=True, usage=usage)
    return {"reply": content or "", "finish_reason": finish_reason, "usage": usage}


def _usage(usage: Any) -> dict[str, int] | None:
    names = ("prompt_tokens", "completion_tokens")
    if not isinstance(usage, dict) or not all(isinstance(usage.get(name), int) for name in names):
        return None
    return {name: usage[name] for name in names}

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Parse what chat servers return: a reply, or an error with the action to take (stop the run, retry, drop the call).
"""

import json
import logging
import re
import time
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any, Literal

from medst_trl.base.redaction import HIDDEN, hide_secrets
from medst_trl.data.cells import printable


logger = logging.getLogger(__name__)

_MAX_CHARS = 300  # of a server's message

# Kinds of errors: these stop the run, these drop the call, and all others are retried.
STOPS = frozenset({"auth", "quota", "model", "address"})
DROPS = frozenset({"content_filter", "bad_request", "unparsable", "interrupted", "image_unreadable"})

NEXT_STEPS = {
    "auth": "{base_url} refused the API key{code}. Set a valid one in the environment variable {variable}",
    "quota": "The account has no quota or credit left. Top it up or raise its limit",
    "model": "The server at {base_url} has no model {model!r} ({detail}). Correct --{setting}{offers}",
    "address": "There is no chat API at {base_url} ({detail}). Correct --base_url; it usually ends in /v1",
    "connection": "The server at {base_url} cannot be reached ({detail}). Start it, or correct --base_url",
    "timeout": "The server at {base_url} did not answer in time. Check its load, or raise --timeout",
    "not_json": "{base_url} is not a chat API ({detail}). Correct --base_url; it usually ends in /v1",
    "error_body": "The server at {base_url} answers with an error: {detail}. Look at its log",
    "server_error": "The server at {base_url} fails{code}: {detail}. Look at its log, or try later",
    "interrupted": "The server at {base_url} stopped in the middle of its reply: {detail}. Look at its log, or retry",
    "rate_limit": "The server at {base_url} rejects every call: {detail}. Lower --concurrency, or try later",
}

# Parts of servers' messages.
_OF_FILTER = re.compile(r"content (management )?policy|content filter|safety system|flagged")
# Fields that not every server accepts, by what it says about them. A newer name replaces `max_tokens`.
FIELDS = {
    "response_format": re.compile(r"response_format|json_schema|json_object|structured|guided"),
    "max_tokens": re.compile("max_completion_tokens"),
    "temperature": re.compile("temperature"),
}


@dataclass(eq=False)
class CallError(Exception):
    """
    A call without a usable reply.

    Attributes:
        kind (`str`): One word, such as `"auth"`; see `STOPS`, `DROPS` and `NEXT_STEPS`.
        detail (`str`): The server's message, shortened and without secrets.
        status (`int` or `None`): HTTP status, if there was one.
        retry_after (`float` or `None`): Seconds the server asked to wait.
        charged (`bool`): Whether the server may have written (and charged for) a reply.
        usage (`dict` or `None`): Tokens of that reply, if the server reported them.
    """

    kind: str
    detail: str = ""
    status: int | None = None
    retry_after: float | None = None
    charged: bool = False
    usage: dict[str, int] | None = None

    @property
    def action(self) -> Literal["stop", "retry", "drop"]:
        return "stop" if self.kind in STOPS else "drop" if self.kind in DROPS else "retry"

    @property
    def reason(self) -> str:
        """The reason as judgements record it."""
        return self.kind if self.kind in ("content_filter", "unparsable") else "request_failed"


def error_of(error: Exception, secret: str | None = None) -> CallError:
    """Classify an exception of the openai client."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return CallError("timeout", "no answer in time", charged=True)
    if isinstance(error, openai.APIStatusError):
        text = error.body if error.body and isinstance(error.body, str) else error.response.text
        body = error.body if isinstance(error.body, dict) else {"message": _without_html(text)}
        return error_of_status(error.status_code, body, error.response.headers, secret)
    cause = error.__cause__ or error
    # If data had begun to flow, or the request was out, the server may have done its work.
    charged = type(cause).__name__ not in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")
    return CallError("connection", clean_message(str(cause) or type(cause).__name__, secret), charged=charged)


def error_of_status(
    status: int, error: Mapping[str, Any], headers: Mapping[str, str] | None = None, secret: str | None = None
) -> CallError:
    """Classify an HTTP status (or one that an error body names) together with the body's `error` object."""
    code = f"{error.get('code') or ''} {error.get('type') or ''}".lower()
    message = str(error.get("message") or error.get("detail") or "")
    kind, retry_after = _kind_of(status, code, message.lower()), retry_after_of(headers or {})
    return CallError(kind, clean_message(message or f"status {status}", secret), status, retry_after)


def clean_message(text: str, secret: str | None = None) -> str:
    """Return a server's message on one line, short, encodable, without the key."""
    if secret and len(secret) > 5:  # not the "none" of a server without keys
        text = text.replace(secret, HIDDEN)
    text = hide_secrets(" ".join(printable(text).split()))
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."


def _kind_of(status: int, code: str, message: str) -> str:
    """Return the kind of an error. The order matters: servers use a status, such as 400 or 429, for several kinds."""
    if any(word in code for word in ("content_filter", "content_policy", "moderation")) or _OF_FILTER.search(message):
        return "content_filter"
    if "insufficient_quota" in code or "billing" in code or status == 402:
        return "quota"
    if status in (404, 405) or "model_not_found" in code:
        return "model" if "model" in f"{code} {message}" else "address"
    if status in (401, 403) or "invalid_api_key" in code or "authentication" in code:
        return "auth"
    if status == 429 or "rate_limit" in code:
        return "rate_limit"
    if status in (408, 409, 425) or status >= 500 or "server_error" in code or "overloaded" in code:
        return "server_error"
    return "error_body" if status == 200 else "bad_request"


def _without_html(text: str) -> str:
    return "an HTML page" if text.lstrip()[:1] == "<" else text


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of `Retry-After` (or OpenAI's `retry-after-ms`), given as a number or as a date."""
    for read in (
        lambda: float(headers["retry-after-ms"]) / 1000,
        lambda: float(headers["retry-after"]),
        lambda: parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(),
    ):
        with suppress(KeyError, ValueError, TypeError, OverflowError):
            if isfinite(seconds := read()):
                return max(0.0, seconds)
    return None


def row_of_content(content: bytes, secret: str | None = None) -> dict[str, Any]:
    """
    Return reply, finish reason and usage of the content of a response with status 200.

    Raises:
        CallError: if it is not a chat completion.
    """
    try:
        return row_of_body(json.loads(content), secret)
    except (ValueError, RecursionError):
        detail = _without_html(clean_message(content[:60].decode("utf-8", "replace"), secret)) or "nothing"
        raise CallError("not_json", f"it sends {detail}", charged=True) from None


def row_of_body(body: Any, secret: str | None = None) -> dict[str, Any]:
    """
    Return reply, finish reason and usage of a chat completion.

    Raises:
        CallError: if the body is an error or a refusal.
    """
    if isinstance(body, dict) and body.get("error"):
        error = body["error"] if isinstance(body["error"], dict) else {"message": str(body["error"])}
        status = str(error.get("status") or error.get("status_code") or error.get("code"))
        raise error_of_status(int(status) if status.isdigit() else 200, error, None, secret)
    usage = _usage(body)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        said = f"no choices in {clean_message(json.dumps(body)[:100], secret)}"
        raise CallError("error_body", said, charged=True, usage=usage) from None
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    finish_reason = choice.get("finish_reason")
    if refusal or finish_reason == "content_filter":
        said = clean_message(str(refusal or "the reply was filtered"), secret)
        raise CallError("content_filter", said, charged=True, usage=usage)
    return {"reply": printable(content or ""), "finish_reason": finish_reason, "usage": usage}


def _usage(body: Any) -> dict[str, int] | None:
    with suppress(LookupError, TypeError, ValueError, OverflowError):
        return {name: int(body["usage"][name]) for name in ("prompt_tokens", "completion_tokens")}
    return None


@dataclass
class AcceptedFields:
    """
    The fields of a request that this server accepts.

    Attributes:
        refused (`set[str]`): The fields that it has refused so far.
    """

    refused: set[str] = field(default_factory=set)

    def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a request in the fields that this server accepts."""
        accepted = {name: value for name, value in body.items() if name not in self.refused}
        if "max_tokens" in body and "max_tokens" in self.refused:
            accepted["max_completion_tokens"] = body["max_tokens"]
        return accepted

    def learn(self, error: CallError, sent: Container[str]) -> bool:
        """
        Learn from a refused request, with the fields `sent`, which field to leave out.

        Returns whether to send it again; concurrent calls may learn the same.
        """
        for name, pattern in FIELDS.items():
            if error.status in (400, 422) and name in sent and pattern.search(error.detail):
                if name == "temperature" and name not in self.refused:
                    logger.warning("The server does not accept a temperature. It samples with its own settings.")
                self.refused.add(name)
                return True
        return False

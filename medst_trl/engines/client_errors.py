# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a call, sorted by what to do: stop the run, try again, or leave the pair out."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from medst_trl.base.redaction import HIDDEN, hide_secrets

from .pace import retry_after_of


SHOWN = 300  # characters of a server's words
Action = Literal["stop", "retry", "drop"]

_ACTIONS: dict[str, Action] = {
    "auth": "stop",
    "quota": "stop",
    "model": "stop",
    "address": "stop",
    "no_images": "stop",
    "rate_limit": "retry",
    "server_error": "retry",
    "timeout": "retry",
    "connection": "retry",
    "not_json": "retry",
    "error_body": "retry",
    "content_filter": "drop",
    "image_refused": "drop",
    "bad_request": "drop",
    "unparsable": "drop",
}

_NEXT_STEPS = {
    "auth": "{base_url} refused the API key{code}. Put a valid one into the environment variable {variable}",
    "quota": "The judge's account has no quota or credit left. Top it up or raise its limit",
    "model": "The judge's server knows no model {model!r}. Correct --model{offers}",
    "address": "There is no chat API at {base_url}. Correct --base_url; it usually ends in /v1",
    "no_images": "The judge's server takes no images for {model!r}: {detail}. Choose a --model that sees images, or "
    "allow images in the server's settings (vLLM: --limit-mm-per-prompt)",
    "connection": "The judge's server at {base_url} cannot be reached ({detail}). Start it, or correct --base_url",
    "timeout": "The judge's server at {base_url} did not answer in time. Look at its load, or raise --timeout",
    "not_json": "What answers at {base_url} is no chat API ({detail}). Correct --base_url; it usually ends in /v1",
    "error_body": "The judge's server at {base_url} answers with an error: {detail}. Look at its log",
    "server_error": "The judge's server at {base_url} fails: {detail}. Look at its log, or try later",
    "rate_limit": "The judge's server turns every call away: {detail}. Lower --concurrency, or try later",
    "content_filter": "The judge refuses every pair for its content. Choose another --model",
    "image_refused": "The judge refuses every image: {detail}. Choose a --model that sees images",
    "bad_request": "The judge's server refuses every request: {detail}. Look at one with --dry_run true",
    "unparsable": "None of the judge's replies could be read, the last one began with: {detail}. Choose a stronger "
    "--model, another --prompt_version, or more --max_tokens",
}

# What servers say, in small letters.
_NO_IMAGES = re.compile(
    r"at most 0 image|not a multi-?modal model|no endpoints? found that support image"
    r"|(?:not|n['\u2019]t) support (?:image|vision|multi-?modal) inputs?\b"
)
_NO_MODEL = re.compile(
    r"\b(?:unknown|no such) model\b"
    r"|\bmodel\b(?:(?! image | file | url ).){0,200}?(?:\bnot|n['\u2019]t) (?:be )?(?:exist|found)\b"
)
_TOO_LONG = re.compile(
    r"context (?:length|window|size)|maximum (?:model|input|prompt|sequence) length|max_model_len|too many tokens"
    r"|\b(?:prompt|input)\b.{0,40}\btoo long"
)
_OF_IMAGE = re.compile(r"\bimages?\b|\bimage_url\b|\bvision\b|\bmulti-?modal\b")


class Trouble(Exception):
    """
    A call without a usable reply.

    Attributes:
        kind (`str`): One word, see `_ACTIONS`.
        detail (`str`): The server's words, shortened and without secrets.
        status (`int` or `None`): HTTP status, where there was one.
        retry_after (`float` or `None`): Seconds the server asked to wait.
        charged (`bool`): Whether the server may have made (and charged) a reply.
        usage (`dict` or `None`): Tokens of that reply, where the server told them.
    """

    def __init__(
        self,
        kind: str,
        detail: str = "",
        status: int | None = None,
        retry_after: float | None = None,
        charged: bool = False,
        usage: dict[str, int] | None = None,
    ):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.status = kind, detail, status
        self.retry_after, self.charged, self.usage = retry_after, charged, usage

    @property
    def action(self) -> Action:
        return _ACTIONS[self.kind]

    @property
    def is_pushback(self) -> bool:
        """Whether the server could not keep up, so that the pace may have to fall."""
        return self.kind in ("rate_limit", "timeout") or self.status in (503, 529)

    @property
    def reason(self) -> str:
        """As judgements name it."""
        return self.kind if self.kind in ("content_filter", "image_refused", "unparsable") else "request_failed"

    def next_step(self, model: str, base_url: str, variable: str, offers: str = "") -> str:
        """What to tell the user when this stops the run."""
        text = _NEXT_STEPS[self.kind].format(
            model=model, base_url=base_url, variable=variable, offers=offers, detail=self.detail or "no details",
            code=f" ({self.status})" if self.status else "",
        )  # fmt: skip
        return f"{text.rstrip('.')}. What was judged is kept: run the same command again and it goes on from there."


def trouble_of(error: Exception, secret: str | None = None) -> Trouble:
    """Sort an exception of the openai client."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return Trouble("timeout", "no answer in time", charged=True)
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {"message": _text_of(error.response)}
        return trouble_of_status(error.status_code, body, error.response.headers, secret)
    cause = error.__cause__ or error
    # Data had begun to flow, or the request was out: the server may have done its work.
    charged = type(cause).__name__ not in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")
    return Trouble("connection", clean(str(cause) or type(cause).__name__, secret), charged=charged)


def trouble_of_status(
    status: int, error: Mapping[str, Any], headers: Mapping[str, str] | None = None, secret: str | None = None
) -> Trouble:
    """Sort an HTTP status (or one that an error body names) together with the body's `error` object."""
    code = f"{error.get('code') or ''} {error.get('type') or ''}".lower()
    message = str(error.get("message") or error.get("detail") or "")
    return Trouble(
        _kind_of(status, code, message.lower()),
        clean(message or f"status {status}", secret),
        status,
        retry_after_of(headers or {}),
    )


def trouble_in_body(error: Any, secret: str | None = None) -> Trouble:
    """Sort the `error` of a body that came with status 200."""
    error = error if isinstance(error, dict) else {"message": str(error)}
    status = error.get("status") or error.get("status_code") or error.get("code")
    status = int(status) if str(status).isdigit() else 200
    return trouble_of_status(status, error, None, secret)


def clean(text: str, secret: str | None = None) -> str:
    """A server's words for a message: one line, short, without the key."""
    if secret and len(secret) > 3:
        text = text.replace(secret, HIDDEN)
    text = hide_secrets(" ".join(text.split()))
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _kind_of(status: int, code: str, message: str) -> str:
    if any(word in code for word in ("content_filter", "content_policy", "moderation")) or re.search(
        r"content (management )?policy|content filter|safety system|flagged", message
    ):
        return "content_filter"
    if "insufficient_quota" in code or "billing" in code or status == 402:
        return "quota"
    if status < 500 and _NO_IMAGES.search(message):
        return "no_images"
    if "model_not_found" in code or (status in (400, 404) and _NO_MODEL.search(message)):
        return "model"
    if status in (401, 403) or "invalid_api_key" in code or "authentication" in code:
        return "auth"
    if status == 404 or status == 405:
        return "model" if "model" in message else "address"
    if status == 429 or "rate_limit" in code:
        return "rate_limit"
    if status in (408, 409, 425) or status >= 500 or "server_error" in code or "overloaded" in code:
        return "server_error"
    if status == 200:
        return "error_body"
    if "context_length" in code or _TOO_LONG.search(message):  # such words often count the images' tokens, too
        return "bad_request"
    return "image_refused" if "image" in code or _OF_IMAGE.search(message) else "bad_request"


def _text_of(response: Any) -> str:
    try:
        text = response.text
    except Exception:
        return ""
    return "an HTML page" if text.lstrip()[:1] == "<" else text

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Keep secrets out of files, messages and publications."""

import re
from typing import Any


HIDDEN = "<hidden>"

_SECRET_KEY = re.compile(r"token$|api_?key|secret|password|passwd|credential|private_key|authorization", re.IGNORECASE)
_PLACE_KEY = re.compile(r"path|folder|dir$|url|file|cache|variable|_pattern$")
_NOT_SECRET = re.compile(r"(^|_)(eos|bos|pad|unk|sep|cls|mask|image|video|vusr)_token$", re.IGNORECASE)
# Keys of the Hub and of OpenAI, and the user:password of a URL, anywhere in a text
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})|(?<=://)[^/\s:@]*:[^/\s]+(?=@)")
# Values of secret parameters in the query of a URL
_SECRET_PARAMETER = re.compile(
    r"(?<=[?&;])((?:[\w.-]{0,60}[_.-])?(?:api-?key|key|(?:access|auth)?token|sig|signature|(?:client)?secret|password"
    r"|passwd|pwd|auth|authorization|credentials?)=)[^&;#\s\"'<>]+",
    re.IGNORECASE,
)


def is_secret_key(key: str) -> bool:
    """Whether a setting of this name holds a secret (`hub_token`, `api_key`; not `eos_token` or `max_new_tokens`)."""
    return bool(_SECRET_KEY.search(key)) and not _NOT_SECRET.search(key)


def is_private_key(key: str) -> bool:
    """Whether a setting of this name holds a secret, or names a file, a directory or a server."""
    return is_secret_key(key) or bool(_PLACE_KEY.search(key))


def hide_secrets(value: Any, key: str = "") -> Any:
    """Copy `value` (dicts, lists, scalars) and replace every secret with `"<hidden>"`."""
    if isinstance(value, dict):
        return {name: hide_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item, key) for item in value]
    if isinstance(value, str):
        if value and is_secret_key(key):
            return HIDDEN
        return _SECRET_PARAMETER.sub(rf"\g<1>{HIDDEN}", _SECRET_VALUE.sub(HIDDEN, value))
    return value

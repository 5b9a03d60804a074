# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Text of data and settings for a page: without invisible characters, secrets and paths of this machine."""

import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medst_trl.base.hub_ids import public_name
from medst_trl.base.redaction import hide_secrets


# Control characters, and those that change the direction of writing: the text would not look like what it is.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Not the end of a URL or of a relative path, and not "and/or" or "5/10".
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>:,;]+[/\\])+([^\s/\\'\"<>:,;]*)")


def clean(text: Any) -> str:
    """Hide secrets and spell out invisible characters (`U+202E`). Escaping takes care of markup."""
    text = _LONE_SURROGATE.sub("\ufffd", hide_secrets(str(text))).replace("\r\n", "\n")
    return _INVISIBLE.sub(lambda match: f"\u27e8U+{ord(match[0]):04X}\u27e9", text)


def cut(text: Any, limit: int) -> str:
    """Return the first `limit` characters, and the number of the others."""
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def relative_path(value: Any, run: Path) -> str:
    """
    Return a path relative to the run directory, or its last part if it is outside. A Hub id and other names are
    unchanged.
    """
    text = str(value)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if os.sep in text and "://" not in text and path.is_relative_to(run):
        return path.relative_to(run).as_posix()
    return text if public_name(text) == text else f"…/{path.name}"


def without_paths(text: str, run: Path) -> str:
    """Make each absolute path in a message relative to the run directory, or cut it to its last part."""
    return _ABSOLUTE_PATH.sub(lambda match: relative_path(match[0], run), str(text))


def words(name: str) -> str:
    """Return a name as words: `no verdict` for `no_verdict`."""
    return name.replace("_", " ")


def sentence(text: str) -> str:
    """Capitalize the first letter of a text."""
    return text[:1].upper() + text[1:]


def number(value: float | None, digits: int | None = None, sign: str = "") -> str:
    """Format a number: `12,345`, `0.693`, `1.0e-05`, with `digits` decimals if given; a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    if digits is not None:
        text = f"{value:{sign},.{digits}f}"
    elif isinstance(value, int):
        text = f"{value:{sign},}"
    elif value and not 1e-3 <= abs(value) < 1e6:
        text = f"{value:{sign}.1e}"
    else:
        text = f"{value:{sign}.3g}" if abs(value) < 1000 else f"{value:{sign},.0f}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def percent(share: float | None) -> str:
    """Format a share in percent; a dash for None."""
    return "–" if share is None else f"{share:.1%}"


def score(value: Any) -> str:
    """Format the score of an answer, which may be any text."""
    return f"{value:g}" if isinstance(value, int | float) else cut(value, 20)


def duration(seconds: float | None) -> str:
    """Format a duration: `3 min 12 s`, `2 h 5 min`."""
    if seconds is None or seconds != seconds:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def environment() -> Environment:
    """Make the environment of the templates, which cleans and escapes every value."""
    templates = Environment(
        loader=PackageLoader("medst_trl", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else "" if value is None else clean(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {f.__name__: f for f in (clean, cut, duration, number, percent, score, sentence, words)}
    return templates

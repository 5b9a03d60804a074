# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Helpers for dataclasses of settings: help texts from docstrings, bounds, lists, and selection by class."""

import inspect
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from math import isfinite
from types import MappingProxyType
from typing import Any, TypeVar

from .errors import Problems, UserError, closest


_T = TypeVar("_T", bound=type)

_COMPARE = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
_ENTRY = re.compile(r"^ {4}(\w+) \(.*?\):(.*(?:\n(?: {8}.*|\s*$))*)", re.MULTILINE)


def documented(cls: _T) -> _T:
    """
    Give each field of a dataclass, as help text, its entry in the docstring's `Args`.

    Fields with a help text of their own keep it, as do inherited ones.

    Raises:
        TypeError: if a field has neither.

    Example:

    ```python
    @documented
    @dataclass
    class CountArguments:
        '''
        Arguments of `medst count`.

        Args:
            dataset (`str`):
                Directory or Hub id of preference pairs.
        '''

        dataset: str
    ```
    """
    if cls.__doc__ is None:  # python -OO strips docstrings
        return cls
    entries = {name: " ".join(text.split()) for name, text in _ENTRY.findall(inspect.cleandoc(cls.__doc__))}
    for field in fields(cls):
        if field.name in entries and field.name in cls.__annotations__:
            field.metadata = MappingProxyType({**field.metadata, "help": entries[field.name]})
        elif "help" not in field.metadata and field.name in cls.__annotations__:
            raise TypeError(f"{cls.__qualname__}.{field.name} has no entry in the docstring.")
    return cls


def check_bounds(args: Any, **bounds: Mapping[str, float]) -> None:
    """
    Refuse numbers out of bounds, including NaN and infinity. None means that a setting is not given.

    Args:
        args (`Any`):
            An object with the settings as attributes.
        **bounds (`Mapping[str, float]`):
            `at_least`, `above`, `at_most`, `below`: bounds by the names of settings.

    Raises:
        UserError: with a message for each setting out of bounds: its value and all its bounds.

    Example:

    ```python
    check_bounds(args, at_least={"max_records": 1, "top_p": 0.01}, at_most={"top_p": 1})
    ```
    """
    limits, problems = defaultdict(list), Problems()
    for words, by_name in bounds.items():
        for name, bound in by_name.items():
            limits[name].append((_COMPARE[words], words.replace("_", " "), bound))
    for name, own in limits.items():
        value = getattr(args, name)
        if value is not None and not (isfinite(value) and all(holds(value, bound) for holds, _, bound in own)):
            expected = " and ".join(f"{words} {bound}" for _, words, bound in own)
            finite = "" if isfinite(value) else "finite and "
            problems.messages.append(f"{name} is {value}. It must be {finite}{expected}.")
    problems.report()


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """
    Refuse a value that is not one of the choices. None means that the setting is not given.

    Args:
        name (`str`):
            Name of the setting.
        value (`Any`):
            Its value.
        choices (iterable of `str`):
            The valid values.

    Raises:
        UserError: with the closest match and all choices.
    """
    known = list(choices)
    if value is not None and value not in known:
        raise UserError(f"Unknown {name} {value!r}.{closest(str(value), known)} Choose one of {', '.join(known)}.")


def check_url(name: str, value: str | None) -> None:
    """Refuse an address without `http://` or `https://`. None means that the setting is not given."""
    if value is not None and not value.startswith(("http://", "https://")):
        # Without the value: it may hold a password.
        raise UserError(f"{name} must start with http:// or https://, for example http://localhost:8000/v1.")


def make_lists(args: Any, *names: str) -> None:
    """Convert settings with a single value to lists, so that a recipe can omit the brackets."""
    for name in names:
        value = getattr(args, name)
        setattr(args, name, [value] if isinstance(value, str) else list(value or []))


def settings_among(given: Iterable[Any], kind: type | None) -> Any:
    """Return the settings of a class among those of several, or its defaults; None without a class."""
    return kind and (next((item for item in given if isinstance(item, kind)), None) or kind())

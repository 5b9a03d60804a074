# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What settings in dataclasses have in common: help texts from docstrings, bounds, lists, and finding one's own."""

import inspect
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

from .errors import UserError


_T = TypeVar("_T", bound=type)

_COMPARE = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
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


def check_bounds(
    args: Any,
    *,
    at_least: Mapping[str, float] = MappingProxyType({}),
    above: Mapping[str, float] = MappingProxyType({}),
    at_most: Mapping[str, float] = MappingProxyType({}),
    below: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """
    Refuse numbers out of bounds, NaN included. None stands for a setting that is not given.

    Args:
        args (`Any`):
            An object with the settings as attributes.
        at_least, above, at_most, below (`Mapping[str, float]`, *optional*):
            Bounds by the names of the settings.

    Raises:
        UserError: with the value of the setting and all its bounds.
    """
    limits = defaultdict(list)
    for words, bounds in zip(_COMPARE, (at_least, above, at_most, below)):
        for name, bound in bounds.items():
            limits[name].append((words, bound))
    for name, bounds in limits.items():
        value = getattr(args, name)
        if value is not None and not all(_COMPARE[words](value, bound) for words, bound in bounds):
            expected = " and ".join(f"{words} {bound}" for words, bound in bounds)
            raise UserError(f"{name} is {value}. It must be {expected}.")


def make_lists(args: Any, *names: str) -> None:
    """Turn settings that hold a single value into lists: a recipe may leave the brackets out."""
    for name in names:
        value = getattr(args, name)
        setattr(args, name, [value] if isinstance(value, str) else list(value or []))


def settings_among(given: Iterable[Any], kind: type | None) -> Any:
    """Return the settings of a class among those of several, or its defaults; None without a class."""
    return kind and (next((item for item in given if isinstance(item, kind)), None) or kind())

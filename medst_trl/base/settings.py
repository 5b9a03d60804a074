# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings documented once: the help of a command line comes from the docstring of the dataclass."""

import inspect
import re
from dataclasses import fields
from types import MappingProxyType
from typing import TypeVar


T = TypeVar("T", bound=type)

_ENTRY = re.compile(r"^ {4}(\w+) \(.*?\):(.*(?:\n(?: {8}.*|\s*$))*)", re.MULTILINE)


def documented(cls: T) -> T:
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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Settings from a file, made into the dataclasses of a stage's parser.

TRL's own `--config` hands values on as YAML read them. Here they pass through the same types as on the command line,
so a wrong one is told with its key and file before anything runs.
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from medst_trl.base.errors import UserError, closest


def keys_of(parser: argparse.ArgumentParser) -> set[str]:
    """The settings a parser takes, under their names in recipes."""
    return set(_actions(parser)) - {"help"}


def convert(parser: argparse.ArgumentParser, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """
    Check `settings` against a parser and give each the type it declares.

    Args:
        parser (`argparse.ArgumentParser`):
            A stage's parser.
        settings (`dict`):
            Key to value, as read from YAML or given as text on the command line.
        where (`str`):
            Opens every message: the file and section the settings stand in.

    Raises:
        UserError: for an unknown key, a value of the wrong type, or one that is not among the choices.
    """
    actions = _actions(parser)
    for key in settings:
        if key not in actions or key == "help":
            raise UserError(
                f"{where}: unknown key {key!r}.{closest(key, keys_of(parser)) or f' See `{parser.prog} --help`.'}"
            )
    return {key: _convert_one(actions[key], value, f"{where}: {key}") for key, value in settings.items()}


def require(parser: argparse.ArgumentParser, settings: Mapping[str, Any], where: str) -> None:
    """Raise a `UserError` if `settings` lack one that the parser cannot do without."""
    missing = [key for key, action in _actions(parser).items() if action.required and settings.get(key) is None]
    if missing:
        raise UserError(f"{where}: {' and '.join(missing)} must be set. See `{parser.prog} --help`.")


def parse(
    parser: argparse.ArgumentParser, settings: Mapping[str, Any], where: str, argv: Iterable[str] = ()
) -> tuple[Any, ...]:
    """
    The parser's dataclasses, filled from converted `settings` and then from `argv`, which wins.

    Raises:
        UserError: for what a dataclass itself refuses.
    """
    parser.set_defaults_with_config(**settings)
    try:
        return parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)
    except ValueError as error:  # a dataclass's own checks, such as those of TrainingArguments
        raise UserError(f"{where}: {error}") from error


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    actions = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # the first: `--no_x` shares the dest of `--x`
    return actions


def _convert_one(action: argparse.Action, value: Any, where: str) -> Any:
    if value is None or isinstance(value, dict):
        return value
    if action.nargs == "+":
        return [_convert_text(action, item, where) for item in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, list) else _convert_text(action, value, where)


def _convert_text(action: argparse.Action, value: Any, where: str) -> Any:
    try:
        converted = _typed(action.type, value)
    except UserError as error:  # of a registry, which lists the names
        raise UserError(f"{where}: {error}") from None
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        name = {"string_to_bool": "bool"}.get(action.type.__name__, action.type.__name__)
        raise UserError(f"{where}: {value!r} is not a valid {name}.") from None
    if action.choices is not None and converted not in action.choices:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, action.choices))}.")
    return converted


def _typed(convert_text, value: Any) -> Any:
    """Through its text: what a setting may be must not depend on whether it came from YAML or the command line."""
    if convert_text is None:
        return value
    if isinstance(value, float) and value.is_integer():  # `max_steps: 1e3`
        try:
            return convert_text(str(int(value)))
        except ValueError:
            pass
    return convert_text(str(value))

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Options on a command line, and the settings of a stage: how they are converted, checked and made into dataclasses.

TRL's `--config` uses values as YAML reads them. Here the values of a recipe are converted in the same way, whether
they are in its file or on the command line, so an invalid one is reported with its key and file before anything runs.
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from medst_trl.base.errors import Problems, UserError, closest, located
from medst_trl.base.redaction import is_secret_key


# Options of `medst run` and `python -m medst_trl`


# Settings on a command line, by section: `"sft"`, `"prepare/<name>"`, or `""` for a plain `--key`, which applies to
# every stage that has this setting. A value is the word after the key, or a tuple if there are several words or none.
Options = dict[str, dict[str, str | tuple[str, ...]]]

_ASSIGNMENT = re.compile(r"[a-z][\w/.-]*\.\w+=.*", re.DOTALL)


def read_options(argv: Sequence[str]) -> tuple[list[str], Options]:
    """
    Split the command line of a recipe into leading words and options.

    Args:
        argv (sequence of `str`):
            `recipe [recipe ...] [--key value] [--key=value] [--flag] [--section.key value] [section.key=value]`

    Returns:
        The words before the first option, and the options. If one is repeated, the last one wins.

    Raises:
        UserError: for a secret, which other users of the machine could read.
    """
    rest = list(argv)
    words, options = [], {"": {}}
    while rest and not _opens_option(rest[0]):
        words.append(rest.pop(0))
    while rest:
        name, equals, text = rest.pop(0).removeprefix("--").partition("=")
        values = [text] if equals else []
        while not equals and rest and not _opens_option(rest[0]):
            values.append(rest.pop(0))
        target, _, key = name.rpartition(".")
        value = values[0] if len(values) == 1 else tuple(values)
        options.setdefault(target, {})[key.replace("-", "_")] = value
    refuse_secrets(key for section in options.values() for key in section)
    return words, options


def _opens_option(word: str) -> bool:
    return word.startswith("--") or bool(_ASSIGNMENT.fullmatch(word))


def take(options: Options, key: str) -> str | None:
    """Remove an option for all stages, and return its value; None if it is missing."""
    value = options[""].pop(key, None)
    if isinstance(value, tuple):
        raise UserError(f"--{key} takes one value.")
    return value


def refuse_secrets(keys: Iterable[str]) -> None:
    """Raise a [`UserError`] if one of these keys of a command line or file holds a secret."""
    for key in keys:
        if is_secret_key(key):
            raise UserError(
                f"{key}: secrets do not belong on a command line or in a recipe, where others can read them. "
                "Set them in the environment instead (HF_TOKEN, OPENAI_API_KEY), or use `hf auth login`."
            )


def as_count(value: Any, key: str, where: str) -> int | None:
    """Convert a number of at least 1 (such as `num_processes`), or None."""
    if value is None:
        return None
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise UserError(f"{where}: {key} is {value!r}. It must be a whole number of at least 1.")


# Settings of one stage


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The settings of a parser, by their names in recipes."""
    actions = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # the first: `--no_x` shares the dest of `--x`
    actions.pop("help", None)
    return actions


def convert(
    parser: argparse.ArgumentParser, settings: Mapping[str, Any], where: str, complete: bool = False
) -> dict[str, Any]:
    """
    Check settings against a parser and convert each to its declared type.

    Args:
        parser (`argparse.ArgumentParser`):
            A stage's parser.
        settings (`dict`):
            Key to value, as read from YAML or as text from the command line.
        where (`str`):
            The file and section of the settings. Every message starts with it.
        complete (`bool`, *optional*, defaults to `False`):
            Whether to refuse settings without a required one.

    Raises:
        UserError: for each unknown key, each value of the wrong type or not among the choices, and what is missing.
    """
    actions, problems, converted = actions_of(parser), Problems(), {}
    for key, value in settings.items():
        with problems.collect():
            if key.startswith("no_") and value in (True, ()) and f"--{key}" in parser._option_string_actions:
                key, value = key.removeprefix("no_"), False  # --no_x turns a flag off
            if key not in actions:
                advice = closest(key, actions) or f" See `{parser.prog} --help`."
                raise UserError(f"{where}: unknown key {key!r}.{advice}")
            if value is None and not actions[key].required and not _takes_none(parser, actions[key]):
                raise UserError(f"{where}: {key} has no value. Set one, or delete the key for its default.")
            converted[key] = _convert(actions[key], value, f"{where}: {key}")
    missing = [key for key, action in actions.items() if action.required and settings.get(key) is None]
    if complete and missing:
        problems.messages.append(f"{where}: {' and '.join(missing)} must be set. See `{parser.prog} --help`.")
    problems.report()
    return converted


def parse(parser: argparse.ArgumentParser, settings: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """
    Fill the parser's dataclasses from converted `settings`.

    Raises:
        UserError: if a dataclass refuses a value, or a required setting is missing.
    """
    parser.set_defaults_with_config(**settings)
    try:
        with located(where):
            return parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    # A dataclass's own checks: TrainingArguments opens files, and looks for packages and devices.
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"{where}: {error}") from error


def _takes_none(parser: argparse.ArgumentParser, action: argparse.Action) -> bool:
    """Whether a setting may be `null` in YAML."""
    kinds = [get_type_hints(arguments).get(action.dest) for arguments in parser.dataclass_types]
    return action.default is None or any(type(None) in get_args(kind) for kind in kinds)


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, dict) and list(value.values()) == [None]:
        raise UserError(f"{where}: put a reference such as '{{{next(iter(value))}}}' in quotes.")
    if value is None or isinstance(value, dict):
        return value
    if value == () and action.nargs == "?":  # a flag on the command line
        return True
    if value == () or (isinstance(value, tuple) and action.nargs != "+"):
        raise UserError(f"{where}: expected one value, not {len(value)}.")
    if action.nargs == "+":
        return [_convert_text(action, item, where) for item in (value if isinstance(value, list | tuple) else [value])]
    return value if isinstance(value, list) else _convert_text(action, value, where)


def _convert_text(action: argparse.Action, value: Any, where: str) -> Any:
    """Convert through text: a setting must accept the same values in YAML and on a command line."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value  # `max_steps: 1e3`
    try:
        with located(where):  # so that a UserError names the place
            converted = value if action.type is None else action.type(str(number))
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        name = {"string_to_bool": "bool (true or false)"}.get(action.type.__name__, action.type.__name__)
        raise UserError(f"{where}: {value!r} is not a valid {name}.") from None
    if action.choices is not None and converted not in action.choices:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, action.choices))}.")
    return converted

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Help texts are taken from docstrings, and documented defaults are correct."""

import ast
import importlib
import re
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace

import pytest
from code_size import PACKAGE, module_name
from transformers import HfArgumentParser

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_bounds, check_choice, documented, make_lists, settings_among


@documented
@dataclass
class Example:
    """
    Settings of an example.

    Args:
        first (`str`):
            What comes first, in two
            lines.
        second (`int`, *optional*, defaults to `2`): On the line of its name.
    """

    first: str
    second: int = 2
    third: bool = field(default=False, metadata={"help": "Its own text."})


def test_help_texts_are_taken_from_the_docstring():
    assert [item.metadata["help"] for item in fields(Example)] == [
        "What comes first, in two lines.",
        "On the line of its name.",
        "Its own text.",
    ]
    text = " ".join(HfArgumentParser(Example).format_help().split())
    assert "What comes first, in two lines." in text and "Its own text." in text


def test_a_field_without_an_entry_is_refused():
    with pytest.raises(TypeError, match=r"Incomplete\.second has no entry"):

        @documented
        @dataclass
        class Incomplete:
            """
            Args:
                first (`str`): There.
            """

            first: str
            second: int = 2


def test_inherited_fields_keep_their_help():
    @documented
    @dataclass
    class Extended(Example):
        """
        Args:
            fourth (`str`, *optional*): New.
        """

        fourth: str | None = None

    assert [item.metadata["help"] for item in fields(Extended)][-2:] == ["Its own text.", "New."]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "share is 0. It must be above 0 and at most 1."),
        (1.5, "share is 1.5. It must be above 0 and at most 1."),
        (float("nan"), "share is nan. It must be finite and above 0 and at most 1."),
        (float("inf"), "share is inf. It must be finite and above 0 and at most 1."),
    ],
)
def test_numbers_out_of_bounds_are_refused(value, message):
    with pytest.raises(UserError) as error:
        check_bounds(SimpleNamespace(share=value), above={"share": 0}, at_most={"share": 1})
    assert str(error.value) == message


def test_numbers_on_bounds_and_missing_values_are_accepted():
    args = SimpleNamespace(share=1, most=None)
    check_bounds(args, above={"share": 0}, at_most={"share": 1}, at_least={"most": 1})


def test_all_numbers_out_of_bounds_are_reported():
    with pytest.raises(UserError, match="^share is 2. It must be at most 1.\nmost is 0. It must be at least 1.$"):
        check_bounds(SimpleNamespace(share=2, most=0, fine=1), at_most={"share": 1}, at_least={"most": 1, "fine": 1})


def test_a_single_value_becomes_a_list():
    args = SimpleNamespace(one="a", several=("a", "b"), none=None)
    make_lists(args, "one", "several", "none")
    assert vars(args) == {"one": ["a"], "several": ["a", "b"], "none": []}


def test_settings_are_found_by_their_class():
    settings = (3, Example("x"))
    assert settings_among(settings, Example) is settings[1]
    assert settings_among(settings, str) == ""
    assert settings_among(settings, None) is None


def _documented_classes():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(d) == "documented" for d in node.decorator_list):
                yield module_name(path), node.name


@pytest.mark.parametrize(("module", "name"), _documented_classes())
def test_documented_defaults_equal_the_actual_defaults(module, name):
    cls = getattr(importlib.import_module(module), name)
    own_fields = {item.name: item for item in fields(cls) if item.name in cls.__annotations__}
    documented_defaults = dict(re.findall(r"^ +(\w+) \(.*defaults to `(.*?)`\)", cls.__doc__, re.MULTILINE))
    for key, item in own_fields.items():
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if key in documented_defaults:
            assert ast.literal_eval(documented_defaults[key]) == default, key
        else:
            assert default in (MISSING, None), key


def test_an_unknown_choice_is_refused_with_the_closest_match_and_all_choices():
    for value in ("float32", None):
        check_choice("dtype", value, ("auto", "float32"))
    with pytest.raises(
        UserError, match=r"^Unknown dtype 'float23'\. Did you mean 'float32'\? Choose one of auto, float32\.$"
    ):
        check_choice("dtype", "float23", {"auto": 1, "float32": 2})

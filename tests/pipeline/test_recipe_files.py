# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which file a name means, and how YAML is read."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.base.errors import UserError
from medst_trl.pipeline.recipe_files import _Loader, find_recipe, read_yaml


def write(directory, text, name="mine.yaml"):
    path = directory / name
    path.write_text(text)
    return path


@given(st.floats(allow_nan=False))
def test_every_float_that_python_writes_is_read_unchanged(value):
    text = repr(value).replace("inf", ".inf")
    assert yaml.load(f"x: {text}", Loader=_Loader) == {"x": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("no", "no"), ("on", "on"), ("true", True), ("False", False), ("1:30", "1:30"),
     ("2026-01-02", "2026-01-02"), ("12", 12), ("-.5", -0.5), ("~", None), ("'7'", "7"), ("1.16.0", "1.16.0"),
     ("e5", "e5")],
)  # fmt: skip
def test_values_are_read_as_in_yaml_1_2(tmp_path, text, value):
    assert read_yaml(write(tmp_path, f"x: {text}")) == {"x": value}


def test_a_local_file_takes_precedence_over_a_packaged_recipe(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file or packaged recipe. Choose one of demo,"):
        find_recipe("no_such_recipe")
    path = write(tmp_path, "base:", "demo")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo").resolve() == path

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import medst_trl


def test_importing_the_package_imports_no_heavy_package():
    code = "import sys, medst_trl; print({'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", [name for name in medst_trl.__all__ if not name.startswith("__")])
def test_a_public_name_is_the_object_of_its_module(name):
    value = getattr(medst_trl, name)
    assert value is getattr(import_module(medst_trl._MODULE_OF[name]), name)
    assert value.__doc__, f"{name} is public and has no docstring"
    assert name in dir(medst_trl)


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SelfAnsweringTrainer'"):
        medst_trl.SelfAnsweringTrainer  # noqa: B018
    with pytest.raises(ImportError):
        from medst_trl import SelfAnsweringTrainer  # noqa: F401


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(medst_trl.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {node.names[0].name: node.module for node in block.body} == medst_trl._MODULE_OF

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from medst_trl.base import registry
from medst_trl.base.errors import UserError
from medst_trl.base.registry import PLUGINS_VARIABLE, Registry, add_plugins
from medst_trl.pipeline.recipe import read_recipe
from medst_trl.pipeline.stage import STAGES


@dataclass
class Fruit:
    name: str | None
    colour: str | None = "red"


@pytest.fixture
def fruits():
    fruits = Registry("fruit", (), ("colour",))
    for name in ("apple", "cherry"):
        fruits.register(Fruit(name))
    return fruits


def test_the_error_for_an_unknown_name_lists_all_names_and_suggests_the_closest(fruits):
    assert fruits.get("apple").name == fruits.check("apple") == "apple"
    with pytest.raises(
        UserError, match=r"Unknown fruit 'aple'. Did you mean 'apple'\? Choose one of apple, cherry, or load your own"
    ):
        fruits.get("aple")
    with pytest.raises(UserError, match=r"Unknown stage 'sfft'. Did you mean 'sft'\? Choose one of convert, base,"):
        STAGES.get("sfft")


def test_the_error_for_an_incomplete_object_names_the_missing_part(fruits):
    with pytest.raises(UserError, match="The fruit 'plum' of medst_trl lacks colour"):
        fruits.register(Fruit("plum", None))
    with pytest.raises(UserError, match="The fruit 'Fruit' of medst_trl lacks name"):
        fruits.register(Fruit(None))
    assert list(fruits) == ["apple", "cherry"] and "plum" not in fruits


def test_two_objects_cannot_share_a_name(fruits):
    with pytest.raises(UserError, match="Two fruit objects share the name 'apple'"):
        fruits.register(Fruit("apple", "green"))


STAGE = """
from dataclasses import dataclass, field
from medst_trl.pipeline.stage import STAGES, Stage

print("imported")

@dataclass
class Arguments:
    output_dir: str = field(default="x", metadata={"help": "Directory of the results."})

STAGES.register(Stage(name="toy", summary="a toy", arguments=lambda: (Arguments,), main=print))
"""


def test_two_plugins_cannot_share_a_name(plugin):
    first, second = plugin(STAGE, "first.py"), plugin(STAGE, "second.py")
    with pytest.raises(UserError) as error:
        list(STAGES)
    assert "Two stage objects share the name 'toy'" in str(error.value)
    assert str(first) in str(error.value) and str(second) in str(error.value)


def test_a_plugin_is_imported_once(plugin, capsys):
    plugin(STAGE)
    assert "toy" in STAGES and "toy" in list(STAGES)
    registry.load_plugins()
    assert capsys.readouterr().out == "imported\n"


def test_the_error_for_a_failing_plugin_names_its_file_every_time(plugin):
    path = plugin("import no_such_module\n")
    for _ in range(2):  # the second attempt must not continue without the plugin
        with pytest.raises(UserError, match="failed to import: ModuleNotFoundError: No module named") as error:
            list(STAGES)
        assert str(path) in str(error.value)


def test_the_error_for_an_incomplete_object_of_a_plugin_names_the_file_and_the_part(plugin):
    path = plugin(STAGE.replace('summary="a toy"', "summary=None"))
    with pytest.raises(UserError, match="The stage 'toy' of .* lacks summary") as error:
        list(STAGES)
    assert str(path) in str(error.value)


def test_plugins_without_a_file_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        add_plugins(["sft", "--plugins"])
    assert "argument --plugins: expected one argument" in capsys.readouterr().err


def test_a_plugin_file_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(PLUGINS_VARIABLE, "")
    monkeypatch.setattr(STAGES, "_is_loaded", False)
    assert add_plugins(["sft", "--plugins", "/nowhere/gone.py"]) == ["sft"]
    with pytest.raises(UserError, match="/nowhere/gone.py failed to import: FileNotFoundError"):
        list(STAGES)
    del registry._plugins["/nowhere/gone.py"]


def test_child_processes_inherit_the_plugins_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("")
    arguments = ["--plugins", "a.py", "run", "demo", "--plugins=b.py", "--plugins", "a.py", "--seed", "1"]
    assert add_plugins(arguments) == ["run", "demo", "--seed", "1"]
    code = f"import os; print(os.environ[{PLUGINS_VARIABLE!r}])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip().split(os.pathsep) == [str(tmp_path / "a.py"), str(tmp_path / "b.py")]


def test_a_recipe_cannot_set_plugins(tmp_path):
    path = tmp_path / "stranger.yaml"
    path.write_text(f"env: {{{PLUGINS_VARIABLE}: evil.py}}\nbase:\n")
    with pytest.raises(UserError, match="stranger.yaml: env cannot set MEDST_PLUGINS"):
        read_recipe(path)
    path.write_text("plugins: evil.py\nbase:\n")
    with pytest.raises(UserError, match="'plugins' is neither a section nor a setting"):
        read_recipe(path).steps()

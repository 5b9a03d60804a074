# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_namespace_packages

import medst_trl
from medst_trl.pipeline.launch import CONFIGS


ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="not in a checkout")


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def requirements(setup):
    groups = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return [Requirement(line) for group in groups for line in lines(group)]


def test_every_package_is_found():
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "medst_trl").rglob("__init__.py")}
    assert packages | {"medst_trl.accelerate_configs", "medst_trl.recipes"} <= set(find_namespace_packages(ROOT))


def test_tested_versions_are_within_the_declared_ranges(setup):
    tested = dict(line.lower().replace("_", "-").split("==") for line in lines((ROOT / "constraints.txt").read_text()))
    assert not any("+" in version for version in tested.values()), "a local version cannot be installed from an index"
    for requirement in requirements(setup):
        name = requirement.name.lower().replace("_", "-")
        # not installed for the tests
        if name in ("torchvision", "trackio"):
            continue
        assert requirement.specifier.contains(tested[name]), f"{requirement} does not allow {tested[name]}"


def test_torchvision_is_never_required(setup):
    assert not any(re.match(r"torchvision", line) for line in lines(setup["options"]["install_requires"]))


def test_the_command_is_installed():
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "medst"]
    assert script.value == "medst_trl.cli:main"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    source.mkdir()
    for name in ("medst_trl", "recipes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    (source / "recipes" / "for_this_test.yaml").write_text("base:\n")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_contains_one_package_with_all_its_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"medst_trl"}
    expected = [path.relative_to(ROOT) for path in (ROOT / "medst_trl").rglob("*.py")]
    expected += [path.relative_to(ROOT) for path in (ROOT / "medst_trl").rglob("*.jinja")]
    expected += [path.relative_to(ROOT) for path in CONFIGS.glob("*.yaml")]
    expected += [path.relative_to(ROOT) for path in (ROOT / "medst_trl/demo").glob("*.yaml")]
    expected += [Path("medst_trl/py.typed"), *(path.relative_to(ROOT) for path in (ROOT / "medst_trl").rglob("*.md"))]
    expected += [Path("medst_trl", path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*.yaml")]
    assert {path.as_posix() for path in expected} <= names
    assert any(name.endswith("LICENSE") for name in names)


def test_recipes_are_found_in_an_installed_copy(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import medst_trl, sys
from medst_trl.pipeline.launch import find_config
from medst_trl.pipeline.recipe import find_recipe
print(medst_trl.__file__, find_recipe("for_this_test"), find_config("zero2"))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(tmp_path / "site")) == 3


def test_the_licence_is_complete_and_the_version_is_valid():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert re.fullmatch(r"\d+\.\d+\.\d+", medst_trl.__version__)


def test_ci_is_executable():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111

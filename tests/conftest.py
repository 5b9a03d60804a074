# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test environment without network and with few threads, and fixtures for plugins, real data and the demo."""

import json
import os
import shutil
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
from hypothesis import HealthCheck, settings


# A loaded machine is slow, which is no failure.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path_factory, monkeypatch) -> Path:
    """Run each test in an empty directory, so that it does not depend on results in the checkout such as `runs/`."""
    directory = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Return a function that writes a plugin file. This process and its children load it until the test ends."""
    from medst_trl.base import registry
    from medst_trl.base.registry import Registry

    def registries() -> list[Registry]:
        modules = [module for name, module in sys.modules.items() if name.startswith("medst_trl.")]
        return [item for module in modules for item in vars(module).values() if isinstance(item, Registry)]

    def write(text: str, name: str = "my_plugin.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        paths.append(str(path))
        monkeypatch.setenv(registry.PLUGINS_VARIABLE, os.pathsep.join(paths))
        for item in registries():
            item._is_loaded = False
        return path

    paths: list[str] = []
    yield write
    for path in paths:
        registry._plugins.pop(path, None)
    for item in registries():
        for name in [name for name, origin in item._origins.items() if origin in paths]:
            del item._objects[name], item._origins[name]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real data (VQA-RAD, SLAKE, PathVQA, GPT-4 reviews). Tests that need it are skipped without it."""
    default = Path(__file__).parents[2] / "shared" / "data"
    directory = Path(os.environ.get("MEDST_SHARED_DATA", default))
    if not directory.is_dir():
        pytest.skip(f"no real data at {directory} (set MEDST_SHARED_DATA)")
    return directory


@pytest.fixture(scope="session")
def golden_metrics(shared_data) -> dict:
    """Scores that LLaVA-Med's own scripts give. Tests that need them are skipped without the file."""
    path = shared_data.parent / "golden" / "llava_med_metrics.json"
    if not path.is_file():
        pytest.skip(f"no reference scores at {path}")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory) -> Path:
    """Directory of the general-purpose model that the demo starts from. Takes a minute."""
    from demo_run import run_demo

    directory = tmp_path_factory.mktemp("base") / "run"
    run_demo(directory, "--stage", "base")
    return directory / "base"


@pytest.fixture(scope="session")
def demo_run(demo_base, tmp_path_factory) -> Path:
    """Directory of a finished demo, which tests must not change. Its output is in `../printed`. Takes minutes."""
    from demo_run import run_demo

    directory = tmp_path_factory.mktemp("demo") / "demo"
    shutil.copytree(demo_base, directory / "base")
    (directory.parent / "printed").write_text(run_demo(directory))
    return directory

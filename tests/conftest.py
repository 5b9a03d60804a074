# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""No network, few threads, and the real data where a machine has it."""

import os
import shutil
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path_factory, monkeypatch) -> Path:
    """No test sees what lies in the checkout, such as the results of `make demo` in `runs/`."""
    directory = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """
    Folder of real data files (VQA-RAD, SLAKE, PathVQA, GPT-4 reviews); tests that need it are skipped without it.
    """
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MEDST_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set MEDST_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory) -> Path:
    """The general-purpose model that the demo starts from. Takes a minute."""
    from demo_run import run_demo

    folder = tmp_path_factory.mktemp("base") / "run"
    run_demo(folder, "--stage", "base")
    return folder / "base"


@pytest.fixture(scope="session")
def demo_run(demo_base, tmp_path_factory) -> Path:
    """A finished demo; not to be changed. What it printed lies beside it. Takes minutes."""
    from demo_run import run_demo

    folder = tmp_path_factory.mktemp("demo") / "demo"
    shutil.copytree(demo_base, folder / "base")
    (folder.parent / "printed").write_text(run_demo(folder))
    return folder

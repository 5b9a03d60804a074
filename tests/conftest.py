# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""No network, few threads, and the real data where a machine has it."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest


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

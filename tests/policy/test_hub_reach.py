# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Without a network a model that is not here is refused at once; one in the cache is looked for there."""

import os
import socket
import subprocess
import sys

import pytest


CODE = """
import sys
from medst_trl import load_policy
from medst_trl.base.errors import UserError
try:
    load_policy(sys.argv[1])
except UserError as error:
    print(error)
"""


@pytest.fixture
def nowhere():
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_model_that_cannot_be_had(nowhere, tmp_path):
    # In a process of its own: huggingface_hub reads both when it is imported. It would try for minutes.
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": nowhere, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, "org/not-here"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "'org/not-here' is not a directory" in done.stdout and nowhere in done.stdout
    assert "Retry" not in done.stderr


def test_folders_offline_and_cached_models_pass(nowhere, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    from medst_trl.base.errors import UserError
    from medst_trl.policy.loading import check_reachable

    check_reachable("org/not-here")  # offline, as the tests are: transformers says it at once
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check_reachable(str(tmp_path))
    with pytest.raises(UserError, match="the local cache has no copy of it"):
        check_reachable("org/here")
    (tmp_path / "models--org--here" / "snapshots").mkdir(parents=True)
    check_reachable("org/here")
    assert "HF_HUB_OFFLINE=1" in capsys.readouterr().out

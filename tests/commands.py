# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the command line of medst_trl in a separate process."""

import os
import subprocess
import sys
from pathlib import Path


def run_medst(directory: Path, *arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run `medst` in a directory, without the plugins of this process.

    Args:
        code: The expected exit code.
        variables: Additional environment variables.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MEDST_PLUGINS"}
    environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "medst_trl.cli", *arguments]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    return result

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Run `medst run recipes/demo.yaml` for the slow tests."""

import subprocess
import sys
from pathlib import Path


DEMO = str(Path(__file__).parents[1] / "recipes/demo.yaml")


def run_demo(directory: Path, *options: str) -> str:
    """Run the demo, or some of its stages, into `directory` and return its output."""
    command = [sys.executable, "-m", "medst_trl.cli", "run", DEMO, "--output_dir", str(directory), *options]
    done = subprocess.run(command, cwd=directory.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

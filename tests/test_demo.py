# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo shows what it says: the model answers held-out scans, needs their images for it, and asks sensibly."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_demo_with_all_labels(tmp_path):
    command = [
        sys.executable,
        "-m",
        "medst_trl.cli",
        "run",
        str(ROOT / "recipes/demo.yaml"),
        "--output_dir",
        str(tmp_path / "demo"),
    ]
    run = subprocess.run([*command, "--prepare.num_phantoms", "2500"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "exact match" in run.stdout and "majority" in run.stdout

    content = json.loads((tmp_path / "demo/evaluate/scores.json").read_text())
    exact_match = content["scores"]["strict"]["exact_match"]
    assert exact_match["value"] >= 90 and exact_match["n"] > 800
    assert exact_match["majority"] < 50
    for control in content["controls"].values():
        assert control["strict"]["exact_match"]["value"] < 60  # without the right image there is little to know

    ask = runpy.run_path(str(ROOT / "examples/ask_questions.py"))["main"]
    assert ask(str(tmp_path / "demo/sft"), 200, 0) >= 0.95

    again = subprocess.run([*command, "--prepare.num_phantoms", "2500"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("nothing to do") == 4

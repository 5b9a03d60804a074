# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that the demo improves the model, and that stage 1 learns the task when all images have labels."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from demo_run import run_demo as run


ROOT = Path(__file__).parents[2]


def exact_match(directory: Path) -> dict:
    return json.loads((directory / "scores.json").read_text())["scores"]["strict"]["exact_match"]


def image_ids(directory: Path) -> set[str]:
    from medst_trl.data.loading import load_records

    return {name for names in load_records(directory / "candidates", "train")["image_ids"] for name in names}


@pytest.mark.slow
def test_the_demo_improves_the_model(demo_run):
    demo = demo_run
    assert "stage 1  aligned" in (demo.parent / "printed").read_text()  # the table of scores before and after
    before, after = exact_match(demo / "evaluate/stage_1"), exact_match(demo / "evaluate/aligned")
    assert before["n"] == after["n"] > 1400
    assert after["value"] - before["value"] >= 3
    assert (demo / "report/index.html").stat().st_size > 50_000
    assert run(demo).count("nothing to do") == 8  # all stages except the report, which is always rewritten


@pytest.mark.slow
def test_stage_1_with_all_labels_learns_the_task(demo_base, tmp_path):
    demo = tmp_path / "demo"
    shutil.copytree(demo_base, demo / "base")
    options = ["--prepare.num_phantoms", "2500", "--sft.max_steps", "750"]
    for stage in ("prepare", "sft", "evaluate/stage_1"):
        run(demo, "--stage", stage, *options)
    scores = json.loads((demo / "evaluate/stage_1/scores.json").read_text())
    assert scores["scores"]["strict"]["exact_match"]["value"] >= 90
    assert scores["scores"]["strict"]["exact_match"]["majority"] < 50
    for control in scores["controls"].values():
        assert control["strict"]["exact_match"]["value"] < 60  # without the image, few questions can be answered
    ask = runpy.run_path(str(ROOT / "examples/ask_questions.py"))["main"]
    assert ask(str(demo / "sft"), 200, 0) >= 0.95


@pytest.mark.slow
def test_each_round_uses_other_images_and_the_policy_of_the_previous_round(demo_base, tmp_path):
    demo = tmp_path / "demo"
    shutil.copytree(demo_base, demo / "base")
    options = [
        "--rounds",
        "2",
        "--generate.max_records",
        "100",
        "--sft.max_steps",
        "100",
        "--dpo.num_train_epochs",
        "1",
    ]
    options += ["--prepare.num_unlabelled_phantoms", "200", "--prepare.num_test_phantoms", "20"]
    run(demo, *options)
    first, second = (image_ids(demo / f"round_{number}/generate") for number in (1, 2))
    assert first and second and not first & second
    record = json.loads((demo / "round_2/dpo/stage.json").read_text())
    assert record["inputs"]["model_name_or_path"][0]["path"].endswith("round_1/dpo")
    page = (demo / "report/index.html").read_text()
    assert "Round 1" in page and "Round 2" in page
    assert run(demo, *options).count("nothing to do") == 3 + 1 + 2 * 4

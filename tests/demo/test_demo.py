# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo shows what it says: the loop makes the model better, and with all labels it learns the task."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from demo_run import run_demo as run


ROOT = Path(__file__).parents[2]


def exact_match(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())["scores"]["strict"]["exact_match"]


def image_ids(folder: Path) -> set[str]:
    from medst_trl.data.schema import load_records

    return {name for names in load_records(folder / "candidates", "train")["image_ids"] for name in names}


@pytest.mark.slow
def test_the_loop_makes_the_model_better(demo_run):
    demo = demo_run
    assert "stage 1  aligned" in (demo.parent / "printed").read_text()  # the table of before and after
    before, after = exact_match(demo / "evaluate/stage_1"), exact_match(demo / "evaluate/aligned")
    assert before["n"] == after["n"] > 1400
    assert after["value"] - before["value"] >= 3
    assert (demo / "report/index.html").stat().st_size > 50_000
    assert run(demo).count("nothing to do") == 8  # all but the report, which is made anew


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
        assert control["strict"]["exact_match"]["value"] < 60  # without the right image there is little to know
    ask = runpy.run_path(str(ROOT / "examples/ask_questions.py"))["main"]
    assert ask(str(demo / "sft"), 200, 0) >= 0.95


@pytest.mark.slow
def test_each_round_asks_about_other_images_with_the_policy_of_the_one_before(demo_base, tmp_path):
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

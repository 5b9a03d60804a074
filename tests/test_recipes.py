# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipes that come with the package: each setting is known to its stage, each file can be executed."""

import os
from pathlib import Path

import pytest

from medst_trl.recipe import read_recipe


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_section_is_complete_and_known(path):
    steps = read_recipe(path).steps()
    made = [Path(step.settings["output_dir"]) for step in steps]
    assert len(set(made)) == len(made)
    for number, step in enumerate(steps):  # each reads what a step before it has made, or what lies outside of the run
        for value in (step.settings.get(key) for key in ("model_name_or_path", "dataset", "images", "candidates")):
            if value is not None and str(value).startswith("runs/"):
                assert any(Path(value).is_relative_to(folder) for folder in made[:number]), (step.label, value)


def test_the_demo_is_the_whole_loop():
    steps = {step.label: step.settings for step in read_recipe(RECIPES[0].with_name("demo.yaml")).steps()}
    loop = ["base", "prepare", "sft", "generate", "judge", "dpo", "evaluate/stage_1", "evaluate/aligned", "report"]
    assert list(steps) == loop
    assert steps["dpo"]["model_name_or_path"] == steps["evaluate/stage_1"]["model_name_or_path"] == "runs/demo/sft"
    assert steps["evaluate/aligned"]["model_name_or_path"] == "runs/demo/dpo"
    assert steps["prepare"]["num_phantoms"] == 0.09 * 2500


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_opens_with_what_it_is_and_how_to_run_it(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env -S python -m medst_trl\n") and os.access(path, os.X_OK)
    for heading in ("# What it is", "# What it needs", "# Run it", "# Change it"):
        assert heading in text
    assert f"medst run recipes/{path.name}" in text

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
    assert [step.stage.name for step in steps] == ["base", "prepare", "sft", "evaluate"]
    settings = {step.stage.name: step.settings for step in steps}
    assert settings["sft"]["model_name_or_path"] == settings["base"]["output_dir"]
    assert settings["evaluate"]["model_name_or_path"] == settings["sft"]["output_dir"]
    assert settings["evaluate"]["controls"] == ["blank", "shuffled"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_opens_with_what_it_is_and_how_to_run_it(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env -S python -m medst_trl\n") and os.access(path, os.X_OK)
    for heading in ("# What it is", "# What it needs", "# Run it", "# Change it"):
        assert heading in text
    assert f"medst run recipes/{path.name}" in text

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""docs/models.md lists the registered families, and every module uses a family that a plugin registers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medst_trl.base.errors import UserError
from medst_trl.policy.families import FAMILIES, Family, family_of


ROOT = Path(__file__).parents[2]
PLUGIN = """
from medst_trl.policy.families import FAMILIES, Family

FAMILIES.register(Family(
    "toy", "Toy VLM", ("aya_vision",), packs_with=frozenset({"cohere2"}), shares_prompts=True,
))
"""
SCRIPT = """
from types import SimpleNamespace
import torch
from transformers import AyaVisionConfig, GenerationConfig
from medst_trl.base.errors import UserError
from medst_trl.policy.families import check_family, family_of
from medst_trl.training.packing import packing_cost

model = SimpleNamespace(config=AyaVisionConfig(), generation_config=GenerationConfig())
model.config.text_config._attn_implementation = "sdpa"
print(packing_cost(model)[0] is not None, family_of("aya_vision").shares_prompts)
try:
    check_family(model.config.text_config, "mine")
except UserError as error:
    print(error)
"""


def table_row(family: Family) -> str:
    cells = (
        family.title,
        ", ".join(family.model_types),
        "read separately" if family.name == "mllama" else "exact",
        "exact" if family.packs_with else "grouped by length",
        "exact" if family.shares_prompts else "read separately",
    )
    return f"| {' | '.join(cells)} |"


def test_docs_list_every_family():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = re.search(r"\| family \|.*\n\|[-|]+\n((?:\|.*\n)+)", text)[1].splitlines()
    without_limits = ["|".join(row.split("|")[:-2]) + "|" for row in table]
    assert without_limits == [table_row(family) for family in FAMILIES.values()]


def test_every_module_uses_a_family_from_a_plugin(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    environment = os.environ | {"MEDST_PLUGINS": str(plugin)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    decisions, message = result.stdout.splitlines()
    assert decisions == "True True"
    assert "SmolVLM; Toy VLM." in message


def test_a_plugin_can_replace_a_built_in_family(monkeypatch):
    monkeypatch.setattr(FAMILIES, "_objects", dict(FAMILIES._objects))
    FAMILIES.register(Family("my_llava", "My LLaVA", ("llava",), shares_prompts=False))
    assert family_of("llava").name == "my_llava" and family_of("llava_next").name == "llava_next"


def test_an_unknown_model_type_gets_conservative_defaults():
    unknown = family_of("another")
    assert (unknown.packs_with, unknown.shares_prompts) == (frozenset(), False)
    assert unknown.causal and not unknown.is_own


def test_a_family_without_a_title_is_refused():
    with pytest.raises(UserError, match="'mine' of .* lacks title"):
        FAMILIES.register(Family("mine", None, ("mine",)))


def test_two_families_cannot_share_a_name():
    with pytest.raises(UserError, match="share the name 'llava'"):
        FAMILIES.register(Family("llava", "another", ("another",)))

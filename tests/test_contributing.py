# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The examples of CONTRIBUTING.md work as plugins, and in the directories of the package that the page names."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset
from documents import ROOT, Block, blocks
from PIL import Image

from medst_trl.base.registry import PLUGINS_GROUP, PLUGINS_VARIABLE
from medst_trl.data.schema import dialogue, preference_features


PAGE = ROOT / "CONTRIBUTING.md"
EXAMPLES = [block for block in blocks(PAGE) if block.language == "python"]

# Prints the help of every command that lists registered objects, the families, and the steps of a recipe.
LISTS_EVERYTHING = """
import sys
import medst_trl
from medst_trl.cli import main
from medst_trl.pipeline.recipe import read_recipe
from medst_trl.policy.families import tested_families

print("package:", medst_trl.__file__)
for command in ("prepare", "generate", "judge", "evaluate", "dpo", "count"):
    assert main([command, "--help"]) == 0
assert main(["--help"]) == 0
print(tested_families())
print("recipe:", [step.label for step in read_recipe(sys.argv[1]).steps()])
"""
RECIPE = """
output_dir: out
prepare: {source: my_hospital, data_path: reports.json}
judge: {candidates: org/candidates, model: gpt-4o, prompt_version: two_numbers}
count:
evaluate: {engine: echo, echo_prefix: "A: ", model_name_or_path: x, benchmark: org/data, variants: [strict, brevity]}
"""
LISTED = (
    "my_hospital (a JSON or JSONL file",
    "two_numbers (two numbers",
    "brevity (answers of fewer",
    "echo (repeats each prompt)",
    "--echo_prefix",
    "margin (an example)",
    "My VLM",
    "count preference pairs",
    "recipe: ['prepare', 'judge', 'count', 'evaluate']",
)


RUNS_EVERYTHING = """
import torch
from medst_trl import MultimodalDPOConfig
from medst_trl.cli import main
from medst_trl.data.schema import dialogue
from medst_trl.engines.engine import ENGINES, Prompt, Sampling
from medst_trl.selftrain.judge.judge import JUDGE_PROMPTS
from medst_trl.training.losses import LOSSES, Answers, PairLogProbs

for command in (
    "prepare --source my_hospital --data_path reports.json --output_dir prepared",
    "evaluate --predictions predictions.jsonl --variants strict brevity --output_dir evaluated",
    "count --dataset pairs --output_dir counted",
    "count --dataset pairs --output_dir counted",
):
    assert main(command.split()) == 0
kind = ENGINES.get("echo")
question, _ = dialogue([("Where?", "Left.")])
print(kind.open("any", kind.settings("A: ")).write([Prompt([question], [])], Sampling())[0].text)
print(JUDGE_PROMPTS.get("two_numbers").read("7 3"))
one, two = torch.tensor([-1.0]), torch.tensor([-3.0])
pairs = PairLogProbs({"image": Answers(one, two)}, {"image": Answers(two, two)}, Answers(one, one))
print("loss", LOSSES.get("margin")(pairs, MultimodalDPOConfig(output_dir="x", beta=0.1, report_to="none")).item())
"""


def list_everything(tmp_path, **environment):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-c", LISTS_EVERYTHING, str(tmp_path / "mine.yaml")],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "10000"} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def place_of(example: Block) -> tuple[str, str]:
    """Return `Directory` or `File`, and the path that the section of an example names."""
    above = "\n".join(PAGE.read_text(encoding="utf-8").splitlines()[: example.line])
    return re.findall(r"^(Directory|File): `(medst_trl/[\w/.]+)`", above, re.MULTILINE)[-1]


def without_imports(text: str) -> str:
    """Return an example without the imports at its top, to be appended to the file that defines these names."""
    body = [node for node in ast.parse(text).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n\n".join(map(ast.unparse, body))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Copy of the package with every example where the page says."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "medst_trl", copy / "medst_trl", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    for name in ("code_size.py", "test_architecture.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    for number, example in enumerate(EXAMPLES):
        kind, place = place_of(example)
        if kind == "Directory":
            assert (copy / place).is_dir()
            (copy / place / f"example_{number}.py").write_text(example.text, encoding="utf-8")
        else:
            with open(copy / place, "a", encoding="utf-8") as file:
                file.write(f"\n\n{without_imports(example.text)}\n")
    return copy


def test_every_section_names_a_place():
    text = PAGE.read_text(encoding="utf-8")
    sections = re.findall(r"^### (.+)\n\n(Directory|File): `", text, re.MULTILINE)
    assert len(sections) == len(re.findall(r"^### ", text, re.MULTILINE)) == len(EXAMPLES)


def test_examples_work_as_plugins(tmp_path):
    files = [tmp_path / f"example_{number}.py" for number in range(len(EXAMPLES))]
    for file, example in zip(files, EXAMPLES):
        file.write_text(example.text, encoding="utf-8")
    printed = list_everything(tmp_path, **{PLUGINS_VARIABLE: os.pathsep.join(map(str, files))})
    assert [words for words in LISTED if words not in printed] == []


def test_examples_work_as_entry_points(tmp_path):
    modules = [f"my_example_{number}" for number in range(len(EXAMPLES))]
    for module, example in zip(modules, EXAMPLES):
        (tmp_path / f"{module}.py").write_text(example.text, encoding="utf-8")
    about = tmp_path / "my_examples-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-examples\nVersion: 1.0\n")
    points = "\n".join(f"{module} = {module}" for module in modules)
    (about / "entry_points.txt").write_text(f"[{PLUGINS_GROUP}]\n{points}\n")
    printed = list_everything(tmp_path, PYTHONPATH=str(tmp_path))
    assert [words for words in LISTED if words not in printed] == []


def test_examples_work_inside_the_package(extended, tmp_path):
    printed = list_everything(tmp_path, PYTHONPATH=str(extended))
    assert f"package: {extended}" in printed
    assert [words for words in LISTED if words not in printed] == []


def test_examples_inside_the_package_run(extended, tmp_path):
    Image.new("L", (8, 8), 90).save(tmp_path / "scan.png")
    reports = [{"image": "scan.png", "findings": "A small nodule."}, {"image": "scan.png"}]
    (tmp_path / "reports.json").write_text(json.dumps(reports))
    answered = {"id": "1", "question": "What?", "answer": "nodule", "answer_type": "open", "prediction": "a nodule"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(answered) + "\n")
    question, chosen = dialogue([("Where?", "Left.")])
    pair = {"id": "a", "images": [], "image_ids": [], "prompt": [question], "chosen": [chosen], "rejected": [chosen]}
    pair = dict.fromkeys(preference_features()) | pair
    Dataset.from_list([pair], preference_features()).to_parquet(tmp_path / "pairs/train-00000-of-00001.parquet")
    done = subprocess.run(
        [sys.executable, "-c", RUNS_EVERYTHING],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(extended), "HF_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    printed = done.stdout
    record = json.loads((tmp_path / "prepared/stage.json").read_text())["counts"]
    assert record["rejected"] == {"no_findings": 1}
    assert re.search(r"^short\b.* 100\.0", printed, re.MULTILINE)  # the figure of the metric in the printed table
    assert json.loads((tmp_path / "counted/count.json").read_text()) == {"pairs": 1}
    assert "finished and unchanged" in printed  # the second run of `count`
    assert "A: Where?" in printed and "Reading(scores=(7.0, 3.0), verdict=0" in printed and "loss 0.8" in printed


def test_examples_inside_the_package_keep_its_structure(extended):
    """All but the limit on lines, which has no room for seven examples."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", extended]
    checks = [extended / "tests/test_architecture.py", "-k", "not budget"]
    done = subprocess.run([*command, *checks], cwd=extended, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout[-4000:]

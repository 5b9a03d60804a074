# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Every command in README.md and docs/ is valid, and every block that runs on any machine runs."""

import ast
import configparser
import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from code_size import PACKAGE, imported_modules, module_name
from documents import PAGES, ROOT, Block, blocks, commands
from judge_server import JudgeServer

from medst_trl import cli
from medst_trl.base.registry import PLUGINS_VARIABLE
from medst_trl.pipeline import launch
from medst_trl.pipeline.recipe import read_recipe
from medst_trl.pipeline.recipe_files import packaged_recipes


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
OTHER_PROGRAMS = {"cd", "export", "git", "hf", "python", "sbatch", "transformers", "vllm", "lmms-eval"}


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_command_is_valid(block, monkeypatch, capsys):
    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "run_stage", lambda stage, arguments: seen.append(stage.name))
    monkeypatch.setattr(launch, "run", lambda command, environment: 0)
    monkeypatch.setattr(launch, "gpu_count", lambda: 4)
    monkeypatch.setattr(launch, "has_deepspeed", lambda: True)
    monkeypatch.setattr(launch, "check_launched", lambda *arguments: None)
    monkeypatch.setattr("medst_trl.pipeline.plan.plan.check_inputs", lambda *arguments: [])  # data is downloaded first
    for words in commands(block):
        _check(words, seen)
        capsys.readouterr()


def _check(words: list[str], seen: list[str]) -> None:
    match words:
        case ["medst", "recipes", "cp", *_] | ["cp", *_]:
            pass
        case ["medst", "--help"] | ["medst", _, "--help"]:
            assert cli.main(words[1:]) == 0
        case ["medst", *argv]:
            assert cli.main(argv) == 0, words
        case ["accelerate", "launch", *options]:
            while options and options[0] not in ("-m", "--no_python"):
                options.pop(0)
            program = options[2:] if options[0] == "-m" else options[1:]
            before = len(seen)
            cli.run_launched(program)
            assert len(seen) > before, words
        case ["make", *targets]:
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= set(rules)
        case ["pip", "install", *_]:
            setup = configparser.ConfigParser()
            setup.read(ROOT / "setup.cfg")
            extras = {extra for word in words for found in re.findall(r"\[(.+)\]", word) for extra in found.split(",")}
            assert extras <= set(setup["options.extras_require"])
        case ["python", script, *_] if script.startswith("examples/"):
            assert (ROOT / script).is_file()
        case _:
            assert words[0] in OTHER_PROGRAMS, words


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_parse(block):
    ast.parse(block.text)


def test_the_recipe_of_the_page_is_valid(tmp_path, monkeypatch):
    (block,) = [block for block in blocks(ROOT / "docs/recipes.md") if block.language == "yaml"]
    (tmp_path / "mine.yaml").write_text(block.text, encoding="utf-8")
    monkeypatch.setenv("WANDB_PROJECT", "")  # the recipe sets it
    steps = {step.label: step.settings for step in read_recipe(tmp_path / "mine.yaml").steps()}
    assert list(steps)[:3] == ["prepare/scans", "prepare/labeled", "sft"]
    assert steps["generate"]["model_name_or_path"] == steps["dpo"]["model_name_or_path"] == "runs/mine/sft"
    assert steps["judge"]["candidates"] == "runs/mine/generate/candidates"
    assert steps["dpo"]["dataset"] in ("runs/mine/judge/preferences", ["runs/mine/judge/preferences"])
    assert steps["evaluate/aligned"]["model_name_or_path"] == "runs/mine/dpo"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900
    assert max(map(len, text.splitlines())) < 100


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_have_targets(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


# Replacements with which the ten commands run on a laptop: a tiny model, a local judge, and suitable learning rates.
LAPTOP_REPLACEMENTS = {
    "MODEL=llava-hf/llava-1.5-7b-hf": "MODEL=runs/demo/base",
    'JUDGE="--model gpt-4o"': 'JUDGE="--model judge --base_url {judge} --min_margin 0"',
    "--learning_rate 2e-4 --vision_learning_rate 5e-5 --projector_learning_rate 2e-5": "--learning_rate 7e-4 "
    "--vision_learning_rate 1e-3 --projector_learning_rate 1e-3 --lora_dropout 0 --per_device_train_batch_size 16",
    "--num_train_epochs 3": "--max_steps 150",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, demo_run) -> Path:
    """Directory of a reader of the docs: the checkout, a finished demo, scans, and a table of questions and images."""
    from medst_trl.demo.phantoms import make_phantoms

    directory = tmp_path_factory.mktemp("workspace")
    for name in ("recipes", "examples", "docs"):
        shutil.copytree(ROOT / name, directory / name)
    shutil.copytree(demo_run, directory / "runs/demo")
    for name in ("scans", "labeled"):
        (directory / name).mkdir()
    make_phantoms(1, 2, split="unlabelled")[0].image.save(directory / "scan.png")
    for number, phantom in enumerate(make_phantoms(40, 1, split="unlabelled")):
        phantom.image.save(directory / f"scans/{number}.png")
    with open(directory / "labeled/questions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer", "split", "patient_id"])
        for split, count in (("train", 225), ("test", 20)):
            for number, phantom in enumerate(make_phantoms(count, 1, split=split)):
                phantom.image.save(directory / f"labeled/{split}_{number}.png")
                for question in phantom.questions:
                    image = f"{split}_{number}"
                    rows.writerow([f"{image}.png", question["question"], question["answer"], split, image])
    return directory


def _run(block: Block, workspace: Path, text: str | None = None) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OPENAI_API_KEY": "sk-x",
    }
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, text or block.text], cwd=workspace, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_run_anywhere_run(page, workspace):
    for block in blocks(page):
        if block.language == "bash" and block.runs_anywhere:
            skipped = ("make ", "pip ")  # these create environments or run this test
            text = "".join(line for line in block.text.splitlines(True) if not line.startswith(skipped))
            _run(block, workspace, text or "true")
        elif block.language == "python":
            _run(block, workspace)


@pytest.mark.slow
def test_the_ten_commands_run(workspace):
    (block,) = [
        block for block in blocks(ROOT / "README.md") if "runs/mine/merged" in block.text and "medst sft" in block.text
    ]
    text = block.text
    with JudgeServer() as server:
        for original, replacement in LAPTOP_REPLACEMENTS.items():
            assert original in text, original
            text = text.replace(original, replacement.replace("{judge}", server.base_url))
        _run(block, workspace, text)
    mine = workspace / "runs/mine"
    assert (mine / "merged/model.safetensors").is_file() and (mine / "dpo/adapter_model.safetensors").is_file()
    assert (mine / "report/index.html").is_file() and (mine / "evaluate/scores.json").is_file()


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_files_of_the_architecture_page_exist():
    paths = {path for path in re.findall(r"`((?:\w+/)+[\w.]*)`", ARCHITECTURE) if not (ROOT / path).exists()}
    assert len(paths) > 30
    assert {path for path in paths if not (ROOT / "medst_trl" / path).exists()} == set()
    names = {file.name for directory in ("medst_trl", "tests") for file in (ROOT / directory).rglob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", ARCHITECTURE)) <= names


def test_names_of_the_architecture_page_are_in_the_files_beside_them():
    """`path.py`: `name` and `name`, up to the next path or the end of the paragraph."""
    beside = re.findall(r"`([\w/]+\.py)`:\s(?=([^|\n]*(?:\n[^|\n]+)*))", ARCHITECTURE)
    assert len(beside) > 15
    for path, text in beside:
        names = re.findall(r"`(\w+)`", re.split(r"`[\w/]+\.py`|;|(?<=`)\)", text)[0])
        source = (ROOT / "medst_trl" / path).read_text(encoding="utf-8")
        assert names and [name for name in names if not re.search(rf"\b{name}\b", source)] == [], path
    for name in set(re.findall(r"`(\w+)`", ARCHITECTURE)):  # other functions and classes
        if not name.isupper() and ("_" in name or name[0].isupper()):
            assert subprocess.run(["grep", "-rqw", name, str(ROOT / "medst_trl")]).returncode == 0, name


def test_packages_import_only_what_the_architecture_page_lists_above_them():
    rings = re.findall(r"^\| (\d?)[^|]*\| (`.+?`) \|", ARCHITECTURE, re.MULTILINE)
    first = [number for number, _ in rings].index("1")
    layers = [{path} for _, path in rings[first : first + 6]]  # one package each
    layers += [{"`pipeline/`"}, {"`hub/`", "`report/`"}]
    layers += [{"`pipeline/stages/`", "`pipeline/plan/`", "`cli.py`", "`__main__.py`"}]
    level = {
        f"medst_trl.{path.strip('`').removesuffix('/').removesuffix('.py').replace('/', '.')}": number
        for number, layer in enumerate(layers)
        for path in layer
    }

    def level_of(module: str) -> int | None:
        names = [name for name in level if f"{module}.".startswith(f"{name}.")]
        return level[max(names, key=len)] if names else None

    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    assert {"medst_trl.data", "medst_trl.evaluation", "medst_trl.cli"} <= level.keys() <= files.keys()
    for module, path in files.items():
        for imported in imported_modules(path, set(files)):
            if level_of(module) is not None and level_of(imported) is not None:
                assert level_of(imported) <= level_of(module), f"{module} imports {imported}"


def messages_of_the_package() -> list[str]:
    """Return the string literals of the package, with `...` for the values in f-strings."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                found.append("".join(parts))
    return found


def test_messages_of_the_troubleshooting_page_exist():
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r'"(.+?)"', row) if "cannot import name" not in text]
    assert len(quoted) > 4
    known = messages_of_the_package()
    for text in quoted:
        parts = [part.strip() for part in re.split(r"\.\.\.|\bN\b", text) if part.strip()]
        assert any(all(part in message for part in parts) for message in known), text


# Registries whose built-in objects are listed in a table of a page.
LISTED_IN = {
    "medst_trl.data.source.SOURCES": "data.md",
    "medst_trl.data.schema.KINDS": "data.md",
    "medst_trl.selftrain.judge.judge.JUDGE_PROMPTS": "judging.md",
    "medst_trl.evaluation.metric.METRICS": "evaluation.md",
    "medst_trl.engines.engine.ENGINES": "models.md",
    "medst_trl.pipeline.stage.STAGES": "recipes.md",
}


def test_tables_list_every_built_in_object():
    code = "".join(
        f"from {registry.rpartition('.')[0]} import {registry.rpartition('.')[2]} as found\nprint(*found)\n"
        for registry in LISTED_IN
    )
    environment = {name: value for name, value in os.environ.items() if name != PLUGINS_VARIABLE}
    command = [sys.executable, "-c", code]  # other tests register objects in this process
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    listed = [(page, names.split()) for page, names in zip(LISTED_IN.values(), done.stdout.splitlines(), strict=True)]
    listed.append(("recipes.md", list(packaged_recipes())))
    for page, names in listed:
        rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
        first_column = re.findall(r"\w+", " ".join(rows))
        assert names and [name for name in names if name not in first_column] == [], page

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stage import MODEL, NO_DATASETS, STAGES, Stage, _in_pipeline_order


BUILT_IN = ["convert", "base", "prepare", "sft", "generate", "judge", "dpo", "merge", "evaluate", "report", "push"]

TOY = '''"""
Counts the pairs of a dataset.

```bash
medst toy --pairs runs/demo/judge/preferences --output_dir runs/demo/toy
```
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from medst_trl.base.errors import UserError
from medst_trl.pipeline.record import StageRecord
from medst_trl.pipeline.stage import STAGES, Count, Input, Output, Stage


@dataclass
class ToyArguments:
    pairs: str = field(metadata={"help": "Directory of preference pairs."})
    output_dir: str = field(metadata={"help": "Directory of the count."})
    limit: int = field(default=3, metadata={"help": "Most pairs to count."})
    overwrite: bool = field(default=False, metadata={"help": "Start again."})


def check(args):
    if args.limit < 1:
        raise UserError(f"limit is {args.limit}. It must be at least 1.")


def main(args):
    check(args)
    record = StageRecord.of(STAGE, args)
    if record.decision != "skip":
        Path(args.output_dir, "count.json").write_text(json.dumps({"limit": args.limit}))
        record.finish()


def plan(counter, args):
    yield "counts", f"{args.limit} of {counter.rows(args.pairs, 'train').describe('pairs')}"


STAGE = STAGES.register(
    Stage(
        name="toy",
        summary="count the pairs of a dataset",
        help=__doc__,
        after=("judge",),
        arguments=lambda: (ToyArguments,),
        check=check,
        main=main,
        plan=plan,
        inputs=(Input("pairs", "preferences"),),
        outputs=(Output("preferences", "preferences", lambda settings, split, counter: Count(settings["limit"])),),
    )
)
'''

RECIPE = """
output_dir: out
judge: {candidates: org/candidates, oracle_error_rate: 0}
toy: {limit: 2}
dpo: {model_name_or_path: org/model, dataset: "{toy}/preferences"}
"""


@pytest.fixture
def toy(plugin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return plugin(TOY)


def medst(*words, plugins):
    command = [sys.executable, "-m", "medst_trl.cli", *words, "--plugins", str(plugins)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_built_in_stages_are_in_pipeline_order():
    assert list(STAGES) == BUILT_IN


def test_a_plugin_stage_is_placed_directly_after_the_stages_it_names(toy):
    assert list(STAGES) == [*BUILT_IN[:6], "toy", *BUILT_IN[6:]]


def test_a_plugin_stage_is_a_command(toy):
    assert "  toy       count the pairs of a dataset\n" in medst("--help", plugins=toy)
    text = medst("toy", "--help", plugins=toy)
    assert "Counts the pairs of a dataset." in text and "Most pairs to count. (default: 3)" in text


def test_a_plugin_stage_is_a_section_of_a_recipe(toy):
    from medst_trl.pipeline.recipe import read_recipe

    steps = {step.label: step.settings for step in read_recipe("mine.yaml").steps()}
    assert list(steps) == ["judge", "toy", "dpo"]
    assert steps["toy"] == {"pairs": "out/judge/preferences", "output_dir": "out/toy", "limit": 2}
    assert steps["dpo"]["dataset"] == ["out/toy/preferences"]


def test_a_plugin_stage_is_validated_and_planned(toy, capsys):
    from medst_trl.cli import main

    assert main(["recipes", "validate", "mine.yaml"]) == 0
    assert "\ntoy\n  reads       judge\n" in capsys.readouterr().out
    assert main(["recipes", "validate", "mine.yaml", "--toy.limit", "0"]) == 2
    assert "section toy: limit is 0" in capsys.readouterr().err
    assert main(["recipes", "validate", "mine.yaml", "--toy.limits", "2"]) == 2
    assert "section toy: unknown key 'limits'. Did you mean 'limit'?" in capsys.readouterr().err
    assert main(["run", "mine.yaml", "--dry_run"]) == 0
    out = capsys.readouterr().out
    rows = "  reads       judge\n  counts      2 of all pairs of judge\n"
    # `dpo` uses the number of pairs that the output of `toy` declares.
    assert f"\ntoy\n{rows}" in out and "data        2 pairs" in out


@pytest.mark.parametrize("program", [["-m", "medst_trl.cli", "run"], ["-m", "medst_trl"]])
def test_every_process_of_a_run_loads_the_plugin(toy, tmp_path, program):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "x").write_text("x")
    command = [sys.executable, *program, "mine.yaml", "--plugins", toy, "--stage", "toy", "--toy.pairs", "pairs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "toy" / "count.json").read_text()) == {"limit": 2}


def test_the_section_of_a_plugin_stage_is_unknown_without_the_plugin(tmp_path):
    from medst_trl.pipeline.recipe import read_recipe

    (tmp_path / "mine.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="'toy' is neither a section nor a setting"):
        read_recipe(tmp_path / "mine.yaml").steps("judge")


def stage(name, *after):
    return Stage(name=name, summary="", arguments=tuple, main=print, after=after)


@pytest.mark.parametrize("name", ["run", "recipes", "help"])
def test_a_stage_with_the_name_of_another_command_is_refused(name):
    with pytest.raises(UserError, match=f"A stage cannot have the name {name!r}"):
        Stage(name, "summary", arguments=tuple, main=print)


def test_unknown_and_circular_predecessors_are_refused():
    with pytest.raises(UserError, match=r"name an unknown stage in `after`: x \(after sfft\)"):
        _in_pipeline_order([stage("sft"), stage("x", "sfft")])
    with pytest.raises(UserError, match=r"have a circular order, .*: x \(after a, y\), y \(after x\)\. Correct"):
        _in_pipeline_order([stage("a"), stage("x", "a", "y"), stage("y", "x")])


def test_a_default_input_is_the_output_of_its_kind_of_the_nearest_earlier_stage():
    def makers(name, key):
        stage, found = STAGES.get(name), []
        earlier = [STAGES.get(other) for other in reversed(list(STAGES)[: list(STAGES).index(name)])]
        while made := stage.input(key).find_default(earlier):
            found.append((made[0].name, made[1].directory))
            earlier = earlier[earlier.index(made[0]) + 1 :]
        return found

    assert makers("sft", "model_name_or_path") == [("base", ""), ("convert", "")]
    assert makers("sft", "dataset") == [("prepare", "instruct")]
    assert makers("generate", "model_name_or_path") == [("sft", ""), ("base", ""), ("convert", "")]
    assert makers("generate", "images") == [("prepare", "images")]
    assert makers("judge", "candidates") == [("generate", "candidates")]
    assert makers("judge", "benchmarks") == makers("evaluate", "benchmark") == [("prepare", "benchmark")]
    assert makers("dpo", "dataset") == [("judge", "preferences")]
    assert makers("merge", "model_name_or_path") == [("dpo", ""), ("sft", "")]
    assert makers("evaluate", "model_name_or_path") == [("dpo", ""), ("sft", ""), ("base", ""), ("convert", "")]
    assert makers("dpo", "base_model_name_or_path") == []


def test_stages_declare_what_they_train_and_publish():
    assert [stage.name for stage in STAGES.values() if stage.trains] == ["sft", "dpo"]
    assert {stage.name: stage.published for stage in STAGES.values() if stage.published} == {
        "prepare": ("instruct", "benchmark", "images"),
        "sft": ("",), "generate": ("candidates",), "judge": ("preferences",), "dpo": ("",), "merge": ("",),
    }  # fmt: skip
    assert STAGES.get("sft").makes(MODEL) and MODEL in NO_DATASETS

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`medst run RECIPE --dry_run` prints the plan, refuses recipes that cannot run, and writes nothing."""

import json
import re

import pytest
from fake_hub import client, serve_hub
from plan_rows import read_plan
from recipe_models import CONFIGS, config_directory

from medst_trl.base.errors import UserError
from medst_trl.cli import main
from medst_trl.cli import run_launched as run_recipe
from medst_trl.pipeline.plan.steps import RecipeCounts
from medst_trl.pipeline.recipe import read_recipe
from medst_trl.pipeline.record import StageRecord
from medst_trl.pipeline.stage import STAGES


RECIPE = """\
output_dir: out
accelerate_config: zero2
sft:
  model_name_or_path: {model}
  dataset: some-org/conversations
  learning_rate: 2.0e-4
  vision_learning_rate: 5.0e-5
  projector_learning_rate: 2.0e-5
  effective_batch_size: 128
  max_records: 1280
  num_train_epochs: 1
generate:
  images: some-org/images
  max_records: 100
  num_questions: 2
judge: {{model: gpt-4o, max_cost: 5, push_to_hub: true, hub_dataset_id: my-org/pairs, hub_private_repo: false}}
dpo:
  effective_batch_size: 256
  push_to_hub: true
  hub_model_id: my-org/aligned
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = CONFIGS["llava-hf/llava-1.5-7b-hf"]()
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 1, 2
    config.save_pretrained(tmp_path / "llava")
    (tmp_path / "my.yaml").write_text(RECIPE.format(model="llava"))
    return "my.yaml"


def plan(capsys, *words, code=0) -> dict[str, dict[str, list[str]]]:
    """Return the printed lines by step and label, see `read_plan`."""
    assert main(["run", *words, "--dry_run"]) in (code, None)
    return read_plan(capsys.readouterr().out)


def test_the_plan_describes_each_step(recipe, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    found = plan(capsys, recipe, "--num_processes", "4")
    sft, judge, dpo = found["sft"], found["judge"], found["dpo"]
    assert list(found) == ["", "sft", "generate", "judge", "dpo"]
    assert sft[""] == ["sft (zero2, 4 GPUs)"] and any("this machine has" in line for line in found[""][""])
    rates = {tuple(line.split()[:1]): line.split()[-1] for line in sft["trains"][:-1]}
    assert rates == {("language",): "0.0002", ("vision",): "5e-05", ("projector",): "2e-05"}
    assert "LoRA r 128" in sft["trains"][0] and f"{128 * (4 * 8192 + 3 * 15104):,}" in sft["trains"][0]
    assert sft["batch"] == ["128 conversations per step: 8 x 4 processes x 4 accumulated"]
    assert sft["reads"] == ["llava, some-org/conversations (Hub)"] and dpo["reads"] == ["sft, judge"]
    assert sft["data"] == ["at most 1,280 conversations"]
    assert sft["steps"][0].startswith("at most 10: 1 epoch of 10")
    assert "GiB on each GPU at 2,048 tokens" in sft["memory"][0] and "weights" in sft["memory"][1]
    assert sft["downloads"] == ["dataset some-org/conversations (size unknown: the Hub cannot be reached)"]
    assert found["generate"]["writes"] == ["at most 200 candidates"]
    assert judge["prompts"][0] == "at most 400 requests to https://api.openai.com/v1, model gpt-4o"
    assert judge["prompts"][1] == "stops at 5 US dollars"
    assert judge["uploads"] == ["my-org/pairs, PUBLIC"] and dpo["uploads"] == ["my-org/aligned, private"]
    assert dpo["model"] == [f"out/sft on {sft['model'][0]}"]
    assert dpo["data"] == ["at most 200 pairs"] and dpo["steps"][0].startswith("at most 3: 3 epochs of 1")
    assert dpo["batch"] == ["256 pairs per step: 8 x 4 processes x 8 accumulated"]
    assert dpo["loss"] == ["sigmoid, beta 0.1"] and "reference" in dpo["memory"][1]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_depends_on_the_config_and_the_number_of_processes(recipe, capsys):
    found = plan(capsys, recipe, "--stage", "sft", "--accelerate_config", "fsdp2", "--num_processes", "8")
    assert found["sft"]["batch"] == ["128 conversations per step: 8 x 8 processes x 2 accumulated"]
    assert "gathered weights" in found["sft"]["memory"][1] and list(found) == ["", "sft"]


def test_the_type_of_the_weights_and_rates_of_zero_are_shown(recipe, capsys):
    found = plan(capsys, recipe, "--stage", "sft", "--sft.fp16", "true", "--sft.vision_learning_rate", "0")["sft"]
    assert found["model"][0].endswith("parameters, float16")
    assert [line.split()[-1] for line in found["trains"] if line.startswith("vision")] == ["0"]


def test_a_row_without_text_is_not_printed(recipe, capsys, monkeypatch):
    monkeypatch.setitem(
        vars(STAGES.get("generate")), "plan", lambda *arguments: [("writes", ""), ("prompts", "nobody")]
    )
    found = plan(capsys, recipe, "--stage", "generate")["generate"]
    assert found["prompts"] == ["nobody"] and "writes" not in found


def test_the_password_of_a_base_url_is_not_shown(recipe, capsys, monkeypatch):
    url = "http://user:hunter2@localhost:8000/v1"
    server = ["--generate.engine", "server", "--generate.base_url", url, "--generate.model_name_or_path", "m"]
    assert main(["run", recipe, *server, "--judge.base_url", url, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "hunter2" not in printed and printed.count("http://<hidden>@localhost:8000/v1") == 2
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert main(["run", recipe, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "hunter2" not in printed and "http://<hidden>@localhost:8000/v1" in printed


def test_the_budget_for_a_server_is_shown(recipe, capsys):
    server = {"engine": "server", "base_url": "http://localhost:8000/v1", "model_name_or_path": "gpt-4o"}
    words = [word for key, value in server.items() for word in (f"--generate.{key}", value)]
    found = plan(capsys, recipe, "--stage", "generate", *words)["generate"]
    assert found["prompts"][:2] == ["http://localhost:8000/v1 (vllm), model gpt-4o", "no max_cost is set"]
    found = plan(capsys, recipe, "--stage", "generate", *words, "--generate.max_cost", "2.5")["generate"]
    assert found["prompts"][1] == "stops at 2.5 US dollars" and "model" not in found


def test_each_round_is_planned(recipe, capsys):
    found = plan(capsys, recipe, "--rounds", "2")
    assert found["round_2/dpo"]["model"][0].startswith("out/round_1/dpo on llava")
    assert found["round_2/dpo"]["data"] == ["at most 200 pairs"]


def test_a_model_that_is_only_on_the_hub_has_no_parameter_counts(recipe, tmp_path, capsys):
    (tmp_path / recipe).write_text(RECIPE.format(model="some-org/some-model"))
    found = plan(capsys, recipe)
    assert found["sft"]["model"] == ["config not available offline: some-org/some-model"]
    assert found["sft"]["batch"] and "trains" not in found["sft"] and "memory" not in found["sft"]
    assert found["sft"]["downloads"][0].startswith("model some-org/some-model")
    assert not any("some-org/some-model" in line for line in found["dpo"].get("downloads", []))


def test_a_model_that_is_on_another_machine_is_reported(recipe, capsys):
    words = [recipe, "--stage", "sft", "--sft.model_name_or_path", "/cluster/models/llava"]
    found = plan(capsys, *words, code=2)
    assert found["sft"]["model"] == ["not on this machine: /cluster/models/llava"] and found["sft"]["batch"]


def test_finished_stages_have_no_rows(recipe, capsys):
    from medst_trl.pipeline.plan.steps import stage_arguments

    (step,) = read_recipe(recipe).steps("sft")
    StageRecord.of(step.stage, *stage_arguments(step), inputs={"dataset": "some-org/conversations"}).finish()
    found = plan(capsys, recipe)
    assert "already finished" in found["sft"][""][0] and len(found["sft"]) == 1
    assert "trains" in plan(capsys, recipe, "--overwrite")["sft"]


def test_stages_whose_settings_have_changed_would_be_refused(recipe, capsys):
    from medst_trl.pipeline.plan.steps import stage_arguments

    (step,) = read_recipe(recipe).steps("sft")
    record = StageRecord.of(step.stage, *stage_arguments(step), inputs={"dataset": "some-org/conversations"})
    words = [recipe, "--stage", "sft"]
    changed = ["--sft.learning_rate", "1e-3", "--sft.max_records", "9", "--sft.logging_steps", "7"]
    for finish in (lambda: None, record.finish):  # interrupted, finished
        finish()
        line = "sft: would be refused: learning_rate: 0.0002 before, 0.001 now; max_records: 1280 before, 9 now"
        assert plan(capsys, *words, *changed)["sft"] == {"": [line]}
        assert "trains" in plan(capsys, *words, *changed, "--overwrite")["sft"]
    # The inputs are compared when the stage runs. A batch of the same size may be divided in another way.
    words += ["--sft.dataset", "some-org/others", "--sft.per_device_train_batch_size", "4"]
    assert "already finished" in plan(capsys, *words)["sft"][""][0]


@pytest.mark.parametrize("content, message", [("{", "is damaged"), ({"stage": "dpo"}, "the output of stage 'dpo'")])
def test_a_directory_that_the_stage_would_refuse_is_named(recipe, tmp_path, capsys, content, message):
    record = {"stage": "sft", "status": "complete", "versions": {}, "inputs": {}, "settings": {}}
    (tmp_path / "out" / "sft").mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(record | content)
    (tmp_path / "out" / "sft" / "stage.json").write_text(text)
    (line,) = plan(capsys, recipe)["sft"][""]
    assert line.startswith("sft: would be refused: ") and message in line


def test_the_problems_of_all_steps_follow_the_plan(recipe, capsys):
    words = ["--sft.dataset", "data/none.json", "--judge.benchmarks", "/none", "--dpo.beta", "-1"]
    assert main(["run", recipe, *words, "--dry_run"]) == 2
    printed = capsys.readouterr()
    assert "trains" in read_plan(printed.out)["sft"]
    assert [line.partition("section ")[2].partition(",")[0] for line in printed.err.splitlines()] == [
        "dpo: beta is -1.0. It must be above 0.",
        "sft: dataset: data/none.json does not exist",
        "judge: benchmarks: /none does not exist",
    ]


@pytest.mark.parametrize("name", ["demo", "vqa_rad_tiny", pytest.param("phantom_study", marks=pytest.mark.slow)])
def test_packaged_recipes_that_start_from_a_tiny_base_have_a_complete_plan(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The data of vqa_rad_tiny is missing here.
    found = plan(capsys, name, code=2 if name == "vqa_rad_tiny" else 0)
    trained = [rows for step, rows in found.items() if step.partition("/")[0] in ("sft", "dpo")]
    assert trained and all("MiB" in rows["memory"][1] for rows in trained)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sft.learning_rat", "1"], "section sft: unknown key 'learning_rat'"),
        (["--sft.learning_rate", "fast"], "'fast' is not a valid float"),
        (["--num_processes", "3"], "section sft: effective_batch_size 128 is not a multiple of"),
        (["--sfft.max_length", "2"], "has no section 'sfft'"),
        (["--sft.lora_r", "-4"], "section sft: lora_r is -4"),
        (["--generate.num_answers", "1"], "section generate: num_answers is 1"),
        (["--accelerate_config", "single_gpu", "--num_processes", "2"], "is for one process, not for 2"),
        (["--accelerate_config", "zero3", "--sft.load_in_4bit", "true"], "load_in_4bit does not work with"),
        (["--dpo.hub_model_id", "no such name"], "hub_model_id"),
        (["--stage", "merge"], "no section 'merge'"),
    ],
)
def test_recipes_that_cannot_run_are_refused(recipe, words, message, capsys):
    assert main(["run", recipe, "--dry_run", *words]) == 2
    assert message in capsys.readouterr().err


def test_missing_settings_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("sft: {learning_rate: 1.0e-4}\n")
    assert main(["run", "my.yaml", "--dry_run"]) == 2
    assert "model_name_or_path and dataset must be set" in capsys.readouterr().err


def test_dry_run_under_a_launcher_is_refused(recipe):
    with pytest.raises(UserError, match="medst run my.yaml --dry_run"):
        run_recipe([recipe, "--dry_run"])


def test_the_dry_run_of_the_judge_is_passed_to_the_stage(recipe, monkeypatch):
    steps = {}
    monkeypatch.setattr(
        "medst_trl.pipeline.launch.run", lambda command, environment: steps.update(command=command) or 0
    )
    assert main(["run", recipe, "--stage", "judge", "--judge.dry_run", "true"]) == 0
    assert "--judge.dry_run true" in " ".join(steps["command"])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("oracle_error_rate: 0.1", "none: the phantoms' oracle"),
        ("model: m, write_batch: requests.jsonl", "none: they are written to requests.jsonl"),
        ("model: m, base_url: 'http://localhost:8000/v1', order: single", "at most 200 requests to http://localhost"),
    ],
)
def test_the_plan_shows_the_number_of_judge_requests(recipe, tmp_path, settings, line):
    from medst_trl.pipeline.plan.steps import stage_arguments

    text = re.sub(r"judge: .*", f"judge: {{{settings}}}", (tmp_path / recipe).read_text())
    (tmp_path / recipe).write_text(text)
    steps = read_recipe(recipe).steps()
    step = next(step for step in steps if step.label == "judge")
    args, *servers, _ = stage_arguments(step)
    assert next(iter(step.stage.plan(RecipeCounts(steps), args, *servers)))[1].startswith(line)


@pytest.mark.slow
def test_sizes_of_downloads_come_from_the_hub(recipe, tmp_path):
    files = {path.name: path.read_bytes() for path in config_directory("llava-hf/llava-1.5-7b-hf", tmp_path).iterdir()}
    with serve_hub() as hub:
        hub.add("model", "some-org/llava", files | {"model.safetensors": b"0" * 2_000_000, "a.bin": b"0"})
        hub.add("dataset", "some-org/conversations", {"data/train.parquet": b"0" * 3_000_000})
        (tmp_path / recipe).write_text(RECIPE.format(model="some-org/llava"))
        words = ["-m", "medst_trl.cli", "run", recipe, "--dry_run", "--stage", "sft"]
        done = client(hub.url, tmp_path / "home", *words, cwd=tmp_path)
    sft = read_plan(done.stdout)["sft"]
    assert sft["downloads"] == ["model some-org/llava (2.0 MB)", "dataset some-org/conversations (3.0 MB)"]
    assert sft["model"] == ["some-org/llava, 7.06B parameters, bfloat16"]
    assert not [call for call in hub.calls if call.startswith("GET") and "safetensors" in call]

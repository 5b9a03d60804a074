# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""`medst recipes validate` accepts valid recipes and reports errors with their location."""

import json
import shutil
import socket
import warnings
from unittest.mock import Mock

import pytest
import torch  # noqa: F401 (`validate` runs in this process only if torch is imported)
from datasets import Dataset
from peft import LoraConfig
from plan_rows import read_plan
from recipe_data import write_source
from tiny_run import SMALL

from medst_trl.cli import main
from medst_trl.data.schema import features_of
from medst_trl.demo.tiny_model import tiny_llava


RECIPE = """\
output_dir: out
prepare: {source: llava, data_path: talks.json}
sft:
  model_name_or_path: org/model
  accelerate_config: zero2
  effective_batch_size: 64
  per_device_train_batch_size: 8
generate: {images: "{prepare}/instruct"}
judge: {model: gpt-4o, benchmarks: []}
dpo: {effective_batch_size: 32, per_device_train_batch_size: 4, loss_type: [sigmoid, sft]}
evaluate: {benchmark: org/benchmark}
push: {source: "{judge}/preferences", repo_id: me/pairs}
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Return a function that validates a recipe next to its data and returns the exit code and the output."""
    monkeypatch.chdir(tmp_path)
    write_source({"source": "llava", "data_path": "talks.json"})

    def run(*words, change=("", "")):
        assert change[0] in RECIPE
        (tmp_path / "mine.yaml").write_text(RECIPE.replace(*change, 1))
        code = main(["recipes", "validate", "mine.yaml", *words])
        printed = capsys.readouterr()
        return code, printed.out if code == 0 else printed.err

    return run


def dataset(directory, kind, split="train", drop=None):
    directory.mkdir(exist_ok=True, parents=True)
    features = features_of(kind)
    rows = Dataset.from_dict({name: [] for name in features}, features=features)
    rows = rows.remove_columns(drop) if drop else rows
    rows.to_parquet(directory / f"{split}-00000-of-00001.parquet")


def test_a_valid_recipe_has_a_line_for_each_step(check):
    code, out = check()
    found = read_plan(out)
    assert code == 0 and out.endswith("mine.yaml is valid.\n")
    assert list(found) == ["", "prepare", "sft", "generate", "judge", "dpo", "evaluate", "push"]
    assert found["sft"][""] == ["sft (zero2, 1 GPU)"]
    assert {label for rows in found.values() for label in rows} == {"", "reads", "batch", "data", "steps", "loss"}
    assert {step: rows["reads"] for step, rows in found.items() if step} == {
        "prepare": ["talks.json"],
        "sft": ["org/model (Hub), prepare"],
        "generate": ["sft, prepare"],
        "judge": ["generate"],
        "dpo": ["sft, judge"],
        "evaluate": ["dpo, org/benchmark (Hub)"],
        "push": ["judge"],
    }


def test_the_batch_is_shown_for_the_given_number_of_processes(check):
    for number, batch in ((1, "8 x 1 process x 8 accumulated"), (4, "8 x 4 processes x 2 accumulated")):
        found = read_plan(check("--num_processes", str(number))[1])
        assert found["sft"]["batch"] == [f"64 conversations per step: {batch}"]
    code, out = check("--num_processes", "3")
    assert code == 2 and "section sft: effective_batch_size 64 is not a multiple of 24" in out
    assert "section dpo: effective_batch_size 32" in out  # every problem is reported
    code, out = check("--sft.per_device_train_batch_size=7")
    assert code == 2 and "effective_batch_size 64 is not a multiple of 7" in out


def test_a_config_for_one_process_allows_only_one_process(check):
    assert "sft (single_gpu, 1 GPU)\n" in check("--accelerate_config", "single_gpu")[1]
    code, out = check("--accelerate_config", "single_gpu", "--num_processes", "2")
    assert code == 2 and "single_gpu is for one process, not for 2" in out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "effective_batch_size: 64",
            "effective_batch: 64",
            "unknown key 'effective_batch'. Did you mean 'effective_b",
        ),
        ("loss_type: [sigmoid, sft]", "beta: much", "section dpo: beta: 'much' is not a valid float"),
        ("per_device_train_batch_size: 8", "max_length: -5", "section sft: max_length is -5"),
        ("source: llava, ", "", "section prepare: source must be set"),
        ("model: gpt-4o", "model: null", "No judge model is set"),
        ("gpt-4o,", "mine, base_url: http://localhost/v1, max_cost: 5,", "section judge: max_cost needs prices"),
        ("gpt-4o,", "gpt-4o, price_per_million_input_tokens: -1,", "price_per_million_input_tokens is -1"),
        (
            '{prepare}/instruct"',
            '{prepare}/instruct", engine: server, base_url: http://localhost/v1, max_cost: 5',
            "section generate: max_cost needs prices",
        ),
        (
            "zero2",
            "zero22",
            "zero22: no such file or packaged accelerate_config. Did you mean 'zero2'?",
        ),
        ("talks.json", "talk.json", "section prepare: data_path: talk.json does not exist"),
        ('generate: {images: "{prepare}/instruct"}\n', "", "section judge: candidates must be set"),
        (
            "gpt-4o,",
            "x, candidates: out/g/c,",
            "candidates: out/g/c does not exist, and no section before judge makes",
        ),
        ("org/model", "out/dpo", "section sft: model_name_or_path: out/dpo is made by dpo, which runs later"),
        ("org/model", '"{prepare}"', "section sft: model_name_or_path: out/prepare is not a model"),
        ("org/model", "models/not/there", "section sft: model_name_or_path: models/not/there does not exist"),
        ("{prepare}/instruct", "{prepare}/instructs", "prepare makes instruct, benchmark, images, and this reads"),
        (
            "loss_type: [sigmoid, sft]",
            'dataset: "{generate}/candidates"',
            "dataset: out/generate/candidates is not pre",
        ),
        ("org/benchmark", "org/benchmark, controls: [blurred]", "Unknown control 'blurred'"),
        ("{judge}/preferences", "{judge}x/y", "section push: source: out/judgex/y does not exist"),
    ],
)
def test_errors_are_reported_with_their_location(check, old, new, message):
    code, out = check(change=(old, new))
    assert code == 2 and message in out and "Traceback" not in out


def test_all_mistakes_in_settings_are_reported_in_one_go(check):
    code, out = check("--judge.base_url", "localhost:8000/v1", "--sft.max_length", "-5", "--dpo.beta", "much")
    assert code == 2 and "Traceback" not in out
    lines = out.splitlines()
    assert "section sft: max_length is -5" in lines[0]
    assert lines[1].endswith(
        "section judge: base_url must start with http:// or https://, for example http://localhost:8000/v1."
    )
    assert "section dpo: beta: 'much' is not a valid float" in lines[2] and len(lines) == 3
    code, out = check("--generate.top_p", "2", "--generate.temperature", "0")
    assert [line.partition("section ")[2] for line in out.splitlines()] == [
        "generate: temperature is 0.0. It must be at least 0.01.",
        "generate: top_p is 2.0. It must be at least 0.01 and at most 1.",
    ]
    code, out = check("--sft.lr_scheduler_type", "cosine_with_min_lr")
    assert code == 2 and "section sft: lr_scheduler_type cosine_with_min_lr" in out
    server = ["--generate.engine", "server", "--generate.base_url", "localhost:8000/v1"]
    assert "section generate: base_url must start with http:// or https://" in check(*server)[1]


def test_settings_of_a_source_or_engine_that_is_not_chosen_are_named(check):
    code, out = check("--prepare.num_phantoms", "4", "--generate.timeout", "9", "--evaluate.batch_size", "2")
    found = read_plan(out)
    assert code == 0 and "note" not in found["evaluate"]
    assert found["prepare"]["note"] == [
        "num_phantoms is ignored: it is a setting of the source phantoms, and source is llava"
    ]
    assert found["generate"]["note"] == [
        "timeout is ignored: it is a setting of the engine server, and engine is transformers"
    ]
    assert "ignored" not in check("--concurrency", "4")[1]  # shared: for the judge


def test_columns_and_splits_of_datasets_on_disk_are_checked(check, tmp_path):
    name = ("org/benchmark", "theirs/benchmark")
    (tmp_path / "theirs").mkdir()
    code, out = check(change=name)  # a path and not a Hub id, because `theirs` is a directory
    assert code == 2 and "section evaluate: benchmark: theirs/benchmark does not exist" in out
    dataset(tmp_path / "theirs/benchmark", "benchmark", drop="questions", split="test")
    code, out = check(change=name)
    assert code == 2 and "section evaluate: benchmark: theirs/benchmark: The dataset lacks the column questions" in out
    dataset(tmp_path / "theirs/benchmark", "benchmark", split="test")
    assert check(change=name)[0] == 0
    code, out = check("--evaluate.split=train", change=name)
    assert code == 2 and "has no split 'train'" in out
    dataset(tmp_path / "mixed", "preferences")
    code, out = check("--sft.dataset", "mixed", "out/prepare/instruct")
    assert code == 2 and "section sft: dataset: mixed: The dataset lacks the column messages of instruct data" in out


def test_a_model_on_disk_needs_a_configuration(check, tmp_path):
    name = ("org/model", "here/model")
    (tmp_path / "here/model").mkdir(parents=True)
    code, out = check(change=name)
    assert code == 2 and "section sft: model_name_or_path: here/model contains no model" in out
    (tmp_path / "here/model/config.json").write_text("{}")
    code, out = check(change=name)
    assert code == 0 and "reads       here/model, prepare\n" in out


def test_the_processor_of_a_model_on_disk_is_checked(check, tmp_path, caplog):
    """As the stage would, without weights, also in a plan and for an adapter's base."""
    name, base = ("org/model", "here/model"), tmp_path / "here/model"
    for part in tiny_llava(**SMALL):
        part.save_pretrained(base)
    (base / "model.safetensors").unlink()
    settings = json.loads((base / "processor_config.json").read_text())
    (base / "processor_config.json").write_text(json.dumps(settings | {"patch_size": None}))
    assert check(change=name)[0] == 0 and "does not match its model. Using patch_size 8" in caplog.text
    images = settings["image_processor"] | {"crop_size": {"height": 32, "width": 32}}
    (base / "processor_config.json").write_text(json.dumps(settings | {"image_processor": images}))
    problem = "section sft: model_name_or_path: The model cannot read an image of the processor of"
    code, out = check(change=name)
    assert code == 2 and problem in out
    LoraConfig(base_model_name_or_path=str(base), target_modules=["q_proj"]).save_pretrained(tmp_path / "here/adapter")
    for file in base.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "here/adapter")
    code, out = check(change=("org/model", "here/adapter"))
    assert code == 2 and problem in out
    assert main(["run", "mine.yaml", "--dry_run"]) == 2


def test_secrets_and_a_second_recipe_are_refused(check):
    assert "secrets do not belong" in check("--hub_token=x")[1]
    code, out = check("other.yaml")
    assert code == 2 and "takes one recipe, not 2" in out
    assert main(["recipes", "validate", "no_such_recipe"]) == 2


def test_validation_needs_neither_the_hub_nor_weights(check, monkeypatch):
    """All network calls fail, and the model is not on this machine."""

    def fail(*args, **kwargs):
        raise AssertionError("network")

    for owner, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_answers = Mock(side_effect=AssertionError("the Hub was contacted"))
    monkeypatch.setattr("medst_trl.pipeline.plan.plan.hub_answers", hub_answers)
    monkeypatch.setattr("medst_trl.pipeline.plan.memory.hub_answers", hub_answers)
    with warnings.catch_warnings(action="error"):
        code, out = check()
    assert code == 0 and "mine.yaml is valid." in out


def test_one_stage_can_be_validated(check):
    code, out = check("--stage", "sft")
    found = read_plan(out)
    assert code == 0 and list(found) == ["", "sft"]
    assert found["sft"]["reads"] == ["org/model (Hub), prepare (not on disk yet: run it first)"]
    assert check("--stage", "sft", change=("gpt-4o", "null"))[0] == 0
    assert "no section 'merge'" in check("--stage", "merge")[1]


def test_an_error_in_a_shared_setting_is_reported_once(check):
    code, out = check("--accelerate_config", "zero22")
    assert code == 2 and out.count("zero22") == 1


@pytest.mark.parametrize("words", [["--sft.load_in_4bit=true"], ["--dpo.precompute_ref_log_probs=true"]])
def test_settings_that_do_not_work_with_sharded_weights_are_refused(check, words):
    code, out = check("--accelerate_config", "zero3", *words)
    assert code == 2 and "does not work with DeepSpeed ZeRO-3" in out


def test_missing_inputs_are_reported_beside_invalid_settings(check):
    code, out = check("--sft.max_length", "-5", "--sft.model_name_or_path", "./m", "--evaluate.benchmark", "./b")
    assert code == 2
    assert [line.partition("section ")[2] for line in out.splitlines()] == [
        "sft: max_length is -5. It must be at least 1.",
        "sft: model_name_or_path: ./m does not exist, and no section before sft makes it.",
        "evaluate: benchmark: ./b does not exist, and no section before evaluate makes it.",
    ]


def test_missing_files_of_a_source_are_reported(check):
    code, out = check("--prepare.image_folder", "./none")
    assert code == 2 and "section prepare: image_folder: ./none does not exist" in out

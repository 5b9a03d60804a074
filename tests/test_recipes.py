# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Packaged recipes: their settings, inputs, trained parameters and batch sizes, and complete runs on a few records. New
recipes are found automatically.
"""

import json
import os
import re
from pathlib import Path

import pytest
import tiny_run
import torch
from judge_server import JudgeServer
from plan_rows import read_plan
from recipe_data import write_source
from recipe_models import CONFIGS, EXPECTED, PARAMETERS, config_directory, trainable_parameters
from safetensors.torch import load_file

from medst_trl.base.errors import UserError
from medst_trl.cli import main
from medst_trl.cli import run_launched as run_recipe
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.pipeline.launch import Batch
from medst_trl.pipeline.plan.memory import meta_model
from medst_trl.pipeline.plan.plan import print_plan
from medst_trl.pipeline.plan.steps import stage_arguments
from medst_trl.pipeline.recipe import read_recipe
from medst_trl.pipeline.recipe_files import packaged_recipes, summary


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
# Recipes that start from a model on the Hub.
LARGE = [path for path in RECIPES if "base" not in read_recipe(path).sections]
TRAIN = ("sft", "dpo")

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
each_large_recipe = pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)


def recipe(name):
    return RECIPES[0].with_name(f"{name}.yaml")


def settings(name):
    return {step.label: step.settings for step in read_recipe(recipe(name)).steps()}


@pytest.fixture
def with_data(tmp_path, monkeypatch):
    """Return a function that writes the data of a recipe to the current directory, where the recipe expects it."""
    monkeypatch.chdir(tmp_path)

    def write(path):
        for step in read_recipe(path).steps():
            if step.stage.name == "prepare" and step.settings["source"] != "phantoms":
                write_source(step.settings)
        return path

    return write


@pytest.fixture(scope="module")
def real_dimensions(tmp_path_factory):
    """Return a function that saves the configuration of a model, given its name, and returns the directory."""
    directory = tmp_path_factory.mktemp("configs")
    return lambda name: str(config_directory(name, directory))


# Comments, inputs and settings


@each_recipe
def test_the_header_describes_the_recipe_and_how_to_run_it(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env -S python -m medst_trl\n#") and os.access(path, os.X_OK)
    assert summary(path) and path.samefile(packaged_recipes()[path.stem])
    for heading in ("# What it is", "# What it needs", "# Run it", "# Change it"):
        assert heading in text
    assert f"medst run recipes/{path.name}" in text
    assert max(map(len, text.splitlines())) < 122


@each_recipe
def test_a_recipe_is_valid_with_its_data(path, with_data, capsys):
    path = with_data(path)
    for number in ("1",) if "single_gpu" in path.read_text() else ("1", "4", "8"):
        print_plan(path, {"": {"num_processes": number}}, with_models=False)
        assert [*read_plan(capsys.readouterr().out)][1:] == [step.label for step in read_recipe(path).steps()]


@each_large_recipe
def test_the_missing_files_of_a_recipe_are_reported(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        print_plan(path, {}, with_models=False)
    for step in read_recipe(path).steps("prepare"):
        assert f"section {step.label}: data_path: {step.settings['data_path']} does not exist" in str(error.value)


@each_recipe
def test_each_section_writes_to_its_own_directory(path):
    directories = [step.settings["output_dir"] for step in read_recipe(path).steps()]
    assert len(set(directories)) == len(directories)


def test_the_demo_runs_the_whole_loop():
    steps = settings("demo")
    loop = ["base", "prepare", "sft", "generate", "judge", "dpo", "evaluate/stage_1", "evaluate/aligned", "report"]
    assert list(steps) == loop
    assert steps["dpo"]["model_name_or_path"] == steps["evaluate/stage_1"]["model_name_or_path"] == "runs/demo/sft"
    assert steps["evaluate/aligned"]["model_name_or_path"] == "runs/demo/dpo"
    assert steps["prepare"]["num_phantoms"] == 0.09 * 2500


@pytest.mark.parametrize("name", ["stllava_med_7b", "stllava_med_7b_finetuned", "stllava_med_7b_24gb"])
def test_the_settings_match_the_paper(name):
    steps = settings(name)
    rates = ("learning_rate", "vision_learning_rate", "projector_learning_rate")
    ranks = ("lora_r", "lora_alpha", "vision_lora_r", "vision_lora_alpha")
    sft, dpo, generate, judge = (steps[stage] for stage in ("sft", "dpo", "generate", "judge"))
    assert [sft[key] for key in rates] == [2e-4, 5e-5, 5e-5] and [dpo[key] for key in rates] == [5e-6, 2e-5, 2e-5]
    assert [sft[key] for key in ranks] == [128, 256, 32, 64]
    assert (sft["effective_batch_size"], dpo["effective_batch_size"]) == (128, 256)
    assert (sft["sq_ratio"], sft["sq_first_turn"], generate["describe_first"]) == (1.0, False, True)
    assert (dpo["loss_type"], dpo["beta"]) == (["sigmoid"], 0.1)
    assert [generate[key] for key in ("temperature", "top_k", "top_p", "max_records")] == [1.2, 100, 0.95, 10000]
    assert [judge[key] for key in ("model", "prompt_version", "order")] == ["gpt-4o", "paper", "single"]
    for stage in (sft, dpo):
        schedule = ("num_train_epochs", "lr_scheduler_type", "warmup_steps", "weight_decay", "bf16")
        assert [stage[key] for key in schedule] == [1, "cosine", 0.03, 0, True]


def test_the_fine_tuned_recipe_differs_only_in_its_data():
    one, other = settings("stllava_med_7b"), settings("stllava_med_7b_finetuned")
    both = [json.dumps(steps).replace("stllava_med_7b_finetuned", "stllava_med_7b") for steps in (one, other)]
    one, other = map(json.loads, both)
    names = ("med_im", "vqa_rad", "slake", "pathvqa")
    assert other["sft"].pop("dataset") == [f"runs/stllava_med_7b/prepare/{name}/instruct" for name in names]
    assert one["sft"].pop("dataset") == ["runs/stllava_med_7b/prepare/med_im/instruct"]
    assert one == other


def test_the_commented_convert_section_works(with_data, tmp_path, capsys):
    """With the section uncommented, stage 1 starts from the converted checkpoint."""
    text = with_data(recipe("stllava_med_7b")).read_text()
    text, count = re.subn(r"^# (convert:)\n#(   source: .*)$", r"\1\n\2", text, flags=re.MULTILINE)
    assert count == 1
    (tmp_path / "mine.yaml").write_text(re.sub(r"^  model_name_or_path: llava-hf.*\n", "", text, flags=re.MULTILINE))
    mine = read_recipe(tmp_path / "mine.yaml")
    steps = {step.label: step.settings for step in mine.steps()}
    assert next(iter(steps)) == "convert" and steps["convert"]["source"] == "ZachSun/sqllava-7B"
    assert steps["sft"]["model_name_or_path"] == steps["convert"]["output_dir"]
    print_plan(tmp_path / "mine.yaml", {}, with_models=False)
    assert read_plan(capsys.readouterr().out)["convert"]["reads"] == ["ZachSun/sqllava-7B (Hub)"]


# Trained parameters and batches


@pytest.mark.parametrize("name", CONFIGS)
def test_the_dimensions_match_the_published_models(name, real_dimensions):
    assert meta_model(real_dimensions(name)).num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize(
    "path",
    # The fine-tuned recipe differs only in its data, see above.
    [pytest.param(path, marks=[pytest.mark.slow] * path.stem.endswith("_finetuned")) for path in LARGE],
    ids=lambda path: path.stem,
)
def test_trained_parameters_equal_those_computed_by_hand(path, real_dimensions):
    steps = read_recipe(path).steps()
    names = {step.label: step.settings.get("model_name_or_path") for step in steps if step.stage.name == "sft"}
    options = {label: {"model_name_or_path": real_dimensions(name)} for label, name in names.items()}
    steps = read_recipe(path, options).steps()
    for step in steps:
        if step.stage.name in TRAIN:
            (name,) = set(names.values())
            first = next(step for step in steps if step.stage.name == "sft").settings
            expected = EXPECTED[name]
            if (first["lora_r"], first["vision_lora_r"]) == (0, 0):
                expected = {"projector": expected["projector"]}
            else:
                assert (first["lora_r"], first["vision_lora_r"]) == (128, 32)
            assert trainable_parameters(step, steps) == expected, step.label


@each_large_recipe
@pytest.mark.parametrize("processes", [1, 4, 8])
def test_the_batch_size_does_not_depend_on_the_number_of_gpus(path, processes):
    for step in read_recipe(path).steps():
        if step.stage.name in TRAIN:
            processes = 1 if step.accelerate_config == "single_gpu" else processes
            batch = Batch.of(*stage_arguments(step), processes)
            assert batch.effective == batch.per_device * batch.accumulation * processes
            assert batch.effective == step.settings["effective_batch_size"] == (128 if step.label == "sft" else 256)


# Runs on a few records


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Save a model with 60k parameters, prepare the environment of recipes, and return the directory of the model."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    for part in tiny_llava(**tiny_run.SMALL):
        part.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def tiny_options(path, model, judge, **sft):
    """Return options with which a recipe for GPUs finishes within seconds on a CPU. They do not change its method."""
    options = []
    for step in read_recipe(path).steps():
        given, stage = step.settings, step.stage.name
        if step.stage.distributed:
            options += [(step.label, "accelerate_config", "cpu")]
        small = {}
        if stage in TRAIN:
            small = {"bf16": "false", "dtype": "float32", "per_device_train_batch_size": "4", "logging_steps": "5"}
            small |= {"effective_batch_size": "4", "max_length": "200", "disable_tqdm": "true"}
            small |= {"load_in_4bit": "false"} if given.get("load_in_4bit") else {}
            small |= {"max_steps": "2"}
        if stage == "sft":
            small |= {"model_name_or_path": model, "max_steps": "60", "learning_rate": "0.005"}
            small |= {"vision_learning_rate": "0.005", "projector_learning_rate": "0.005", "lora_dropout": "0"}
            small |= {key: "8" for key in ("lora_r", "vision_lora_r") if given[key]}
            small |= sft
        if stage == "generate":
            small = {"dtype": "float32", "max_records": "8", "max_new_tokens": "24", "max_question_tokens": "24"}
            small |= {"english_questions": "false", "min_question_words": "1"}
        if stage == "judge":
            small = {"base_url": judge, "model": "gpt-4o"}
        if stage == "evaluate":
            small = {"dtype": "float32", "max_new_tokens": "6", "bootstrap_samples": "10", "batch_size": "16"}
        options += [(step.label, key, value) for key, value in small.items()]
    return [f"--{label}.{key}={value}" for label, key, value in options]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == "stllava_med_7b" else pytest.mark.slow) for path in LARGE],
    ids=lambda path: path.stem,
)
def test_a_recipe_runs_on_a_few_records(path, with_data, tiny, capsys):
    with_data(path)
    with JudgeServer() as judge:
        words = [str(path), *tiny_options(path, tiny, judge.base_url)]
        assert main(["recipes", "validate", *words]) == 0
        run_recipe(words)
        num_requests = len(judge.bodies)
        capsys.readouterr()
        run_recipe(words)  # the second time, every stage is finished
    steps = {step.label: step for step in read_recipe(path).steps()}
    records = {label: record_of(step) for label, step in steps.items() if step.stage.name not in ("report", "push")}
    assert all(record["status"] == "complete" for record in records.values())
    assert capsys.readouterr().out.count("is finished and unchanged") == len(records)
    if "dpo" in steps:
        orders = 2 if steps["judge"].settings["order"] == "both" else 1
        assert 0 < records["dpo"]["counts"]["pairs"] <= num_requests / orders == len(judge.bodies) / orders
        for name in ("vqa_rad", "slake", "pathvqa"):  # 2 test images with 2 questions each
            for label in ("evaluate/stage_1", "evaluate/aligned"):
                predictions = Path(steps[label].settings["output_dir"], name, "predictions.jsonl").read_text()
                assert len(predictions.splitlines()) == 4, (label, name)


def test_stage_1_starts_from_an_aligned_projector(with_data, tiny):
    """Alignment trains only the projector and is merged before stage 1, as the headers of both recipes say."""
    alignment, paper = with_data(recipe("llava_med_alignment")), with_data(recipe("stllava_med_7b"))
    short = {"max_steps": "3"}
    run_recipe([str(alignment), *tiny_options(alignment, tiny, "", **short)])
    trained = load_file("runs/llava_med_alignment/sft/adapter_model.safetensors")
    assert trained and all("multi_modal_projector" in name for name in trained)
    base, merged = (
        load_file(f"{directory}/model.safetensors") for directory in (tiny, "runs/llava_med_alignment/merge")
    )
    changed = {name for name in base if not torch.equal(base[name], merged[name][: len(base[name])])}
    assert len(changed) == len(trained) and all("multi_modal_projector" in name for name in changed)

    words = [str(paper), *tiny_options(paper, "runs/llava_med_alignment/merge", "", **short)]
    for stage in ("prepare/med_im", "sft"):
        run_recipe([*words, "--stage", stage])
    names = load_file("runs/stllava_med_7b/sft/adapter_model.safetensors")
    for kind in ("language_model", "vision_tower", "multi_modal_projector", "trainable_tokens"):
        assert any(kind in name for name in names), kind


def record_of(step):
    return json.loads(Path(step.settings["output_dir"], "stage.json").read_text())

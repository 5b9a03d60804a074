# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Stages on several processes, as `medst` starts them: two ranks give the same results as one, with DDP and ZeRO-2.

Rows are read in order, so that one of the two ranks has no image in its batches.
"""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import tiny_dpo
import tiny_run
import torch
import yaml
from commands import without_launcher
from datasets import Dataset
from safetensors.torch import load_file

from medst_trl.base.registry import PLUGINS_VARIABLE
from medst_trl.cli import run_launched as run_recipe
from medst_trl.data.schema import instruct_features, preference_features
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.pipeline.launch import launch_command


# Plain gradient descent, because Adam would turn a rounding error in a zero gradient into a full step. The learning
# rates differ widely and decrease, so that weights differ if a parameter group is lost.
TRAINING = {
    "max_steps": 3, "optim": "sgd", "lr_scheduler_type": "linear", "learning_rate": 2e-2, "vision_learning_rate": 5e-1,
    "projector_learning_rate": 2e-3, "train_sampling_strategy": "sequential", "logging_steps": 1, "report_to": "none",
    "disable_tqdm": True, "effective_batch_size": 8,
}  # fmt: skip
GENERATION = {
    "num_questions": 2, "max_new_tokens": 24, "max_question_tokens": 24, "min_question_words": 1,
    "english_questions": False, "batch_size": 4,
}  # fmt: skip
CONFIGS = [
    pytest.param("cpu", id="ddp"),
    pytest.param("zero2", marks=pytest.mark.slow, id="zero2"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Directory of base models, an adapter, and data in which every other row has no image."""
    directory = tmp_path_factory.mktemp("inputs")
    tiny_dpo.save_adapter(directory, "sft")
    unprepared, processor = tiny_llava(**tiny_run.SMALL)  # without a row for `<vusr>`
    unprepared.save_pretrained(directory / "without_vusr")
    processor.save_pretrained(directory / "without_vusr")
    questioner, processor = tiny_run.small_policy()
    # More terminators, so that texts have different lengths.
    questioner.generation_config.eos_token_id = [*questioner.generation_config.eos_token_id, *range(5, 400, 8)]
    questioner.save_pretrained(directory / "questioner")
    processor.save_pretrained(directory / "questioner")
    rows = [
        {**tiny_run.conversation(n, with_image=n % 2 == 0), "image_ids": [str(n)] * (n % 2 == 0)} for n in range(24)
    ]
    for message in (message for row in rows for message in row["messages"]):
        message["vusr"] = False
    write_split(directory / "instruct", rows, instruct_features())
    rows = [tiny_run.conversation(n) | {"image_ids": [str(n)], "messages": []} for n in range(9)]
    write_split(directory / "images", rows, instruct_features())
    rows = [tiny_dpo.pair(n) for n in range(24)]
    for row in rows[1::2]:
        row["images"], row["prompt"][0]["content"] = [], row["prompt"][0]["content"][1:]
    judged = {"image_ids": [], "score_chosen": 9.0, "score_rejected": 2.0, "judge": "{}"}
    write_split(directory / "preferences", [row | judged for row in rows], preference_features())
    return directory


def write_split(directory, rows, features):
    directory.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(directory / "train-00000-of-00001.parquet")


def medst(stage, output_dir, config=None, **options):
    """Run `medst STAGE`, on two ranks if an accelerate config is given, and return its output."""
    if config in ("zero2", "zero3"):
        pytest.importorskip("deepspeed")
    launcher = {"accelerate_config": config, "num_processes": 2} if config else {}
    arguments = [f"--{key}={value}" for key, value in (options | launcher | {"output_dir": output_dir}).items()]
    return run_launch([sys.executable, "-m", "medst_trl.cli", stage, *arguments])


def run_launch(command, **environment):
    """Run a launch and return what it prints. Fails with the output of all ranks, also if it does not end in time."""
    environment = {
        **without_launcher(os.environ), **environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as launch:
        try:
            out, err = launch.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            launcher = psutil.Process(launch.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                process.send_signal(signal.SIGABRT)  # with PYTHONFAULTHANDLER, each prints where it is
            out, err = launch.communicate(timeout=30)
            pytest.fail(f"The launch did not end in 280 s.\n{out}\n{err}")
    assert launch.returncode == 0, err
    return out


def assert_same_training(one, two, tolerance=2e-5):
    logs = [
        [entry for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
        for run in (one, two)
    ]
    assert len(logs[0]) == len(logs[1]) == 3 and logs[0][-1]["loss"] < logs[0][0]["loss"]
    for ours, theirs in zip(*logs):
        # TRL averages some metrics over ranks with different numbers of tokens; others depend on rounding or time
        averaged = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
        names = ours.keys() - {*averaged, "data_wait", "rewards/accuracies"}
        assert {n: ours[n] for n in names} == pytest.approx(
            {n: theirs[n] for n in names}, abs=tolerance, rel=tolerance
        )
    rates = [[log[f"learning_rate{part}"] for log in logs[1]] for part in ("", "_vision", "_projector")]
    assert [rate[0] for rate in rates] == [2e-2, 5e-1, 2e-3]
    assert all(rate[2] == pytest.approx(rate[0] / 3) for rate in rates)
    weights, expected = (load_file(directory / "adapter_model.safetensors") for directory in (one, two))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name], atol=1e-5), name


ADAPTER = {"lora_r": 4, "vision_lora_r": 2, "lora_dropout": 0.0}
STEP = {"sft": "8 conversations per step", "dpo": "8 pairs per step"}


def write_recipe(inputs, directory, **launch):
    """Write a recipe of stage 1 and stage 2 that start from existing models, and return its path."""
    sections = {
        "sft": {"model_name_or_path": f"{inputs}/base", "dataset": f"{inputs}/instruct", **ADAPTER},
        "dpo": {"model_name_or_path": f"{inputs}/sft", "dataset": f"{inputs}/preferences"},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(directory), **launch, **TRAINING, **sections}))
    return str(path)


@pytest.fixture(scope="module")
def one_rank(inputs, tmp_path_factory):
    """Directory of the results of both stages with one process."""
    directory = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        run_recipe([write_recipe(inputs, directory, per_device_train_batch_size=4)])
    return directory


# A plugin that counts gloo's threads at exit: one that is left may abort the process.
THREADS = """\
import atexit
import os
from pathlib import Path

def count():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    gloo = sum("gloo" in name for name in names)
    os.write(1, f"gloo threads at exit: {gloo}\\n".encode())  # one write: the ranks share the pipe

atexit.register(count)
"""


@pytest.fixture(scope="module", params=CONFIGS)
def two_ranks(request, inputs, tmp_path_factory):
    """Directory of the results with two processes and one row per batch, so that one process never has an image."""
    if request.param == "zero2":
        pytest.importorskip("deepspeed")
    directory = tmp_path_factory.mktemp("two")
    plugin = directory / "threads.py"
    plugin.write_text(THREADS)
    path = write_recipe(
        inputs, directory, per_device_train_batch_size=1, accelerate_config=request.param, num_processes=2
    )
    for stage, batch_size in STEP.items():
        command, environment = launch_command(["medst_trl", path, "--stage", stage], request.param, 2)
        out = run_launch(command, **environment | {PLUGINS_VARIABLE: str(plugin)})
        assert out.count(f"{batch_size}: 1 x 2 processes x 4 accumulated.") == 1  # printed only by rank 0
        if request.param == "cpu":
            assert out.count("gloo threads at exit: 0") == 2
    return directory


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_ranks_train_the_same_weights_as_one(one_rank, two_ranks, stage):
    assert_same_training(one_rank / stage, two_ranks / stage)


def run_sft(inputs, directory, config=None, **options):
    model = {"model_name_or_path": inputs / "base"} | ADAPTER
    medst("sft", directory, config, dataset=inputs / "instruct", **TRAINING | model | options)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "zero2"])
def test_full_finetuning_on_two_ranks_equals_one(inputs, tmp_path, config):
    """The last vision layer is unused, so it has no gradient on any rank."""
    options = {"use_lora": False, "learning_rate": 1e-3, "vision_learning_rate": 1e-3, "max_steps": 2}
    for directory, kind, size in (("one", None, 4), ("two", config, 1)):
        medst(
            "sft", tmp_path / directory, kind, dataset=inputs / "instruct", per_device_train_batch_size=size,
            model_name_or_path=inputs / "base", **TRAINING | options,
        )  # fmt: skip
    one, two = (load_file(tmp_path / directory / "model.safetensors") for directory in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.slow
def test_sft_runs_with_zero_3_without_the_token(inputs, tmp_path):
    """PEFT 0.21 puts the row of a trained token on a GPU with ZeRO-3, so the token cannot be trained on CPUs."""
    options = {"model_name_or_path": inputs / "without_vusr", "train_vusr": False}
    one = run_sft(inputs, tmp_path / "one", per_device_train_batch_size=4, **options)
    assert_same_training(one, run_sft(inputs, tmp_path / "two", "zero3", per_device_train_batch_size=1, **options))


@pytest.mark.slow
def test_dpo_with_a_precomputed_reference_runs_with_zero_2(inputs, one_rank, tmp_path):
    options = {"precompute_ref_log_probs": True, "ref_log_probs_dir": tmp_path / "log_probs"}
    paths = {"model_name_or_path": inputs / "sft", "dataset": inputs / "preferences"}
    medst("dpo", tmp_path / "two", "zero2", per_device_train_batch_size=1, **TRAINING | paths | options)
    assert_same_training(one_rank / "dpo", tmp_path / "two")


@pytest.fixture(scope="module")
def candidates_of_one_rank(inputs, tmp_path_factory):
    return run_generate(inputs, tmp_path_factory.mktemp("one") / "generate")


def run_generate(inputs, directory, config=None):
    paths = {"model_name_or_path": inputs / "questioner", "images": inputs / "images"}
    medst("generate", directory, config, **GENERATION | paths)
    counts = json.loads((directory / "stage.json").read_text())["counts"]
    assert counts["questions"] == 18 and counts["candidates"] > 4
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("stage.json", ".stage.lock")
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "zero2"])
def test_two_ranks_generate_the_same_candidates_as_one(inputs, candidates_of_one_rank, tmp_path, config):
    assert run_generate(inputs, tmp_path / "two", config) == candidates_of_one_rank

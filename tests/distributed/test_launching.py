# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A launch that differs from the requested one is an error, because accelerate does not report it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.commands.launch as accelerate_launch
import pytest
from accelerate.commands.config import config_args
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from commands import without_launcher
from jsonl import write_prediction

from medst_trl.base.errors import UserError
from medst_trl.pipeline import launch
from medst_trl.pipeline.launch import CONFIGS, check_launched, find_config, launch_command
from medst_trl.pipeline.recipe_files import read_yaml
from medst_trl.pipeline.stages import _training as training
from medst_trl.pipeline.stages.sft import SftArguments
from medst_trl.training.sft import SelfQuestioningConfig


ENVIRONMENT = without_launcher(os.environ) | {
    "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
}  # fmt: skip
# Scoring a predictions file is a distributed stage that needs no model.
RECIPE = """\
#!/usr/bin/env -S python -m medst_trl
# A stage that takes seconds.
output_dir: out
evaluate:
  predictions: predictions.jsonl
  bootstrap_samples: 0
"""
NOT_DISTRIBUTED = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\nnum_processes: 4\n"


@pytest.fixture
def directory(tmp_path):
    write_prediction(tmp_path / "predictions.jsonl")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "mine.yaml").chmod(0o755)
    (tmp_path / "four.yaml").write_text(NOT_DISTRIBUTED)
    return tmp_path


def run(directory, command, **environment):
    return subprocess.run(
        command, shell=True, env=ENVIRONMENT | environment, cwd=directory, capture_output=True, text=True, timeout=120
    )


def is_complete(directory):
    path = directory / "out" / "evaluate" / "stage.json"
    return path.exists() and json.loads(path.read_text())["status"] == "complete"


def test_the_error_for_one_process_instead_of_two_names_what_works(directory):
    rest = "--num_processes 2 -m medst_trl mine.yaml --stage evaluate"
    process = run(directory, f"accelerate launch --cpu {rest}")
    assert process.returncode != 0 and not is_complete(directory)
    assert "several processes were requested, but accelerate has started one" in process.stderr
    assert "On GPUs, use `accelerate launch --multi_gpu`. On CPUs, set ACCELERATE_USE_CPU=true." in process.stderr
    process = run(directory, f"accelerate launch --multi_gpu --main_process_port 0 {rest}", ACCELERATE_USE_CPU="true")
    assert process.returncode == 0 and is_complete(directory), process.stderr


@pytest.mark.parametrize(
    ("arguments", "num_processes"),
    [
        (["--config_file", "four.yaml", "-m", "medst_trl"], 4),
        (["-m", "medst_trl"], 4),  # accelerate's default configuration
        (["--cpu", "--num_processes=2", "--no_python", "./mine.yaml"], 2),
        (["--cpu", "--num_processes", "1", "-m", "medst_trl"], 1),
    ],
    ids=["config_file", "default_config", "executable", "one"],
)
def test_one_process_is_refused_if_several_were_requested_in_any_way(directory, monkeypatch, arguments, num_processes):
    """Runs the check in the environment that accelerate creates for the only process that it starts."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(os, "environ", dict(ENVIRONMENT))
    for module in (accelerate_launch, config_args):
        monkeypatch.setattr(module, "default_config_file", "four.yaml")
    started = []
    monkeypatch.setattr(accelerate_launch, "simple_launcher", started.append)
    accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(arguments))
    _, environment = prepare_simple_launcher_cmd_env(*started)
    monkeypatch.setattr(os, "environ", environment)
    assert started[0].num_processes == num_processes
    if num_processes == 1:
        return check_launched(None, None, "medst sft")
    with pytest.raises(UserError, match="processes were requested, but accelerate has started one"):
        check_launched(None, None, "medst sft")


def test_one_process_is_accepted_if_one_was_requested(directory):
    command = "accelerate launch --cpu --num_processes 1 -m medst_trl mine.yaml --stage evaluate"
    process = run(directory, command)
    assert process.returncode == 0 and is_complete(directory), process.stderr


def test_a_port_in_the_environment_is_not_taken_for_a_launch_of_several_processes(monkeypatch):
    assert "MASTER_PORT" not in launched(monkeypatch, "cpu", None, MASTER_PORT="29500")[1]


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_started_by_mpirun_are_accepted(monkeypatch, variable):
    started = {"ACCELERATE_DYNAMO_BACKEND": "no", "MASTER_PORT": "29500"}
    monkeypatch.setattr(os, "environ", ENVIRONMENT | started | {variable: "2"})
    check_launched(None, None, "medst sft")
    monkeypatch.setitem(os.environ, variable, "1")  # srun sets it to 1
    with pytest.raises(UserError, match="accelerate has started one"):
        check_launched(None, None, "medst sft")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_sharding_that_accelerate_ignores_is_an_error(monkeypatch, kind):
    for name, value in {f"ACCELERATE_USE_{kind}": "true", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="accelerate silently ignores"):
        check_launched(None, None, "medst sft")


# The command and environment with which `medst` starts its processes


def launched(monkeypatch, config, count, gpus=0, **environment):
    monkeypatch.setattr(launch, "gpu_count", lambda: gpus)
    monkeypatch.setattr(launch, "has_deepspeed", lambda: True)
    monkeypatch.setattr(os, "environ", ENVIRONMENT | environment)
    return launch_command(["program"], config, count)


def test_a_config_for_cpus_starts_the_configured_number_of_processes(monkeypatch, tmp_path):
    for content in (NOT_DISTRIBUTED, "distributed_type: MULTI_CPU\nnum_processes: 4\n"):
        (tmp_path / "mine.yaml").write_text(content)
        command, environment = launched(monkeypatch, str(tmp_path / "mine.yaml"), None)
        assert str(find_config("multi_gpu")) in command and environment["ACCELERATE_USE_CPU"] == "true"
        assert command[command.index("--num_processes") + 1] == "4"


def test_without_gpus_deepspeed_runs_on_cpus_and_fsdp_is_refused(monkeypatch):
    command, environment = launched(monkeypatch, "zero2", 2, ACCELERATE_USE_CPU="true")
    assert environment["DS_ACCELERATOR"] == "cpu" and environment["ACCELERATE_USE_CPU"] == "false"
    assert command[command.index("--mixed_precision") + 1] == "no"
    with pytest.raises(UserError, match="fsdp2 divides the weights among GPUs"):
        launched(monkeypatch, "fsdp2", 2)
    command, environment = launched(monkeypatch, "zero2", None, gpus=4)
    assert "DS_ACCELERATOR" not in environment and "--mixed_precision" not in command


def test_missing_deepspeed_is_reported(monkeypatch):
    monkeypatch.setattr(launch, "has_deepspeed", lambda: False)
    with pytest.raises(UserError, match=r'pip install "medst_trl\[deepspeed\]"'):
        launch_command(["program"], "zero3", 2)


@pytest.mark.parametrize("machines", [1, 2])
def test_a_config_for_several_machines_or_with_a_port_keeps_its_port(monkeypatch, tmp_path, machines):
    port = "main_process_port: 29501\n" if machines == 1 else ""
    (tmp_path / "mine.yaml").write_text(f"distributed_type: MULTI_GPU\nnum_machines: {machines}\n{port}")
    command, _ = launched(monkeypatch, str(tmp_path / "mine.yaml"), None, gpus=4)
    assert command[command.index("--num_processes") + 1] == str(4 * machines)
    assert "--main_process_port" not in command


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_do_not_set_training_arguments(path):
    config = read_yaml(path)
    # The Trainer replaces the default, "auto". A value here that differs from the Trainer's is an error in DeepSpeed.
    assert config["mixed_precision"] == "no"
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(config.get("deepspeed_config") or {})
    names = {f"--{key}" for part in ("deepspeed_config", "fsdp_config") for key in config.get(part) or {}}
    from accelerate.commands.launch import launch_command_parser

    assert names <= set(launch_command_parser()._option_string_actions)
    assert Path(path).read_text().startswith("# ")


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({"load_in_4bit": True}, 3, "load_in_4bit does not work with DeepSpeed ZeRO-3"),
        ({"load_in_4bit": True, "use_lora": False}, 2, "use_lora: false trains it"),
        ({}, 3, "ZeRO-3 trains the row of <vusr> on GPUs only"),
        ({"train_vusr": False}, 3, None),
        ({"load_in_4bit": True}, 2, None),
    ],
)
def test_incompatible_settings_are_refused_before_loading(monkeypatch, options, stage, message):
    monkeypatch.setattr(training, "gpu_count", lambda: 0)
    args = SftArguments(model_name_or_path="base", dataset=["data"], **options)
    training_args = SelfQuestioningConfig(output_dir="out", report_to="none")
    training_args.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    if message is None:
        args.check(training_args)
    else:
        with pytest.raises(UserError, match=message):
            args.check(training_args)


def test_settings_of_another_kind_of_launch_are_not_read(tmp_path):
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nfsdp_config: some.json\n")
    assert launch.read_config(str(tmp_path / "mine.yaml")).kind == "DDP"

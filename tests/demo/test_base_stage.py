# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from medst_trl.base.errors import UserError
from medst_trl.demo import base_stage as base
from medst_trl.demo.tiny_model import tiny_llava


FEW = {
    "num_texts": 8, "num_pictures": 24, "per_device_train_batch_size": 4, "warmup_steps": 1, "save_steps": 3,
    "logging_steps": 2,
}  # fmt: skip

# Runs the stage and kills its process after a training step or while the result is being saved.
RUN_AND_KILL = """
import os, signal, sys
import transformers
from medst_trl.demo import base_stage as base

args, = base.STAGE.make_parser().parse_args_and_config(sys.argv[2:])
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "saving":
    os.replace = lambda source, target: kill() if str(target).endswith("config.json") else os.rename(source, target)
else:
    build = base._trainer
    def trainer(*args):
        class Kill(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 5:
                    kill()
        built = build(*args)
        built.add_callback(Kill())
        return built
    base._trainer = trainer
base.main(args)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the arguments of a finished stage."""
    args = base.BaseArguments(output_dir=str(tmp_path_factory.mktemp("runs") / "base"), **FEW)
    base.main(args)
    return args


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(f"{directory}/model.safetensors")


def test_a_trained_model_and_its_processor_are_saved(finished):
    model = AutoModelForImageTextToText.from_pretrained(finished.output_dir)
    processor = AutoProcessor.from_pretrained(finished.output_dir)
    assert "<vusr>" not in processor.tokenizer.get_vocab()
    assert model.get_input_embeddings().weight.shape[0] == len(processor.tokenizer)
    untrained = tiny_llava(seed=finished.seed)[0].state_dict()
    assert any(not torch.equal(untrained[name], value) for name, value in model.state_dict().items())


def test_a_record_is_written_and_no_temporary_files_remain(finished):
    with open(f"{finished.output_dir}/stage.json") as file:
        record = json.load(file)
    assert record["status"] == "complete"
    assert record["counts"]["steps"] == 8
    names = set(os.listdir(finished.output_dir)) - {".stage.lock"}
    assert {"config.json", "model.safetensors", "stage.json", "tokenizer.json", "processor_config.json"} <= names
    assert not [name for name in names if name.startswith((".", "checkpoint"))]


def test_a_finished_stage_is_skipped(finished, capsys):
    before = os.stat(f"{finished.output_dir}/model.safetensors").st_mtime_ns
    base.main(replace(finished, logging_steps=7))  # has no effect on the result
    assert os.stat(f"{finished.output_dir}/model.safetensors").st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().out


def test_a_changed_setting_is_refused(finished):
    with pytest.raises(UserError, match="num_pictures: 24 before, 25 now"):
        base.main(replace(finished, num_pictures=25))


def test_the_same_seed_gives_the_same_weights(finished, tmp_path):
    base.main(replace(finished, output_dir=str(tmp_path)))
    reloaded = weights(tmp_path)
    assert all(torch.equal(value, reloaded[name]) for name, value in weights(finished.output_dir).items())


@pytest.mark.parametrize("moment", ["step", "saving"])
def test_a_resumed_run_gives_the_same_weights(finished, tmp_path, moment):
    arguments = [part for key, value in FEW.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-c", RUN_AND_KILL, moment, "--output_dir", str(tmp_path / "base"), *arguments]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "base/config.json").exists()  # an incomplete model does not look complete
    base.main(replace(finished, output_dir=str(tmp_path / "base")))
    reloaded = weights(tmp_path / "base")
    assert all(torch.equal(value, reloaded[name]) for name, value in weights(finished.output_dir).items())


@pytest.mark.parametrize("invalid", [{"learning_rate": -1.0}, {"num_pictures": 0}, {"turns": 0}])
def test_numbers_out_of_bounds_are_refused(tmp_path, invalid):
    (name,) = invalid
    with pytest.raises(UserError, match=f"{name} is"):
        base.main(base.BaseArguments(output_dir=str(tmp_path / "base"), **FEW | invalid))
    assert not (tmp_path / "base").exists()

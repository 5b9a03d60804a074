# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Finished stages in run directories of version 0.1.0 are skipped, and interrupted stages are resumed.

`tests/fixtures/write_runs.py` describes the archive. The tests run each stage on the command line, with the arguments
that were used to write the archive. They use no module of the package directly, only the names of files in a run
directory.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import fake_hub
import pytest
import torch
from datasets import load_dataset
from judge_server import JudgeServer
from safetensors.torch import load_file


ARCHIVE = Path(__file__).parents[1] / "fixtures" / "runs_0_1_0" / "runs.tar.xz"
COMMANDS = json.loads(ARCHIVE.with_name("commands.json").read_text())
MARK = "written by version 0.1.0"


@pytest.fixture(autouse=True)
def old_runs(tmp_path, monkeypatch):
    """Unpack the archive into the current directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def medst(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "medst_trl.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def command(stage: str, directory: str, *more: str) -> list[str]:
    return [stage, *COMMANDS[stage]["arguments"], "--output_dir", f"{directory}/{stage}", *more]


def files_in(directory: str | Path) -> dict[str, tuple[str, int]]:
    """Return the SHA-256 and the modification time of each file except locks and logs."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in Path(directory).rglob("*")
        if path.is_file() and path.name != ".stage.lock" and path.suffix != ".log"
    }


def read_complete_lines(path: str | Path) -> list[dict]:
    """Return the records of a file without its last line, which an interruption can leave incomplete."""
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def record_of(directory: str) -> dict:
    return json.loads(Path(directory, "stage.json").read_text(encoding="utf-8"))


def assert_resumed(done: subprocess.CompletedProcess, before: dict, directory: str) -> dict:
    """Check that the stage is complete and that its record continues that of the interrupted run."""
    assert done.returncode == 0, done.stderr
    after = record_of(directory)
    assert before["status"] == "running" and after["status"] == "complete"
    assert after["started"] == before["started"] and after["seconds"] > before["seconds"]
    return after


def resume(stage: str, *more: str) -> dict:
    directory = f"interrupted/{stage}"
    before = record_of(directory)
    return assert_resumed(medst(*command(stage, "interrupted", *more)), before, directory)


def mark_first_line(path: str, edit) -> str:
    """Edit the first record of the interrupted run, so that a recomputed record would differ, and return its id."""
    rows = read_complete_lines(path)
    edit(rows[0])
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows[0]["id"]


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_finished_stage_is_skipped(stage):
    before = files_in("runs")
    done = medst(*command(stage, "runs"))
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    after = files_in("runs")
    if stage == "evaluate":  # it is checked for contamination, which version 0.1.0 did not do
        assert after.pop("runs/evaluate/contamination.json") and "Contamination: " in done.stdout
    assert after == before


@pytest.mark.parametrize("directory", ["runs", "interrupted"])
@pytest.mark.parametrize("stage", COMMANDS)
def test_a_changed_setting_is_refused(stage, directory):
    before = files_in(directory)
    done = medst(*command(stage, directory, *COMMANDS[stage]["changed"]))
    assert done.returncode == 2
    assert f"{COMMANDS[stage]['changed'][0].removeprefix('--')}:" in done.stderr
    assert files_in(directory) == before


def test_a_changed_input_is_refused():
    """Inputs are compared by the hash of their content, so the hash must be the same in both versions."""
    with open("runs/dpo/adapter_config.json", "a") as file:
        file.write("\n")
    done = medst(*command("merge", "runs"))
    assert done.returncode == 2 and "model_name_or_path" in done.stderr


def test_convert_starts_again():
    staging = next(Path("interrupted/convert").glob(".saving-*"))
    assert len(list(staging.glob("*.safetensors"))) == 2
    resume("convert")
    assert not staging.exists()
    for path in sorted(Path("runs/convert").glob("*.safetensors")):
        expected, weights = load_file(path), load_file(f"interrupted/convert/{path.name}")
        assert expected.keys() == weights.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_base_resumes_from_its_checkpoint():
    """All weights of the checkpoint are 0.001, see `write_runs.py`. Weights of a new model have a spread of 0.06."""
    record = resume("base")
    assert record["counts"]["steps"] == 4
    weights = load_file("interrupted/base/model.safetensors")
    assert all(weight.min() > 0.001 - 0.005 and weight.max() < 0.001 + 0.005 for weight in weights.values())
    assert any((weight != 0.001).any() for weight in weights.values())
    assert not Path("interrupted/base/.run").exists()


def test_prepare_keeps_finished_files():
    before = files_in("interrupted/prepare")
    kept = {name: state for name, state in before.items() if name.endswith((".parquet", "image_index.jsonl"))}
    assert len(kept) == 4
    record = resume("prepare")
    after = files_in("interrupted/prepare")
    assert {name: after[name] for name in kept} == kept
    assert record["counts"] == record_of("runs/prepare")["counts"]
    for name, split in (("benchmark", "test"), ("instruct", "train"), ("images", "train")):
        expected, rows = (
            load_dataset("parquet", data_files=f"{run}/prepare/{name}/*.parquet", split="train").to_list()
            for run in ("runs", "interrupted")
        )
        assert [row | {"group_id": None} for row in rows] == [row | {"group_id": None} for row in expected], split


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_training_resumes_from_its_checkpoint(stage):
    directory = Path("interrupted", stage)
    checkpoint, inputs = files_in(directory / "checkpoint-2"), files_in("runs")
    assert checkpoint
    record = resume(stage)
    assert record["counts"]["steps"] == 3 and (directory / "checkpoint-3").is_dir()
    assert files_in(directory / "checkpoint-2") == checkpoint
    after = files_in("runs")  # with log-probabilities of the reference in another form
    assert {name: after[name] for name in inputs} == inputs
    old, new, uninterrupted = (
        json.loads((path / "trainer_state.json").read_text())["log_history"]
        for path in (directory / "checkpoint-2", directory, Path("runs", stage))
    )
    assert len(old) == 2 and new[:2] == old  # identical, including the measured times
    assert new[2]["step"] == 3 and new[2]["loss"] == pytest.approx(uninterrupted[2]["loss"], rel=1e-3)
    expected, weights = (load_file(path / "adapter_model.safetensors") for path in (Path("runs", stage), directory))
    assert expected.keys() == weights.keys()
    for name, weight in weights.items():  # on another machine than the one that trained the fixtures
        assert torch.allclose(weight, expected[name], rtol=1e-3, atol=1e-4), name


def test_generate_keeps_finished_records():
    log = "interrupted/generate/.generated.jsonl.incomplete"

    def mark(row):
        row["candidates"][0]["answers"][0] = MARK

    mark_first_line(log, mark)
    kept = [candidate for row in read_complete_lines(log) for candidate in row["candidates"]]
    assert kept and len(read_complete_lines(log)) == 2
    record = resume("generate")
    assert record["counts"] == record_of("runs/generate")["counts"]
    candidates = {
        row["id"]: row["answers"]
        for row in load_dataset("parquet", data_files="interrupted/generate/candidates/*.parquet", split="train")
    }
    assert len(candidates) == record["counts"]["candidates"]
    assert all(candidates[candidate["id"]] == candidate["answers"] for candidate in kept)
    assert MARK in candidates[kept[0]["id"]]


def test_judge_requests_only_the_missing_replies():
    cache = Path("interrupted/judge/judge_cache.jsonl")
    cached, replies = cache.read_bytes(), len(read_complete_lines("runs/judge/judge_cache.jsonl"))
    with JudgeServer() as server:
        record = resume("judge", "--base_url", server.base_url)
        assert len(server.bodies) == replies - cached.count(b"\n") > 0
    assert cache.read_bytes().startswith(cached) and len(read_complete_lines(cache)) == replies
    earlier = record_of("runs/judge")["counts"]["preferences"]
    shared = earlier["shared_with_benchmarks"] | {"near_copy": 0}
    assert record["counts"]["preferences"] == earlier | {"shared_with_benchmarks": shared}
    judgements, expected = (
        {row["id"]: (row["verdict"], row["scores"]) for row in read_complete_lines(f"{run}/judge/judgements.jsonl")}
        for run in ("interrupted", "runs")
    )
    assert judgements == expected


def test_merge_resumes():
    resume("merge")
    directory = Path("interrupted/merge")
    assert (directory / "config.json").is_file() and not (directory / ".merging").exists()
    expected, weights = (load_file(f"{run}/merge/model.safetensors") for run in ("runs", "interrupted"))
    assert expected.keys() == weights.keys()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in weights)


def test_evaluate_keeps_finished_predictions():
    directory = "interrupted/evaluate"

    def mark(row):
        row["prediction"] = MARK

    key = mark_first_line(f"{directory}/predictions_blank.jsonl.incomplete", mark)
    kept = read_complete_lines(f"{directory}/predictions_blank.jsonl.incomplete")
    answers = files_in(directory)[f"{directory}/predictions.jsonl"]
    assert len(kept) == 3
    record = resume("evaluate")
    assert files_in(directory)[f"{directory}/predictions.jsonl"] == answers
    blank = {row["id"]: row for row in read_complete_lines(f"{directory}/predictions_blank.jsonl")}
    assert len(blank) == 4 and all(blank[row["id"]] == row for row in kept)
    assert blank[key]["prediction"] == MARK
    assert len(read_complete_lines(f"{directory}/predictions_shuffled.jsonl")) == 4
    assert record["counts"] == record_of("runs/evaluate")["counts"]
    assert (Path(directory) / "scores.json").is_file()


def test_push_resumes():
    before = record_of("interrupted/push")
    with fake_hub.serve_hub() as hub:
        arguments = ["-m", "medst_trl.cli", *command("push", "interrupted")]
        done = fake_hub.client(hub.url, Path("home"), *arguments, check=False, CUDA_VISIBLE_DEVICES="")
        record = assert_resumed(done, before, "interrupted/push")
        names = hub.files("dataset", "org/pairs")
    assert "README.md" in names and any(name.endswith(".parquet") for name in names)
    # Log-probabilities of the reference in the form of version 0.1.0 are no longer read or pushed.
    assert record["counts"]["files"] == record_of("runs/push")["counts"]["files"] - 1
    assert not any("reference_log_probs" in name for name in names)


@pytest.mark.parametrize("directory", ["runs", "interrupted"])
def test_report_reads_old_runs(directory):
    """`report` writes no record and changes none."""
    before = files_in(directory)
    done = medst("report", "--run", directory, "--bootstrap_samples", "20")
    assert done.returncode == 0, done.stderr
    page = Path(directory, "report", "index.html").read_text(encoding="utf-8")
    after = {name: state for name, state in files_in(directory).items() if "/report/" not in name}
    assert after == before
    if directory == "runs":
        assert all(stage in page for stage in ("prepare", "sft", "generate", "judge", "dpo", "evaluate"))

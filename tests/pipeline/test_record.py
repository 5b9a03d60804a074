# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, make_dataclass, replace
from types import SimpleNamespace

import pytest

from medst_trl.base import fingerprints
from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import fingerprint, same_source
from medst_trl.base.redaction import HIDDEN, hide_secrets
from medst_trl.base.registry import Registry
from medst_trl.pipeline.record import StageRecord, changes_of, is_complete, read_record
from medst_trl.pipeline.stage import FILE, Input, Stage


def open_record(directory, overwrite=False, stage="prepare", inputs=None, **settings):
    """Open the record of a stage whose dataclass has these settings."""
    settings = {"seed": 0, "num_workers": 2, "output_dir": str(directory), "overwrite": overwrite} | settings
    if isinstance(stage, str):
        stage = Stage(stage, "a test", tuple, print, operational=frozenset({"num_workers"}))
    return StageRecord.of(stage, make_dataclass("Settings", settings)(**settings), inputs=inputs)


def stored(directory):
    return json.loads((directory / "stage.json").read_text())


def test_a_new_record_is_written_when_a_run_starts(tmp_path):
    record = open_record(tmp_path / "out")
    assert record.decision == "start"
    content = stored(tmp_path / "out")
    assert content["status"] == "running" and content["stage"] == "prepare" and content["settings"]["seed"] == 0
    assert {"python", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "medst_trl"} == set(
        content["versions"]
    )


def test_a_finished_and_unchanged_stage_is_skipped_and_its_record_is_kept(tmp_path):
    open_record(tmp_path).finish(counts={"records": 3}, rejected={"blank": 1})
    before = (tmp_path / "stage.json").read_bytes()
    again = open_record(tmp_path, num_workers=8)  # an operational key
    assert again.decision == "skip"
    assert again.content["counts"] == {"records": 3} and again.content["rejected"] == {"blank": 1}
    again.finish(counts={"records": 0})
    assert (tmp_path / "stage.json").read_bytes() == before


def test_an_interrupted_run_is_resumed_and_its_seconds_add_up(tmp_path):
    open_record(tmp_path)
    content = stored(tmp_path) | {"seconds": 100.0}
    (tmp_path / "stage.json").write_text(json.dumps(content))
    os.utime(tmp_path / "stage.json", (1_000_000, 1_000_000))
    (tmp_path / "part").write_text("x")
    os.utime(tmp_path / "part", (1_000_050, 1_000_050))
    record = open_record(tmp_path)
    assert record.decision == "resume"
    record.finish()
    assert 150 <= stored(tmp_path)["seconds"] < 160
    assert stored(tmp_path)["started"] == content["started"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_setting_is_refused_with_its_old_and_new_value(tmp_path, finished):
    record = open_record(tmp_path, seed=7)
    if finished:
        record.finish()
    with pytest.raises(UserError, match=r"seed: 7 before, 8 now[\s\S]*--overwrite") as error:
        open_record(tmp_path, seed=8, num_workers=5)
    assert "num_workers" not in str(error.value)


def test_a_setting_that_the_record_lacks_is_ignored_if_it_is_none_or_false(tmp_path):
    open_record(tmp_path).finish()
    assert open_record(tmp_path, new_option=None, other=False).decision == "skip"
    with pytest.raises(UserError, match=r"new_option: \(not set\) before, 0 now"):
        open_record(tmp_path, new_option=0)
    open_record(tmp_path / "next", new_option=True)
    with pytest.raises(UserError, match="new_option: true before, false now"):
        open_record(tmp_path / "next", new_option=False)


def test_earlier_defaults_replace_settings_that_the_record_lacks(tmp_path):
    toy = Stage(
        name="toy", summary="", arguments=tuple, main=print, operational=frozenset({"workers"}),
        earlier_defaults={"rate": 0.5},
    )  # fmt: skip
    open_record(tmp_path, stage=toy, workers=1).finish()
    assert open_record(tmp_path, stage=toy, rate=0.5, workers=2).decision == "skip"
    with pytest.raises(UserError, match="rate: 0.5 before, 0.6 now"):
        open_record(tmp_path, stage=toy, rate=0.6)


def test_missing_and_damaged_records_are_read_as_empty(tmp_path):
    assert read_record(tmp_path) == {} and not is_complete(tmp_path)
    record = open_record(tmp_path)
    assert read_record(tmp_path)["stage"] == "prepare" and not is_complete(tmp_path)
    record.finish()
    assert is_complete(tmp_path) and is_complete(tmp_path, "prepare") and not is_complete(tmp_path, "sft")
    for damaged in ("[]", '{"stage": "pre'):
        (tmp_path / "stage.json").write_text(damaged)
        assert read_record(tmp_path) == {} and not is_complete(tmp_path)


def test_tuples_sets_and_paths_equal_their_json_form(tmp_path):
    settings = {"betas": (0.9, 0.99), "kinds": {"b", "a"}, "path": tmp_path}
    open_record(tmp_path / "out", **settings).finish()
    assert open_record(tmp_path / "out", **settings).decision == "skip"


def test_inputs_are_compared_by_content_not_by_path(tmp_path):
    source = tmp_path / "data.json"
    source.write_text("[1]")
    out = tmp_path / "out"
    open_record(out, inputs={"source": source}, source=str(source)).finish()
    moved = source.rename(tmp_path / "moved.json")
    assert open_record(out, inputs={"source": moved}, source=str(moved)).decision == "skip"
    moved.write_text("[2]")
    with pytest.raises(UserError, match="input source: .*SHA-256"):
        open_record(out, inputs={"source": moved}, source=str(moved))


def test_a_missing_input_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        open_record(tmp_path / "out", inputs={"source": tmp_path / "missing.json"})
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_of_a_directory_depends_on_every_result_file(tmp_path):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "weights").write_bytes(bytes(5 << 20))
    seen = {fingerprint(directory)["sha256"]}

    def assert_changed():
        value = fingerprint(directory)["sha256"]
        assert value not in seen
        seen.add(value)

    (directory / "config.json").write_text("{}")
    assert_changed()
    (directory / "config.json").write_text("[]")
    assert_changed()
    (directory / "config.json").rename(directory / "other.json")
    assert_changed()
    with open(directory / "sub" / "weights", "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"x")
    assert_changed()
    for name in ("stage.json", ".hidden", "checkpoint-3/optimizer.pt"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("not a result")
    assert fingerprint(directory)["sha256"] in seen
    shutil.copytree(directory, tmp_path / "copy")
    assert same_source(fingerprint(directory), fingerprint(tmp_path / "copy"))


def test_a_hub_id_is_compared_by_its_revision_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    reference = tmp_path / "hub" / "models--org--name" / "refs" / "main"
    for commit in ("a" * 40, "b" * 40):
        (tmp_path / "hub" / "models--org--name" / "snapshots" / commit).mkdir(parents=True)
    out = tmp_path / "out"
    record = open_record(out, inputs={"model": "org/name"})
    reference.parent.mkdir(parents=True)
    reference.write_text("a" * 40)  # downloaded while the stage ran
    record.finish()
    assert stored(out)["inputs"]["model"] == [{"hub_id": "org/name", "revision": "a" * 40}]
    assert open_record(out, inputs={"model": "org/name"}).decision == "skip"
    reference.write_text("b" * 40)
    with pytest.raises(UserError, match="org/name at aaaa.*org/name at bbbb"):
        open_record(out, inputs={"model": "org/name"})


def test_overwrite_starts_from_an_empty_directory(tmp_path):
    open_record(tmp_path, seed=1).finish()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a").write_text("old")
    (tmp_path / ".progress").write_text("old")
    (tmp_path / "run.log").write_text("kept")
    record = open_record(tmp_path, seed=2, overwrite=True)
    assert record.decision == "start"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".stage.lock", "run.log", "stage.json"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_directory_without_a_record_is_never_changed(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty and holds no stage.json.*thesis.tex"):
        open_record(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["[]", '{"name": "a theatre"}'])
def test_a_stage_json_of_another_tool_is_refused(tmp_path, content):
    (tmp_path / "stage.json").write_text(content)
    with pytest.raises(UserError, match="not written by medst_trl"):
        open_record(tmp_path, overwrite=True)
    assert (tmp_path / "stage.json").read_text() == content


def test_overwrite_does_not_delete_the_output_of_other_stages(tmp_path):
    open_record(tmp_path).finish()
    with pytest.raises(UserError, match="holds the output of stage 'prepare', not of 'sft'"):
        open_record(tmp_path, stage="sft", overwrite=True)
    open_record(tmp_path / "nested").finish()
    with pytest.raises(UserError, match="nested"):
        open_record(tmp_path, overwrite=True)
    assert stored(tmp_path / "nested")["status"] == "complete"


@pytest.mark.parametrize("length", [0, 1, 40])
def test_a_damaged_record_is_refused_and_can_be_overwritten(tmp_path, length):
    open_record(tmp_path).finish()
    (tmp_path / "stage.json").write_bytes((tmp_path / "stage.json").read_bytes()[:length])
    with pytest.raises(UserError, match=r"damaged[\s\S]*--overwrite"):
        open_record(tmp_path)
    assert open_record(tmp_path, overwrite=True).decision == "start"


def test_a_run_killed_while_writing_its_record_keeps_the_old_one(tmp_path):
    open_record(tmp_path).finish(counts={"n": 1})
    (tmp_path / ".stage.json.tmp").write_text('{"status": "comp')
    assert open_record(tmp_path).decision == "skip"


def test_another_version_of_a_package_causes_a_warning(tmp_path, monkeypatch):
    open_record(tmp_path).finish()
    real = fingerprints.version
    monkeypatch.setattr(fingerprints, "version", lambda name: "9.9" if name == "torch" else real(name))
    with pytest.warns(UserWarning, match="torch .* -> 9.9"):
        assert open_record(tmp_path).decision == "skip"


def test_secrets_are_neither_written_nor_compared(tmp_path):
    secrets = {
        "hub_token": "abc-very-secret",
        "api_key": "abc-very-secret",
        "judge": {"password": "abc-very-secret", "url": "https://me:abc-very-secret@host/v1"},
        "args": ["hf_abcdefghijklmnopqrstuvwxyz"],
    }
    open_record(tmp_path, **secrets).finish()
    text = (tmp_path / "stage.json").read_text()
    assert "very-secret" not in text and "hf_abc" not in text and text.count(HIDDEN) == 5
    assert open_record(tmp_path, **(secrets | {"hub_token": "another"})).decision == "skip"


def test_settings_whose_names_resemble_secrets_are_kept():
    settings = {"max_new_tokens": 64, "eos_token": "</s>", "average_tokens_across_devices": True, "hub_token": None}
    assert hide_secrets(settings) == settings


OPEN = """
import sys
from dataclasses import dataclass
from medst_trl.base.errors import UserError
from medst_trl.pipeline.record import StageRecord
from medst_trl.pipeline.stage import Stage

@dataclass
class Settings:
    output_dir: str
    seed: int = 0

stage = Stage("prepare", "a test", tuple, print, operational=frozenset({{"num_workers"}}))
{}
"""


def test_a_second_process_is_refused_with_the_host_and_pid_of_the_first(tmp_path):
    record = open_record(tmp_path)  # this process holds the lock
    code = OPEN.format(f"""
try:
    StageRecord.of(stage, Settings({str(tmp_path)!r}))
except UserError as error:
    print(error)
""")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Another process is writing" in result.stdout and record.decision == "start"
    assert f"host {socket.gethostname()}, pid {os.getpid()}" in result.stdout


def test_a_record_imports_no_heavy_package(tmp_path):
    code = OPEN.format(f"""
StageRecord.of(stage, Settings({str(tmp_path / "out")!r}), inputs={{"model": "org/name"}}).finish()
print([name for name in ("torch", "transformers", "datasets", "trl", "peft") if name in sys.modules])
""")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_record_of_a_run_that_failed_before_its_first_result_is_removed(tmp_path):
    def fail_after(leave, rate):
        record = open_record(tmp_path / "out", stage="sft", rate=rate)
        with pytest.raises(ValueError, match="no such model"), record:
            leave(tmp_path / "out")
            raise ValueError("no such model")

    fail_after(lambda directory: None, rate=1)
    for name in (".gitkeep", ".gitignore", "judge_cache.jsonl"):  # left by the user, or by an earlier run
        path = tmp_path / "out" / name
        path.write_text("x" * (name != ".gitkeep"))
        os.utime(path, (0, 0))
        fail_after(lambda directory: (directory / "reference_log_probs").mkdir(exist_ok=True), rate=len(name))
        assert path.exists()
    fail_after(lambda directory: (directory / "rows.jsonl.incomplete").touch(), rate=2)  # not refused
    fail_after(lambda directory: (directory / "checkpoint-1").mkdir(), rate=3)  # opened, but without a row
    with pytest.raises(UserError, match="rate: 3 before, 4 now"):
        fail_after(lambda directory: None, rate=4)


def test_a_directory_inside_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file, not a directory. Choose another"):
        open_record(tmp_path / "file" / "out")


@dataclass
class _Arguments:
    output_dir: str
    data: str
    results: str | None = None
    overwrite: bool = False


@dataclass
class _Engine:
    precision: str = "low"


@dataclass
class _OtherEngine:
    speed: int = 1


def test_a_record_takes_settings_and_inputs_from_the_stage(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.txt").write_text("1")
    stage = Stage(
        "toy",
        "a test",
        lambda: (_Arguments, _Engine, _OtherEngine),
        print,
        inputs=(Input("data", FILE), Input("results", FILE), Input("address", FILE)),
        operational=frozenset({"results"}),
    )
    arguments = _Arguments(str(tmp_path / "out"), str(tmp_path / "data"))
    record = StageRecord.of(stage, arguments, _Engine(), None)
    assert record.content["inputs"].keys() == {"data"}, "an operational input is not compared"
    assert record.content["settings"].keys() == {"output_dir", "data", "results", "overwrite", "precision"}
    record.finish()
    with pytest.raises(UserError, match=r"precision: \"low\" before, \"high\" now"):
        StageRecord.of(stage, arguments, _Engine("high"))


def test_settings_of_an_unused_engine_are_not_compared(tmp_path):
    stage = Stage("toy", "a test", lambda: (_Arguments, _Engine, _OtherEngine), print)
    arguments = _Arguments(str(tmp_path / "out"), "x")
    # Earlier versions recorded the settings of all engines.
    StageRecord.of(stage, arguments, _Engine(), _OtherEngine()).finish()
    assert StageRecord.of(stage, arguments, _Engine()).decision == "skip"
    with pytest.raises(UserError, match="speed"):
        StageRecord.of(stage, arguments, _Engine(), _OtherEngine(2))


@dataclass
class _WithEngine:
    output_dir: str
    engine: str
    overwrite: bool = False


def test_only_settings_of_the_named_engine_are_recorded_and_compared(tmp_path):
    engines = Registry("engine", (), ())
    engines.register(SimpleNamespace(name="exact", settings=_Engine))
    engines.register(SimpleNamespace(name="fast", settings=_OtherEngine, operational=frozenset({"speed"})))
    kinds = (_WithEngine, _Engine, _OtherEngine)
    stage = Stage("toy", "a test", lambda: kinds, print, registries={"engine": engines})
    exact, fast = (_WithEngine(str(tmp_path / name), name) for name in ("exact", "fast"))
    record = StageRecord.of(stage, exact, _OtherEngine(2), _Engine())
    assert record.content["settings"] == vars(exact) | {"precision": "low"}
    assert StageRecord.of(stage, fast).content["settings"] == vars(fast) | {"speed": 1}
    assert changes_of(stage, exact, _Engine("high"), _OtherEngine(3)) == ['precision: "low" before, "high" now']
    assert changes_of(stage, fast, _Engine("high"), _OtherEngine(3)) == []  # its speed does not affect the result
    assert changes_of(stage, replace(exact, overwrite=True), _Engine("high")) == []


def test_a_plan_names_the_changes_for_which_the_stage_would_be_refused(tmp_path):
    stage = Stage("toy", "a test", lambda: (_Arguments,), print)
    arguments = _Arguments(str(tmp_path), "x")
    StageRecord.of(stage, arguments).finish()
    assert changes_of(stage, arguments) == []
    assert changes_of(stage, replace(arguments, results="y")) == ['results: null before, "y" now']


@pytest.mark.parametrize(
    "damage",
    [{"settings": []}, {"settings": "x"}, {"inputs": []}, {"inputs": {"data": "x"}}, {"inputs": {"data": ["x"]}},
     {"inputs": {"data": [{"path": 3}]}}, {"seconds": "1"}],
)  # fmt: skip
def test_an_edited_record_is_not_taken_for_one_of_a_stage(tmp_path, damage):
    stage = Stage("toy", "a test", lambda: (_Arguments,), print)
    arguments = _Arguments(str(tmp_path), "x")
    StageRecord.of(stage, arguments).finish()
    (tmp_path / "stage.json").write_text(json.dumps(stored(tmp_path) | damage))
    (message,) = changes_of(stage, arguments)
    assert read_record(tmp_path) == {} and "was not written by medst_trl" in message
    with pytest.raises(UserError, match="was not written by medst_trl"):
        StageRecord.of(stage, arguments)


@dataclass
class _OddNames:
    output_dir: str
    operational: str = "lr"
    is_chosen: bool = False


@dataclass
class _OddSwitch:
    seed: int = 0
    is_chosen: bool = False


def test_a_setting_may_have_any_name(tmp_path):
    stage = Stage("toy", "a test", lambda: (_OddNames, _OddSwitch), print)
    record = StageRecord.of(stage, _OddNames(str(tmp_path)), _OddSwitch(5))
    assert record.content["settings"] == {
        "output_dir": str(tmp_path),
        "operational": "lr",
        "is_chosen": False,
        "seed": 5,
    }
    record.finish()
    with pytest.raises(UserError, match="operational: "):
        StageRecord.of(stage, _OddNames(str(tmp_path), operational="lr2"), _OddSwitch(5))


def test_only_used_files_are_compared_but_records_of_earlier_versions_are_compared_by_their_rule(tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    for name in ("a.png", "b.png", "unused.txt"):
        (directory / name).write_text(name)
    earlier, used = fingerprint(directory), fingerprint(directory, ["b.png", "a.png", "a.png"])
    assert "sha256" not in used and same_source(used, fingerprint(directory, ["a.png", "b.png"]))
    assert same_source(earlier, used) and not same_source(used, earlier)
    os.mkfifo(directory / "pipe")  # nothing waits for it
    (directory / "broken").symlink_to(directory / "nothing")
    assert same_source(earlier, fingerprint(directory, ["a.png", "b.png", "broken", "pipe", "missing"]))
    (directory / "unused.txt").write_text("changed")
    assert same_source(used, fingerprint(directory, ["a.png", "b.png"]))
    assert not same_source(earlier, fingerprint(directory, ["a.png", "b.png"]))
    (directory / "a.png").write_text("changed")
    assert not same_source(used, fingerprint(directory, ["a.png", "b.png"]))
    assert not same_source(used, fingerprint(directory, ["b.png"]))
    with pytest.raises(UserError, match="neither a file nor a directory"):
        fingerprint(directory / "pipe")

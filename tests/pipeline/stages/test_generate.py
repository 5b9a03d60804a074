# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
from commands import launch_script
from datasets import Dataset
from jsonl import read_jsonl

from medst_trl.base.errors import UserError
from medst_trl.data.conform import conform
from medst_trl.data.loading import load_records
from medst_trl.data.schema import instruct_features
from medst_trl.demo.phantoms import instruct_rows, make_phantoms
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.engines.kinds.server import ServerSettings
from medst_trl.engines.kinds.transformers import TransformersSettings
from medst_trl.pipeline.stages.generate import STAGE, GenerateArguments, main, select_records
from medst_trl.policy.loading import prepare_policy
from medst_trl.selftrain.candidates import CandidateGenerator


FAST = {
    "num_questions": 2, "max_question_tokens": 24, "max_new_tokens": 24, "english_questions": False,
    "min_question_words": 1, "batch_size": 2, "rows_per_shard": 5, "seed": 3,
}  # fmt: skip
RECORDS = 14
# Run the stage in a separate process. If the first argument is not 0, SIGKILL it after that number of records.
SCRIPT = """
import os, signal, sys
from medst_trl.base.processes import process_state
from medst_trl.selftrain.candidates import CandidateGenerator
from medst_trl.pipeline.stages.generate import STAGE, main

state, outcomes = process_state(), CandidateGenerator.outcomes
def killed(self, *args):
    for index, outcome in enumerate(outcomes(self, *args)):
        if index == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield outcome
if int(sys.argv[1]):
    CandidateGenerator.outcomes = killed
main(*STAGE.make_parser().parse_args_into_dataclasses(sys.argv[2:])[:-1])
print("world", state.num_processes)
"""


def write_images(directory, rows):
    directory.mkdir(parents=True)
    Dataset.from_list(rows, features=instruct_features()).to_parquet(directory / "train-00000-of-00001.parquet")
    return str(directory)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    model, processor = tiny_llava(vision_size=32, vision_layers=2, text_size=32, text_layers=1, vocab_size=400)
    prepare_policy(model, processor)
    model.generation_config.eos_token_id = [*model.generation_config.eos_token_id, *range(5, 400, 8)]
    model.save_pretrained(directory / "model")
    processor.save_pretrained(directory / "model")
    rows = [row | {"messages": []} for row in instruct_rows(make_phantoms(RECORDS, 0, "unlabelled"), 0)]
    rows.insert(3, rows[1] | {"id": "again"})
    rows[7]["images"] = [{"bytes": b"no image", "path": None}]
    return {"model_name_or_path": str(directory / "model"), "images": write_images(directory / "images", rows)}


def arguments(inputs, directory, **kwargs):
    given = inputs | FAST | {"output_dir": str(directory)} | kwargs
    classes = (GenerateArguments, TransformersSettings, ServerSettings)
    return [cls(**{item.name: given[item.name] for item in fields(cls) if item.name in given}) for cls in classes]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    main(*arguments(inputs, directory))
    return directory


def files(directory):
    """Return all files of a finished stage except its record."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("stage.json", ".stage.lock")
    }


def test_a_run_writes_its_files_and_counts(finished, inputs):
    candidates = load_records(finished / "candidates", "train")
    assert conform(candidates, "candidates") is candidates
    counts = json.loads((finished / "stage.json").read_text())["counts"]
    rejected = read_jsonl(finished / "rejected.jsonl")
    assert counts["records"] == RECORDS
    assert counts["questions"] == 2 * (RECORDS - 1)
    assert counts["candidates"] == len(candidates) > 8
    assert counts["answers"] == 2 * len(candidates)
    assert counts["rejected"]["unreadable_image"] == counts["rejected"]["repeated_images"] == 1
    assert sum(counts["rejected"].values()) == len(rejected)
    assert counts["questions"] == len(candidates) + len(rejected) - 2, "every question is a candidate or rejected"
    assert all(set(row) == {"id", "reason", "value"} for row in rejected)
    order = list(load_records(inputs["images"], "train")["id"])
    positions = [order.index(key.partition("#")[0]) for key in candidates["id"]]
    assert positions == sorted(positions), "in the order of the images"
    models = {json.loads(text)["model"] for text in candidates["generation"]}
    assert models == {Path(inputs["model_name_or_path"]).name}, "local paths are private"
    shards = [name for name in files(finished) if name.startswith("candidates")]
    assert len(shards) == -(-len(candidates) // 5)
    assert len(files(finished)) == len(shards) + 1, "no other file is left"


def test_a_finished_stage_is_skipped(finished, inputs, capsys):
    before = files(finished)
    main(*arguments(inputs, finished, batch_size=7))
    assert files(finished) == before
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="temperature: 1.2 before, 0.9 now"):
        main(*arguments(inputs, finished, temperature=0.9))


@pytest.mark.parametrize("after", [1, 6])
def test_an_interrupted_run_resumes(finished, inputs, tmp_path, monkeypatch, after):
    class Killed(BaseException):
        pass

    def killed(self, *args):
        for index, outcome in enumerate(outcomes(self, *args)):
            if index == after:
                raise Killed
            yield outcome

    def counted(self, windows):
        return finished_records(self, (window_sizes.append(len(window)) or window for window in windows))

    outcomes, finished_records, window_sizes = CandidateGenerator.outcomes, CandidateGenerator._finished, []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CandidateGenerator, "outcomes", killed)
        main(*arguments(inputs, tmp_path / "out"))
    assert not (tmp_path / "out" / "candidates").exists()
    monkeypatch.setattr(CandidateGenerator, "_finished", counted)
    main(*arguments(inputs, tmp_path / "out"))
    assert files(tmp_path / "out") == files(finished)
    assert sum(window_sizes) == RECORDS - after // 4 * 4, "whole windows are not computed again"


def test_a_run_interrupted_while_writing_files_resumes(finished, inputs, tmp_path, monkeypatch):
    """The resumed run samples no text again."""
    from medst_trl.data import schema as shards

    class Killed(BaseException):
        pass

    def killed(path, rows, features):
        if "00001-of" in path.name:
            raise Killed
        write(path, rows, features)

    write = shards._write_shard
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards, "_write_shard", killed)
        main(*arguments(inputs, tmp_path / "out"))
    monkeypatch.setattr(CandidateGenerator, "_finished", None)
    main(*arguments(inputs, tmp_path / "out"))
    assert files(tmp_path / "out") == files(finished)


def test_rounds_share_no_images(inputs, tmp_path):
    seen = []
    for round_number in range(2):
        directory = tmp_path / f"round_{round_number}"
        main(*arguments(inputs, directory, skip_records=4 * round_number, max_records=4))
        assert json.loads((directory / "stage.json").read_text())["counts"]["records"] == 4
        seen.append({image for row in load_records(directory / "candidates", "train")["image_ids"] for image in row})
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_a_run_without_candidates_reports_the_reasons(inputs, tmp_path, monkeypatch):
    """A second run reports them again without sampling."""
    args = arguments(inputs, tmp_path / "out", english_questions=True, max_records=6)
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=r"All of 12 questions about 6 images were rejected: .*not_a_question.*add --overwrite",
        ):
            main(*args)
        monkeypatch.setattr(CandidateGenerator, "_finished", None)
    reasons = [row["reason"] for row in read_jsonl(tmp_path / "out" / "rejected.jsonl")]
    assert len(reasons) == 12 + 1
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["status"] == "running"


def test_a_run_that_wrote_nothing_leaves_no_record(finished, inputs, tmp_path, monkeypatch):
    """For example, the model is missing or the first text cannot be sampled."""
    out = tmp_path / "out"
    broken = tmp_path / "model"
    broken.mkdir()

    def failing(self, records):
        raise UserError("no memory")

    with pytest.raises(UserError, match="model"):
        main(*arguments(inputs, out, model_name_or_path=str(broken)))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no memory"):
        patch.setattr(CandidateGenerator, "_finished", failing)
        main(*arguments(inputs, out, temperature=0.7))
    assert not files(out)
    main(*arguments(inputs, out))
    assert files(out) == files(finished)


def test_a_run_that_wrote_texts_keeps_its_record(inputs, tmp_path, monkeypatch):
    def failing(self, *record):
        if (tmp_path / "out" / ".generated.jsonl.incomplete").stat().st_size:
            raise UserError("no memory")
        return steps(self, *record)

    steps = CandidateGenerator._steps
    monkeypatch.setattr(CandidateGenerator, "_steps", failing)
    with pytest.raises(UserError, match="no memory"):
        main(*arguments(inputs, tmp_path / "out"))
    with pytest.raises(UserError, match="temperature: 1.2 before, 0.7 now"):
        main(*arguments(inputs, tmp_path / "out", temperature=0.7))


@pytest.mark.parametrize("status", ["complete", "running"])
def test_instruct_is_read_if_images_do_not_exist(inputs, tmp_path, capsys, status):
    """Only if `medst prepare` is complete. A message and the record name the directory that is read."""
    prepare = tmp_path / "prepare"
    shutil.copytree(inputs["images"], prepare / "instruct")
    (prepare / "stage.json").write_text(json.dumps({"stage": "prepare", "status": status}))
    args = arguments(inputs, tmp_path / "out", images=str(prepare / "images"), max_records=4)
    if status == "running":
        with pytest.raises(UserError, match="images"):
            main(*args)
        return
    main(*args)
    assert capsys.readouterr().out.count(f"Using the images of {prepare / 'instruct'}") == 1
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["settings"]["images"] == str(prepare / "instruct")
    assert [Path(item["path"]).name for item in record["inputs"]["images"]] == ["instruct"]
    main(*arguments(inputs, tmp_path / "out", images=str(prepare / "instruct"), max_records=4))
    assert "nothing to do" in capsys.readouterr().out


def test_images_are_preferred_if_they_exist(inputs, tmp_path):
    prepare = tmp_path / "prepare"
    shutil.copytree(inputs["images"], prepare / "images")
    (prepare / "instruct").mkdir()
    (prepare / "stage.json").write_text(json.dumps({"stage": "prepare", "status": "complete"}))
    main(*arguments(inputs, tmp_path / "out", images=str(prepare / "images"), max_records=4))
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["settings"]["images"] == str(prepare / "images")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "vllm"}, "Unknown engine 'vllm'"),
        ({"engine": "server"}, "base_url"),
        ({"engine": "server", "base_url": "http://localhost:1/v1", "server_kind": "x"}, "server_kind 'x'"),
        ({"num_answers": 1}, "num_answers is 1. It must be at least 2"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5. It must be at least 0.01 and at most 1"),
        ({"max_question_words": 2, "min_question_words": 3}, "max_question_words is 2"),
        ({"skip_records": 99}, "skip_records is 99.*lower skip_records.*with several rounds: max_records"),
        ({"dtype": "float17"}, "Unknown dtype 'float17'.*auto, float32"),
        ({"split": "test"}, "no split 'test'"),
        ({"images": "/nowhere/images"}, "/nowhere/images"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(inputs, change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(*arguments(inputs, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_a_finished_stage_needs_no_server(inputs, tmp_path, monkeypatch):
    from medst_trl.engines.engine import BatchEngine, Reply
    from medst_trl.engines.kinds.server import ServerEngine

    texts = iter(range(10**6))
    monkeypatch.setattr(ServerEngine, "check", lambda self: None)
    monkeypatch.setattr(ServerEngine, "run", BatchEngine.run)
    monkeypatch.setattr(ServerEngine, "_run_group", BatchEngine._run_group, raising=False)
    monkeypatch.setattr(
        ServerEngine, "write", lambda self, prompts, _: [Reply(f"Text {next(texts)}") for _ in prompts]
    )
    settings = {"engine": "server", "base_url": "http://127.0.0.1:9/v1", "model_name_or_path": "a name: of any kind"}
    main(*arguments(inputs, tmp_path / "out", **settings))
    before = files(tmp_path / "out")
    monkeypatch.undo()
    main(*arguments(inputs, tmp_path / "out", **settings | {"base_url": "http://127.0.0.1:10/v1"}))
    assert files(tmp_path / "out") == before


def test_the_parser_has_defaults_and_help():
    help = " ".join(STAGE.make_parser().format_help().split())
    assert "rejects only equal answers" in help and "the model in this process" in help and "--server_kind" in help
    args, *_ = STAGE.make_parser().parse_args_into_dataclasses(
        ["--model_name_or_path", "m", "--images", "i", "--output_dir", "o", "--describe_first"]
    )
    assert (args.temperature, args.top_k, args.top_p, args.describe_first) == (1.2, 100, 0.95, True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_twice_resumes(finished, inputs, tmp_path, ranks):
    """A run killed twice on one or two processes is finished on two, with the files of an uninterrupted run."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def run(processes, kill_after):
        settings = FAST | inputs | {"output_dir": tmp_path / "out"}
        words = [str(kill_after), *(f"--{key}={value}" for key, value in settings.items())]
        return launch_script(script, *words, ranks=processes)

    for kill_after in (1, 3):
        result = run(ranks, kill_after)
        assert result.returncode == -signal.SIGKILL if ranks == 1 else result.returncode != 0, result.stderr
        assert not (tmp_path / "out" / "candidates").exists()
    log = (tmp_path / "out" / ".generated.jsonl.incomplete").read_bytes()
    assert log.count(b"\n") >= 3
    done = run(2, 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("world 2") == 2
    assert done.stdout.count("candidates with") == 1
    assert files(tmp_path / "out") == files(finished)


def test_one_of_several_records_with_the_same_images_is_selected():
    images = {"r0": ["a"], "r1": ["b"], "again": ["b"], "r2": ["c"], "r3": ["d", "e"]}
    rows = Dataset.from_list([{"id": name, "image_ids": ids} for name, ids in images.items()])
    chosen, rejected = select_records(rows)
    assert list(chosen["id"]) == ["r0", "r1", "r2", "r3"]
    assert [(row["id"], row["reason"]) for row in rejected] == [("again", "repeated_images")]
    first, second = (list(select_records(rows, skip, 2)[0]["id"]) for skip in (0, 2))
    assert first + second == ["r0", "r1", "r2", "r3"], "two rounds of two records do not have all records"
    with pytest.raises(UserError, match="4 different sets of images, and skip_records is 4"):
        select_records(rows, 4)

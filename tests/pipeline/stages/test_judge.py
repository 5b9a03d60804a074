# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from datasets import Dataset
from jsonl import read_jsonl
from judge_server import JudgeServer, RandomFaults, prefers_first, reply_with
from letter_prompt import letter_prompt
from phantom_rows import benchmark_rows

from medst_trl.base.errors import UserError
from medst_trl.cli import main as medst
from medst_trl.data.conform import conform
from medst_trl.data.loading import load_records
from medst_trl.data.schema import benchmark_features, features_of, image_part, message, text_part
from medst_trl.demo.oracle import OracleArguments
from medst_trl.demo.phantoms import make_phantoms
from medst_trl.engines.calls import CACHE_FILE
from medst_trl.pipeline.stages.judge import STAGE, JudgeArguments, main
from medst_trl.selftrain.judge.judge import JUDGE_PROMPTS, LOCAL_JUDGES, LocalJudge
from medst_trl.selftrain.judge.pairwise import PairwiseJudge


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def write_candidates(directory, n, split="unlabelled", answers=None):
    """Write questions about phantoms. The first answer is right, and for every second question it is also longer."""
    rows = []
    for number, phantom in enumerate(make_phantoms(n, seed=0, split=split)):
        record = next(iter(benchmark_rows([phantom])))
        question = record["questions"][0]
        content = [image_part(), text_part(question["question"])]
        pair = [f"{question['answer']} indeed", "no way" if number % 2 else "that can not be told from this"]
        rows.append(
            {
                "id": f"{phantom.id}#0",
                "images": [record["image"]],
                "image_ids": [record["image_id"]],
                "prompt": [{k: v for k, v in message("user", content).items() if k != "vusr"}],
                "answers": answers or pair,
                "generation": "{}",
            }
        )
    directory.mkdir(parents=True)
    Dataset.from_list(rows, features=features_of("candidates", grouped=False)).to_parquet(
        directory / "train-00000-of-00001.parquet"
    )
    return str(directory)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    return write_candidates(tmp_path_factory.mktemp("generate") / "candidates", 12)


def arguments(candidates, output_dir, **settings):
    return JudgeArguments(candidates=candidates, output_dir=str(output_dir), **settings)


def run(candidates, output_dir, server, **settings):
    return main(arguments(candidates, output_dir, **{"model": "judge", "base_url": server.base_url} | settings))


@pytest.fixture(scope="module")
def finished(candidates, tmp_path_factory):
    directory = tmp_path_factory.mktemp("judge") / "out"
    with JudgeServer() as server:
        run(candidates, directory, server, validation_share=0.3)
    return directory


def test_outputs_are_complete(finished, candidates):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {"judgements.jsonl", "preferences", "rejected.jsonl", "stage.json", CACHE_FILE}
    judgements, record = read_jsonl(finished / "judgements.jsonl"), json.loads((finished / "stage.json").read_text())
    source = load_records(candidates, "train")
    assert [judgement["candidate"] for judgement in judgements] == list(source["id"])
    assert record["status"] == "complete"
    assert record["counts"]["judge"]["judged"] == 12 and record["counts"]["judge"]["usage"]["all"]["replies"] == 24
    pairs = 0
    for split in ("train", "validation"):
        data = load_records(finished / "preferences", split)
        assert conform(data, "preferences") is data
        assert len(data) == record["counts"]["preferences"][split]["pairs"]
        pairs += len(data)
        for row in data:
            original = source[list(source["id"]).index(row["id"])]
            assert row["images"][0].tobytes() == original["images"][0].tobytes()
            assert {row["chosen"][0]["content"][0]["text"], row["rejected"][0]["content"][0]["text"]} == set(
                original["answers"]
            )
            assert len(row["chosen"][0]["content"][0]["text"]) > len(row["rejected"][0]["content"][0]["text"])
            assert row["score_chosen"] > row["score_rejected"]
    assert pairs == 12 and len(read_jsonl(finished / "rejected.jsonl")) == 0


def test_a_second_run_does_nothing(finished, candidates, capsys):
    with JudgeServer() as server:
        run(candidates, finished, server, validation_share=0.3, concurrency=3, max_cost=None, timeout=9)
        assert not server.bodies
    printed = capsys.readouterr().out
    assert "judged" in printed and "flips" in printed and "preferences, train" in printed


def test_a_changed_setting_is_refused_and_overwriting_reuses_the_replies(candidates, tmp_path):
    with JudgeServer() as server:
        run(candidates, tmp_path / "out", server)
        with pytest.raises(UserError, match="min_margin"):
            run(candidates, tmp_path / "out", server, min_margin=2)
        run(candidates, tmp_path / "out", server, min_margin=2, overwrite=True)
        assert len(server.bodies) == 24


def test_runs_share_a_cache(candidates, tmp_path):
    with JudgeServer() as server:
        for name in "ab":
            run(candidates, tmp_path / name, server, cache_dir=str(tmp_path / "cache"))
            assert not (tmp_path / name / CACHE_FILE).exists()
        assert len(server.bodies) == 24
    first, second = (read_jsonl(tmp_path / name / "judgements.jsonl") for name in "ab")
    assert [row["scores"] for row in first] == [row["scores"] for row in second] and len(first) == 12


def test_pairs_with_images_of_a_benchmark_are_dropped(candidates, tmp_path):
    rows = list(benchmark_rows(make_phantoms(4, seed=0, split="unlabelled")))
    (tmp_path / "benchmark").mkdir()
    path = tmp_path / "benchmark" / "test-00000-of-00001.parquet"
    Dataset.from_list(rows, features=benchmark_features()).to_parquet(path)
    with JudgeServer() as server:
        run(candidates, tmp_path / "out", server, benchmarks=str(tmp_path / "benchmark"))
        assert len(load_records(tmp_path / "out/preferences", "train")) == 8 and len(server.bodies) == 16
        reasons = {row["reason"] for row in read_jsonl(tmp_path / "out/rejected.jsonl")}
        assert all("benchmark" in reason for reason in reasons)
        counts = json.loads((tmp_path / "out/stage.json").read_text())["counts"]["preferences"]
        assert counts["pairs"] == 12 and sum(counts["rejected"].values()) == 4
        assert counts["shared_with_benchmarks"]["image_and_question"] == 4
        written = tmp_path / "requests.jsonl"
        settings = {"benchmarks": str(tmp_path / "benchmark"), "write_batch": str(written)}
        run(candidates, tmp_path / "batch", server, **settings)
        assert len(read_jsonl(written)) == 16
        settings = {"benchmarks": [str(tmp_path / "benchmark")], "keep_benchmark_images": True}
        run(candidates, tmp_path / "kept", server, **settings)
        assert len(load_records(tmp_path / "kept/preferences", "train")) == 12


def test_pairs_of_patients_and_near_copies_of_a_benchmark_are_dropped(candidates, tmp_path, capsys):
    groups = [f"5a17ed-{number // 2:020}" for number in range(12)]
    source = load_records(candidates, "train").remove_columns("group_id").add_column("group_id", groups)
    (tmp_path / "candidates").mkdir()
    source.to_parquet(tmp_path / "candidates" / "train-00000-of-00001.parquet")
    larger = source[11]["images"][0].resize((128, 128))
    rows = list(benchmark_rows(make_phantoms(2, seed=0, split="test")))
    rows = [rows[0] | {"group_id": groups[0]}, rows[1] | {"group_id": None, "image": larger, "image_id": "a" * 64}]
    for salt in ("5a17ed", "07be70"):
        directory = tmp_path / salt
        directory.mkdir()
        own = {groups[0]: groups[0] if salt == "5a17ed" else f"{salt}-{'f' * 20}", None: None}
        held = [row | {"group_id": own[row["group_id"]]} for row in rows]
        path = directory / "test-00000-of-00001.parquet"
        Dataset.from_list(held, features=features_of("benchmark")).to_parquet(path)
        with JudgeServer() as server:
            settings = {"benchmarks": [str(directory)], "validation_share": 0.3}
            run(str(tmp_path / "candidates"), directory / "out", server, **settings)
        rejected = {row["id"]: row["reason"] for row in read_jsonl(directory / "out/rejected.jsonl")}
        same_group = dict.fromkeys(source["id"][:2], "group_in_benchmark") if salt == "5a17ed" else {}
        assert rejected == same_group | {source["id"][11]: "near_copy_in_benchmark"}
        assert len(server.bodies) == 2 * (12 - len(rejected))  # their images are not sent
        assert ("another salt" in capsys.readouterr().out) == (salt == "07be70")
        sides = [
            set(load_records(directory / "out/preferences", split)["group_id"]) for split in ("train", "validation")
        ]
        assert all(sides) and sides[0].isdisjoint(sides[1])


def test_the_pairs_of_one_patient_are_not_divided(candidates, tmp_path):
    source = load_records(candidates, "train").remove_columns("group_id").add_column("group_id", ["P"] * 12)
    (tmp_path / "candidates").mkdir()
    source.to_parquet(tmp_path / "candidates" / "train-00000-of-00001.parquet")
    with JudgeServer() as server:
        run(str(tmp_path / "candidates"), tmp_path / "out", server, validation_share=0.3)
    counts = json.loads((tmp_path / "out/stage.json").read_text())["counts"]["preferences"]
    assert counts["train"]["pairs"] > 0 == counts["validation"]["pairs"]


@pytest.mark.parametrize("version", ["rubric", "paper"])
def test_the_oracle_judges_phantoms_by_their_ground_truth(candidates, tmp_path, version):
    for rate in (0.0, 1.0):
        directory = tmp_path / str(rate)
        main(
            arguments(candidates, str(directory), prompt_version=version),
            OracleArguments(rate),
        )
        verdicts = {judgement["verdict"] for judgement in read_jsonl(directory / "judgements.jsonl")}
        assert verdicts <= {None, int(rate)} and int(rate) in verdicts
        assert "oracle" in read_jsonl(directory / "judgements.jsonl")[0]["model"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\n\n{"image_id": "a", "caption": "b"}\n["a"]\n', "must have JSON lines with image_id and caption"),
        ('{"image_id": 7, "caption": "b"}', "captions.jsonl must have"),
        ('{"image_id": "a", "caption": null}', "captions.jsonl must have"),
        (None, "Correct the path to the reference_captions"),
        ("\n", None),
    ],
)
def test_reference_captions_are_checked(candidates, tmp_path, text, message):
    path = tmp_path / "captions.jsonl"
    if text is not None:
        path.write_text(text)
    settings = {"model": "judge", "reference_captions": str(path), "dry_run": True}
    if message is None:
        return main(arguments(candidates, tmp_path / "out", **settings))
    with pytest.raises(UserError, match=message):
        main(arguments(candidates, tmp_path / "out", **settings))


def test_only_the_chosen_local_judge_is_recorded(candidates, tmp_path):
    main(arguments(candidates, tmp_path / "oracle"), OracleArguments(0.1))
    assert json.loads((tmp_path / "oracle/stage.json").read_text())["settings"]["oracle_error_rate"] == 0.1
    with JudgeServer() as server:
        run(candidates, tmp_path / "out", server)
        record = json.loads((tmp_path / "out/stage.json").read_text())
        assert "oracle_error_rate" not in record["settings"]
        record["settings"]["oracle_error_rate"] = None  # as version 0.1.0 did
        (tmp_path / "out/stage.json").write_text(json.dumps(record))
        run(candidates, tmp_path / "out", server)
        with pytest.raises(UserError, match="oracle_error_rate"):
            main(arguments(candidates, tmp_path / "out"), OracleArguments(0.1))


def test_another_judge_in_place_of_the_oracle_is_refused(candidates, tmp_path):
    settings = arguments(candidates, tmp_path / "out", model="judge", base_url="http://127.0.0.1:9/v1")
    main(settings, OracleArguments(0.1))
    with pytest.raises(UserError, match=r"oracle_error_rate: 0\.1 before, \(not set\) now"):
        main(settings)


def test_a_dry_run_prints_the_estimate_and_a_request(candidates, tmp_path, capsys):
    main(arguments(candidates, str(tmp_path / "out"), model="gpt-4o", dry_run=True))
    printed = capsys.readouterr().out
    assert "12 pairs, 24 calls" in printed and "about $" in printed and "answer_1" in printed
    assert "base64" not in printed and "bytes of image/png" in printed
    assert not (tmp_path / "out").exists()


def test_the_printed_table_has_near_duplicates(candidates, tmp_path, capsys):
    rows = Dataset.from_parquet(f"{candidates}/*.parquet").to_list()
    for row in rows[:5]:
        content = [image_part(), text_part(row["prompt"][0]["content"][1]["text"] + " Please tell.")]
        rows.append(row | {"id": row["id"] + "again", "prompt": [{"role": "user", "content": content}]})
    (tmp_path / "candidates").mkdir()
    data = Dataset.from_list(rows, features=features_of("candidates", grouped=False))
    data.to_parquet(tmp_path / "candidates" / "train-00000-of-00001.parquet")
    with JudgeServer() as server:
        for _ in range(2):  # also when the stage is skipped
            run(str(tmp_path / "candidates"), tmp_path / "out", server, duplicate_similarity=0.5)
            printed = capsys.readouterr().out.split()
            assert printed[printed.index("near_duplicate_question") + 1] == "5"


def test_replies_that_could_not_be_read_are_asked_for_again(candidates, tmp_path):
    """A run that overwrites another sends what nobody could read again, and nothing else."""

    def answer(body):
        return "Lovely." if "no way" in str(body) else JudgeServer().answer(body)

    with JudgeServer(answer=answer) as server:
        run(candidates, tmp_path / "out", server)
    dropped = [row["dropped"] for row in read_jsonl(tmp_path / "out/judgements.jsonl")]
    assert 0 < dropped.count("unparsable") < 12
    with JudgeServer() as server:
        run(candidates, tmp_path / "out", server)  # complete
        assert not server.bodies
        run(candidates, tmp_path / "out", server, overwrite=True)
        assert len(server.bodies) == 2 * dropped.count("unparsable")
    assert {row["dropped"] for row in read_jsonl(tmp_path / "out/judgements.jsonl")} == {None}


def test_batch_files_give_the_same_judgements(candidates, tmp_path, capsys, finished):
    arguments = {
        "candidates": candidates,
        "output_dir": str(tmp_path / "out"),
        "model": "judge",
        "validation_share": 0.3,
    }
    main(JudgeArguments(**arguments, write_batch=str(tmp_path / "requests.jsonl")))
    assert "--read_batch" in capsys.readouterr().out and not (tmp_path / "out").exists()
    lines = []
    for request in read_jsonl(tmp_path / "requests.jsonl"):
        choice = {"message": {"content": JudgeServer().answer(request["body"])}, "finish_reason": "stop"}
        response = {"status_code": 200, "body": {"choices": [choice], "usage": None}}
        lines.append({"custom_id": request["custom_id"], "response": response, "error": None})
    (tmp_path / "part.jsonl").write_text("\n".join(map(json.dumps, lines[:-1])))
    (tmp_path / "rest.jsonl").write_text(json.dumps(lines[-1]))
    with pytest.raises(UserError, match="1 call has no result"):
        main(JudgeArguments(**arguments, read_batch=str(tmp_path / "part.jsonl")))
    assert f"judge: {len(lines) - 1} results read (replies: {len(lines) - 1})." in capsys.readouterr().out
    main(JudgeArguments(**arguments, read_batch=[str(tmp_path / "rest.jsonl")]))
    live, batch = (read_jsonl(directory / "judgements.jsonl") for directory in (finished, tmp_path / "out"))
    keys = ("id", "verdict", "scores", "dropped")
    assert [[row[key] for key in keys] for row in live] == [[row[key] for key in keys] for row in batch]


def test_reference_captions_are_sent(candidates, tmp_path):
    source = load_records(candidates, "train")
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"image_id": source[0]["image_ids"][0], "caption": "A drawn scan of nothing."}) + "\n")
    with JudgeServer() as server:
        run(candidates, tmp_path / "out", server, reference_captions=str(path))
        assert sum("A drawn scan of nothing." in str(body) for body in server.bodies) == 2
    path.write_text('{"image": 1}\n')
    with pytest.raises(UserError, match="KeyError.'image_id'"):
        main(arguments(candidates, str(tmp_path / "x"), model="judge", reference_captions=str(path)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda body: reply_with("rubric", (7, 7)), "temperature"), (prefers_first, "stronger judge")],
)
def test_an_empty_result_is_explained_and_keeps_the_judgements(candidates, tmp_path, answer, message):
    with JudgeServer(answer=answer) as server:
        for _ in range(2):  # the second run reuses the replies
            with pytest.raises(UserError, match=message) as error:
                run(candidates, tmp_path / "out", server)
        assert len(server.bodies) == 24 and "judgements.jsonl" in str(error.value)
    assert len(read_jsonl(tmp_path / "out/judgements.jsonl")) == 12


def test_calls_that_failed_are_named_if_no_pair_is_left(candidates, tmp_path):
    expected = pytest.raises(UserError, match="12 request_failed.*Calls to the judge failed")
    with JudgeServer(fault=lambda number, body: "400" if number else None) as server, expected:
        run(candidates, tmp_path / "out", server, concurrency=1)
    assert "bad request" in (tmp_path / "out/judgements.jsonl").read_text()


def test_the_suggested_lower_margin_works(candidates, tmp_path):
    with JudgeServer() as server:
        with pytest.raises(UserError, match="--min_margin.*--overwrite"):
            run(candidates, tmp_path / "out", server, min_margin=5)
        run(candidates, tmp_path / "out", server, min_margin=1, overwrite=True)
        assert len(server.bodies) == 24


@pytest.mark.parametrize(
    ("record", "is_skipped"),
    [
        ({"stage": "prepare", "status": "complete"}, True), ({"stage": "prepare", "status": "running"}, False),
        ({"stage": "sft", "status": "complete"}, False), ([], False), (None, False),
    ],
)  # fmt: skip
def test_a_benchmark_that_prepare_did_not_write_is_skipped(candidates, tmp_path, capsys, record, is_skipped):
    (tmp_path / "prepare").mkdir()
    if record is not None:
        (tmp_path / "prepare/stage.json").write_text(json.dumps(record))
    with JudgeServer() as server:
        settings = {"benchmarks": [str(tmp_path / "prepare/benchmark")]}
        if is_skipped:
            run(candidates, tmp_path / "out", server, **settings)
            assert "without a benchmark" in capsys.readouterr().out
            run(candidates, tmp_path / "out", server)  # equal to a run without benchmarks
            assert len(server.bodies) == 24
        else:
            with pytest.raises(UserError, match="prepare/benchmark is neither a directory nor"):
                run(candidates, tmp_path / "out", server, **settings)
        if is_skipped:
            with pytest.raises(UserError, match="prepare/bench is neither a directory nor"):
                run(candidates, tmp_path / "out2", server, benchmarks=[str(tmp_path / "prepare/bench")])


def test_a_key_in_the_base_url_is_never_written(candidates, tmp_path):
    url = "http://127.0.0.1:9/v1?api_key=abcdefsecret"
    with pytest.raises(UserError, match="cannot be reached") as error:
        main(arguments(candidates, str(tmp_path / "out"), model="judge", base_url=url, max_retries=0))
    assert "abcdefsecret" not in str(error.value)
    with JudgeServer() as server:
        run(candidates, tmp_path / "out", server)
        run(candidates, tmp_path / "again", server, base_url=f"{server.base_url}?api_key=abcdefsecret")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"abcdefsecret" not in path.read_bytes()


def test_a_reply_with_a_lone_surrogate_is_written(candidates, tmp_path):
    with JudgeServer(answer=lambda body: JudgeServer().answer(body) + "\ud83d") as server:
        run(candidates, tmp_path / "out", server)
    judgements = read_jsonl(tmp_path / "out/judgements.jsonl")
    assert judgements and all(order["reply"].endswith("?") for row in judgements for order in row["orders"])


def test_a_judge_that_often_flips_causes_a_warning(candidates, tmp_path, capsys):
    def answer(body):
        return prefers_first(body) if sum(map(ord, str(body["messages"][1]["content"][-1]))) % 2 else consistent(body)

    consistent = JudgeServer().answer
    with JudgeServer(answer=answer) as server:
        run(candidates, tmp_path / "out", server)
    assert "WARNING: the judge changes its verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model"), ({"base_url": None}, "OPENAI_API_KEY"), ({"candidates": "/nowhere"}, "nowhere"),
        ({"split": "test"}, "no split"), ({"validation_share": 1.0}, "validation_share"), ({"max_cost": 1.0}, "price"),
        ({"oracle_error_rate": 2.0}, "oracle_error_rate"), ({"prompt_version": "x"}, "Unknown judge prompt 'x'"),
        ({"reference_captions": "/nowhere.jsonl"}, "nowhere"), ({"rows_per_shard": 0}, "rows_per_shard"),
        ({"key_variable": "sk-abc-def"}, "not the key itself"), ({"benchmarks": ["/nowhere/b"]}, "nowhere"),
        ({"write_batch": "a", "read_batch": "b"}, "two steps"), ({"order": "sideways"}, "order 'sideways'"),
        ({"duplicate_similarity": 7.0}, "duplicate_similarity"), ({"duplicate_similarity": 0}, "duplicate_similarity"),
        ({"oracle_error_rate": 0.2, "image_size": 0}, "image_size is 0"),
    ],
)  # fmt: skip
def test_invalid_settings_are_reported_before_a_record_is_written(candidates, tmp_path, changes, message):
    settings = {"candidates": candidates, "output_dir": str(tmp_path / "out"), "model": "judge"}
    settings |= {"base_url": "http://127.0.0.1:9/v1"} | changes
    oracle = OracleArguments(settings.pop("oracle_error_rate", None))
    with pytest.raises(UserError, match=message):
        main(JudgeArguments(**settings), oracle)
    assert not (tmp_path / "out").exists()


def test_a_run_without_any_reply_leaves_no_record(candidates, tmp_path):
    with JudgeServer(fault=lambda number, body: "404_model") as server, pytest.raises(UserError, match="judge-1"):
        run(candidates, tmp_path / "out", server, model="jugde")
    with JudgeServer() as server:
        run(candidates, tmp_path / "out", server)
    assert (tmp_path / "out/judgements.jsonl").exists()


def test_an_empty_candidates_directory_is_refused(tmp_path):
    (tmp_path / "candidates").mkdir()
    with pytest.raises(UserError, match="candidates has no split 'train'"):
        main(arguments(str(tmp_path / "candidates"), str(tmp_path / "out"), model="judge"))


def test_the_directory_above_the_candidates_is_not_taken_for_an_empty_one(candidates, tmp_path):
    above = Path(candidates).parent
    with pytest.raises(UserError, match=f"Did you mean {candidates}"):
        main(arguments(str(above), str(tmp_path / "out"), model="judge"))


def test_help_shows_the_command_and_every_setting():
    text = STAGE.make_parser().format_help()
    assert "medst judge" in text
    for name in (*JudgeArguments.__dataclass_fields__, "oracle_error_rate"):
        assert f"--{name}" in text


def judge_process(candidates, output_dir, base_url, **settings):
    words = {"candidates": candidates, "output_dir": output_dir, "model": "judge", "base_url": base_url} | settings
    argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    code = "import sys; from medst_trl.pipeline.stages.judge import *\n"
    code += "main(*STAGE.make_parser().parse_args_and_config(sys.argv[1:])[:2])"
    return subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def judge_killed(candidates, directory, server, kills, **settings):
    """Kill a run after each number of replies in `kills`, then finish it."""
    for replies in (*kills, None):
        process = judge_process(candidates, directory, server.base_url, **settings)
        if replies is None:
            _, errors = process.communicate()
            assert process.returncode == 0, errors.decode()
            return
        while server.delivered.total() < replies and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read().decode()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def check_complete(directory, server, n, allowed_repeats):
    judgements = read_jsonl(directory / "judgements.jsonl")
    assert len({judgement["id"] for judgement in judgements}) == len(judgements) == n
    assert all((judgement["verdict"] is None) == (judgement["dropped"] is not None) for judgement in judgements)
    repeats = sum(number - 1 for number in server.delivered.values())
    assert repeats <= allowed_repeats
    return judgements


def test_a_killed_run_resumes(candidates, tmp_path):
    with JudgeServer(latency=0.05) as server:
        judge_killed(candidates, tmp_path / "out", server, kills=(6,), concurrency=2)
        judgements = check_complete(tmp_path / "out", server, 12, allowed_repeats=2)
    assert all(judgement["verdict"] is not None for judgement in judgements)


@pytest.mark.slow
def test_2000_pairs_are_judged_despite_a_faulty_server_and_two_kills(tmp_path):
    """Every pair is judged or dropped with a reason; only calls in flight at a kill are sent twice."""
    candidates = write_candidates(tmp_path / "candidates", 2000)
    rates = {"429": 0.10, "500": 0.05, "hang": 0.05, "garbage": 0.025, "nonsense": 0.025, "truncate": 0.02}
    with JudgeServer(fault=RandomFaults(rates), latency=0.1, retry_after="0.2") as server:
        judge_killed(
            candidates, tmp_path / "out", server, kills=(800, 2500), concurrency=32, timeout=2, duplicate_similarity=1
        )
        judgements = check_complete(tmp_path / "out", server, 2000, allowed_repeats=2 * 32)
    dropped = [judgement["dropped"] for judgement in judgements if judgement["dropped"]]
    assert len(dropped) < 20 and set(dropped) <= {"request_failed", "unparsable"}
    record = json.loads((tmp_path / "out/stage.json").read_text())
    assert record["counts"]["judge"]["judged"] + sum(record["counts"]["judge"]["dropped"].values()) == 2000


def test_every_command_accepts_the_prompt_of_a_plugin(candidates, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = f"""
output_dir: run
judge: {{model: gpt-4o, prompt_version: letter, candidates: {candidates}, benchmarks: [], min_margin: 2}}
"""
    (tmp_path / "my.yaml").write_text(recipe)
    with pytest.raises(UserError, match="Unknown judge prompt 'letter'. Choose one of"):
        JUDGE_PROMPTS.get("letter")
    with letter_prompt(tmp_path, monkeypatch) as plugin:
        assert "letter (one letter for the better answer)" in " ".join(STAGE.make_parser().format_help().split())
        assert medst(["recipes", "validate", "my.yaml", "--plugins", str(plugin)]) == 0
        assert medst(["run", "my.yaml", "--dry_run", "--plugins", str(plugin)]) == 0
        assert "at most 24 requests to https://api.openai.com/v1, model gpt-4o" in capsys.readouterr().out
        assert (
            PairwiseJudge("m", prompt_version="letter").estimate(load_records(candidates, "train")).output_tokens == 24
        )

        main(
            arguments(candidates, "run/judge", prompt_version="letter"),
            OracleArguments(0.0),
        )
        assert {judgement["verdict"] for judgement in read_jsonl(tmp_path / "run/judge/judgements.jsonl")} <= {None, 0}
        pairs = load_records("run/judge/preferences", "train")
        assert {json.loads(judge)["prompt_version"] for judge in pairs["judge"]} == {"letter"}
        assert medst(["report", "--run", "run", "--output_dir", "page"]) == 0
        assert "letter" in (tmp_path / "page/index.html").read_text(encoding="utf-8")

        with JudgeServer(answer=lambda body: "B") as server:
            with pytest.raises(UserError, match="stronger judge"):
                run(candidates, tmp_path / "flips", server, prompt_version="letter")
            assert {body["seed"] for body in server.bodies} == {7}, "fields of the prompt are in the request"


@dataclass
class CoinArguments(LocalJudge):
    name, summary = "coin", "a coin"

    coin_side: str | None = field(default=None, metadata={"help": "The better answer of every pair."})

    def check(self, args):
        if self.coin_side not in ("A", "B"):
            raise UserError("coin_side must be A or B.")

    def model_name(self, args):
        return f"coin-{self.coin_side}"

    def open(self, args, candidates):
        return lambda pair: (10, 0) if self.coin_side == "A" else (0, 10)


def test_every_command_accepts_a_registered_local_judge(candidates, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(
        f"output_dir: run\njudge: {{coin_side: A, prompt_version: letter, candidates: {candidates}, benchmarks: []}}\n"
    )

    with letter_prompt(tmp_path, monkeypatch):
        LOCAL_JUDGES.register(CoinArguments)
        try:
            assert "--coin_side" in STAGE.make_parser().format_help()
            assert medst(["recipes", "validate", "my.yaml"]) == 0
            assert medst(["run", "my.yaml", "--dry_run"]) == 0
            assert "none: a coin" in capsys.readouterr().out
            with pytest.raises(UserError, match="must be A or B"):
                main(arguments(candidates, "run/judge"), CoinArguments("C"))
            main(
                arguments(candidates, "run/judge", prompt_version="letter", order="single"),
                CoinArguments("A"),
            )
        finally:
            del LOCAL_JUDGES._objects["coin"]
    judgements = read_jsonl(tmp_path / "run/judge/judgements.jsonl")
    assert {(judgement["verdict"], judgement["model"]) for judgement in judgements} == {(0, "coin-A")}
    assert json.loads((tmp_path / "run/judge/stage.json").read_text())["settings"]["coin_side"] == "A"


def test_a_damaged_benchmark_is_refused(candidates, tmp_path):
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "test-00000-of-00002.parquet").write_bytes(b"")
    with JudgeServer() as server, pytest.raises(UserError, match="1 of 2|00000"):
        run(candidates, tmp_path / "out", server, benchmarks=[str(tmp_path / "benchmark")])

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from itertools import chain
from zlib import crc32

import pytest
from datasets import Dataset
from jsonl import read_jsonl
from judge_server import JudgeServer
from phantom_rows import benchmark_rows

from medst_trl.base.errors import UserError
from medst_trl.data.loading import load_records
from medst_trl.data.schema import benchmark_features
from medst_trl.demo.phantoms import make_phantoms
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.engines.kinds.server import ServerSettings
from medst_trl.engines.kinds.transformers import TransformersSettings
from medst_trl.evaluation import vqa
from medst_trl.evaluation.metrics.llava_med import LlavaMedSettings
from medst_trl.pipeline.record import StageRecord, changes_of
from medst_trl.pipeline.stages.evaluate import (
    STAGE,
    EvaluateArguments,
    _count_questions,
    check,
    main,
)


FAST = {"batch_size": 8, "max_new_tokens": 3, "bootstrap_samples": 20}


def evaluate(**settings):
    classes = (EvaluateArguments, TransformersSettings, ServerSettings)
    names = [[item.name for item in fields(cls)] for cls in classes]
    assert settings.keys() <= set(chain(*names))
    main(
        *(
            cls(**{name: settings[name] for name in own if name in settings})
            for cls, own in zip(classes, names, strict=True)
        )
    )


def write_benchmark(directory, n):
    rows = list(benchmark_rows(make_phantoms(n, seed=0, split="test")))
    directory.mkdir(parents=True)
    Dataset.from_list(rows, features=benchmark_features()).to_parquet(directory / "test-00000-of-00001.parquet")
    return str(directory)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    model, processor = tiny_llava(vision_size=32, vision_layers=2, text_size=32, text_layers=1, vocab_size=400)
    model.save_pretrained(directory / "model")
    processor.save_pretrained(directory / "model")
    return {"model_name_or_path": str(directory / "model"), "benchmark": [write_benchmark(directory / "benchmark", 5)]}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    evaluate(output_dir=str(directory), **inputs, **FAST)
    return directory


@pytest.fixture
def predictions(tmp_path):
    rows = [
        {"id": str(i), "image_id": str(i // 2), "answer": "yes", "answer_type": "closed", "prediction": text}
        for i, text in enumerate(["yes", "no", "Yes.", "maybe"])
    ]
    path = tmp_path / "given" / "predictions.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_a_run_writes_predictions_controls_and_scores(finished):
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} == {
        "predictions.jsonl",
        "predictions_blank.jsonl",
        "predictions_shuffled.jsonl",
        "scores.json",
        "contamination.json",
        "stage.json",
    }
    scores, rows = json.loads((finished / "scores.json").read_text()), read_jsonl(finished / "predictions.jsonl")
    assert scores["counts"] == {
        "records": len(rows),
        "rejected": {},
        "cut_off": sum(not r["generation"]["ended"] for r in rows),
    }
    assert scores["data"]["sha256"]
    assert set(scores["scores"]) == {"strict", "llava_med"}
    for name in ("blank", "shuffled"):
        leaf = scores["controls"][name]["strict"]["exact_match"]
        assert leaf["difference"] == pytest.approx(scores["scores"]["strict"]["exact_match"]["value"] - leaf["value"])
        control = read_jsonl(finished / f"predictions_{name}.jsonl")
        assert [row["id"] for row in control] == [row["id"] for row in rows]
        assert {row["generation"]["control"] for row in control} == {name}
    record = json.loads((finished / "stage.json").read_text())
    assert record["status"] == "complete"


def test_a_finished_run_prints_its_table_again(finished, inputs, capsys):
    before = (finished / "scores.json").stat().st_mtime_ns
    evaluate(output_dir=str(finished), **inputs, **FAST | {"batch_size": 3})
    printed = capsys.readouterr().out
    assert (finished / "scores.json").stat().st_mtime_ns == before
    for text in ("exact match", "majority", "real - blank", "real - shuffled", "strict", "llava_med", "split test"):
        assert text in printed


def test_test_images_in_the_training_of_the_model_are_reported(inputs, tmp_path, capsys):
    """The model carries the ids of its training images. A base model carries none, and gets no warning."""
    model = shutil.copytree(inputs["model_name_or_path"], tmp_path / "model")
    seen = load_records(inputs["benchmark"][0], "test")["image_id"][0]
    (model / "training_images.json").write_text(json.dumps({"complete": True, "image_ids": [seen, "f" * 64]}))
    once = FAST | {"controls": []}
    arguments = inputs | {"model_name_or_path": str(model), "output_dir": str(tmp_path / "out")}
    evaluate(**arguments, **once)
    line = (
        "Warning: training data of the model contains parts of the benchmark: exact copies 1 of 5 images, near copies "
    )
    assert line + "not checked" in capsys.readouterr().out
    evaluate(**arguments, **once)
    assert line in capsys.readouterr().out
    (tmp_path / "out" / "contamination.json").unlink()  # as an earlier version left it
    evaluate(**arguments, **once)
    assert "nothing to do" in (printed := capsys.readouterr().out) and line in printed
    assert (tmp_path / "out" / "contamination.json").exists()
    evaluate(**inputs, **once, output_dir=str(tmp_path / "base"))
    assert "Contamination: not checked, no training data of the model is known." in capsys.readouterr().out


def test_a_changed_setting_is_refused(finished, inputs):
    with pytest.raises(UserError, match="max_new_tokens"):
        evaluate(output_dir=str(finished), **inputs, **FAST | {"max_new_tokens": 9})


def test_an_interrupted_run_resumes(finished, inputs, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed_in_a_control(*args, control=None, **kwargs):
        for index, row in enumerate(vqa_answers(*args, control=control, **kwargs)):
            if control == "blank" and index == 5:
                raise Killed
            yield row

    vqa_answers = vqa.answer_benchmark
    args = {"output_dir": str(tmp_path / "out"), **inputs, **FAST}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vqa, "answer_benchmark", killed_in_a_control)
        evaluate(**args)
    assert not (tmp_path / "out" / "scores.json").exists()
    evaluate(**args)
    for name in ("predictions.jsonl", "predictions_blank.jsonl", "predictions_shuffled.jsonl", "scores.json"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_two_ranks_write_the_same_files_as_one(finished, inputs, tmp_path):
    code = (
        "import sys; from medst_trl.base.processes import process_state; process_state()\n"
        "from medst_trl.pipeline.stages.evaluate import STAGE, main;"
        "main(*STAGE.make_parser().parse_args_into_dataclasses(sys.argv[1:]))"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    words = [f"--{key}={value}" for key, value in (FAST | {"output_dir": tmp_path / "out"}).items()]
    words += [f"--model_name_or_path={inputs['model_name_or_path']}", "--benchmark", *inputs["benchmark"]]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *words]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("predictions.jsonl", "predictions_blank.jsonl", "predictions_shuffled.jsonl", "scores.json"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name
    assert not list((tmp_path / "out").glob("*.incomplete*"))
    assert done.stdout.count("Scores are in") == 1


def test_each_of_several_benchmarks_gets_a_directory(inputs, tmp_path):
    other = write_benchmark(tmp_path / "other" / "benchmark", 3)
    benchmark = [*inputs["benchmark"], other]
    args = inputs | {"benchmark": benchmark, "output_dir": str(tmp_path / "out"), "controls": "none"}
    evaluate(**args, **FAST)
    counts = json.loads((tmp_path / "out" / "stage.json").read_text())["counts"]
    names = [os.path.basename(os.path.dirname(name)) for name in benchmark]
    assert set(counts) == set(benchmark)
    for name, path in zip(names, benchmark):
        assert json.loads((tmp_path / "out" / name / "scores.json").read_text())["counts"] == counts[path]
        assert not (tmp_path / "out" / name / "predictions_blank.jsonl").exists()


def test_shuffling_a_single_image_is_refused_before_anything_is_computed(inputs, tmp_path):
    benchmark = write_benchmark(tmp_path / "benchmark", 1)
    with pytest.raises(UserError, match="'shuffled'"):
        evaluate(output_dir=str(tmp_path / "out"), **inputs | {"benchmark": benchmark}, **FAST)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_rescoring_gives_the_same_scores(finished, tmp_path):
    evaluate(predictions=str(finished / "predictions.jsonl"), output_dir=str(tmp_path), bootstrap_samples=20)
    first, again = (json.loads((directory / "scores.json").read_text()) for directory in (finished, tmp_path))
    for key in ("counts", "scores", "controls"):
        assert first[key] == again[key]
    assert (tmp_path / "contamination.json").read_text() == (finished / "contamination.json").read_text()


def test_predictions_of_others_do_not_inherit_the_contamination_beside_them(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "beside") / "answer-file.jsonl"
    path.with_name("predictions.jsonl").rename(path)
    evaluate(predictions=str(path), output_dir=str(tmp_path / "out"), bootstrap_samples=0)
    assert not (tmp_path / "out" / "contamination.json").exists()


def test_the_whole_benchmark_is_compared(inputs, tmp_path):
    model = shutil.copytree(inputs["model_name_or_path"], tmp_path / "model")
    (model / "training_images.json").write_text('{"complete": true, "image_ids": []}')
    options = inputs | FAST | {"controls": [], "max_records": 3, "model_name_or_path": str(model)}
    evaluate(**options, output_dir=str(tmp_path / "out"))
    read = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("scores", "contamination"))
    asked, figures = next(read)["scores"]["strict"], next(read)["figures"]
    assert figures["questions"]["of"] > asked["n"] == 3 and figures["exact"]["of"] > asked["n_images"]


def test_scoring_a_file_needs_no_model(predictions, tmp_path):
    code = (
        "import sys; from medst_trl.pipeline.stages.evaluate import STAGE, main;"
        "main(*STAGE.make_parser().parse_args_into_dataclasses(sys.argv[1:]));"
        "print('IMPORTED', [name for name in ('torch', 'transformers', 'datasets', 'PIL') if name in sys.modules])"
    )
    words = [f"--predictions={predictions}", f"--output_dir={tmp_path / 'out'}", "--variants", "strict"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "IMPORTED []" in done.stdout
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert list(scores) == ["strict"]
    assert scores["strict"]["closed"]["accuracy"]["value"] == 50
    assert scores["strict"]["closed"]["no_verdict"]["value"] == 25


def test_malformed_lines_are_rejected(predictions, tmp_path, capsys):
    lines = predictions.read_text().splitlines()
    predictions.write_text("\n".join([lines[0], lines[1][:30], *lines[2:], '{"id": "x"}']))
    evaluate(predictions=str(predictions), output_dir=str(tmp_path / "out"))
    rejected = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    assert [(row["id"], row["reason"]) for row in rejected] == [("row 2", "not JSON"), ("x", "no answer")]
    counts = json.loads((tmp_path / "out" / "stage.json").read_text())["counts"]
    assert counts == {"records": 3, "rejected": {"not JSON": 1, "no answer": 1}, "cut_off": 0}
    assert "2 lines were rejected (1 not JSON, 1 no answer)" in capsys.readouterr().out


def test_files_of_other_projects_are_scored(inputs, finished, tmp_path, capsys):
    """Answers in LLaVA-Med's format, joined with the benchmark, get the scores and controls of the original run."""
    for path in finished.glob("predictions*.jsonl"):
        rows = [
            {"question_id": row["id"], "prompt": row["question"], "text": row["prediction"], "metadata": {}}
            for row in read_jsonl(path)
        ]
        (tmp_path / path.name).write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    common = {"predictions": str(tmp_path / "predictions.jsonl"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match="Give the benchmark that it answers"):
        evaluate(**common)  # leaves no record that would refuse the next run
    evaluate(**common, benchmark=inputs["benchmark"], bootstrap_samples=20)
    before, after = (json.loads((directory / "scores.json").read_text()) for directory in (finished, tmp_path / "out"))
    assert after["scores"] == before["scores"] and after["controls"] == before["controls"]
    assert after["format"] == "llava_med"
    assert after["counts"]["rejected"] == {"repeated id": 1}
    assert [row["reason"] for row in read_jsonl(tmp_path / "out" / "rejected.jsonl")] == ["repeated id"]
    kept, original = (read_jsonl(directory / "predictions.jsonl") for directory in (tmp_path / "out", finished))
    assert [(row["id"], row["prediction"]) for row in kept] == [(row["id"], row["prediction"]) for row in original]

    results = [
        {"question": row["question"], "answer": row["answer"], "response": row["prediction"]} for row in original
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    common = {"predictions": str(tmp_path / "results.json"), "output_dir": str(tmp_path / "guessed")}
    evaluate(**common, predictions_format="medevalkit", bootstrap_samples=0, controls=["none"])
    assert f"{len(original)} count as closed if" in capsys.readouterr().out
    assert json.loads((tmp_path / "guessed" / "scores.json").read_text())["scores"]["strict"]["n"] == len(original)
    with pytest.raises(UserError, match="holds no prediction.*LLaVA-Med's answer files"):
        evaluate(**common | {"output_dir": str(tmp_path / "x")}, predictions_format="llava_med")


def test_control_files_of_other_questions_are_refused(predictions, tmp_path):
    first, *_ = predictions.read_text().splitlines()
    (predictions.parent / "predictions_blank.jsonl").write_text(first)
    with pytest.raises(UserError, match="same questions"):
        evaluate(predictions=str(predictions), output_dir=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "Nothing to evaluate"),
        ({"model_name_or_path": "x"}, "Nothing to evaluate"),
        ({"predictions": "p", "model_name_or_path": "x"}, "either predictions"),
        ({"predictions": "p", "benchmark": ["a", "b"]}, "at most one benchmark"),
        ({"predictions": "p", "predictions_format": "coco"}, "predictions format 'coco'"),
        ({"model_name_or_path": "x", "benchmark": ["b"], "predictions_format": "medst"}, "Give that file"),
        ({"predictions": "p", "controls": ["noise"]}, "control 'noise'"),
        ({"predictions": "p", "variants": "loose"}, "metric 'loose'"),
        ({"predictions": "p", "bootstrap_samples": -1}, "bootstrap_samples"),
        ({"model_name_or_path": "x", "benchmark": ["b"], "engine": "servr"}, "engine 'servr'. Did you mean 'server'"),
        ({"model_name_or_path": "x", "benchmark": ["b"], "engine": "server"}, "base_url must start with http://"),
        ({"model_name_or_path": "x", "benchmark": ["b"], "batch_size": 0}, "batch_size is 0"),
        ({"predictions": "/nowhere/p.jsonl"}, "/nowhere/p.jsonl"),
    ],
)
def test_invalid_settings_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate(output_dir=str(tmp_path / "out"), **change)


def test_an_unknown_closed_rule_is_refused():
    words = ["--output_dir", "o", "--predictions", "p", "--closed_rule", "x"]
    with pytest.raises(UserError, match="invalid choice: 'x'"):
        STAGE.make_parser().parse_args_into_dataclasses(words)
    with pytest.raises(UserError, match="Unknown closed_rule 'x'. Choose one of gated, substring, drop_misses"):
        LlavaMedSettings(closed_rule="x")


def test_the_parser_reads_lists_and_metric_settings():
    words = ["--output_dir", "o", "--benchmark", "a", "b", "--controls", "none", "--predictions", "p"]
    assert "shuffled" in STAGE.make_parser().format_help()
    args, *settings = STAGE.make_parser().parse_args_into_dataclasses(words)
    assert (args.benchmark, args.controls, args.variants) == (["a", "b"], [], ["strict", "llava_med"])
    for defaults in (TransformersSettings(), ServerSettings(), LlavaMedSettings(closed_rule="gated")):
        assert defaults in settings


def request_of(body):
    """Return the question of a request and the URL of its image, or None for the request that checks the server."""
    content = body["messages"][-1]["content"]
    if not any(part["type"] == "image_url" for part in content):
        return None
    image, text = content
    return text["text"], image["image_url"]["url"]


def requests_to(server):
    return [request for body in server.bodies if (request := request_of(body))]


def evaluate_hosted(server, inputs, directory, **settings):
    evaluate(
        output_dir=str(directory), engine="server", model_name_or_path="gpt-4o",
        concurrency=2, benchmark=inputs["benchmark"], max_new_tokens=3, bootstrap_samples=20,
        **{"base_url": server.base_url} | settings,
    )  # fmt: skip


def test_a_hosted_model_is_evaluated_with_controls(finished, inputs, tmp_path):
    with JudgeServer(answer=lambda body: str(crc32(repr(request_of(body)).encode()) % 7)) as server:
        evaluate_hosted(server, inputs, tmp_path / "out")
        requests = requests_to(server)
        assert {body["model"] for body in server.bodies} == {"gpt-4o"}
        assert all(body["temperature"] == 0 for body in server.bodies[1:])
    rows = {
        control: read_jsonl(tmp_path / "out" / f"predictions{control and '_' + control}.jsonl")
        for control in ("", "blank", "shuffled")
    }
    n = len(rows[""])
    assert [row["id"] for row in rows[""]] == [row["id"] for row in read_jsonl(finished / "predictions.jsonl")]
    real, blank, shuffled = requests[:n], requests[n : 2 * n], requests[2 * n :]
    assert len(shuffled) == n and len({image for _, image in blank}) == 1
    assert {image for _, image in shuffled} == {image for _, image in real} and set(shuffled) != set(real)
    for control, found in rows.items():
        for row in found:
            assert row["generation"]["engine"] == "server" and row["generation"]["model"] == "gpt-4o"
            assert row["generation"]["control"] == (control or None)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["controls"].keys() == {"blank", "shuffled"} and scores["model"] == "gpt-4o"
    settings = json.loads((tmp_path / "out" / "stage.json").read_text())["settings"]
    assert settings["engine"] == "server" and "dtype" not in settings


def test_an_interrupted_hosted_run_sends_only_the_remaining_requests(inputs, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed_in_a_control(*args, control=None, **kwargs):
        for index, row in enumerate(answers(*args, control=control, **kwargs)):
            if control == "blank" and index == 5:
                raise Killed
            yield row

    answers = vqa.answer_benchmark
    with JudgeServer(answer=lambda body: "yes") as server:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(vqa, "answer_benchmark", killed_in_a_control)
            evaluate_hosted(server, inputs, tmp_path / "out")
        before = len(requests_to(server))
        evaluate_hosted(server, inputs, tmp_path / "out", base_url=f"{server.base_url}/")
        n = len(read_jsonl(tmp_path / "out" / "predictions.jsonl"))
        assert len(requests_to(server)) - before == 2 * n - 5
        evaluate_hosted(server, inputs, tmp_path / "out")  # finished
        assert len(requests_to(server)) - before == 2 * n - 5


def test_refused_questions_count_as_wrong(inputs, tmp_path, capsys):
    def fault(number, body):
        return "image" if "modality" in json.dumps(body["messages"]) else None

    with JudgeServer(answer=lambda body: "yes", fault=fault) as server:
        evaluate_hosted(server, inputs, tmp_path / "out", controls="none")
    rows = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    refused = [row for row in rows if "problem" in row["generation"]]
    assert refused and all("modality" in row["question"] and row["prediction"] == "" for row in refused)
    assert refused[0]["generation"]["problem"].startswith("request_failed: 400")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["counts"]["refused"] == len(refused) and scores["counts"]["records"] == len(rows)
    assert f"{len(refused)} questions were refused and count as wrong" in capsys.readouterr().out


def test_a_hosted_run_stops_at_its_budget_and_resumes(inputs, tmp_path):
    prices = {"price_per_million_input_tokens": 1, "price_per_million_output_tokens": 1}
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    with JudgeServer(answer=lambda body: "yes", usage=usage) as server:
        with pytest.raises(UserError, match="--max_cost"):
            evaluate_hosted(server, inputs, tmp_path / "out", controls="none", max_cost=0.001, **prices)
        assert 0.0003 < server.delivered.total() * 101e-6 <= 0.001
        before = len(requests_to(server))
        evaluate_hosted(server, inputs, tmp_path / "out", controls="none", max_cost=1.0, **prices)
        n = len(read_jsonl(tmp_path / "out" / "predictions.jsonl"))
        assert len(requests_to(server)) == n, "a resumed run asks only for what is missing"
        assert before < n


def test_a_failed_server_check_leaves_no_record(inputs, tmp_path):
    with JudgeServer(fault=lambda number, body: "404_model") as server, pytest.raises(UserError, match="no model"):
        evaluate_hosted(server, inputs, tmp_path / "out")
    with JudgeServer(answer=lambda body: "yes") as server:
        evaluate_hosted(server, inputs, tmp_path / "out", controls="none", max_records=2)
    assert len(read_jsonl(tmp_path / "out" / "predictions.jsonl")) == 2


def test_questions_are_counted_whatever_the_name_of_the_directory(tmp_path):
    directory = tmp_path / "questions=1"
    directory.mkdir()
    for number in range(2):
        rows = Dataset.from_dict({"questions": [["a", "b"]]})
        rows.to_parquet(directory / f"test-{number:05d}-of-00002.parquet")
    assert _count_questions(str(directory), "test").number == 4


@pytest.mark.parametrize("name", ["test.jsonl", "test.parquet"])
def test_questions_of_other_files_are_not_counted(tmp_path, name):
    rows = Dataset.from_dict({"question": ["a", "b"]})
    (rows.to_json if name.endswith("jsonl") else rows.to_parquet)(tmp_path / name)
    assert _count_questions(str(tmp_path), "test").number is None


def test_a_check_changes_no_settings_and_the_batch_size_is_not_compared(inputs, tmp_path):
    arguments, settings = EvaluateArguments(output_dir=str(tmp_path), **inputs), TransformersSettings()
    check(arguments, settings)
    assert settings.batch_size is None
    StageRecord.of(STAGE, arguments, replace(settings, batch_size=16), inputs={}).finish()
    assert changes_of(STAGE, arguments, settings) == []

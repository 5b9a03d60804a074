# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test predictions files of medst_trl. tests/interop tests those of other projects."""

import json

import pytest
from commands import run_medst

from medst_trl.base.errors import UserError
from medst_trl.evaluation.predictions import read_predictions


def test_malformed_lines_are_rejected(tmp_path):
    good = {"id": "a", "answer": "yes", "answer_type": "closed", "prediction": "yes"}
    lines = [
        json.dumps(good),
        '{"id": "b", "answer": "ye',
        "",
        "[1, 2]",
        json.dumps(good | {"id": "c", "prediction": None}),
        json.dumps(good | {"id": "d", "answer_type": "both"}),
        json.dumps(good),
        json.dumps(good | {"id": "e", "answer": "\ud800"}),
    ]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode() + b"\n\xff\xfe\n")
    records, rejected = read_predictions(path)
    assert [row["id"] for row in records] == ["a"]
    assert [(row["id"], row["reason"]) for row in rejected] == [
        ("row 2", "not JSON"),
        ("row 3", "not a JSON object"),
        ("c", "no prediction"),
        ("d", "unknown answer_type"),
        ("a", "repeated id"),
        ("row 7", "invalid Unicode"),
        ("row 8", "not JSON"),
    ]
    json.dumps(rejected).encode()


@pytest.mark.parametrize("content", [b"", b"\n", b"no json", None])
def test_files_without_predictions_are_refused(tmp_path, content):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"p\.jsonl"):
        read_predictions(path)


PLUGIN = """
from medst_trl.evaluation.predictions import PREDICTION_FORMATS, PredictionFormat


def rows(path, needs):
    for number, line in enumerate(path.read_text().splitlines()):
        answer, prediction = line.split("|")
        yield number, {"answer": answer, "prediction": prediction}


PREDICTION_FORMATS.register(
    PredictionFormat(
        name="bars",
        summary="answer and prediction between bars",
        expected="Each line has an answer, a bar and a prediction.",
        needs=("answer", "prediction"),
        guess=lambda path, first: path.suffix == ".bars",
        record=lambda row, number: row | {"id": str(number), "answer_type": "open"},
        rows=rows,
    )
)
"""


def test_a_format_of_a_plugin_is_detected_and_scored(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "p.bars").write_text("lung|a lung\nleft|right\n")
    evaluate = ("evaluate", "--plugins", "plugin.py")
    text = run_medst(tmp_path, *evaluate, "--help").stdout
    assert "bars (answer and prediction between bars)" in " ".join(text.split())
    run_medst(tmp_path, *evaluate, "--predictions", "p.bars", "--output_dir", "out", "--variants", "strict")
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert content["format"] == "bars" and content["scores"]["strict"]["exact_match"]["value"] == 50
    written = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in written] == ["a lung", "right"]

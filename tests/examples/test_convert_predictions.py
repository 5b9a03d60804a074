# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The example converts predictions between formats, and the examples report invalid arguments in one message."""

import json
import runpy
from pathlib import Path

import pytest
from jsonl import read_jsonl

from medst_trl.base.errors import UserError


RECORDS = [
    {"id": f"q-{number}", "image_id": "a", "question": f"Is it {number}?", "answer": "yes", "answer_type": "closed",
     "question_type": "PRES", "prediction": text}
    for number, text in enumerate(["yes", "=1+1", "a\tb\nc", ""])
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convert_predictions", ["no.jsonl", "a.tsv", "vlmevalkit"], "no.jsonl cannot be read"),
        ("convert_predictions", ["no.jsonl"], "required: target"),
        ("convert_preferences", ["no.json", "images"], "three or four paths"),
        ("convert_preferences", ["no.json", "images", "directory"], "image_folder is not a directory: images"),
        ("score_predictions", ["no.jsonl"], "no.jsonl cannot be read"),
    ],
)
def test_invalid_arguments_end_in_a_message(name, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(path), *arguments])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(path), run_name="__main__")
    assert error.value.code
    assert message in capsys.readouterr().err + str(error.value.code)


def test_every_format_is_converted_and_read_back(tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "convert_predictions.py"))["main"]
    steps = [
        ("predictions.jsonl", "answers.jsonl", "llava_med"),
        ("answers.jsonl", "table.tsv", "vlmevalkit"),
        ("table.tsv", "results.json", "medevalkit"),
        ("results.json", "back.jsonl", "medst"),
    ]
    lines = [json.dumps(record) for record in RECORDS]
    (tmp_path / steps[0][0]).write_text("\n".join([*lines, lines[0]]))
    counts = [main(str(tmp_path / source), str(tmp_path / target), format) for source, target, format in steps]
    assert counts == [{"records": 4, "repeated id": 1}, *[{"records": 4}] * 3]
    assert "4 predictions, 1 rejected {'repeated id': 1}" in capsys.readouterr().out
    back = read_jsonl(tmp_path / "back.jsonl")
    assert [{key: row[key] for key in RECORDS[0]} for row in back] == RECORDS

    # LLaVA-Med's answer files contain neither right answers nor images. Its file of questions does.
    rows = [json.loads(line) | {"metadata": {}} for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gold = str(tmp_path / "answers_questions.json")
    assert main(str(tmp_path / "plain.jsonl"), str(tmp_path / "joined.jsonl"), "medst", gold) == {"records": 4}
    joined = read_jsonl(tmp_path / "joined.jsonl")
    assert [row["prediction"] for row in joined] == [record["prediction"] for record in RECORDS]
    assert [row["answer"] for row in joined] == ["yes"] * 4
    with pytest.raises(UserError, match="holds no right answers"):
        main(str(tmp_path / "plain.jsonl"), str(tmp_path / "none.jsonl"))

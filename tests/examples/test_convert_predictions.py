# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""From one project's predictions to another's, as the example's page says."""

import json
import runpy
from pathlib import Path

import pytest

from medst_trl.errors import UserError


RECORDS = [
    {"id": f"q-{number}", "image_id": "a", "question": f"Is it {number}?", "answer": "yes", "answer_type": "closed",
     "question_type": "PRES", "prediction": text}
    for number, text in enumerate(["yes", "=1+1", "a\tb\nc", ""])
]  # fmt: skip


def test_there_and_back(tmp_path, capsys):
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
    assert "4 predictions, 1 set aside {'repeated id': 1}" in capsys.readouterr().out
    back = [json.loads(line) for line in (tmp_path / "back.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in RECORDS[0]} for row in back] == RECORDS

    # LLaVA-Med's own answers know neither the right ones nor the images; its file of questions does
    rows = [json.loads(line) | {"metadata": {}} for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gold = str(tmp_path / "answers_questions.json")
    assert main(str(tmp_path / "plain.jsonl"), str(tmp_path / "joined.jsonl"), "medst", gold) == {"records": 4}
    joined = [json.loads(line) for line in (tmp_path / "joined.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in joined] == [record["prediction"] for record in RECORDS]
    assert [row["answer"] for row in joined] == ["yes"] * 4
    with pytest.raises(UserError, match="holds no right answers"):
        main(str(tmp_path / "plain.jsonl"), str(tmp_path / "none.jsonl"))

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are, and do what they say."""

import json
import runpy
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


def _main(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_training(tmp_path):
    question = _main("train_self_questioning")(None, None, str(tmp_path), 2)
    assert question
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "chat_template.jinja").is_file()


def test_collating(capsys):
    trained = _main("collate_questions")()
    assert trained["questions"][0] != trained["questions"][1]  # drawn anew
    assert trained["answers"][0] == trained["answers"][1]
    assert "<vusr>" in capsys.readouterr().out


def test_scoring(tmp_path, capsys):
    scores = _main("score_predictions")()
    assert (
        scores["strict"]["closed"]["accuracy"]["value"] == 50
        and scores["llava_med"]["closed"]["accuracy"]["value"] == 100
    )
    row = {"id": "1", "answer": "yes", "answer_type": "closed", "prediction": "no"}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert _main("score_predictions")(str(path))["strict"]["closed"]["accuracy"]["value"] == 0
    assert "no verdict" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_fits_a_page(path):
    assert len(path.read_text().splitlines()) <= 90

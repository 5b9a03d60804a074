# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import runpy
from pathlib import Path

from judge_server import JudgeServer


PATH = Path(__file__).parents[2] / "examples" / "judge_pairs.py"


def test_the_oracle_prefers_the_true_answers(capsys):
    judgements = runpy.run_path(str(PATH))["main"](pairs=4)
    assert [judgement["verdict"] for judgement in judgements] == [0, 0, 0, 0]
    assert "longer answer wins" in capsys.readouterr().out


def test_any_server_can_be_the_judge(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with JudgeServer() as server:
        runpy.run_path(str(PATH))["main"]("local/model", server.base_url, pairs=2)
    assert {body["model"] for body in server.bodies} == {"local/model"}

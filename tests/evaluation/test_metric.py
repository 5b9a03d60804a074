# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that a metric of a plugin file appears in help, recipes, tables, `scores.json`, cards and reports."""

import json
from functools import partial

import pytest
from commands import run_medst

from medst_trl.base.errors import UserError
from medst_trl.base.registry import Registry
from medst_trl.evaluation.metric import METRICS, Figure, Metric, describe_figures
from medst_trl.hub.cards import model_card
from medst_trl.hub.contents import find_contents


PLUGIN = """
from dataclasses import dataclass, field

from medst_trl.evaluation.metric import METRICS, Figure, Metric


@dataclass
class BrevitySettings:
    max_words: int = field(default=2, metadata={"help": "Words of a short answer."})


def score(row, settings):
    return {} if row.closed else {("short",): float(len(row.prediction.split()) <= settings.max_words)}


METRICS.register(
    Metric(
        name="brevity",
        summary="share of short answers",
        figures=(Figure(("short",), label="short answers", in_card=True, in_chart=True),),
        score=score,
        settings=BrevitySettings,
    )
)
"""


@pytest.fixture
def run_with_plugin(tmp_path):
    """Write the plugin and a predictions file, and return a function that runs `medst` with the plugin."""
    plugin = tmp_path / "brevity.py"
    plugin.write_text(PLUGIN)
    rows = [
        {"id": str(number), "answer": "lung", "answer_type": kind, "prediction": text}
        for number, (kind, text) in enumerate([("open", "a lung"), ("open", "it is a lung"), ("closed", "yes")])
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial(run_medst, tmp_path, MEDST_PLUGINS=str(plugin))


def test_help_lists_a_plugin_metric_and_its_settings(run_with_plugin):
    result = run_with_plugin("evaluate", "--help")
    text = " ".join(result.stdout.split())
    assert "brevity (share of short answers)" in text
    assert "--max_words" in text and "Words of a short answer." in text


def test_scores_of_a_plugin_metric_are_printed_and_written(run_with_plugin, tmp_path):
    arguments = ["evaluate", "--predictions", "predictions.jsonl", "--variants", "brevity", "strict"]
    result = run_with_plugin(*arguments, "--output_dir", "out", "--max_words", "3")
    assert "brevity, max words 3: 3 questions" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("short answers"))
    assert line.split()[2:4] == ["2", "50.0"]
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert content["scores"]["brevity"]["short"]["value"] == 50
    assert content["figures"][0] == {
        "metric": "brevity",
        "path": ["short"],
        "label": "short answers",
        "in_card": True,
        "in_chart": True,
        "by_type": False,
        "higher_is_better": True,
    }
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["settings"]["max_words"] == 3

    again = run_with_plugin(*arguments, "--output_dir", "out", "--max_words", "3")
    assert "nothing to do" in again.stdout and "short answers" in again.stdout
    changed = run_with_plugin(*arguments, "--output_dir", "out", code=2)
    assert "max_words: 3 before, 2 now" in changed.stderr


def test_recipes_accept_a_plugin_metric(run_with_plugin, tmp_path):
    recipe = "output_dir: runs\nevaluate:\n  predictions: predictions.jsonl\n  variants: {}\n  max_words: 1\n"
    (tmp_path / "good.yaml").write_text(recipe.format("[strict, brevity]"))
    (tmp_path / "bad.yaml").write_text(recipe.format("[brevty]"))
    assert "is valid" in run_with_plugin("recipes", "validate", "good.yaml").stdout
    result = run_with_plugin("run", "good.yaml")
    assert "brevity, max words 1" in result.stdout
    result = run_with_plugin("recipes", "validate", "bad.yaml", code=2)
    assert "Unknown metric 'brevty'. Did you mean 'brevity'?" in result.stderr


def test_cards_and_reports_show_a_plugin_metric_without_the_plugin(run_with_plugin, tmp_path):
    arguments = ["--predictions", "predictions.jsonl", "--variants", "brevity", "--output_dir", "run/evaluate"]
    run_with_plugin("evaluate", *arguments)
    result = run_medst(tmp_path, "report", "--run", "run", "--output_dir", "run/report")
    assert "short answers" in result.stdout
    page = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "Short answers, 2 questions" in page  # the title of a chart

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    card = model_card(find_contents(model), "org/name", evaluations=[tmp_path / "run" / "evaluate"])
    assert "| brevity | short answers | 50.0 " in card


def test_runs_without_the_metric_do_not_depend_on_the_plugin(run_with_plugin, tmp_path):
    arguments = ["evaluate", "--predictions", "predictions.jsonl", "--variants", "strict", "--output_dir", "out"]
    run_with_plugin(*arguments)
    result = run_medst(tmp_path, *arguments)
    assert "nothing to do" in result.stdout


def test_built_in_metrics_describe_their_figures():
    described = describe_figures(["strict", "llava_med"])
    assert {figure["metric"] for figure in described} == {"strict", "llava_med"}
    assert [figure["label"] for figure in described if figure["in_card"]] == [
        "exact match", "open: recall", "open: f1", "closed: accuracy", "open: recall", "open: f1", "closed: accuracy",
    ]  # fmt: skip
    assert [figure["path"] for figure in described if not figure["higher_is_better"]] == [
        ["closed", "no_verdict"],
        ["closed", "dropped"],
    ]


def test_incomplete_metrics_are_refused():
    registry = Registry("metric", (), METRICS.parts)
    metric = Metric("brevity", "short answers", figures=(Figure(("short",)),), score=None)
    with pytest.raises(UserError, match="metric 'brevity' of .* lacks score"):
        registry.register(metric)
    with pytest.raises(UserError, match="Two metric objects share the name 'strict'"):
        METRICS.register(METRICS.get("strict"))

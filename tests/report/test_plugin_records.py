# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that cards and the report show a source and a metric of a plugin file without loading the plugin."""

import json
from functools import partial
from pathlib import Path

import pytest
from commands import run_medst

from medst_trl.data.source import SOURCES
from medst_trl.evaluation.metric import METRICS
from medst_trl.hub.cards import dataset_card, model_card
from medst_trl.hub.contents import find_contents
from medst_trl.report import ReportArguments
from medst_trl.report.report import make_report


PLUGIN = """
from PIL import Image

from medst_trl.data.images import MemoryImages
from medst_trl.data.schema import image_part, message, text_part
from medst_trl.data.source import SOURCES, Conversation, Records, Source, SourceCard
from medst_trl.evaluation.metric import METRICS, Figure, Metric


def read(request):
    turns = [message("user", [image_part(), text_part("Shade?")]), message("assistant", [text_part("Grey.")])]
    images = {f"square-{number}": Image.new("L", (8, 8), number) for number in range(3)}
    conversations = [Conversation(name, (name,), turns) for name in images]
    return Records("squares", conversations=conversations, images=MemoryImages(images))


SOURCES.register(
    Source(
        name="squares",
        summary="grey squares",
        read=read,
        card=SourceCard("Grey | squares", homepage="https://example.org/squares", licence="CC0 1.0", synthetic=True),
        needs_data=False,
    )
)
METRICS.register(
    Metric(
        name="brevity",
        summary="length of answers",
        figures=(
            Figure(("short",), label="short answers", in_card=True, in_chart=True),
            Figure(("long",), label="long answers", higher_is_better=False),
        ),
        score=lambda row, settings: {
            ("short",): float(len(row.prediction.split()) < 3), ("long",): float(len(row.prediction.split()) > 5),
        },
    )
)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Write a run with `prepare` and two evaluations, by processes that load the plugin."""
    tmp_path = tmp_path_factory.mktemp("plugin")
    (tmp_path / "plugin.py").write_text(PLUGIN)
    run_with_plugin = partial(run_medst, tmp_path, "--plugins", "plugin.py")
    run_with_plugin("prepare", "--source", "squares", "--output_dir", "run/prepare")
    for name, prediction in (("before", "it is a lung that you see"), ("after", "a lung")):
        row = {"id": "1", "image_id": "a", "answer": "lung", "answer_type": "open", "prediction": prediction}
        (tmp_path / "predictions.jsonl").write_text(json.dumps(row) + "\n")
        directory = f"run/evaluate/{name}"
        run_with_plugin(
            "evaluate", "--predictions", "predictions.jsonl", "--variants", "brevity", "--output_dir", directory
        )
    return tmp_path / "run"


def test_this_process_has_no_plugin():
    assert "squares" not in SOURCES and "brevity" not in METRICS


def test_the_dataset_card_shows_the_source_of_a_plugin(run):
    card = dataset_card(find_contents(run / "prepare" / "instruct"), "org/squares")
    assert "[Grey &#124; squares](https://example.org/squares). License: CC0 1.0" in card
    assert "license: cc0-1.0\n" in card and "| source | squares |" in card


def test_the_model_card_shows_the_metric_of_a_plugin(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    card = model_card(find_contents(tmp_path), "org/model", evaluations=[run / "evaluate" / "after"])
    assert "| brevity | short answers | 100.0 | 1 | - |" in card and "long answers" not in card
    assert "name: brevity short answers" in card


def test_the_report_shows_the_source_and_the_metric_of_a_plugin(run):
    html = make_report(ReportArguments(str(run), bootstrap_samples=10)).html
    assert 'aria-label="Short answers, 1 questions"' in html and 'aria-label="Long answers' not in html
    assert ">short answers</th>" in html and ">long answers</th>" in html
    assert "source</span> squares" in html

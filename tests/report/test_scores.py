# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test which evaluation is the base, stage 1 and the headline: the records decide, not names, times or order."""

import json
import shutil

import made_run
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medst_trl.report import ReportArguments
from medst_trl.report.report import make_report
from medst_trl.report.run_directory import Run
from medst_trl.report.scores import read_comparisons


# What is evaluated, in the order of the columns: a stage's directory, or the name of a model.
MODELS = {
    "base": "org/base", "another": "org/another", "stage 1": "sft/mine", "aligned": "dpo", "merged": "merge",
    "round 1": "round_1/dpo", "round 2": "round_2/dpo", "server": "gpt-4o",
}  # fmt: skip


def train(run, name, stage, model, **more):
    made_run.write_stage(
        run / name, stage, settings={"model_name_or_path": model, "output_dir": str(run / name)}, **more
    )


def evaluate(run, name, phantoms, model, **changes):
    """Evaluate a model as the stage does: the record names it as the recipe did."""
    directory = made_run.evaluate(run, f"evaluate/{name}", phantoms, "sft", 0.5)
    model = str(run / model if (run / model).exists() else model)
    settings = {"model_name_or_path": model, "output_dir": str(directory), **changes}
    for file, change in (("stage.json", {"settings": settings}), ("scores.json", {"model": model})):
        (directory / file).write_text(json.dumps(json.loads((directory / file).read_text()) | change))
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "original"
    phantoms = made_run.prepare(run, 2)
    train(run, "sft/mine", "sft", "org/base@main")
    train(run, "dpo", "dpo", str(run / "sft/mine"))
    train(run, "merge", "merge", str(run / "dpo"))
    train(run, "round_1/dpo", "dpo", str(run / "sft/mine"))
    train(run, "round_2/dpo", "dpo", str(run / "round_1/dpo"))
    for number, model in enumerate(MODELS.values()):
        more = {"engine": "server"} if model == "gpt-4o" else {}
        evaluate(run, f"e{number}", phantoms, model, **more)
    return run


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def report_on(run, **settings):
    return make_report(ReportArguments(str(run), bootstrap_samples=0, **settings))


def columns(run):
    [comparison] = read_comparisons(Run(run), 0)
    return comparison, [
        evaluation.file.content["model"].split("/original/")[-1] for evaluation in comparison.evaluations
    ]


def set_started(run, times):
    for number, hour in enumerate(times):
        path = run / f"evaluate/e{number}/stage.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"started": f"2026-01-01T{hour:02}:00:00+00:00"}))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.permutations(range(len(MODELS))))
def test_columns_are_in_the_order_of_training_whenever_each_was_evaluated(run, times):
    set_started(run, times)
    comparison, found = columns(run)
    assert found == list(MODELS.values())
    assert comparison.headline.trained[0].name == "round_2/dpo" and comparison.before.trained[0].name == "sft/mine"


@pytest.mark.parametrize(
    ("left_out", "before", "headline"),
    [
        ({"server"}, "sft/mine", "round_2/dpo"),
        ({"round 2", "round 1"}, "sft/mine", "dpo"),
        ({"round 2", "round 1", "aligned"}, "sft/mine", "merge"),
        ({"round 2", "round 1", "merged"}, "sft/mine", "dpo"),
        ({"stage 1"}, "org/base", "round_2/dpo"),
        ({"round 2", "round 1", "merged", "aligned"}, "org/base", "sft/mine"),
        (set(MODELS) - {"aligned", "server"}, "dpo", "dpo"),
        (set(MODELS) - {"base", "server"}, "org/base", "org/base"),
        (set(MODELS) - {"server"}, "gpt-4o", "gpt-4o"),
    ],
)
def test_the_headline_is_the_policy_trained_last_beside_the_one_before(run, left_out, before, headline):
    for number, name in enumerate(MODELS):
        if name in left_out:
            shutil.rmtree(run / f"evaluate/e{number}")
    comparison, found = columns(run)
    shown = dict(zip(comparison.evaluations, found))
    assert (shown[comparison.before], shown[comparison.headline]) == (before, headline)


def test_a_moved_run_is_read_as_before(original, run):
    found = columns(run)[1]  # a copy: the original is still there
    assert found == list(MODELS.values())
    page = report_on(run, title="same").html
    moved = shutil.move(original, original.parent / "aside")
    try:
        assert columns(run)[1] == found and report_on(run, title="same").html == page
    finally:
        shutil.move(moved, original)


def test_the_tiles_and_the_gallery_name_stage_1_and_the_aligned_model(run):
    words = " ".join(report_on(run).html.split())
    assert "e6 compared with e2 on " in words and "Change since e2<" in words
    assert "Exact match, e6<" in words and "e0 − e2" not in words and "e6 − e2" in words


@pytest.mark.parametrize("later", [False, True])
def test_an_ablation_is_not_the_headline(run, later):
    """Of several models of the last round, the one that was trained first is, whenever they were evaluated."""
    phantoms = made_run.make_phantoms(2, seed=0, split="test")
    trained = f"2026-01-0{1 + later}T00:00:00+00:00"
    train(run, "round_2/dpo_without_sft", "dpo", str(run / "round_1/dpo"), started=trained)
    evaluate(run, "a", phantoms, "round_2/dpo_without_sft")
    set_started(run, range(9, 1, -1))
    headline = columns(run)[0].headline.trained[0].name
    assert headline == ("round_2/dpo" if later else "round_2/dpo_without_sft")


def test_the_policy_before_is_the_one_that_the_headline_was_trained_from(run):
    """Of several models of stage 1, such as those of ablations."""
    phantoms = made_run.make_phantoms(2, seed=0, split="test")
    for name in ("a_first", "z_last"):
        train(run, f"sft/{name}", "sft", "org/base")
        evaluate(run, name, phantoms, f"sft/{name}")
    comparison, found = columns(run)
    assert found[2:5] != ["sft/mine"] and comparison.before.trained[0].name == "sft/mine"
    shutil.rmtree(run / "evaluate/e2")
    assert columns(run)[0].before.level == 1


def test_rescored_predictions_belong_to_the_policy_that_gave_them(run):
    directory = shutil.copytree(run / "evaluate/e6", run / "evaluate/again")
    for file in ("stage.json", "scores.json"):
        content = json.loads((directory / file).read_text()) | {"model": None}
        content["predictions"] = predictions = str(run / "evaluate/e6/predictions.jsonl")
        content["settings"] = {"predictions": predictions, "output_dir": str(directory)}
        (directory / file).write_text(json.dumps(content))
    [comparison] = read_comparisons(Run(run), 0)
    assert {one.label: one.level for one in comparison.evaluations}["again"] == 2


def test_a_circle_of_records_ends(run):
    for name, model in (("sft/mine", "dpo"), ("dpo", "sft/mine")):
        train(run, name, "sft" if "sft" in name else "dpo", str(run / model))
    assert columns(run)[0].headline.level == 2


def test_an_almost_empty_page_has_a_note(original, tmp_path):
    run = tmp_path / "run"
    made_run.write_stage(run / "prepare", "prepare")
    made_run.write_stage(run / "sft", "sft", status="running")
    [note] = report_on(run).notes
    assert "no scores and no judged pairs" in note and "sft" in note and "evaluate" in note and "dpo" in note
    assert not any("no scores" in note for note in report_on(original).notes)


@pytest.mark.parametrize("unit", ["image", "group"])
def test_the_page_says_over_what_the_intervals_are(run, unit):
    for path in run.glob("evaluate/*/scores.json"):
        content = json.loads(path.read_text())
        for scores in content["scores"].values():
            scores["bootstrap"] = scores.get("bootstrap", {}) | {"unit": unit}
        path.write_text(json.dumps(content))
    assert f"95% bootstrap intervals over {unit}s." in report_on(run).html

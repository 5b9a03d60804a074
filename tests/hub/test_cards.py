# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Cards say what was done and what came out, and nothing that data or paths could smuggle in."""

import json

import pytest
from huggingface_hub import DatasetCard, ModelCard

from medst_trl.base.errors import UserError
from medst_trl.data.schema import preference_features, write_split
from medst_trl.hub.cards import dataset_card, model_card, write_card
from medst_trl.hub.contents import find_contents
from medst_trl.hub.provenance import looks_local, steps_to


ROW = {"id": "a", "images": [], "image_ids": ["i"], "prompt": [], "chosen": [], "rejected": []}


def stage(folder, name, inputs=None, settings=None, **counts):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"stage": name, "status": "complete", "versions": {"trl": "1.16.0"}, "inputs": inputs or {}}
    (folder / "stage.json").write_text(json.dumps(record | {"settings": settings or {}, "counts": counts}))
    return folder


def reads(*folders):
    return [{"path": str(folder), "sha256": "0" * 64} for folder in folders]


@pytest.fixture
def preferences(tmp_path):
    """A dataset that came the whole way, from the images of a benchmark."""
    prepare = stage(tmp_path / "prepare", "prepare", settings={"source": "slake", "data_path": "/hospital/slake"})
    generate = stage(
        tmp_path / "generate", "generate", {"images": reads(prepare / "images")}, {"top_k": 100}, rejected={"empty": 3}
    )
    judge = stage(
        tmp_path / "judge",
        "judge",
        {"candidates": reads(generate / "candidates"), "benchmarks": reads(prepare / "benchmark")},
        {"model": "gpt-4o", "base_url": "http://10.0.0.1/v1", "cache_dir": "x", "benchmarks": ["/hospital"]},
        judge={"flip_rate": 0.123456, "dropped": {"tie": 5}},
    )
    for folder in (prepare / "images", prepare / "benchmark", generate / "candidates"):
        folder.mkdir()
    write_split(judge / "preferences", "train", [ROW] * 2, dict, preference_features(), 2)
    return judge / "preferences"


def test_the_way_of_the_data(preferences):
    assert [step.stage for step in steps_to(preferences)] == ["prepare", "generate", "judge"]
    text = dataset_card(find_contents(preferences), "org/name", license="cc-by-4.0")
    card = DatasetCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.medst_trl_kind == "preferences"
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "train-*.parquet"}]
    for said in (
        "| top_k | 100 |",
        "| model | gpt-4o |",
        "flip_rate | 0.1235",
        "dropped / tie | 5",
        "SLAKE",
        "empty | 3",
    ):
        assert said in text
    for hidden in ("hospital", "10.0.0.1", str(preferences.parent.parent)):
        assert hidden not in text


def test_what_references_say_is_told_and_is_no_data(preferences):
    without = dataset_card(find_contents(preferences), "org/name")
    assert "reference_log_probs" not in without
    (preferences / "reference_log_probs").mkdir()
    (preferences / "reference_log_probs" / "a.parquet").write_bytes(b"")
    card = dataset_card(find_contents(preferences), "org/name")
    told = [line for line in card.splitlines() if line not in without.splitlines()]
    assert 1 <= len(told) <= 2 and "`reference_log_probs`" in told[0]
    assert DatasetCard(card).data.configs == DatasetCard(without).data.configs


def test_inputs_that_have_moved_are_found_in_the_run(preferences, tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    for name in ("prepare", "generate"):
        (tmp_path / name).rename(run / name)
    assert [step.stage for step in steps_to(preferences)] == ["judge"]
    assert [step.stage for step in steps_to(preferences, run)] == ["prepare", "generate", "judge"]


def test_nothing_known_is_no_error(tmp_path):
    write_split(tmp_path, "train", [ROW], dict, preference_features(), 2)
    for record in (None, "{", "[]", '{"stage": "judge", "inputs": []}', '{"stage": "judge"}'):
        if record is not None:
            (tmp_path / "stage.json").write_text(record)
        card = dataset_card(find_contents(tmp_path), "org/name")
        assert "How it was made" not in card and DatasetCard(card).data.license is None


def test_phantoms_have_a_licence(tmp_path):
    stage(tmp_path, "prepare", settings={"source": "phantoms"})
    write_split(tmp_path / "data", "train", [ROW], dict, preference_features(), 2)
    assert DatasetCard(dataset_card(find_contents(tmp_path / "data"), "org/name")).data.license == "apache-2.0"


def test_values_stay_values(tmp_path):
    bad = "<script>alert(1)</script> | [x](http://evil) \n# Heading `{{ 7 * 7 }}`"
    stage(tmp_path, "judge", settings={"model": bad}, **{bad: 1})
    write_split(tmp_path / "data", "train", [ROW], dict, preference_features(), 2)
    text = dataset_card(find_contents(tmp_path / "data"), "org/name")
    assert "<script>" not in text and "\n# Heading" not in text and "[x](" not in text
    assert "{{ 7 * 7 }}" in text and "49" not in text


def model(folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def scores(folder, benchmark, **more):
    folder.mkdir(parents=True)
    value = {"value": 61.5, "n": 30, "interval": [50.0, 70.04], "majority": 55.0}
    content = {"scores": {"strict": {"n": 30, "n_images": 9, "closed": {"accuracy": value}}}, "split": "test"}
    (folder / "scores.json").write_text(json.dumps(content | {"benchmark": benchmark} | more))
    return folder


def test_scores_are_evaluation_results(tmp_path):
    prepare = stage(tmp_path / "prepare", "prepare", settings={"source": "vqa_rad"})
    (prepare / "benchmark").mkdir()
    blank = {"blank": {"strict": {"closed": {"accuracy": {"value": 54.0}}}}}
    evaluations = [
        scores(tmp_path / "evaluate", str(prepare / "benchmark"), controls=blank),
        scores(tmp_path / "others" / "a", "org/bench@main").parent,  # several benchmarks: a folder each
        scores(tmp_path / "others" / "b", "/gone/benchmark").parent,
    ]
    text = model_card(find_contents(model(tmp_path / "model")), "org/name", evaluations=evaluations[:2])
    results = ModelCard(text).data.eval_results
    assert [(result.dataset_type, result.metric_name, result.metric_value) for result in results] == [
        ("vqa_rad", "strict closed accuracy", 61.5),
        ("org/bench", "strict closed accuracy", 61.5),
        ("b", "strict closed accuracy", 61.5),
    ]
    assert "| strict | closed accuracy | 61.5 (50.0 to 70.0) | 30 | 55.0 | 54.0 |" in text and "gone" not in text


def test_scores_of_another_model(tmp_path):
    contents = find_contents(model(tmp_path / "model"))
    own = scores(tmp_path / "own", "org/bench", model=str(contents.folder))
    moved = scores(tmp_path / "moved", "org/bench", model="runs/gone/sft")  # cannot be told
    other = scores(tmp_path / "other", "org/bench", model=str(model(tmp_path / "stage_1")))
    assert model_card(contents, "org/name", evaluations=[own, moved])
    with pytest.raises(UserError, match="scores of .*stage_1, not of"):
        model_card(contents, "org/name", evaluations=[other])


def test_broken_scores(tmp_path):
    contents = find_contents(model(tmp_path / "model"))
    with pytest.raises(UserError, match="no scores.json"):
        model_card(contents, "org/name", evaluations=[tmp_path])
    for content in ("{", "[]", "{}", '{"scores": 3}', '{"scores": {}}', '{"scores": {"strict": []}}'):
        (tmp_path / "scores.json").write_text(content)
        with pytest.raises(UserError, match="not written by `medst evaluate`"):
            model_card(contents, "org/name", evaluations=[tmp_path])


def test_the_card_of_a_run(tmp_path):
    folder = model(tmp_path / "sft")
    stage(folder, "sft", settings={"learning_rate": 2e-4, "logging_steps": 7, "output_dir": str(folder)})
    (folder / "README.md").write_text("a stock card")
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "| learning_rate | 0.0002 |" in text and "logging_steps" not in text
    assert 'load_policy("' in text and "<vusr>" in text and "medst_trl_kind: model" in text


@pytest.mark.parametrize("name", ["/data/x", "~/x", "./x", "../x", "runs/demo/sft", "C:\\models\\x", "file:/x"])
def test_local_names(name):
    assert looks_local(name)


@pytest.mark.parametrize("name", ["gpt-4o", "org/name", "org/name@main", "some judge"])
def test_public_names(name):
    assert not looks_local(name)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that cards show how a result was made and its scores, and that data cannot inject markup or paths."""

import json
from hashlib import sha256

import pytest
from datasets import Dataset, Features
from huggingface_hub import DatasetCard, ModelCard

from medst_trl.base.errors import UserError
from medst_trl.data.schema import preference_features, write_split
from medst_trl.evaluation.contamination import FIGURES
from medst_trl.hub.cards import dataset_card, model_card, read_merged, steps_to, write_card
from medst_trl.hub.contents import find_contents
from medst_trl.policy.chat_template import MARK, TEXT_ROLE_MARK


ROW = {"id": "a", "images": [], "image_ids": ["i"], "prompt": [], "chosen": [], "rejected": []}


def write_stage(directory, name, inputs=None, settings=None, **counts):
    directory.mkdir(parents=True, exist_ok=True)
    record = {"stage": name, "status": "complete", "versions": {"trl": "1.16.0"}, "inputs": inputs or {}}
    (directory / "stage.json").write_text(json.dumps(record | {"settings": settings or {}, "counts": counts}))
    return directory


def stage_inputs(*directories):
    """Return the fingerprints of empty directories."""
    return [{"path": str(directory), "sha256": sha256().hexdigest()} for directory in directories]


@pytest.fixture
def preferences(tmp_path):
    """Write preference pairs about the images of a benchmark, with the records of all stages."""
    prepare = write_stage(
        tmp_path / "prepare", "prepare", settings={"source": "slake", "data_path": "/hospital/slake"}
    )
    generate = write_stage(
        tmp_path / "generate",
        "generate",
        {"images": stage_inputs(prepare / "images")},
        {"top_k": 100},
        rejected={"empty": 3},
    )
    judge = write_stage(
        tmp_path / "judge",
        "judge",
        {"candidates": stage_inputs(generate / "candidates"), "benchmarks": stage_inputs(prepare / "benchmark")},
        {"model": "gpt-4o", "base_url": "http://10.0.0.1/v1", "cache_dir": "x", "benchmarks": ["/hospital"]},
        judge={"flip_rate": 0.123456, "dropped": {"tie": 5}},
    )
    for directory in (prepare / "images", prepare / "benchmark", generate / "candidates"):
        directory.mkdir()
    write_split(judge / "preferences", "train", [ROW] * 2, dict, preference_features(), 2)
    return judge / "preferences"


def test_a_dataset_card_lists_the_stages_in_pipeline_order_without_paths(preferences):
    assert [step["stage"] for step in steps_to(preferences)] == ["prepare", "generate", "judge"]
    text = dataset_card(find_contents(preferences), "org/name", license="cc-by-4.0")
    card = DatasetCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.medst_trl_kind == "preferences"
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "train-*.parquet"}]
    for expected in (
        "| top_k | 100 |",
        "| model | gpt-4o |",
        "flip_rate | 0.1235",
        "dropped / tie | 5",
        "SLAKE",
        "empty | 3",
    ):
        assert expected in text
    for hidden in ("hospital", "10.0.0.1", str(preferences.parent.parent)):
        assert hidden not in text


def test_a_dataset_in_the_format_of_trl_has_a_card(tmp_path):
    columns = ("images", "prompt", "chosen", "rejected")
    features = Features({name: feature for name, feature in preference_features().items() if name in columns})
    write_split(tmp_path, "train", [{name: [] for name in columns}], dict, features, 2)
    card = dataset_card(find_contents(tmp_path), "org/name")
    assert "| train | 1 |  |" in card and DatasetCard(card).data.medst_trl_kind == "preferences"


def test_pairs_in_files_of_any_name_can_be_published(tmp_path):
    row = {"images": [], "prompt": "Which plane?", "chosen": "Axial.", "rejected": "Sagittal."}
    for name in ("train_one", "train_two", "val"):
        Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
    contents = find_contents(tmp_path)
    assert contents.kind == "preferences"
    assert contents.files == ["train_one.parquet", "train_two.parquet", "val.parquet"]
    files = DatasetCard(dataset_card(contents, "org/name")).data.configs[0]["data_files"]
    assert files == [
        {"split": "train", "path": ["train_one.parquet", "train_two.parquet"]},
        {"split": "validation", "path": "val.parquet"},
    ]


def test_reference_log_probs_are_mentioned_and_are_not_a_data_file(preferences):
    without = dataset_card(find_contents(preferences), "org/name")
    assert "reference_log_probs" not in without
    (preferences / "reference_log_probs").mkdir()
    (preferences / "reference_log_probs" / "a.jsonl").write_bytes(b"")
    card = dataset_card(find_contents(preferences), "org/name")
    added = [line for line in card.splitlines() if line not in without.splitlines()]
    assert 1 <= len(added) <= 2 and "`reference_log_probs`" in added[0]
    assert DatasetCard(card).data.configs == DatasetCard(without).data.configs


def test_inputs_that_have_moved_are_found_in_the_run_directory(preferences, tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    for name in ("prepare", "generate"):
        (tmp_path / name).rename(run / name)
    assert [step["stage"] for step in steps_to(preferences)] == ["judge"]
    (tmp_path / "judge").rename(run / "judge")
    assert [step["stage"] for step in steps_to(run / "judge" / "preferences")] == ["prepare", "generate", "judge"]


def test_a_missing_or_damaged_record_shortens_the_card(tmp_path):
    write_split(tmp_path, "train", [ROW], dict, preference_features(), 2)
    for record in (None, "{", "[]", '{"stage": "judge", "inputs": []}', '{"stage": "judge"}'):
        if record is not None:
            (tmp_path / "stage.json").write_text(record)
        card = dataset_card(find_contents(tmp_path), "org/name")
        assert "How it was made" not in card and DatasetCard(card).data.license is None


def test_a_dataset_of_synthetic_images_has_the_licence_of_its_source(tmp_path):
    write_stage(tmp_path, "prepare", settings={"source": "phantoms"})
    write_split(tmp_path / "data", "train", [ROW], dict, preference_features(), 2)
    assert DatasetCard(dataset_card(find_contents(tmp_path / "data"), "org/name")).data.license == "apache-2.0"


def test_values_from_data_cannot_become_markup(tmp_path):
    bad = "<script>alert(1)</script> | [x](http://evil) \n# Heading `{{ 7 * 7 }}`"
    write_stage(tmp_path, "judge", settings={"model": bad}, **{bad: 1})
    write_split(tmp_path / "data", "train", [ROW], dict, preference_features(), 2)
    text = dataset_card(find_contents(tmp_path / "data"), "org/name")
    assert "<script>" not in text and "\n# Heading" not in text and "[x](" not in text
    assert "{{ 7 * 7 }}" in text and "49" not in text


def write_model(directory):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def write_scores(directory, benchmark, **more):
    directory.mkdir(parents=True)
    value = {"value": 61.5, "n": 30, "interval": [50.0, 70.04], "majority": 55.0}
    content = {"scores": {"strict": {"n": 30, "n_images": 9, "closed": {"accuracy": value}}}, "split": "test"}
    (directory / "scores.json").write_text(json.dumps(content | {"benchmark": benchmark} | more))
    return directory


def test_scores_become_evaluation_results_of_the_hub(tmp_path):
    prepare = write_stage(tmp_path / "prepare", "prepare", settings={"source": "vqa_rad"})
    (prepare / "benchmark").mkdir()
    blank = {"blank": {"strict": {"closed": {"accuracy": {"value": 54.0, "n": 30, "interval": None}}}}}
    evaluations = [
        write_scores(tmp_path / "evaluate", str(prepare / "benchmark"), controls=blank),
        # With several benchmarks, each has a directory.
        write_scores(tmp_path / "others" / "a", "org/bench@main").parent,
        write_scores(tmp_path / "others" / "b", "/gone/benchmark").parent,
    ]
    text = model_card(find_contents(write_model(tmp_path / "model")), "org/name", evaluations=evaluations[:2])
    results = ModelCard(text).data.eval_results
    assert [(result.dataset_type, result.metric_name, result.metric_value) for result in results] == [
        ("vqa_rad", "strict closed accuracy", 61.5),
        ("org/bench", "strict closed accuracy", 61.5),
        ("b", "strict closed accuracy", 61.5),
    ]
    assert "| strict | closed accuracy | 61.5 (50.0 to 70.0) | 30 | 55.0 | 54.0 |" in text and "gone" not in text


def test_the_contamination_of_a_benchmark_is_on_the_card(tmp_path):
    scores = write_scores(tmp_path / "evaluate", "org/bench")
    contents = find_contents(write_model(tmp_path / "model"))
    card = model_card(contents, "org/name", evaluations=[scores])
    assert "Contamination was not checked:" in card  # by an earlier version, and the benchmark is not here
    figures = {name: {"n": 3, "of": 96} for name in FIGURES} | {"groups": {"n": None, "of": 0}}
    missing = {"groups": "its images | have no groups"}
    sources = [
        {"path": "/hospital/prepare/instruct", "sha256": "ab" * 32, "stage": "sft", "images": 1234},
        {"hub_id": "org/pairs", "revision": "c0ffee", "stage": "dpo", "images": 5},
    ]
    content = {"figures": figures, "compared": [source | {"not_checked": missing} for source in sources]}
    (scores / "contamination.json").write_text(json.dumps(content))
    card = model_card(contents, "org/name", evaluations=[scores])
    for expected in (
        "| exact copies | 3 of 96 images |",
        "| same group | not checked |",
        "| same question and image | 3 of 96 questions |",
        "- training data of sft, a local directory or file (SHA-256 abababababab): 1,234 images; not checked: same ",
        "group (its images &#124; have no groups)",
        "- training data of dpo, org/pairs at c0ffee: 5 images",
        "near copies are resized or re-encoded",
    ):
        assert expected in card, card
    assert "hospital" not in card
    warning = "**Warning: training data of the model contains parts of the benchmark: exact copies 3 of 96 images"
    assert card.index(warning) < card.index("| metric | figure") and ModelCard(card).data.eval_results is None
    clean = {name: figure | {"n": figure["n"] and 0} for name, figure in figures.items()}
    (scores / "contamination.json").write_text(json.dumps(content | {"figures": clean}))
    card = model_card(contents, "org/name", evaluations=[scores])
    assert "Warning" not in card and ModelCard(card).data.eval_results
    (scores / "contamination.json").write_text(json.dumps(content | {"compared": []}))
    card = model_card(contents, "org/name", evaluations=[scores])
    assert "Contamination was not checked: this machine has no training data of the model." in card


def test_scores_of_another_model_are_refused(tmp_path):
    contents = find_contents(write_model(tmp_path / "model"))
    own = write_scores(tmp_path / "own", "org/bench", model=str(contents.directory))
    # The model of these scores has moved, so it cannot be compared.
    moved = write_scores(tmp_path / "moved", "org/bench", model="runs/gone/sft")
    other = write_scores(tmp_path / "other", "org/bench", model=str(write_model(tmp_path / "stage_1")))
    assert model_card(contents, "org/name", evaluations=[own, moved])
    with pytest.raises(UserError, match="scores of .*stage_1, not of"):
        model_card(contents, "org/name", evaluations=[other])


def test_damaged_scores_are_refused(tmp_path):
    contents = find_contents(write_model(tmp_path / "model"))
    with pytest.raises(UserError, match="no scores.json"):
        model_card(contents, "org/name", evaluations=[tmp_path])
    for content in ("{", "[]", "{}", '{"scores": 3}', '{"scores": {}}', '{"scores": {"strict": []}}'):
        (tmp_path / "scores.json").write_text(content)
        with pytest.raises(UserError, match="not written by `medst evaluate`"):
            model_card(contents, "org/name", evaluations=[tmp_path])


def test_the_card_of_a_run_replaces_a_default_card(tmp_path):
    directory = write_model(tmp_path / "sft")
    write_stage(directory, "sft", settings={"learning_rate": 2e-4, "logging_steps": 7, "output_dir": str(directory)})
    (directory / "README.md").write_text("a stock card")
    write_card(directory)
    text = (directory / "README.md").read_text()
    assert "| learning_rate | 0.0002 |" in text and "logging_steps" not in text
    assert 'load_policy("' in text and "<vusr>" in text and "medst_trl_kind: model" in text


def test_a_training_can_be_repeated_from_its_card(tmp_path):
    settings = {
        "effective_batch_size": 64, "dtype": "bfloat16", "vusr_role": "text", "loss_type": ["sigmoid", "sft"],
        "train_vusr": True, "early_stopping_patience": 3, "beta": 0.1, "save_steps": 5, "hub_model_id": "org/x",
        "attn_implementation": None, "max_records": 100,
    }  # fmt: skip
    for stage, expected in (
        ("sft", ("train_vusr | True", "vusr_role | text")),
        ("dpo", ("beta | 0.1", "sigmoid, sft")),
    ):
        directory = write_stage(write_model(tmp_path / stage), stage, settings=settings)
        card = model_card(find_contents(directory), "org/name")
        for text in (*expected, "effective_batch_size | 64", "dtype | bfloat16", "max_records | 100"):
            assert text in card, text
        for text in ("save_steps", "hub_model_id", "attn_implementation"):
            assert text not in card, text


def test_of_an_unknown_stage_only_numbers_are_published(tmp_path):
    write_stage(tmp_path, "filter", settings={"min_words": 3, "names": "jones", "access_token": 7})
    write_split(tmp_path / "data", "train", [ROW], dict, preference_features(), 2)
    card = dataset_card(find_contents(tmp_path / "data"), "org/name")
    assert "| min_words | 3 |" in card and "jones" not in card and "access_token" not in card


def merged_card(directory, model_type="llava", template=MARK, **facts):
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "model.safetensors").write_bytes(b"")
    (directory / "chat_template.jinja").write_text(template)
    proof = {"float32_difference": 2e-6, "stored_difference": 0.03}
    record = {
        "stage": "merge", "inputs": {"model_name_or_path": [{"hub_id": "org/adapter", "revision": "abc"}]},
        "settings": {}, "merged": {
            "base": "org/base", "base_revision": "0123456789abcdef", "adapter_revision": "fedcba9876543210",
            "dtype": "float16", "trained_in_4bit": False, "proof": proof, **facts,
        },
    }  # fmt: skip
    (directory / "stage.json").write_text(json.dumps(record))
    return model_card(find_contents(directory), "org/name")


def test_the_card_of_a_merged_model_names_base_and_adapter_with_revisions(tmp_path):
    card = merged_card(tmp_path)
    assert "Merged from `org/base` (revision 0123456789ab) and `org/adapter` (revision fedcba987654)" in card
    assert "to 2e-06 in float32, and to 3e-02 as stored" in card and "4 bits" not in card
    assert "base_model: org/base\n" in card
    assert "4 bits" in merged_card(tmp_path, trained_in_4bit=True)


@pytest.mark.parametrize("template", [MARK, TEXT_ROLE_MARK])
def test_a_model_that_needs_no_medst_trl_is_loaded_without_it(tmp_path, template):
    card = merged_card(tmp_path, template=template)
    assert 'pipeline("image-text-to-text", model="org/name")' in card and "load_policy" not in card


def test_a_model_of_a_custom_architecture_is_loaded_with_medst_trl(tmp_path):
    card = merged_card(tmp_path, model_type="prototype_llava")
    assert 'load_policy("org/name")' in card and "other engines cannot load it" in card


def test_a_model_without_a_merge_record_is_not_called_merged(tmp_path):
    merged_card(tmp_path)
    for record in ("{", "{}", '{"merged": {}, "inputs": {}}'):
        (tmp_path / "stage.json").write_text(record)
        assert read_merged(tmp_path) is None
        assert "Merged from" not in model_card(find_contents(tmp_path), "org/name")

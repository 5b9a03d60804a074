# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which images a model was trained on, from its own list, its records, and the data that is still here."""

import json
from pathlib import Path

import pytest
from tiny_run import write_instruct

from medst_trl.base.fingerprints import fingerprint
from medst_trl.pipeline.lineage import TRAINING_IMAGES_FILE, trained_on, training_images, write_training_images


def write_stage(directory: Path, stage: str, settings=None, **inputs) -> Path:
    """Write the record of a stage with one or several inputs under each name."""
    directory.mkdir(parents=True, exist_ok=True)
    sources = {name: [fingerprint(x) for x in (v if isinstance(v, list) else [v])] for name, v in inputs.items()}
    record = {"stage": stage, "status": "complete", "versions": {}, "settings": settings or {}, "counts": {}}
    (directory / "stage.json").write_text(json.dumps(record | {"inputs": sources}))
    return directory


def ids(*numbers: int) -> set[str]:
    return {str(number) for number in numbers}


@pytest.fixture
def run(tmp_path) -> Path:
    """
    Records of base -> sft (two datasets) -> merge -> sft, whose preferences come from another model's candidates.
    None of them has `training_images.json`.
    """
    (tmp_path / "base").mkdir()
    a, b, c, d = (
        write_instruct(tmp_path / name, range(start, start + 3)) for name, start in zip("abcd", (0, 10, 20, 30))
    )
    write_instruct(tmp_path / "c", range(25, 27), split="validation")
    other = write_stage(tmp_path / "other", "sft", model_name_or_path=tmp_path / "base", dataset=d)
    first = write_stage(tmp_path / "first", "sft", model_name_or_path=tmp_path / "base", dataset=[a, b])
    merged = write_stage(tmp_path / "merged", "merge", model_name_or_path=first)
    write_stage(tmp_path / "c", "judge", candidates=write_stage(tmp_path / "generate", "generate", images=a))
    write_stage(tmp_path / "generate", "generate", model_name_or_path=other)
    settings = {"train_split": "train", "eval_strategy": "steps", "validation_split": "validation"}
    write_stage(tmp_path / "last", "sft", settings, model_name_or_path=merged, dataset=c)
    return tmp_path


def test_records_lead_to_all_datasets_that_trained_the_model_and_to_no_others(run):
    """The model that wrote the candidates (`other`) has trained on data that this model has never seen."""
    assert [(Path(one.source["path"]).name, one.splits) for one in trained_on(str(run / "last"))] == [
        ("a", ("train",)),
        ("b", ("train",)),
        ("c", ("train", "validation")),
    ]
    expected = ids(0, 1, 2, 10, 11, 12, 20, 21, 22, 25, 26)
    assert training_images(str(run / "last")) == (expected, True)
    assert training_images(str(run / "base")) == (set(), True)


def test_validation_data_counts_only_if_the_training_used_it(run):
    write_stage(run / "last", "sft", {"eval_strategy": "no"}, model_name_or_path=run / "merged", dataset=run / "c")
    assert not ids(25, 26) & training_images(str(run / "last"))[0]


def test_a_checkpoint_has_the_images_of_its_run(run):
    (run / "last" / "checkpoint-2").mkdir()
    assert training_images(str(run / "last" / "checkpoint-2")) == training_images(str(run / "last"))


@pytest.mark.parametrize("change", ["missing", "changed"])
def test_data_that_is_gone_or_has_changed_leaves_the_images_incomplete(run, change):
    if change == "missing":
        (run / "a").rename(run / "moved_a")
    else:
        write_instruct(run / "a", range(5))
    found, complete = training_images(str(run / "last"))
    assert not complete and found == ids(10, 11, 12, 20, 21, 22, 25, 26)


def test_a_run_that_was_moved_is_found_again(run, tmp_path):
    place = tmp_path / "elsewhere" / "run"
    place.parent.mkdir()
    moved = [path.name for path in run.iterdir() if path != place.parent]
    place.mkdir()
    for name in moved:
        (run / name).rename(place / name)
    assert training_images(str(run / "last"), place)[1]
    assert len(training_images(str(run / "last"), place)[0]) == 11


def test_a_model_hands_its_images_on_without_its_data(run, tmp_path):
    """What was written is all that is needed: records and datasets do not exist where it was downloaded to."""
    write_training_images(run / "last", ids(20, 99), str(run / "merged"))
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    (run / "last" / TRAINING_IMAGES_FILE).rename(pulled / TRAINING_IMAGES_FILE)
    expected = ids(0, 1, 2, 10, 11, 12, 20, 99)
    assert training_images(str(pulled)) == (expected, True)
    further = tmp_path / "further"
    further.mkdir()
    write_training_images(further, ids(7), str(pulled))
    assert training_images(str(further)) == (expected | ids(7), True)
    content = json.loads((further / TRAINING_IMAGES_FILE).read_text())
    assert content == {"complete": True, "image_ids": sorted(expected | ids(7))}


def test_an_adapter_without_a_list_and_a_record_leaves_the_images_incomplete(tmp_path):
    """Unlike a base model, which nobody expects to know, it was trained for this task."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert training_images(str(adapter)) == (set(), False)
    write_training_images(adapter, ids(1), str(adapter))
    assert training_images(str(adapter)) == (ids(1), False)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"image_ids": 3}', '{"image_ids": [1]}', '{"image_ids": ["a"]'])
def test_a_damaged_list_counts_as_incomplete(tmp_path, content):
    (tmp_path / TRAINING_IMAGES_FILE).write_text(content)
    assert training_images(str(tmp_path)) == (set(), False)


def test_a_circle_of_records_ends(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    second.mkdir()
    write_stage(first, "sft", model_name_or_path=second)
    write_stage(second, "sft", model_name_or_path=first)
    assert trained_on(str(first)) == []

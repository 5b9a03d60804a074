# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which images a model was trained on, from its own list, its records, and the data that is still here."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from random_images import random_image
from tiny_run import write_instruct

from medst_trl.base.files import write_json
from medst_trl.base.fingerprints import fingerprint
from medst_trl.data.images import store_image
from medst_trl.data.loading import fingerprint_dataset, load_records
from medst_trl.data.near_copies import perceptual_hash
from medst_trl.data.overlap import image_ids_of
from medst_trl.data.schema import dialogue, features_of, write_split
from medst_trl.evaluation.contamination import Contamination
from medst_trl.pipeline.lineage import (
    TRAINING_IMAGES_FILE,
    check_contamination,
    possible_places,
    records_of,
    trained_on,
    training_images,
    write_training_images,
)
from medst_trl.pipeline.record import read_record
from medst_trl.pipeline.stage import MODEL, STAGES, Input
from medst_trl.policy.chat_template import MARK


def write_stage(directory: Path, stage: str, settings=None, **inputs) -> Path:
    """Write the record of a stage with one or several inputs under each name."""
    directory.mkdir(parents=True, exist_ok=True)
    lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
    sources = {name: list(map(fingerprint_dataset, values)) for name, values in lists.items()}
    record = {"stage": stage, "status": "complete", "versions": {}, "settings": settings or {}, "counts": {}}
    (directory / "stage.json").write_text(json.dumps(record | {"inputs": sources}))
    return directory


def ids(*numbers: int) -> set[str]:
    """Return the image ids that `write_instruct` writes for these numbers."""
    return {f"{number:064x}" for number in numbers}


def write_base(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def run(tmp_path) -> Path:
    """
    Records of base -> sft (two datasets) -> merge -> sft, whose preferences come from another model's candidates.
    None of them has `training_images.json`.
    """
    write_base(tmp_path / "base")
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
    assert [(Path(one["path"]).name, one["splits"]) for one in trained_on(run / "last")] == [
        ("a", ["train"]),
        ("b", ["train"]),
        ("c", ["train", "validation"]),
    ]
    expected = ids(0, 1, 2, 10, 11, 12, 20, 21, 22, 25, 26)
    assert training_images(str(run / "last")) == (expected, True)
    assert training_images(str(run / "base")) == (set(), True)


def test_validation_data_counts_only_if_the_training_used_it(run):
    write_stage(run / "last", "sft", {"eval_strategy": "no"}, model_name_or_path=run / "merged", dataset=run / "c")
    assert not ids(25, 26) & training_images(str(run / "last"))[0]


def test_one_of_several_datasets_needs_a_validation_split(run):
    settings, datasets = {"eval_strategy": "steps"}, [run / "a", run / "c"]
    write_stage(run / "both", "sft", settings, model_name_or_path=run / "base", dataset=datasets)
    assert training_images(str(run / "both")) == (ids(0, 1, 2, 20, 21, 22, 25, 26), True)


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
    found, complete = training_images(place / "last")
    assert complete and len(found) == 11


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


def test_a_model_that_is_gone_leaves_the_images_incomplete(run):
    """Nobody knows whether it was a base model, unless the model that was made from it has a list."""
    (run / "first").rename(run / "gone")
    assert training_images(str(run / "last")) == (ids(20, 21, 22, 25, 26), False)


def test_a_training_stage_of_a_plugin_may_call_its_data_by_another_name(run, monkeypatch):
    inputs = (Input("model_name_or_path", MODEL), Input("pairs", "preferences"))
    monkeypatch.setitem(STAGES._objects, "tune", replace(STAGES.get("dpo"), name="tune", inputs=inputs))
    write_stage(run / "tuned", "tune", model_name_or_path=run / "last", pairs=run / "d")
    assert [(Path(one["path"]).name, one["stage"]) for one in trained_on(run / "tuned")][-1] == ("d", "tune")
    assert ids(30, 31, 32) < training_images(run / "tuned")[0]


def test_directories_of_images_are_not_hashed_to_follow_records(run, monkeypatch):
    (run / "hospital").mkdir()
    write_stage(run / "d", "prepare", data_path=run / "hospital", image_folder=run / "hospital")
    hashed = []
    monkeypatch.setattr(
        "medst_trl.pipeline.lineage.fingerprint", lambda place: hashed.append(place) or fingerprint(place)
    )
    assert len(records_of(run / "other")) == 2 and run / "hospital" not in hashed


def test_a_model_made_by_an_unknown_stage_is_no_base_model(run):
    (run / "base" / "stage.json").write_text(json.dumps({"stage": "of a plugin that is not here"}))
    assert training_images(run / "base") == (set(), False) and not training_images(run / "last")[1]


def test_a_base_model_that_has_changed_is_unknown(run):
    assert training_images(run / "last")[1]
    (run / "base" / "config.json").write_text('{"other": 1}')
    assert not training_images(run / "last")[1]


def test_data_that_may_not_be_read_is_not_on_this_machine(run, monkeypatch):
    """Root may read everything, so the error is made."""

    def refused(place):
        raise PermissionError(place)

    monkeypatch.setattr("medst_trl.pipeline.lineage.fingerprint_dataset", refused)
    assert training_images(run / "last") == (set(), False)


def test_a_circle_of_records_ends(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    second.mkdir()
    write_stage(first, "sft", model_name_or_path=second)
    write_stage(second, "sft", model_name_or_path=first)
    assert trained_on(str(first)) == []


# What a benchmark shares with it


def row(image, **columns) -> dict:
    made = store_image(image)
    columns["group_id"] = columns.pop("group", None)
    file = {"bytes": made.bytes, "path": None}
    if "questions" in columns:
        keys = dict.fromkeys(("id", "answer", "answer_type", "question_type", "link"), "x")
        columns["questions"] = [keys | {"question": question} for question in columns["questions"]]
        return {"image_id": made.image_id, "image": file, **columns}
    columns["messages"] = dialogue([(columns.pop("asks", "Other?"), "Yes.")], 1)
    return {"id": made.image_id, "images": [file], "image_ids": [made.image_id], **columns}


def write_rows(directory: Path, rows: list[dict], split: str = "train") -> Path:
    kind = "benchmark" if "questions" in rows[0] else "instruct"
    (directory / f"{split}-00000-of-00001.parquet").unlink(missing_ok=True)
    write_split(directory, split, rows, dict, features_of(kind), 100)
    return directory


def picture(seed: int, side: int = 96):
    return random_image(seed, (24, 24)).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def evaluated(tmp_path) -> Path:
    """
    A model that was trained on two datasets. Its benchmark has an exact copy (image 0), a near copy (1), an image of
    the same patient (2) and an image of its own (3).
    """
    questions = ["Is it normal?", "Where?"]
    tested = [row(picture(seed), questions=questions, group=f"aaaaaa-{seed:020}") for seed in range(4)]
    write_rows(write_stage(tmp_path / "prepare", "prepare") / "benchmark", tested, "test")
    write_rows(tmp_path / "a", [row(picture(0), asks="is it  NORMAL?"), row(picture(9), group=f"aaaaaa-{2:020}")])
    write_rows(tmp_path / "b", [row(picture(1, side=48), asks="Where?", group=f"bbbbbb-{7:020}")])
    write_base(tmp_path / "base")
    datasets = [tmp_path / "a", tmp_path / "b"]
    write_stage(tmp_path / "sft", "sft", model_name_or_path=tmp_path / "base", dataset=datasets)
    return tmp_path


def checked(run: Path, model: str = "sft") -> dict:
    place = run / "prepare" / "benchmark"
    [found] = check_contamination(str(run / model), [(place, load_records(place, "test", "benchmark"))])
    return found


def numbers(found: dict) -> list[int | None]:
    return [figure["n"] for figure in found["figures"].values()]


def test_a_benchmark_is_compared_with_every_dataset_of_the_training(evaluated):
    found = checked(evaluated)
    assert found["figures"] == {
        "exact": {"n": 1, "of": 4},
        "near": {"n": 1, "of": 4},
        "groups": {"n": 1, "of": 4},
        "questions": {"n": 2, "of": 8},
        "texts": {"n": 8, "of": 8},
    }
    assert [(Path(one["path"]).name, one["stage"], one["images"]) for one in found["compared"]] == [
        ("a", "sft", 2),
        ("b", "sft", 1),
    ]
    reasons = ["1 training image without a group", "groups of another kind, or hashed with another salt"]
    assert [one["not_checked"] for one in found["compared"]] == [
        {"groups": reason, "questions": reason} for reason in reasons
    ]


def test_questions_about_an_image_are_not_checked_if_its_relatives_cannot_be_found(evaluated):
    """Training asks the same questions about another image, perhaps of the same patient."""
    write_rows(evaluated / "c", [row(picture(11), asks="Where?", group=f"bbbbbb-{77:020}")])
    train(evaluated / "other", evaluated / "base", evaluated / "c")
    found = checked(evaluated, "other")
    assert numbers(found) == [0, 0, None, None, 4] and Contamination(found).figures["questions"] == (None, 8)


def test_a_base_model_has_no_known_training_data(evaluated):
    found = checked(evaluated, "base")
    assert found["compared"] == [] and numbers(found) == [None] * 5


def test_a_pulled_adapter_is_checked_by_the_ids_that_it_carries(evaluated, tmp_path):
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    write_training_images(pulled, (), str(evaluated / "sft"))
    found = checked(evaluated, "pulled")
    assert numbers(found) == [1, None, None, None, None]
    [one] = found["compared"]
    assert one["images"] == 3 and "exact" not in one["not_checked"] and "near" in one["not_checked"]


def test_a_model_trained_further_on_a_pulled_adapter_is_partly_checked(evaluated, tmp_path):
    (tmp_path / "pulled").mkdir()
    write_training_images(tmp_path / "pulled", (), str(evaluated / "sft"))
    data = write_rows(tmp_path / "c", [row(picture(3, side=64), asks="Why?")])
    further = write_stage(tmp_path / "further", "sft", model_name_or_path=tmp_path / "pulled", dataset=data)
    write_training_images(further, {store_image(picture(3, side=64)).image_id}, str(tmp_path / "pulled"))
    found = checked(evaluated, "further")
    assert numbers(found) == [1, 1, None, None, 0]
    assert ["near" in one["not_checked"] for one in found["compared"]] == [False, True]


@pytest.mark.parametrize("has_list", [True, False])
def test_what_cannot_be_read_any_more_is_not_checked(evaluated, has_list):
    """Exact copies are still found if the model carries the ids."""
    if has_list:
        write_training_images(evaluated / "sft", (), str(evaluated / "sft"))
    (evaluated / "a").rename(evaluated / "gone")
    write_rows(evaluated / "b", [row(picture(7))], "validation")  # another fingerprint
    found = checked(evaluated)
    assert numbers(found) == [1 if has_list else None, None, None, None, None]
    reasons = [one["not_checked"]["near"] for one in found["compared"]]
    assert reasons == ["the dataset is not on this machine as it was in training"] * 2
    assert all(("exact" in one["not_checked"]) != has_list for one in found["compared"])


def test_rows_that_were_not_trained_on_do_not_count(evaluated):
    """With `max_records`, the list of the model has fewer images than its dataset."""
    name = store_image(picture(9)).image_id
    write_training_images(evaluated / "sft", {name}, str(evaluated / "base"))
    assert numbers(checked(evaluated)) == [0, 0, 1, 0, 0]


def test_images_whose_file_was_replaced_are_not_checked(evaluated):
    """The fingerprint of a Parquet file does not cover the images that it names."""
    data = evaluated / "own.parquet"
    file = {"bytes": None, "path": str(evaluated / "1.png")}
    messages = dialogue([("Where?", "Left.")], 1)
    parquet.write_table(pa.Table.from_pylist([{"images": [file], "messages": messages}]), data)
    picture(1, side=48).save(evaluated / "1.png")
    write_stage(evaluated / "sft", "sft", model_name_or_path=evaluated / "base", dataset=data)
    write_training_images(evaluated / "sft", {store_image(picture(1, side=48)).image_id}, str(evaluated / "base"))
    assert checked(evaluated)["figures"]["near"] == {"n": 1, "of": 4}
    picture(7).save(evaluated / "1.png")
    found = checked(evaluated)
    assert [("near" in one["not_checked"], one["images"]) for one in found["compared"]] == [(False, 0), (True, 1)]
    assert found["compared"][1]["not_checked"]["near"] == "no dataset on this machine contains them"


def test_a_json_file_whose_images_were_replaced_has_changed(evaluated):
    data = evaluated / "own.jsonl"
    data.write_text(json.dumps({"images": ["1.png"], "messages": [{"role": "user", "content": "Where?"}] * 2}))
    picture(1, side=48).save(evaluated / "1.png")
    write_stage(evaluated / "sft", "sft", model_name_or_path=evaluated / "base", dataset=data)
    assert checked(evaluated)["figures"]["near"] == {"n": 1, "of": 4}
    picture(7).save(evaluated / "1.png")
    [one] = checked(evaluated)["compared"]
    assert one["not_checked"]["near"] == "the dataset is not on this machine as it was in training"


def train(directory: Path, model: Path, *datasets: Path, version: str = "now") -> Path:
    """Write what a training leaves. Version 0.1.0 left neither a list of images nor one of datasets."""
    write_stage(directory, "sft", model_name_or_path=model, dataset=list(datasets))
    (directory / "adapter_config.json").write_text(json.dumps(list(map(str, datasets))))
    (directory / "chat_template.jinja").write_text(MARK)
    if version == "now":
        images = {image for place in datasets for [image] in image_ids_of(load_records(place, "train"))}
        write_training_images(directory, images, model)
        record = read_record(directory) | {"trained_on": trained_on(directory)}
        write_json(directory / "stage.json", record)
    return directory


@pytest.fixture
def two_stages(evaluated):
    """Make a function that trains in two stages. Only the first one sees a near copy of a test image (image 1)."""

    def make(directory: Path, version: str = "now") -> Path:
        other = write_rows(evaluated / "c", [row(picture(11))])
        first = train(directory / "first", evaluated / "base", evaluated / "b", version=version)
        return train(directory / "second", first, other, version=version)

    return make


def near_copies(run: Path, model: Path) -> tuple[int | None, bool]:
    """Return the number of near copies, and whether all sources were checked for them."""
    found = checked(run, model)
    return found["figures"]["near"]["n"], not any("near" in one["not_checked"] for one in found["compared"])


VERSIONS = pytest.mark.parametrize("version", ["now", "0.1.0"])


@VERSIONS
def test_a_first_stage_that_was_trained_again_on_other_data_is_not_taken_for_the_old_one(
    evaluated, two_stages, version
):
    second = two_stages(evaluated / "run", version)
    assert near_copies(evaluated, second) == (1, True)
    train(evaluated / "run" / "first", evaluated / "base", evaluated / "c", version=version)
    assert near_copies(evaluated, second) == ((1, True) if version == "now" else (0, False))


@pytest.mark.parametrize("damaged", ["", "{", '{"stage": "of a plugin that is not here"}'])
@VERSIONS
def test_a_damaged_record_is_not_taken_for_that_of_a_base_model(evaluated, two_stages, version, damaged):
    second = two_stages(evaluated / "run", version)
    (evaluated / "run" / "first" / "stage.json").write_text(damaged)
    assert near_copies(evaluated, second) == ((1, True) if version == "now" else (0, False))
    assert near_copies(evaluated, evaluated / "run" / "first") == (None, False)
    [*_, one] = checked(evaluated, "run/first")["compared"]
    assert one["not_checked"]["near"] == "the record of its training is missing or damaged"


@VERSIONS
def test_relative_paths_do_not_lead_to_another_run_in_the_working_directory(
    evaluated, two_stages, version, monkeypatch, tmp_path
):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    second = two_stages(Path("runs/a"), version)
    monkeypatch.chdir(tmp_path / "there")
    train(Path("runs/a/first"), evaluated / "base", evaluated / "c", version=version)
    assert near_copies(evaluated, tmp_path / "here" / second) == (1, True)
    (tmp_path / "here/runs/a/first").rename(tmp_path / "gone")
    assert near_copies(evaluated, tmp_path / "here" / second) == ((1, True) if version == "now" else (0, False))


@VERSIONS
def test_a_model_of_another_run_is_not_looked_for_under_the_name_of_this_one(evaluated, two_stages, version):
    """`other/first` was trained from `run/first`, which is gone: its last part leads to `other/first` itself."""
    two_stages(evaluated / "run", version)
    model = train(evaluated / "other" / "first", evaluated / "run" / "first", evaluated / "c", version=version)
    (evaluated / "run").rename(evaluated / "elsewhere")
    assert near_copies(evaluated, model) == ((1, True) if version == "now" else (0, False))
    if version != "now":
        [*_, first] = checked(evaluated, model)["compared"]
        assert first["not_checked"]["near"] == "the model is not on this machine as it was in training"


@VERSIONS
def test_a_run_of_several_rounds_that_was_renamed_is_followed_through_its_rounds(evaluated, two_stages, version):
    two_stages(evaluated / "run" / "round_1", version)
    (evaluated / "run" / "round_1" / "second").rename(evaluated / "run" / "round_1" / "dpo")
    other = write_rows(evaluated / "run" / "round_2" / "pairs", [row(picture(12))])
    train(evaluated / "run" / "round_2" / "dpo", evaluated / "run" / "round_1" / "dpo", other, version=version)
    renamed = (evaluated / "run").rename(evaluated / "renamed")
    assert near_copies(evaluated, renamed / "round_2" / "dpo") == (1, True)


def test_a_copied_run_is_compared_with_its_own_data(evaluated, two_stages):
    """The original has other data at the recorded places by now."""
    data = write_rows(evaluated / "run" / "pairs", [row(picture(2, side=48))])
    model = train(evaluated / "run" / "first", evaluated / "base", data)
    copy = shutil.copytree(evaluated / "run", evaluated / "copy") / "first"
    write_rows(data, [row(picture(12))])
    assert near_copies(evaluated, model)[1] is False and near_copies(evaluated, copy) == (1, True)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_model_of_this_package_without_record_and_list_is_no_base_model(evaluated, two_stages, name):
    copy = evaluated / "copy"
    shutil.copytree(two_stages(evaluated / "run"), copy)
    for path in copy.iterdir():
        if path.name != "chat_template.jinja":
            path.unlink()
    (copy / name).write_text("{}")
    assert training_images(copy) == (set(), False) and near_copies(evaluated, copy) == (None, False)
    further = train(evaluated / "further", copy, evaluated / "c")
    assert not training_images(further)[1] and near_copies(evaluated, further) == (0, False)


def test_ids_that_are_no_hashes_stay_on_this_machine(tmp_path):
    """Own data may call its images by the name of a patient."""
    model = write_base(tmp_path / "base")
    write_training_images(model, {"Mueller_Anna.png", "17", "a" * 64, "A" * 64}, model)
    expected = {"complete": False, "image_ids": ["a" * 64]}
    assert json.loads((model / TRAINING_IMAGES_FILE).read_text()) == expected
    (model / TRAINING_IMAGES_FILE).write_text(json.dumps({"complete": True, "image_ids": ["Anna", "a" * 64]}))
    assert training_images(model) == ({"a" * 64}, False)


def test_images_too_plain_to_find_near_copies_are_not_counted_as_checked(evaluated):
    plain = [Image.new("L", (64, 64), level) for level in (0, 40)]
    place = evaluated / "prepare" / "benchmark"
    for images, expected in (([*plain, picture(1)], {"n": 1, "of": 1}), (plain, {"n": None, "of": 0})):
        write_rows(place, [row(image, questions=["Where?"]) for image in images], "test")
        found = checked(evaluated)
        assert found["figures"]["near"] == expected
        texts = dict(Contamination(found).rows())
        plain = " (2 images too plain to compare)"
        assert texts["near copies"] == (f"1 of 1 images{plain}" if expected["n"] else "not checked")
        assert texts["same question and image"] == (f"1 of 3 questions{plain}" if expected["n"] else "not checked")


def test_a_model_on_a_server_is_not_checked(evaluated):
    place = evaluated / "prepare" / "benchmark"
    [found] = check_contamination(None, [(place, load_records(place, "test", "benchmark"))])
    assert numbers(found) == [None] * 5
    assert {text for _, text in Contamination(found).rows()} == {"not checked"}


def test_the_training_data_is_read_once_for_several_benchmarks(evaluated, monkeypatch):
    place, read = evaluated / "prepare" / "benchmark", []
    both = [(place, load_records(place, "test", "benchmark"))] * 2
    monkeypatch.setattr(
        "medst_trl.pipeline.lineage.load_records", lambda *args: read.append(args) or load_records(*args)
    )
    first, second = check_contamination(str(evaluated / "sft"), both)
    assert first == second and first["figures"]["near"]["n"] == 1
    assert len(read) == 2  # two datasets


def test_groups_are_not_checked_if_the_benchmark_has_none(evaluated):
    rows = [row(picture(0), questions=["Where?"])]
    (evaluated / "prepare" / "benchmark" / "test-00000-of-00001.parquet").unlink()
    write_rows(evaluated / "prepare" / "benchmark", rows, "test")
    found = checked(evaluated)
    assert found["figures"]["groups"] == {"n": None, "of": 0} and found["figures"]["exact"] == {"n": 1, "of": 1}
    assert not any("questions" in one["not_checked"] for one in found["compared"])  # no image has relatives


def test_near_hashes_of_prepare_are_used_and_its_setting_decides(evaluated, monkeypatch):
    """Nothing is decoded: the index is beside the datasets, whose records lead to it."""
    pictures = [*map(picture, (0, 1, 2, 3, 9)), picture(1, side=48)]
    hashes = {store_image(one).image_id: perceptual_hash(one) for one in pictures}
    lines = [{"image": "x", "image_id": name, "near_hash": code} for name, code in hashes.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (evaluated / "prepare" / "image_index.jsonl").write_text(text)
    for name in "ab":  # datasets beside an index of their own
        write_stage(evaluated / name, "prepare")
        (evaluated / name / "image_index.jsonl").write_text(text)
    (evaluated / "sft" / "stage.json").unlink()
    datasets = [evaluated / "a", evaluated / "b"]
    write_stage(evaluated / "sft", "sft", model_name_or_path=evaluated / "base", dataset=datasets)
    monkeypatch.setattr("medst_trl.data.overlap.hash_images", None)
    assert checked(evaluated)["figures"]["near"]["n"] == 1
    write_stage(evaluated / "prepare", "prepare", {"near_copy_bits": 0})
    found = checked(evaluated)
    assert found["figures"]["near"]["n"] is None
    assert all(one["not_checked"]["questions"] == "near_copy_bits is 0" for one in found["compared"])


@pytest.mark.parametrize("name", ["judge/preferences", "round_2/judge/preferences", "sft", "round_2/dpo"])
def test_what_has_moved_with_its_run_is_found_in_its_round(tmp_path, name):
    for place in ("judge/preferences", "round_1/judge/preferences", "round_2/judge/preferences", "sft", "dpo"):
        (tmp_path / "now" / place).mkdir(parents=True)
    (tmp_path / "now/round_2/dpo").mkdir()
    assert possible_places(f"/nowhere/before/{name}", tmp_path / "now")[0] == tmp_path / "now" / name
    assert possible_places(f"/nowhere/before/{name}", tmp_path / "nowhere") == []
    assert possible_places(str(tmp_path / "now/sft"), tmp_path)[0] == tmp_path / "now/sft"
    places = possible_places(str(tmp_path / "now" / name), tmp_path / "now" / name)
    assert len({place.resolve() for place in places}) == len(places)  # each is hashed

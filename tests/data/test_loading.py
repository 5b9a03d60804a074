# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Datasets of one's own: where their files are found, and that each form of file gives the same rows."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Image, List
from PIL import Image as PILImage

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import fingerprint, same_source
from medst_trl.data.images import image_id
from medst_trl.data.loading import columns_and_rows, fingerprint_dataset, load_records, mix, split_files, splits_in
from medst_trl.data.schema import dialogue, features_of, image_part, text_part, with_stored_images


SCAN = PILImage.new("RGB", (64, 64), "gray")


@pytest.fixture(autouse=True)
def separate_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def scan(tmp_path) -> str:
    SCAN.save(tmp_path / "scan.png")
    return str(tmp_path / "scan.png")


CONVERSATION = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Which plane is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Axial."}]},
]
ROWS = {
    "instruct": {"messages": CONVERSATION},
    "preferences": {
        "prompt": CONVERSATION[:1],
        "chosen": CONVERSATION[1:],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Sagittal."}]}],
    },
}


def made(kind: str, scan: str, rows: int = 4) -> Dataset:
    return Dataset.from_list([{"id": "scan-1", "images": [scan], **ROWS[kind]}] * rows).cast_column(
        "images", List(Image())
    )


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


FORMS = {
    "train.parquet": lambda data, path: data.to_parquet(path / "train.parquet"),
    "train_v2.parquet": lambda data, path: data.to_parquet(path / "train_v2.parquet"),
    "data/train-00000-of-00001.parquet": lambda data, path: data.to_parquet(
        path / "data" / "train-00000-of-00001.parquet"
    ),
    "save_to_disk": lambda data, path: data.save_to_disk(path),
    "DatasetDict": lambda data, path: DatasetDict({"train": data, "test": data}).save_to_disk(path),
    "jsonl": lambda data, path: write_lines(
        path / "train.jsonl", [row | {"images": ["scan.png"]} for row in data.remove_columns("images")]
    ),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_dataset_has_the_same_rows(tmp_path, scan, form, kind):
    directory = tmp_path / "own [1] *"  # not a pattern
    directory.mkdir()
    SCAN.save(directory / "scan.png")
    FORMS[form](made(kind, scan), directory)
    dataset = load_records(directory, "train", kind)
    columns, rows = columns_and_rows(directory, "train")
    assert len(dataset) == rows == 4 and {"images", *ROWS[kind]} <= {*columns}
    for name, feature in features_of(kind).items():
        assert dataset.features[name] == feature
    assert dataset["id"][:] == ["scan-1", "scan-1-2", "scan-1-3", "scan-1-4"]
    assert dataset["image_ids"][:] == [[image_id(SCAN)]] * 4
    for row in dataset:
        assert row["images"][0].convert("RGB").tobytes() == SCAN.tobytes()
        for name, messages in ROWS[kind].items():
            assert [{"role": turn["role"], "content": turn["content"]} for turn in row[name]] == messages


def test_ids_of_images_need_not_be_computed(tmp_path, scan):
    made("instruct", scan).to_parquet(tmp_path / "own" / "train.parquet")
    assert load_records(tmp_path / "own", "train", "instruct", identify=False)["image_ids"][:] == [None] * 4


def test_one_file_can_be_given_for_any_split_but_validation(tmp_path, scan):
    path = tmp_path / "pairs.parquet"
    made("preferences", scan).to_parquet(path)
    for split in ("train", "test", "mine"):
        assert len(load_records(path, split, "preferences")) == 4
    for name, wrong in (("pairs", "validation"), ("train", "validation"), ("test_set", "train"), ("dev", "train")):
        made("preferences", scan).to_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=rf"{name}.parquet has no split '{wrong}' .*; it has \w+"):
            load_records(tmp_path / f"{name}.parquet", wrong, "preferences")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_validation_has_its_usual_names(tmp_path, scan, name):
    made("instruct", scan, 3).to_parquet(tmp_path / "own" / "train.parquet")
    made("instruct", scan, 2).to_parquet(tmp_path / "own" / f"{name}.parquet")
    assert len(load_records(tmp_path / "own", "validation", "instruct")) == 2
    assert len(load_records(tmp_path / "own", "train", "instruct")) == 3
    assert splits_in(tmp_path / "own") == ["train", "validation"]


def test_splits_of_a_saved_dictionary_have_their_usual_names_too(tmp_path, scan):
    splits = {"train": made("instruct", scan, 3), "val": made("instruct", scan, 2)}
    DatasetDict(splits).save_to_disk(tmp_path / "own")
    assert len(load_records(tmp_path / "own", "train", "instruct")) == 3
    assert len(load_records(tmp_path / "own", "validation", "instruct")) == 2
    with pytest.raises(UserError, match="no split 'test'"):
        load_records(tmp_path / "own", "test", "instruct")


def test_other_files_beside_a_dataset_are_no_splits(tmp_path):
    """An adapter has `training_images.json`, `trainer_state.json` and so on."""
    for name in ("training_images.json", "trainer_state.json", "rejected.jsonl", "stage.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"has no split 'train' \(train\*.parquet or train\*.jsonl\); it has rejected"):
        split_files(tmp_path, "train")


def test_a_directory_above_or_beside_gets_a_suggestion(tmp_path, scan):
    made("instruct", scan).save_to_disk(tmp_path / "run" / "talks")
    made("preferences", scan).to_parquet(tmp_path / "run" / "pairs" / "train.parquet")
    for name in ("run", "run/talk"):
        with pytest.raises(UserError, match=rf"Did you mean {tmp_path}/run/talks\?"):
            load_records(tmp_path / name, "train", "instruct")
    with pytest.raises(UserError, match=rf"Did you mean {tmp_path}/run/pairs\?"):
        load_records(tmp_path / "run", "train", "preferences")


def test_json_lines_hold_messages_in_any_form_and_images_beside_the_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "scans").mkdir(exist_ok=True)
        SCAN.save(tmp_path / "scans" / f"{name}.png")
    answer = {"role": "assistant", "content": "Yes."}
    between = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "vs."}, {"type": "image"}]}
    rows = [
        {"id": 1, "image": "scans/a.png", "messages": [{"role": "user", "content": "Normal?"}, answer]},
        {"id": "1", "images": ["scans/a.png", "scans/b.png"], "messages": [between, answer]},
        {"id": "x", "messages": [{"role": "user", "content": "No image."}, answer], "split": "train"},
        {"id": "y", "image": None, "messages": [{"role": "user", "content": "None."}, answer]},
    ]  # fmt: skip
    dataset = load_records(write_lines(tmp_path / "talks.jsonl", rows), "train", "instruct")
    assert dataset["id"][:] == ["1", "1-2", "x", "y"]
    assert [len(row) for row in dataset["images"]] == [1, 2, 0, 0]
    assert dataset["image_ids"][:] == [[image_id(SCAN)], [image_id(SCAN)] * 2, [], []]
    first, second = dataset[0]["messages"], dataset[1]["messages"]
    assert first == dialogue([("Normal?", "Yes.")], 1)
    assert second[0]["content"] == [image_part(), text_part("vs."), image_part()]


def test_images_of_json_lines_must_be_inside_its_directory(tmp_path, capsys):
    directory = tmp_path / "own"
    directory.mkdir()
    SCAN.save(tmp_path / "secret.png")
    SCAN.save(directory / "a.png")
    os.mkfifo(directory / "pipe.png")
    (directory / "link.png").symlink_to(tmp_path / "secret.png")
    talk = {"messages": [{"role": "user", "content": "Normal?"}, {"role": "assistant", "content": "Yes."}]}
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png"]
    good = [talk | {"image": name} for name in ("a.png", str(directory / "a.png"), "missing.png")]
    bad = [talk | {"image": name} for name in (*outside, "pipe.png", "\0", 7)]
    path = write_lines(directory / "train.jsonl", [*bad, *good])
    with open(path, "a") as file:
        file.write('{"image": "a.png", "messages": [{"role": \n')
    dataset = load_records(directory, "train", "instruct", identify=False)
    paths = [Path(row["images"][0]["path"]).name for row in with_stored_images(dataset)]
    assert paths == ["a.png", "a.png", "missing.png"] and dataset["id"][:] == ["6", "7", "8"]
    said = capsys.readouterr().out
    assert f"{path}: 7 of 10 rows cannot be used" in said and "record 0: outside_image_folder" in said
    with pytest.raises(UserError, match="none of its 3 rows can be used.*outside_image_folder"):
        load_records(write_lines(directory / "bad.jsonl", bad[:3]), "train", "instruct")


def test_a_benchmark_of_json_lines_keeps_numbers_and_truth_values_and_drops_what_is_missing(tmp_path, capsys):
    SCAN.save(tmp_path / "a.png")
    answers = ["yes", True, 4, 2.5, None, float("nan"), "", ["a"], {"b": 1}]
    rows = [{"image": "a.png", "question": "What?", "answer": answer, "id": n} for n, answer in enumerate(answers)]
    dataset = load_records(write_lines(tmp_path / "test.jsonl", rows), "test", "benchmark")
    found = {q["id"]: (q["answer"], q["answer_type"]) for row in dataset["questions"] for q in row}
    assert {key: found[key] for key in "0123"} == {
        "0": ("yes", "closed"), "1": ("yes", "closed"), "2": ("4", "open"), "3": ("2.5", "open"),
    }  # fmt: skip
    assert not {"4", "5", "6"} & found.keys()
    assert set(dataset["image_id"]) == {image_id(SCAN)}
    assert (
        "rows cannot be used. The first: test.jsonl, record 4: no_answer; test.jsonl, record 5: "
        in capsys.readouterr().out
    )


def test_rows_of_another_split_are_left_out(tmp_path, capsys):
    SCAN.save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "What?", "answer": str(n), "id": f"q{n}", "split": split}
        for n, split in enumerate(["train", "Test", None, "val"])
    ]
    path = write_lines(tmp_path / "own.jsonl", rows)
    made(  # the same in Parquet
        "instruct", str(tmp_path / "a.png")
    ).add_column("split", [row["split"] for row in rows]).to_parquet(tmp_path / "own.parquet")
    found = load_records(path, "test", "benchmark")
    assert [question["id"] for row in found["questions"] for question in row] == ["q1", "q2"]
    assert len(load_records(tmp_path / "own.parquet", "train", "instruct")) == 2
    said = capsys.readouterr().out
    assert "The split 'test': 2 of 4 rows cannot be used. The first: row 0: its column `split` says train" in said
    with pytest.raises(UserError, match="own.jsonl: The split 'test': none of its 1 rows can be used"):
        load_records(write_lines(tmp_path / "own.jsonl", rows[:1]), "test", "benchmark")


def test_images_behind_json_lines_are_part_of_the_fingerprint(tmp_path):
    SCAN.save(tmp_path / "a.png")
    path = write_lines(tmp_path / "own.jsonl", [{"image": "a.png", "question": "What?", "answer": "yes"}])
    before = fingerprint_dataset(path)
    assert same_source(before, fingerprint_dataset(path)) and same_source(fingerprint(path), before)
    PILImage.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    assert not same_source(before, fingerprint_dataset(path)) and before["sha256"] == fingerprint(path)["sha256"]
    (tmp_path / "a.png").unlink()
    assert not same_source(before, fingerprint_dataset(path))
    for no_name in ("iVBORw0K" * 40, "a\0b", "\ud800"):  # an image in base64 instead of a file
        path = write_lines(tmp_path / "own.jsonl", [{"image": no_name, "question": "What?", "answer": "yes"}])
        assert same_source(fingerprint(path), fingerprint_dataset(path))
    path = write_lines(tmp_path / "predictions.jsonl", [{"id": "1", "prediction": "yes"}])
    assert fingerprint_dataset(path) == fingerprint(path)


def test_a_split_in_several_forms_is_refused(tmp_path, scan):
    for name in ("train-00000-of-00001", "train_extra"):
        made("instruct", scan).to_parquet(tmp_path / "own" / f"{name}.parquet")
    with pytest.raises(UserError, match="split 'train' in several forms: train-00000-of-00001.parquet and train_ext"):
        load_records(tmp_path / "own", "train", "instruct")


def test_a_table_is_no_dataset_and_the_datasets_beside_it_are_not_meant(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"image": "a.png", "question": "What?", "answer": "yes"}])
    (tmp_path / "labeled.csv").write_text("image,question,answer\na.png,What?,yes\n")
    with pytest.raises(UserError, match="is not a dataset, .*file. `medst prepare` reads tables"):
        load_records(tmp_path / "labeled.csv", "train")


def test_a_question_about_a_missing_image_does_not_end_an_evaluation(tmp_path, capsys):
    SCAN.save(tmp_path / "a.png")
    rows = [{"image": f"{name}.png", "question": "What?", "answer": "yes", "id": name} for name in "ba"]
    found = load_records(write_lines(tmp_path / "own.jsonl", rows), "test", "benchmark")
    assert [question["id"] for row in found["questions"] for question in row] == ["a"]
    assert "1 of 2 rows cannot be used. The first: row 0: its image is missing or damaged" in capsys.readouterr().out


def test_only_what_looks_like_a_hub_id_is_asked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", None)
    (tmp_path / "own").mkdir()
    for name in ("own/nope", "own.jsonl", "theirs/own.parquet"):
        with pytest.raises(UserError, match=f"{name} is neither a directory nor a dataset on the Hub"):
            load_records(name, "train", "instruct")


def test_missing_columns_are_named_with_the_file(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [{"image": "a.png", "conversations": []}])
    with pytest.raises(UserError, match=f"{path}.*lacks the column messages of instruct.*has image, conversations"):
        load_records(path, "train", "instruct")


def numbers(start: int, count: int) -> Dataset:
    return Dataset.from_dict({"n": range(start, start + count)})


def test_a_mixture_uses_the_first_records_in_the_shares_that_were_asked_for():
    small, large = numbers(0, 10), numbers(100, 90)
    assert mix([small, large])["n"][:] == [*range(10), *range(100, 190)]
    assert mix([small, large], [1, 3])["n"][:] == [*range(10), *range(100, 130)]
    assert mix([small, large], [25, 75])["n"][:] == mix([small, large], [0.25, 0.75])["n"][:]
    assert mix([small], [7])["n"][:] == list(range(10))


def test_oversampling_repeats_the_smaller_dataset_and_uses_every_record():
    small, large = numbers(0, 10), numbers(100, 90)
    rows = mix([small, large], [1, 1], oversample=True, seed=3)["n"][:]
    assert set(rows) == {*range(10), *range(100, 190)}
    share = sum(row < 100 for row in rows) / len(rows)
    assert 0.4 < share < 0.6
    assert rows == mix([small, large], [1, 1], oversample=True, seed=3)["n"][:]
    assert rows != mix([small, large], [1, 1], oversample=True, seed=4)["n"][:]

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Datasets of one's own: where their files are found, and that each form of file gives the same rows."""

import io
import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Image, List
from fake_hub import client, serve_hub
from PIL import Image as PILImage

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import fingerprint, same_source
from medst_trl.data.images import image_id
from medst_trl.data.loading import (
    columns_and_rows,
    fingerprint_dataset,
    is_parquet,
    load_records,
    mix,
    read_parquet,
    split_files,
    splits_in,
)
from medst_trl.data.schema import dialogue, features_of, image_part, text_of, text_part, with_stored_images
from medst_trl.data.source import SourceRequest
from medst_trl.pipeline.stages.prepare import PrepareArguments, main


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


# Tables of questions with the images inside


def png(shade: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("L", (20, 20), shade).save(file, "PNG")
    return file.getvalue()


def rows(start: int = 0, count: int = 3) -> list[dict]:
    """Two questions about each of some images."""
    return [
        {"image": {"bytes": png(n), "path": f"img_{n}.png"}, "question": question, "answer": answer}
        for n in range(start, start + count)
        for question, answer in (("is it dark?", "yes"), ("what is it?", f"shade {n}"))
    ]


def write(path, data: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(data).cast_column("image", Image()).to_parquet(path)


def hub_copy(directory) -> None:
    write(directory / "data" / "train-00000-of-00002-0123.parquet", rows(0, 2))
    write(directory / "data" / "train-00001-of-00002-4567.parquet", rows(2, 1))
    write(directory / "data" / "validation-00000-of-00001.parquet", rows(3, 1))
    write(directory / "data" / "test-00000-of-00001.parquet", rows(4))
    (directory / "README.md").write_text("# VQA-RAD\n")


def read(path, name="images"):
    return read_parquet(name, SourceRequest(path, path.parent))


def prepare(directory, source, path, **arguments):
    main(PrepareArguments(str(directory), source, str(path), num_workers=2, **arguments))
    return json.loads((directory / "stage.json").read_text())["counts"]


@pytest.mark.parametrize("source", ["vqa_rad", "pathvqa", "images"])
def test_a_copy_of_a_benchmark_is_prepared_by_its_source(tmp_path, source):
    hub_copy(tmp_path / "copy")
    counts = prepare(tmp_path / "out", source, tmp_path / "copy")
    assert counts["datasets"] == {
        "benchmark/test": {"images": 3, "questions": 6, "closed": 3, "open": 3},
        "instruct/train": {"images": 3, "conversations": 3, "answers": 6},
        "instruct/validation": {"images": 1, "conversations": 1, "answers": 2},
    }
    test = load_records(tmp_path / "out" / "benchmark", "test")
    assert [row["image"].getpixel((0, 0)) for row in test] == [4, 5, 6]
    assert test[1]["questions"][1]["answer"] == "shade 5" and test[1]["questions"][0]["id"].startswith(
        f"{source}-test-"
    )
    train = load_records(tmp_path / "out" / "instruct", "train")
    assert text_of(train[2]["messages"][3]["content"]) == "shade 2" and train[2]["images"][0].getpixel((0, 0)) == 2


def test_a_finished_run_reads_no_images_to_say_so(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    hub_copy(copy)
    prepare(tmp_path / "out", "vqa_rad", copy / "data" / "test-00000-of-00001.parquet")
    prepare(tmp_path / "whole", "vqa_rad", copy)
    (copy / "README.md").write_text("changed")
    monkeypatch.setattr("medst_trl.pipeline.stages.prepare.read_parquet", None)
    prepare(tmp_path / "whole", "vqa_rad", copy)
    prepare(tmp_path / "out", "vqa_rad", copy / "data" / "test-00000-of-00001.parquet")
    assert "nothing to do" in capsys.readouterr().out
    write(copy / "data" / "test-00000-of-00001.parquet", rows(5))
    with pytest.raises(UserError, match="data_path"):
        prepare(tmp_path / "out", "vqa_rad", copy / "data" / "test-00000-of-00001.parquet")


def test_each_image_is_read_once_however_many_questions_it_has(tmp_path):
    hub_copy(tmp_path)
    records = read(tmp_path, "vqa_rad")
    names = records.image_names
    assert len(names) == 14 and len(set(names)) == 7
    assert {records.images.load(name).image_id for name in names[:2]} == {records.images.load(names[0]).image_id}
    assert not any("img_" in name for name in names), "names of files are not taken over"


def test_columns_of_a_table_are_recognized(tmp_path):
    data = [
        row | {"ID": f"q{n}", "Split": " TEST", "Answer Type": "CLOSED", "site": 3} for n, row in enumerate(rows())
    ]
    write(tmp_path / "t.parquet", data)
    records = read(tmp_path / "t.parquet")
    assert {(q.split, q.answer_type) for q in records.questions} == {("test", "closed")}
    assert [q.id for q in records.questions] == [f"q{n}" for n in range(6)]
    assert records.counts == {"columns_not_used": "site"}
    write(tmp_path / "test.parquet", [row | {"Split": None, "empty": None} for row in rows()])
    records = read(tmp_path / "test.parquet")
    assert {question.split for question in records.questions} == {"test"} and not records.counts


@pytest.mark.parametrize(
    ("name", "split"), [("test-00000-of-00001", "test"), ("val", "validation"), ("mine", "train")]
)
def test_the_split_of_one_file_is_in_its_name(tmp_path, name, split):
    write(tmp_path / f"{name}.parquet", rows())
    assert {question.split for question in read(tmp_path / f"{name}.parquet").questions} == {split}


def test_images_may_be_bytes_or_lists(tmp_path):
    Dataset.from_list([{"image": png(7)}, {"image": png(8)}]).to_parquet(tmp_path / "bytes.parquet")
    pair = {
        "images": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}],
        "question": "?",
        "answer": "no",
    }
    Dataset.from_list([pair]).cast_column("images", List(Image())).to_parquet(tmp_path / "lists.parquet")
    counts = prepare(tmp_path / "bytes", "images", tmp_path / "bytes.parquet")
    assert counts["datasets"] == {"images/train": {"images": 2}}
    counts = prepare(tmp_path / "lists", "images", tmp_path / "lists.parquet")
    assert counts["datasets"] == {"instruct/train": {"images": 2, "conversations": 1, "answers": 1}}
    shown = load_records(tmp_path / "lists" / "instruct", "train")[0]["images"]
    assert [image.getpixel((0, 0)) for image in shown] == [1, 2]


def test_images_that_datasets_has_not_embedded_are_read_on_this_machine_only(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "p7.png").write_bytes(png(9))
    row = {"id": "p7-q1", "image": str(tmp_path / "scans" / "p7.png"), "question": "?", "answer": "no"}
    write(tmp_path / "copy" / "t.parquet", [row | {"split": "test"}])
    counts = prepare(tmp_path / "out", "vqa_rad", tmp_path / "copy")
    assert counts["datasets"] == {"benchmark/test": {"images": 1, "questions": 1, "closed": 1}}
    assert load_records(tmp_path / "out" / "benchmark", "test")[0]["image"].getpixel((0, 0)) == 9
    assert read_parquet("vqa_rad", SourceRequest(tmp_path / "copy")).image_names == []


def test_names_of_files_in_place_of_images_are_rejected(tmp_path):
    (tmp_path / "9.png").write_bytes(png(9))
    for number, image in enumerate(["9.png", str(tmp_path / "9.png"), {"bytes": None, "path": "9.png"}]):
        Dataset.from_list([{"image": image}]).to_parquet(tmp_path / f"{number}.parquet")
        with pytest.raises(UserError, match=r"can be used: 1 no_image"):
            prepare(tmp_path / f"out{number}", "images", tmp_path / f"{number}.parquet")
    Dataset.from_list([{"images": [png(1), None]}, {"images": [png(2)]}]).to_parquet(tmp_path / "some.parquet")
    counts = prepare(tmp_path / "some", "images", tmp_path / "some.parquet")
    assert (counts["datasets"], counts["rejected"]) == ({"images/train": {"images": 1}}, {"no_image": 1})


def test_unusable_rows_are_rejected(tmp_path):
    data = rows(0, 1)
    data += [data[0] | {"image": {"bytes": b"no image", "path": None}}, data[0] | {"image": None}]
    data += [data[0] | {"question": None}, data[0] | {"answer": " "}, data[0] | {"answer": "NaN"}]
    data += [data[0] | {"image": {"bytes": None, "path": "img_1.png"}}]
    Dataset.from_list(data).to_parquet(tmp_path / "t.parquet")
    counts = prepare(tmp_path / "out", "images", tmp_path / "t.parquet")
    assert counts["rejected"] == {"no_answer": 2, "no_image": 2, "no_question": 1, "not_an_image": 1}
    assert counts["datasets"]["instruct/train"]["answers"] == 2


def test_only_directories_of_nothing_else_are_parquet(tmp_path):
    hub_copy(tmp_path)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert is_parquet(tmp_path) and is_parquet(tmp_path / "data")
    (tmp_path / "scan.png").write_bytes(png(0))
    assert not is_parquet(tmp_path)


def test_other_tables_are_refused(tmp_path):
    Dataset.from_list([{"text": "x"}]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet has no column `image` .it has text.. Rename its columns"):
        read(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"t\.parquet: Parquet file"):
        read(tmp_path / "t.parquet")


def test_a_dataset_on_the_hub_is_a_source(tmp_path):
    hub_copy(tmp_path / "copy")
    files = {path.relative_to(tmp_path / "copy").as_posix(): path for path in (tmp_path / "copy").rglob("*.*")}
    recipe = "output_dir: run\nprepare:\n  source: vqa_rad\n  data_path: org/vqa-rad\n"
    (tmp_path / "r.yaml").write_text(recipe)
    with serve_hub() as hub:
        hub.add("dataset", "org/vqa-rad", {name: path.read_bytes() for name, path in files.items()})
        run = lambda *command: client(  # noqa: E731
            hub.url, tmp_path / "home", "-m", "medst_trl.cli", *command, cwd=tmp_path, check=False
        )
        assert "r.yaml is valid" in run("recipes", "validate", "r.yaml").stdout
        done = run("run", "r.yaml")
        assert "3 images, 6 questions" in done.stdout, done.stderr
        record = json.loads((tmp_path / "run" / "prepare" / "stage.json").read_text())
        assert record["inputs"]["data_path"][0]["hub_id"] == "org/vqa-rad"
        assert "nothing to do" in run("run", "r.yaml").stdout
        missing = run("prepare", "--source", "vqa_rad", "--data_path", "org/none", "--output_dir", "out")
        assert missing.returncode == 2 and "org/none is neither a directory nor a dataset on the Hub" in missing.stderr


def test_a_misspelled_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("data/questions", "scans/table.csv"):
        with pytest.raises(UserError, match=f"data_path does not exist: {path}"):
            prepare(tmp_path / "out", "images", path)
    with pytest.raises(UserError, match="data_path does not exist: org/data"):
        prepare(tmp_path / "out", "llava", "org/data")


def test_the_files_of_splits_may_have_other_columns(tmp_path):
    write(tmp_path / "train.parquet", rows(0, 1))
    write(tmp_path / "test.parquet", [row | {"link": "x"} for row in rows(1, 1)])
    (tmp_path / "README.txt").write_text("About the data")
    assert is_parquet(tmp_path)
    assert [(question.split, question.link) for question in read(tmp_path).questions] == [
        ("train", None), ("train", None), ("test", "x"), ("test", "x"),
    ]  # fmt: skip

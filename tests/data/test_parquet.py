# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Copies of benchmarks in Parquet or on the Hub, with the images inside."""

import io
import json

import pytest
from datasets import Dataset, List
from datasets import Image as ImageColumn
from fake_hub import client, serve_hub
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.data.loading import load_records
from medst_trl.data.parquet import is_parquet, read_parquet
from medst_trl.data.schema import text_of
from medst_trl.data.source import SourceRequest
from medst_trl.pipeline.stages.prepare import PrepareArguments, main


@pytest.fixture(autouse=True)
def separate_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (20, 20), shade).save(file, "PNG")
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
    Dataset.from_list(data).cast_column("image", ImageColumn()).to_parquet(path)


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
    monkeypatch.setattr("medst_trl.data.parquet.read_parquet", None)
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
    Dataset.from_list([pair]).cast_column("images", List(ImageColumn())).to_parquet(tmp_path / "lists.parquet")
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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_jsonl
from medst_trl.data.images import store_image
from medst_trl.data.schema import (
    benchmark_features,
    check_columns,
    image_part,
    instruct_features,
    load_records,
    message,
    text_of,
    text_part,
    write_split,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def image(shade: int) -> dict:
    return {"bytes": store_image(Image.new("L", (5, 4), shade)).bytes, "path": None}


def write_instruct(folder, split="train", n=3):
    def row(n):
        messages = [message("user", [image_part(), text_part("What?")]), message("assistant", [text_part(str(n))])]
        return {"id": str(n), "images": [image(n)], "image_ids": ["x"], "messages": messages}

    write_split(folder, split, range(n), row, instruct_features(), rows_per_shard=2)


def test_what_is_written_reads_back_with_decoded_images(tmp_path):
    write_instruct(tmp_path / "data")
    dataset = load_records(tmp_path / "data", "train")
    check_columns(dataset, "instruct")
    assert dataset["id"][:] == ["0", "1", "2"]
    assert [row["images"][0].getpixel((0, 0)) for row in dataset] == [0, 1, 2]
    first = dataset[0]["messages"][0]
    assert first == {"role": "user", "content": [image_part(), text_part("What?")], "vusr": False}
    assert text_of(first["content"]) == text_of("What?") == "What?"


def test_stock_load_dataset_reads_the_folder(tmp_path):
    from datasets import load_dataset

    write_instruct(tmp_path / "data")
    write_instruct(tmp_path / "data", "validation", 1)
    both = load_dataset(str(tmp_path / "data"))
    assert {split: len(rows) for split, rows in both.items()} == {"train": 3, "validation": 1}
    assert both["train"].features == instruct_features()
    assert both["train"][2]["images"][0].size == (5, 4)


def test_benchmark_columns(tmp_path):
    questions = [dict.fromkeys(("id", "question", "answer", "answer_type", "question_type"), "x") | {"link": None}]

    def row(n):
        return {"image_id": str(n), "image": image(n), "questions": questions}

    write_split(tmp_path / "data", "test", [1], row, benchmark_features(), rows_per_shard=2)
    dataset = load_records(str(tmp_path / "data"), "test")
    check_columns(dataset, "benchmark")
    assert dataset[0]["questions"] == questions
    with pytest.raises(UserError, match="lacks the columns id, images"):
        check_columns(dataset, "instruct")


def test_columns_of_another_type_are_refused(tmp_path):
    from datasets import Value

    write_instruct(tmp_path / "data")
    dataset = load_records(tmp_path / "data", "train")
    with pytest.raises(UserError, match="column id"):
        check_columns(dataset.cast_column("id", Value("int64")), "instruct")
    check_columns(dataset.cast_column("id", Value("large_string")).add_column("more", [1, 2, 3]), "instruct")


def test_missing_and_incomplete_datasets_are_explained(tmp_path):
    with pytest.raises(UserError, match="neither a directory nor a dataset on the Hub"):
        load_records(tmp_path / "none", "train")
    write_instruct(tmp_path / "data")
    with pytest.raises(UserError, match="no split 'test'.*it has train"):
        load_records(tmp_path / "data", "test")
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 files"):
        load_records(tmp_path / "data", "train")


def test_jsonl_appears_whole_or_not_at_all(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "é\n"}])
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == {"text": "é\n"}

    def rows():
        yield {}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "b.jsonl", rows())
    assert not (tmp_path / "b.jsonl").exists()

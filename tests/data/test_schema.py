# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import errno
import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_jsonl
from medst_trl.data.conform import conform
from medst_trl.data.images import store_image
from medst_trl.data.loading import load_records
from medst_trl.data.schema import (
    KINDS,
    benchmark_features,
    features_of,
    image_part,
    instruct_features,
    kind_of,
    message,
    preference_features,
    text_of,
    text_part,
    write_split,
)


@pytest.fixture(autouse=True)
def separate_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def image(shade: int) -> dict:
    return {"bytes": store_image(Image.new("L", (5, 4), shade)).bytes, "path": None}


def write_instruct(directory, split="train", n=3):
    def row(n):
        messages = [message("user", [image_part(), text_part("What?")]), message("assistant", [text_part(str(n))])]
        return {"id": str(n), "images": [image(n)], "image_ids": ["x"], "messages": messages}

    write_split(directory, split, range(n), row, instruct_features(), rows_per_shard=2)


def test_a_written_split_is_read_with_decoded_images(tmp_path):
    write_instruct(tmp_path / "data")
    dataset = load_records(tmp_path / "data", "train")
    assert conform(dataset, "instruct") is dataset
    assert dataset["id"][:] == ["0", "1", "2"]
    assert [row["images"][0].getpixel((0, 0)) for row in dataset] == [0, 1, 2]
    first = dataset[0]["messages"][0]
    assert first == {"role": "user", "content": [image_part(), text_part("What?")], "vusr": False}
    assert text_of(first["content"]) == text_of("What?") == "What?"


def test_load_dataset_reads_the_directory(tmp_path):
    from datasets import load_dataset

    write_instruct(tmp_path / "data")
    write_instruct(tmp_path / "data", "validation", 1)
    both = load_dataset(str(tmp_path / "data"))
    assert {split: len(rows) for split, rows in both.items()} == {"train": 3, "validation": 1}
    assert both["train"].features == instruct_features()
    assert both["train"][2]["images"][0].size == (5, 4)


def test_a_benchmark_has_its_columns(tmp_path):
    questions = [dict.fromkeys(("id", "question", "answer", "question_type", "link"), "x") | {"answer_type": "open"}]

    def row(n):
        return {"image_id": str(n), "image": image(n), "questions": questions}

    write_split(tmp_path / "data", "test", [1], row, benchmark_features(), rows_per_shard=2)
    dataset = load_records(str(tmp_path / "data"), "test")
    assert conform(dataset, "benchmark") is dataset
    assert dataset[0]["questions"] == questions
    with pytest.raises(UserError, match="lacks the column messages"):
        conform(dataset, "instruct")


def test_the_errors_for_missing_and_incomplete_datasets_say_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="neither a directory nor a dataset on the Hub"):
        load_records(tmp_path / "none", "train")
    write_instruct(tmp_path / "data")
    with pytest.raises(UserError, match="no split 'test'.*it has train"):
        load_records(tmp_path / "data", "test")
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 files"):
        load_records(tmp_path / "data", "train")


def test_the_error_for_a_directory_one_level_off_names_the_dataset(tmp_path):
    write_instruct(tmp_path / "run" / "prepare" / "instruct")
    write_split(
        tmp_path / "run" / "prepare" / "benchmark", "train", [1],
        lambda n: {"image_id": str(n), "image": image(n), "questions": []}, benchmark_features(), rows_per_shard=2,
    )  # fmt: skip
    meant = tmp_path / "run" / "prepare" / "instruct"
    for name in ("run", "run/prepare", "run/instruct", "run/prepare/instruct/train-00000-of-00002.parquet"):
        with pytest.raises(UserError, match=rf"{name}.* Did you mean {meant}\?"):
            load_records(tmp_path / name, "train", "instruct")
    with pytest.raises(UserError, match=rf"Did you mean {meant.with_name('benchmark')} or {meant}\?"):
        load_records(tmp_path / "run", "train")
    with pytest.raises(UserError, match=r"no split 'test'.*it has train\.$"):
        load_records(meant, "test", "instruct")


def test_optional_columns_that_are_missing_are_filled_in(tmp_path):
    from datasets import Features

    columns = {name: preference_features()[name] for name in ("id", "images", "image_ids", "prompt")}
    columns |= {name: preference_features()[name] for name in ("chosen", "rejected")}
    row = {"id": "1", "images": [], "image_ids": [], "prompt": [], "chosen": [], "rejected": []}
    write_split(tmp_path / "data", "train", [row], dict, Features(columns), rows_per_shard=2)
    dataset = load_records(tmp_path / "data", "train")
    assert conform(dataset, "preferences") is dataset
    assert dataset.features == features_of("preferences")
    assert [dataset[0][name] for name in ("score_chosen", "score_rejected", "judge", "group_id")] == 4 * [None]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_documents_its_columns(name):
    kind = KINDS.get(name)
    assert set(kind.columns) <= set(kind.meanings) and set(kind.optional) <= set(kind.columns)
    assert kind.about and "{id}" in kind.use
    assert kind.marker is None or kind_of(kind.columns) is kind


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="Unknown kind of dataset 'preference'. Did you mean 'preferences'"):
        features_of("preference")


def test_an_interrupted_jsonl_file_is_not_written(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "é\n"}])
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == {"text": "é\n"}

    def rows():
        yield {}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "b.jsonl", rows())
    assert not (tmp_path / "b.jsonl").exists()


def row(n):
    return {"id": str(n), "images": [], "image_ids": [], "messages": []}


def write(directory, make_row=row, n=10, workers=1):
    write_split(directory, "train", range(n), make_row, instruct_features(), rows_per_shard=4, num_workers=workers)


def files(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_shards_have_a_fixed_number_of_rows_and_are_reproducible(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", workers=3)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sorted(files(tmp_path / "a")) == [f"train-0000{n}-of-00003.parquet" for n in range(3)]


def test_without_records_no_file_is_written(tmp_path):
    write(tmp_path, n=0)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop")])
def test_an_interrupted_and_resumed_split_equals_an_uninterrupted_one(tmp_path, error):
    write(tmp_path / "uninterrupted")
    computed = []

    def interrupted_row(n):
        if n == 6:
            raise error
        return row(n)

    def counted_row(n):
        computed.append(n)
        return row(n)

    with pytest.raises(type(error)):
        write(tmp_path / "interrupted", interrupted_row)
    assert list(files(tmp_path / "interrupted")) == ["train-00000-of-00003.parquet"], "an incomplete file is left"
    write(tmp_path / "interrupted", counted_row)
    assert computed == list(range(4, 10)), "finished shards are written again"
    assert files(tmp_path / "interrupted") == files(tmp_path / "uninterrupted")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_finished_files_are_kept_if_the_disk_is_full(tmp_path, monkeypatch, number):
    import pyarrow.parquet as pq

    write(tmp_path / "uninterrupted")
    write_table, calls = pq.ParquetWriter.write_table, []

    def raise_on_second_call(self, table):
        calls.append(table)
        if len(calls) == 2:
            raise OSError(number, "No space left on device")
        write_table(self, table)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", raise_on_second_call)
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path / "full")
    assert list(files(tmp_path / "full")) == ["train-00000-of-00003.parquet"]
    write(tmp_path / "full")
    assert files(tmp_path / "full") == files(tmp_path / "uninterrupted")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_arrow_reports_a_full_disk_by_its_error_number():
    import pyarrow as pa

    # Not with pq.write_table: it deletes the file that it could not write, and root could delete the device.
    with pytest.raises(OSError) as error, pa.OSFile("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)
    assert error.value.errno == errno.ENOSPC

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import tiny_run
from datasets import Dataset, Features, List, Value

from medst_trl.base.errors import UserError
from medst_trl.data.schema import instruct_features
from medst_trl.pipeline.stages.run_directory import load_splits


def write(folder, numbers, split="train", features=None, **columns):
    """An instruct dataset of conversations about these numbers, whose ids are `r<number>`."""
    rows = [{**tiny_run.conversation(n), "image_ids": [str(n)], **columns} for n in numbers]
    for message in (message for row in rows for message in row["messages"]):
        message["vusr"] = False
    folder.mkdir(exist_ok=True)
    extra = {name: Value("string") for name in columns}
    dataset = Dataset.from_list(rows, features=Features({**instruct_features(), **(features or {}), **extra}))
    dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def load(*names, max_records=None, eval_strategy="no"):
    args = SimpleNamespace(
        dataset=list(names), train_split="train", validation_split="validation", max_records=max_records
    )
    return load_splits(args, SimpleNamespace(eval_strategy=eval_strategy), "instruct")


def test_several_datasets_become_one_in_their_order(tmp_path):
    first, second = write(tmp_path / "a", range(3)), write(tmp_path / "b", range(10, 12), source="elsewhere")
    joined = load(first, second)["train"]
    assert joined["id"] == ["r0", "r1", "r2", "r10", "r11"]
    for row, number in zip(joined, (0, 1, 2, 10, 11)):
        expected = tiny_run.conversation(number)
        assert row["images"][0].tobytes() == expected["images"][0].tobytes()
        assert row["messages"][0]["content"] == expected["messages"][0]["content"]
        assert row["image_ids"] == [str(number)]
    assert load(first, second, max_records=4)["train"]["id"] == ["r0", "r1", "r2", "r10"]


def test_ids_that_two_datasets_share_are_told_apart(tmp_path):
    first, second = write(tmp_path / "a", range(2)), write(tmp_path / "b", range(1, 3))
    assert load(first, second, first)["train"]["id"] == ["r0", "r1", "r1@2", "r2", "r0@3", "r1@3"]
    assert load(first)["train"]["id"] == ["r0", "r1"]


def test_large_strings_of_another_writer_are_no_obstacle(tmp_path):
    large = {"id": Value("large_string"), "image_ids": List(Value("large_string"))}
    first, second = write(tmp_path / "a", range(2)), write(tmp_path / "b", range(5, 7), features=large)
    assert load(first, second)["train"]["id"] == ["r0", "r1", "r5", "r6"]


def test_each_of_them_has_to_be_complete(tmp_path):
    first, second = write(tmp_path / "a", range(2)), write(tmp_path / "b", range(2))
    write(tmp_path / "a", range(20, 22), split="validation")
    with pytest.raises(UserError, match="b has no split 'validation'"):
        load(first, second, eval_strategy="steps")
    assert load(first, eval_strategy="steps")["eval"]["id"] == ["r20", "r21"]
    bare = tmp_path / "c"
    bare.mkdir()
    Dataset.from_list([{"id": "x"}]).to_parquet(bare / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=f"{bare}: .*lacks the columns images, image_ids, messages"):
        load(first, str(bare))

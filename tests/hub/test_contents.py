# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test how directories are recognized and which of their files are published."""

import json
from contextlib import nullcontext

import pytest
from datasets import Dataset

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import fingerprint
from medst_trl.data.schema import (
    benchmark_features,
    candidate_features,
    features_of,
    instruct_features,
    preference_features,
    write_split,
)
from medst_trl.hub.contents import fill_upload, find_contents, public_base
from medst_trl.hub.push import REPLACED


ROW = {
    "id": "a",
    "images": [],
    "image_ids": [],
    "messages": [],
    "prompt": [],
    "answers": [],
    "chosen": [],
    "rejected": [],
}
CONVERSATION = ROW | {"messages": [{"role": "user", "content": [], "vusr": False}]}
BENCHMARK = {"image_id": "a", "image": None, "questions": []}


@pytest.mark.parametrize(
    ("kind", "features", "row"),
    [
        ("preferences", preference_features, ROW),
        ("candidates", candidate_features, ROW),
        ("benchmark", benchmark_features, BENCHMARK),
        ("instruct", instruct_features, CONVERSATION),
        ("images", instruct_features, ROW),
    ],
)
def test_each_kind_of_dataset_is_recognized(tmp_path, kind, features, row):
    for split in ("train", "test"):
        write_split(tmp_path / "data", split, [row] * 3, dict, features(), 2)
    contents = find_contents(tmp_path / "data")
    assert (contents.kind, contents.repo_type, len(contents.files)) == (kind, "dataset", 4)


@pytest.mark.parametrize(
    ("features", "row", "num_files"), [(preference_features, ROW, 2), (instruct_features, CONVERSATION, 0)]
)
def test_reference_log_probs_are_published_with_preference_pairs(tmp_path, features, row, num_files):
    write_split(tmp_path, "train", [row], dict, features(), 2)
    cache = tmp_path / "reference_log_probs"
    cache.mkdir()
    for name in ("b.jsonl", "a.jsonl", ".b.jsonl.tmp", "c.jsonl.incomplete", "notes.txt"):
        (cache / name).write_bytes(b"")
    files = find_contents(tmp_path).files
    assert files[0] == "train-00000-of-00001.parquet"
    assert files[1:] == ["reference_log_probs/a.jsonl", "reference_log_probs/b.jsonl"][:num_files]


def test_a_stage_directory_with_one_dataset_is_accepted(tmp_path):
    write_split(tmp_path / "preferences", "train", [ROW], dict, preference_features(), 2)
    assert find_contents(tmp_path) == find_contents(tmp_path / "preferences")
    write_split(tmp_path / "instruct", "train", [CONVERSATION], dict, instruct_features(), 2)
    with pytest.raises(UserError, match="several datasets. Push one of them: .*instruct, .*preferences"):
        find_contents(tmp_path)


@pytest.mark.parametrize(
    "content", ["nothing", "config_alone", "adapter_alone", "shards_missing", "other_columns", "running"]
)
def test_directories_without_complete_contents_are_refused(tmp_path, content):
    directory, message = tmp_path / "directory", "holds nothing to publish"
    directory.mkdir()
    if content == "config_alone":
        (directory / "config.json").write_text("{}")
        message = "no weights"
    elif content == "adapter_alone":
        (directory / "adapter_config.json").write_text("{}")
        message = "no weights"
    elif content == "shards_missing":
        write_split(directory, "train", [ROW] * 3, dict, preference_features(), 1)
        (directory / "train-00001-of-00003.parquet").unlink()
        message = "2 of 3 files"
    elif content == "other_columns":
        Dataset.from_list([{"text": "a"}]).to_parquet(directory / "train-00000-of-00001.parquet")
        message = "no stage of medst writes"
    elif content == "running":
        write_split(directory, "train", [ROW], dict, preference_features(), 1)
        (tmp_path / "stage.json").write_text(json.dumps({"status": "running"}))
        message = "is not finished"
    with pytest.raises(UserError, match=message):
        find_contents(directory)
    with pytest.raises(UserError, match="is not a directory"):
        find_contents(tmp_path / "nowhere")


def adapter(directory, base, revision=None):
    directory.mkdir(exist_ok=True)
    config = {"base_model_name_or_path": base, "revision": revision, "r": 8}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    (directory / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(directory), "eos_token": "</s>"}))
    for name in ("README.md", "stage.json", "trainer_state.json", "rejected.jsonl", "optimizer.pt", "run.log"):
        (directory / name).write_text(str(directory))
    (directory / "checkpoint-5").mkdir(exist_ok=True)
    (directory / "checkpoint-5" / "adapter_model.safetensors").write_bytes(b"old")
    return directory


def test_only_weights_processor_and_card_of_an_adapter_are_published(tmp_path):
    directory = adapter(tmp_path / "adapter", "/private/base")
    target = tmp_path / "staged"
    fill_upload(find_contents(directory), target, "# Card", "org/base@abc")
    files = {path.name: path.read_text() for path in target.iterdir()}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"}
    assert not any(str(tmp_path) in content or "/private" in content for content in files.values())
    config = json.loads(files["adapter_config.json"])
    assert config == {"base_model_name_or_path": "org/base", "revision": "abc", "r": 8}
    assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "</s>"}
    assert str(directory) in (directory / "tokenizer_config.json").read_text()  # the original is unchanged


def uploaded_images(directory, target):
    """Return the list of training images that a push uploads; None if there is none."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_text("{}")
    target.mkdir()
    fill_upload(find_contents(directory), target, "card")
    path = target / "training_images.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_only_hashes_of_training_images_are_published(tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()
    assert uploaded_images(directory, tmp_path / "none") is None
    ids = ["Mueller_Anna_0.png", "17", "a" * 64]
    (directory / "training_images.json").write_text(json.dumps({"complete": True, "image_ids": ids}))
    assert uploaded_images(directory, tmp_path / "some") == {"complete": False, "image_ids": ["a" * 64]}
    (directory / "training_images.json").write_text(json.dumps({"complete": True, "image_ids": ids[:2]}))
    assert uploaded_images(directory, tmp_path / "names") is None  # nothing is left to announce


def test_a_model_of_version_0_1_0_is_published_with_the_images_of_the_data_that_is_here(tmp_path):
    write_split(tmp_path / "data", "train", [CONVERSATION | {"image_ids": ["a" * 64]}], dict, instruct_features(), 2)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    names = {"model_name_or_path": tmp_path / "base", "dataset": tmp_path / "data"}
    inputs = {name: [fingerprint(path)] for name, path in names.items()}
    directory = tmp_path / "sft"
    directory.mkdir()
    (directory / "stage.json").write_text(json.dumps({"stage": "sft", "status": "complete", "inputs": inputs}))
    assert uploaded_images(directory, tmp_path / "target") == {"complete": True, "image_ids": ["a" * 64]}
    assert not (directory / "training_images.json").exists()
    assert "training_images.json" in REPLACED["model"]  # of an earlier push of another model


@pytest.mark.parametrize(
    ("kind", "column", "value", "is_public"),
    [
        ("instruct", "image_ids", ["a" * 64, "Mueller_Anna.png"], False), ("instruct", "image_ids", ["17"], False),
        ("instruct", "image_ids", ["a" * 64], True), ("instruct", "image_ids", None, True),
        ("instruct", "group_id", "P-4711", False), ("instruct", "group_id", "0123ab-" + "c" * 20, True),
        ("benchmark", "image_id", "scan.png", False), ("benchmark", "image_id", "a" * 64, True),
    ],
)  # fmt: skip
def test_a_dataset_with_ids_that_are_not_hashes_is_not_published(tmp_path, kind, column, value, is_public):
    rows = [(CONVERSATION if kind == "instruct" else BENCHMARK | {"image_id": "b" * 64}) | {column: value}]
    write_split(tmp_path / "data", "train", rows, dict, features_of(kind), 2)
    (tmp_path / "target").mkdir()
    with nullcontext() if is_public else pytest.raises(UserError, match=f"column {column} .* not hashes"):
        fill_upload(find_contents(tmp_path / "data"), tmp_path / "target", "card")


def test_the_base_of_an_adapter_must_be_on_the_hub(tmp_path):
    directory = adapter(tmp_path / "adapter", "org/base", "c0ffee")
    assert public_base(directory, None) == "org/base@c0ffee"
    assert public_base(directory, "org/other") == "org/other"
    (tmp_path / "base").mkdir()
    for local in (str(tmp_path / "base"), "runs/demo/base", "base"):
        with pytest.raises(UserError, match="--base_model_name_or_path ORG/BASE"):
            public_base(adapter(tmp_path / "adapter", local), None)
        with pytest.raises(UserError, match="a local model"):
            public_base(adapter(tmp_path / "adapter", "org/base"), local)

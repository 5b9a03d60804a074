# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a push uploads: the files of a dataset, adapter or model, and copies of the few that name this machine."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_object, write_json
from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.base.hub_ids import is_hub_id, looks_local, public_name, split_revision
from medst_trl.data.loading import split_files, splits_in
from medst_trl.data.schema import kind_of
from medst_trl.pipeline.lineage import TRAINING_IMAGES_FILE, nearest_record, training_images, write_training_images


# The files of a processor. Nothing else of a stage's directory is published: records, checkpoints and logs stay.
PROCESSOR_FILES = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "base_model.json", TRAINING_IMAGES_FILE, *PROCESSOR_FILES,
)  # fmt: skip
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", TRAINING_IMAGES_FILE, *PROCESSOR_FILES,
)  # fmt: skip

_HASHED = re.compile("[0-9a-f]{64}|[0-9a-f]{6}-[0-9a-f]{20}")  # ids of images and of groups
PATH_KEYS = ("name_or_path", "_name_or_path")  # where transformers notes what a file was loaded from


@dataclass(frozen=True)
class Contents:
    """
    A directory to publish.

    Attributes:
        directory (`pathlib.Path`): Where the files are; perhaps inside the directory that was named.
        kind (`str`): `"adapter"`, `"model"`, or the kind of dataset, such as `"preferences"`.
        files (`list[str]`): Names in the directory and in the repository.
    """

    directory: Path
    kind: str
    files: list[str]

    @property
    def title(self) -> str:
        """The kind as words of a sentence."""
        return self.kind if self.repo_type == "model" else f"{self.kind} dataset"

    @property
    def repo_type(self) -> Literal["dataset", "model"]:
        return "model" if self.kind in ("adapter", "model") else "dataset"


def find_contents(directory: Path) -> Contents:
    """
    Recognize a dataset, an adapter or a model.

    Raises:
        UserError: if the directory holds none of them, holds several, or is incomplete.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory. Give the directory of a dataset, an adapter or a model.")
    path, record = nearest_record(directory)
    if record.get("status") == "running":  # half a result can look like a whole one
        raise UserError(f"{path.parent} is not finished. Run its stage again (it resumes), then push.")
    if (directory / "adapter_config.json").is_file():
        return Contents(directory, "adapter", _weights(directory, ADAPTER_FILES, "adapter_model.safetensors"))
    if (directory / "config.json").is_file():
        return Contents(directory, "model", _weights(directory, MODEL_FILES, "*.safetensors"))
    if splits_in(directory):
        return _dataset(directory)
    datasets = [child for child in sorted(directory.iterdir()) if child.is_dir() and splits_in(child)]
    if len(datasets) == 1:
        return _dataset(datasets[0])
    if datasets:
        raise UserError(f"{directory} holds several datasets. Push one of them: {', '.join(map(str, datasets))}.")
    raise UserError(f"{directory} holds nothing to publish. Give a directory with a dataset, an adapter or a model.")


def _weights(directory: Path, patterns: tuple[str, ...], weights: str) -> list[str]:
    if not any(directory.glob(weights)):
        raise UserError(f"{directory} has no weights ({weights}). Let the stage that writes it finish first.")
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    images = {directory / TRAINING_IMAGES_FILE}  # also of a model of version 0.1.0, which has no such file
    found = found | images if training_images(directory)[0] else found - images
    return sorted(path.relative_to(directory).as_posix() for path in found)


def _dataset(directory: Path) -> Contents:
    shards = [shard for split in splits_in(directory) for shard in split_files(directory, split)]
    columns = pq.read_schema(shards[0]).names
    kind = kind_of(columns)
    if kind is None:
        what = f"the columns {', '.join(columns)}, which no stage of medst writes"
        raise UserError(f"{directory} has {what}. Publish other datasets with `hf upload`.")
    name = kind.name
    if name == "instruct":
        messages = pq.ParquetFile(shards[0]).read_row_group(0, ["messages"])["messages"]
        name = name if any(messages.to_pylist()) else "images"  # without labels
    references = sorted(directory.glob(f"{REFERENCE_FOLDER}/*.jsonl")) if name == "preferences" else []
    return Contents(directory, name, [path.relative_to(directory).as_posix() for path in [*shards, *references]])


def fill_upload(contents: Contents, target: Path, card: str, base_model: str | None = None) -> None:
    """
    Fill an empty directory with what is to be uploaded: links to the originals, and copies of
    configurations without their paths.

    Args:
        contents ([`Contents`]): What is published. Its files are not changed.
        target (`Path`): The empty directory.
        card (`str`): README.md.
        base_model (`str`, *optional*): Hub id of an adapter's base, which replaces a local path.
    """
    for name in contents.files:
        source, path = contents.directory / name, target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("config.json"):
            config = source.read_text(encoding="utf-8")
            public = json.loads(config, object_hook=_without_paths)
            if name == "adapter_config.json" and base_model is not None:
                public["base_model_name_or_path"], public["revision"] = split_revision(base_model)
            if public != json.loads(config):  # other files stay as they are, byte for byte
                write_json(path, public)
        elif name == TRAINING_IMAGES_FILE:  # without ids that are not hashes: they may name a patient
            write_training_images(target, (), contents.directory)
        elif name.endswith(".parquet"):
            _check_models(source)
            _check_ids(source)
        if not path.exists():
            path.symlink_to(source.resolve())
    (target / "README.md").write_text(card, encoding="utf-8")


def base_model_of(directory: Path) -> str | None:
    """Return the base that an adapter names, with its revision (`org/name@revision`) if it has one."""
    from medst_trl.policy.adapters import base_of_adapter  # loads torch

    config = read_object(directory / "adapter_config.json")
    return with_revision(base_of_adapter(directory, config.get("base_model_name_or_path")), config.get("revision"))


def with_revision(name: str | None, revision: str | None) -> str | None:
    """Return a Hub id with its revision: `org/name@revision`."""
    return f"{name}@{revision}" if name and revision else name


def public_base(directory: Path, given: str | None) -> str | None:
    """
    Return the Hub id of an adapter's base: the one given, or the adapter's own.

    Raises:
        UserError: if the base is a local directory, which nobody else could load.
    """
    base = given or base_model_of(directory)
    if base is None or is_hub_id(base):
        return base
    raise UserError(
        f"The base of the adapter in {directory} is {base}, a local model that nobody else can load. Push the base "
        "first, then the adapter with --base_model_name_or_path ORG/BASE."
    )


def _without_paths(item: dict[str, Any]) -> dict[str, Any]:
    """Drop from an object in a configuration where it was loaded from on this machine."""
    local = {key for key in PATH_KEYS if isinstance(item.get(key), str) and looks_local(item[key])}
    return {key: value for key, value in item.items() if key not in local}


def _check_models(shard: Path) -> None:
    """Refuse rows that name a model by its path on this machine, as version 0.1.0 wrote them."""
    columns = {"generation", "judge"}.intersection(pq.read_schema(shard).names)
    for name, texts in pq.read_table(shard, columns=list(columns), partitioning=None).to_pydict().items():
        for text in dict.fromkeys(filter(None, texts)):
            model = None
            with suppress(ValueError, LookupError, TypeError):  # of another program
                model = json.loads(text)["model"]
            if isinstance(model, str) and public_name(model) != model:
                raise UserError(
                    f"The column {name} of {shard} names a model by its path, which must not be published ({model}). "
                    "Run the stage that made it again with --overwrite: a judge's replies stay in its cache."
                )


def _check_ids(shard: Path) -> None:
    """Refuse ids of images and groups that are not hashes, as datasets of others can have them."""
    columns = {"image_ids", "image_id", "group_id"}.intersection(pq.read_schema(shard).names)
    for name, values in pq.read_table(shard, columns=list(columns), partitioning=None).to_pydict().items():
        ids = chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
        if not all(value is None or _HASHED.fullmatch(str(value)) for value in ids):
            raise UserError(
                f"The column {name} of {shard} has ids that are not hashes, such as names or patient numbers. Do not "
                "publish them: remove the column, or push the output of `medst prepare`."
            )

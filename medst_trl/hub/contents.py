# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a folder is that is to be published, and which of its files go with it."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.data.schema import complete_shards, kind_of, splits_in
from medst_trl.pipeline.record import FILE_NAME


# Folders that hold one dataset for others to read, and what it is called inside.
INSIDE = ("preferences", "candidates")

# What a processor is made of. Nothing else is taken from a run's folder: it also holds records, checkpoints, a log.
PROCESSOR_FILES = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "base_model.json", *PROCESSOR_FILES)
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", *PROCESSOR_FILES,
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """
    A folder to publish.

    Attributes:
        folder (`pathlib.Path`): Where its files lie; perhaps inside the folder that was named.
        kind (`str`): `"adapter"`, `"model"`, or the kind of dataset: `"instruct"`, `"images"`, `"benchmark"`,
            `"candidates"`, `"preferences"`.
        files (`list[str]`): Names in the folder and in the repository.
    """

    folder: Path
    kind: str
    files: list[str]

    @property
    def title(self) -> str:
        """Its kind in a sentence."""
        return self.kind if self.repo_type == "model" else f"{self.kind} dataset"

    @property
    def repo_type(self) -> Literal["dataset", "model"]:
        return "model" if self.kind in ("adapter", "model") else "dataset"


def find_contents(folder: Path) -> Contents:
    """
    Recognise a dataset, an adapter or a model.

    Raises:
        UserError: if the folder is none of them, holds several, or is not complete.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. `medst push` publishes a dataset, an adapter or a model from one.")
    _refuse_unfinished(folder)
    if (folder / "adapter_config.json").is_file():
        return Contents(folder, "adapter", _weights(folder, ADAPTER_FILES, "adapter_model.safetensors"))
    if (folder / "config.json").is_file():
        return Contents(folder, "model", _weights(folder, MODEL_FILES, "*.safetensors"))
    if splits_in(folder):
        return _dataset(folder)
    datasets = [child for child in sorted(folder.iterdir()) if child.is_dir() and splits_in(child)]
    if len(datasets) == 1 and datasets[0].name in INSIDE:
        return _dataset(datasets[0])
    if datasets:
        raise UserError(f"{folder} holds several datasets. Push one of them: {', '.join(map(str, datasets))}.")
    raise UserError(
        f"{folder} holds nothing to publish: no adapter (adapter_config.json), no model (config.json) and no dataset "
        "(*.parquet). Name the folder that a stage wrote."
    )


def _refuse_unfinished(folder: Path) -> None:
    """Half a result may look like a whole one: the files of one split, but not yet of the other."""
    path = next((place / FILE_NAME for place in (folder, folder.parent) if (place / FILE_NAME).is_file()), None)
    with suppress(ValueError, AttributeError):  # a damaged record or another tool's: the files have to speak
        if path is not None and json.loads(path.read_text(encoding="utf-8")).get("status") == "running":
            raise UserError(f"{path.parent} is not finished. Run its stage again, it goes on where it was; then push.")


def _weights(folder: Path, patterns: tuple[str, ...], weights: str) -> list[str]:
    if not any(folder.glob(weights)):
        raise UserError(f"{folder} has no weights ({weights}). Let the stage that writes it finish first.")
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    return sorted(name for name in found if (folder / name).is_file())


def _dataset(folder: Path) -> Contents:
    import pyarrow.parquet as pq

    shards = [shard for split in splits_in(folder) for shard in complete_shards(folder, split)]
    columns = pq.read_schema(shards[0]).names
    kind = kind_of(columns)
    if kind is None:
        raise UserError(
            f"{folder} has the columns {', '.join(columns)}, which no stage of medst writes. Other datasets are "
            "published with `datasets.Dataset.push_to_hub` or `hf upload`."
        )
    kind = kind.name
    if kind == "instruct" and not any(
        pq.ParquetFile(shards[0]).read_row_group(0, ["messages"])["messages"].to_pylist()
    ):
        kind = "images"  # unlabelled ones
    references = sorted(folder.glob(f"{REFERENCE_FOLDER}/*.parquet")) if kind == "preferences" else []
    return Contents(folder, kind, [path.relative_to(folder).as_posix() for path in [*shards, *references]])

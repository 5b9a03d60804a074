# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Open datasets that a stage wrote, or that are on the Hub."""

import re
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean
from medst_trl.base.hub_ids import split_revision

from .schema import KINDS, check_columns, features_of, kind_of


if TYPE_CHECKING:
    from datasets import Dataset

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet")


def load_records(path_or_hub_id: str | PathLike, split: str, kind: str | None = None) -> "Dataset":
    """
    Open one split of a dataset that a stage wrote or that is on the Hub. Images are decoded when they are read, and
    optional columns that are missing are filled in.

    Args:
        path_or_hub_id (`str` or `os.PathLike`):
            A directory of `<split>-*.parquet` files, or a Hub id.
        split (`str`):
            For example `"train"`.
        kind (`str`, *optional*):
            A name in `KINDS`, whose required columns it must have. By default they are not checked.

    Raises:
        UserError: if the dataset or split does not exist, if the stage that writes it was interrupted, or for other
            columns.
    """
    dataset = _open(path_or_hub_id, split, kind)
    found = kind_of(dataset.features)
    for name, default in found.optional.items() if found else ():
        if name not in dataset.features:
            dataset = dataset.add_column(name, [default] * len(dataset), feature=features_of(found.name)[name])
    if kind is not None:
        try:
            check_columns(dataset, kind)
        except UserError as error:
            raise UserError(f"{path_or_hub_id}: {error}") from None
    return dataset


def _open(path_or_hub_id: str | PathLike, split: str, kind: str | None) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    directory = Path(path_or_hub_id)
    if directory.is_dir():
        shards = [str(path) for path in complete_shards(directory, split, kind)]
        return load_dataset("parquet", data_files={split: shards}, split=split)
    try:
        hub_id, revision = split_revision(str(path_or_hub_id))
        return load_dataset(hub_id, split=split, revision=revision)
    except (DatasetNotFoundError, FileNotFoundError):
        raise UserError(
            f"{path_or_hub_id} is neither a directory nor a dataset on the Hub that you may read."
            f"{_datasets_near(directory, split, kind)} Run the stage that makes it first, or correct the path."
        ) from None
    except (ConnectionError, HfHubHTTPError) as error:
        raise UserError(
            f"{path_or_hub_id} is not a directory, and the Hub cannot be reached ({str(error).splitlines()[0]})."
            f"{_datasets_near(directory, split, kind)} Check the network, the token (`hf auth login`) and "
            "HF_HUB_OFFLINE, or correct the path."
        ) from None
    except ValueError as error:  # an unknown split
        raise UserError(f"{path_or_hub_id}: {error}") from None


def splits_in(directory: str | PathLike) -> list[str]:
    """Return the names of the splits in a directory of `<split>-*.parquet` files, training first."""
    return sorted({match["split"] for match in _shards(Path(directory))}, key=lambda split: (split != "train", split))


def complete_shards(directory: Path, split: str, kind: str | None = None) -> list[Path]:
    """
    Return the files of a split.

    Raises:
        UserError: if there are none, with the directories nearby that have some, of `kind` if that is given; or if
            some are missing.
    """
    shards = [match for match in _shards(directory) if match["split"] == split]
    if not shards:
        found = ", ".join(splits_in(directory)) or "no splits. `medst prepare`, `generate` and `judge` write them"
        near = _datasets_near(directory, split, kind)
        raise UserError(f"{directory} has no split {split!r} ({split}-*.parquet); it has {found}.{near}")
    total = int(shards[0]["total"])
    if any(int(match["total"]) != len(shards) for match in shards):
        raise UserError(
            f"{directory} has {len(shards)} of {total} files of split {split!r}. Run the stage that writes it again: "
            "it resumes where it stopped."
        )
    return [directory / match.string for match in shards]


def _datasets_near(path: Path, split: str, kind: str | None) -> str:
    """Return the end of a message that names the directories near a path that hold the split (of a kind)."""
    from pyarrow.parquet import read_schema

    marker = KINDS.get(kind).marker if kind else None

    def holds_split(directory: Path) -> bool:
        shard = next((directory / match.string for match in _shards(directory) if match["split"] == split), None)
        return shard is not None and (marker is None or marker in read_schema(shard).names)

    return did_you_mean(path, holds_split)


def _shards(directory: Path) -> list[re.Match]:
    return [match for path in sorted(directory.iterdir()) if (match := _SHARD.fullmatch(path.name))]

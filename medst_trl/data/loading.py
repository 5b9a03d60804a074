# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Open datasets: those that the stages write, and your own in one of the usual forms.

A split is a set of Parquet or JSON files, a directory of `datasets.save_to_disk`, or on the Hub.
"""

import glob
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError, located
from medst_trl.base.files import did_you_mean
from medst_trl.base.hub_ids import split_revision

from .cells import SPLIT_NAMES, answer_text, is_missing
from .conform import (
    MALFORMED,
    check_missing,
    conform,
    messages_of,
    missing_columns,
    report_unusable,
    typed_messages,
)
from .reading import read_json_records
from .schema import KINDS, feature_of, kind_of
from .source import Rejected


if TYPE_CHECKING:
    from datasets import Dataset

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet")
_IN_DIRECTORIES = (".parquet", ".jsonl")  # not .json, as many other files are
_SUFFIXES = (*_IN_DIRECTORIES, ".json")
# Columns besides those of a kind that JSON records may have.
_MORE = dict.fromkeys(("question", "answer", "answer_type", "question_type", "question_id"), "string")


def load_records(
    path_or_hub_id: str | PathLike, split: str, kind: str | None = None, identify: bool = True
) -> "Dataset":
    """
    Open one split of a dataset that a stage wrote, of your own, or on the Hub. Images are decoded when they are read,
    and it has all columns of its kind; see [`conform`].

    Args:
        path_or_hub_id (`str` or `os.PathLike`):
            A directory of `<split>*.parquet` or `<split>*.jsonl` files (also in `data/` inside it), one such file,
            a directory of `save_to_disk`, or a Hub id.
        split (`str`):
            For example `"train"`.
        kind (`str`, *optional*):
            A name in `KINDS`, whose required columns it must have. Defaults to the kind that its columns show.
        identify (`bool`, *optional*, defaults to `True`):
            Whether to compute missing `image_ids`, for which all images are decoded; otherwise they are null.

    Raises:
        UserError: if the dataset or split does not exist, if the stage that writes it was interrupted, or for other
            columns.
    """
    dataset = _open(path_or_hub_id, split, kind)
    found = kind_of(dataset.features)
    if kind is None and found is not None and not missing_columns(dataset.features, found.name):
        kind = found.name
    try:
        dataset = dataset if kind is None else conform(dataset, kind)
    except UserError as error:
        raise UserError(f"{path_or_hub_id}: {error}") from None
    if not identify:
        return dataset
    from .identify import with_image_ids  # loads NumPy and Pillow

    return with_image_ids(dataset)


def _open(path_or_hub_id: str | PathLike, split: str, kind: str | None) -> "Dataset":
    from datasets import load_dataset

    path = Path(path_or_hub_id)
    with readable_errors(path_or_hub_id, lambda: _datasets_near(path, split, kind)):
        if path.exists():
            return _read(split_files(path, split, kind), split, kind)
        hub_id, revision = split_revision(str(path_or_hub_id))
        return load_dataset(hub_id, split=split, revision=revision)


@contextmanager
def readable_errors(path_or_hub_id: str | PathLike, near: Callable[[], str] = str) -> Iterator[None]:
    """Turn what `datasets` raises for a dataset that it cannot open into a [`UserError`]. `near` is part of it."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (DatasetNotFoundError, FileNotFoundError):
        raise UserError(
            f"{path_or_hub_id} is neither a directory nor a dataset on the Hub that you may read."
            f"{near()} Run the stage that makes it first, or correct the path."
        ) from None
    except (ConnectionError, HfHubHTTPError) as error:
        raise UserError(
            f"{path_or_hub_id} is not a directory, and the Hub cannot be reached ({str(error).splitlines()[0]})."
            f"{near()} Check the network, the token (`hf auth login`) and HF_HUB_OFFLINE, or correct the path."
        ) from None
    except (DatasetGenerationError, KeyError) as error:  # damaged, or files with different columns
        raise UserError(f"{path_or_hub_id} cannot be read: {error.__cause__ or error}") from None
    except ValueError as error:  # an unknown split
        raise UserError(f"{path_or_hub_id}: {error}") from None


def _read(files: list[Path], split: str, kind: str | None) -> "Dataset":
    from datasets import load_dataset, load_from_disk

    if files[0].is_dir():
        return load_from_disk(files[0])
    if files[0].suffix == ".parquet":
        names = [glob.escape(str(file)) for file in files]  # otherwise a path with brackets is a pattern
        return load_dataset("parquet", data_files={split: names}, split=split)
    return _read_json(files, kind)


def _read_json(files: list[Path], kind: str | None) -> "Dataset":
    """The records of JSON files. Images are files, named relative to the JSON file and inside its directory."""
    from datasets import Dataset, Features

    from .image_formats import ImageProblem  # loads Pillow

    records = [(path, *found) for path in files for found in read_json_records(path, "images", notes={})]
    given = dict.fromkeys(name for _, _, record in records if isinstance(record, dict) for name in record)
    own = kind_of(given) if kind is None else KINDS.get(kind)
    where = str(files[0] if len(files) == 1 else files[0].parent)
    if own is None:
        raise UserError(f"{where} has the columns {', '.join(given)}, which are those of no kind of dataset.")
    with located(where):
        check_missing(given, own.name)
    known = _MORE | dict.fromkeys(own.extras, "float64") | own.columns
    texts, rows, problems = messages_of(own), [], []
    columns = {name: known[name] for name in known if name in {"images", "image", *texts, *given}}
    for path, position, record in records:
        try:
            if isinstance(record, Rejected):
                raise ValueError(record.reason)
            rows.append(_json_row(record, columns, texts, path.parent))
        except (*MALFORMED, ImageProblem) as error:
            problems.append(f"{path.name}, record {position}: {error}")
    report_unusable(problems, len(rows), where)
    return Dataset.from_list(rows, Features({name: feature_of(column) for name, column in columns.items()}))


def _json_row(
    record: Mapping[str, Any], columns: Mapping[str, Any], texts: Sequence[str], directory: Path
) -> dict[str, Any]:
    """A record as a row with those of the columns that it or another record has; `texts` are those of messages."""
    images = record.get("images") or record.get("image") or []
    images = [_image_file(image, directory) for image in (images if isinstance(images, list) else [images])]
    row = typed_messages({name: record.get(name) for name in texts}, len(images)) if texts else {}
    row |= {"images": images} if "images" in columns else {"image": images[0] if images else None}
    return row | {name: _json_value(record.get(name), columns[name]) for name in columns if name not in row}


def _image_file(image: Any, directory: Path) -> dict[str, Any]:
    from .image_formats import ImageProblem
    from .images import resolve_inside

    name = image.get("path") if isinstance(image, dict) else image
    path = resolve_inside(directory, name)
    if path.exists() and not path.is_file():
        raise ImageProblem("not_a_file", name)
    return {"bytes": None, "path": str(path)}


def _json_value(value: Any, column: Any) -> Any:
    if isinstance(column, list) and value is not None:
        return [_json_value(item, column[0]) for item in value]
    if isinstance(column, Mapping):
        return {name: _json_value(value.get(name), inner) for name, inner in column.items()}
    if column == "float64":
        return None if value is None else float(value)
    if isinstance(value, dict | list):
        return json.dumps(value)
    return None if is_missing(value) else answer_text(value)


def mix(
    datasets: "Sequence[Dataset]", weights: Sequence[float] | None = None, oversample: bool = False, seed: int = 0
) -> "Dataset":
    """
    Join datasets with the same columns.

    Args:
        datasets (sequence of [`~datasets.Dataset`]):
            The datasets.
        weights (sequence of `float`, *optional*):
            Their shares, in any unit. As in TRL's `DatasetMixtureConfig`, the first records of each are used, as many
            as the shares allow. All records by default.
        oversample (`bool`, *optional*, defaults to `False`):
            Use [`~datasets.interleave_datasets`] instead: each record at least once, those of smaller datasets several
            times.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order, with `oversample`.
    """
    from datasets import concatenate_datasets, interleave_datasets

    if len(datasets) == 1:
        return datasets[0]
    shares = [weight / sum(weights) for weight in weights or ()]
    if oversample:
        return interleave_datasets(list(datasets), shares, seed, stopping_strategy="all_exhausted")
    most = min((len(dataset) / share for dataset, share in zip(datasets, shares)), default=0)
    if shares:
        datasets = [
            dataset.select(range(round(share * most))) for dataset, share in zip(datasets, shares, strict=True)
        ]
    return concatenate_datasets(datasets)


def split_files(path: Path, split: str, kind: str | None = None) -> list[Path]:
    """
    Return the files of a split: Parquet files, JSON files, or one directory of `save_to_disk`.

    Raises:
        UserError: if there are none, with the directories nearby that have some, of `kind` if that is given; or if
            some are missing.
    """
    if found := _find(path, split):
        return found
    near = _datasets_near(path, split, kind)
    if not path.is_dir():
        raise UserError(
            f"{path} is not a whole split {split!r}: a *.parquet or *.jsonl file of that name.{near} `medst prepare` "
            "reads tables (--source images) and LLaVA's conversations (--source llava)."
        )
    others = [file.name for suffix in _IN_DIRECTORIES for file in _files(path, suffix)]
    found = ", ".join(splits_in(path) or others) or "no splits. `medst prepare`, `generate` and `judge` write them"
    raise UserError(f"{path} has no split {split!r} ({split}*.parquet or {split}*.jsonl); it has {found}.{near}")


def _find(path: Path, split: str) -> list[Path]:
    """The files of a split; none if there is no such split."""
    if path.is_file():
        match = _SHARD.fullmatch(path.name)
        is_whole = match is None or (int(match["total"]) == 1 and match["split"] == split)
        return [path] if is_whole and path.suffix in _SUFFIXES and _can_be(path.stem, split) else []
    if not path.is_dir():  # a pipe, a device
        return []
    if shards := [match for match in _shards(path) if match["split"] == split]:
        total = int(shards[0]["total"])
        if any(int(match["total"]) != len(shards) for match in shards):
            raise UserError(
                f"{path} has {len(shards)} of {total} files of split {split!r}. Run the stage that writes it again: "
                "it resumes where it stopped."
            )
        return [path / match.string for match in shards]
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [path] if _can_be(path.name, split) else []
    if (path / "dataset_dict.json").is_file():
        found = [item for item in path.iterdir() if item.name == split or split_named_by(item.name) == split]
        return sorted(item for item in found if (item / "state.json").is_file())[:1]
    for suffix in _IN_DIRECTORIES:
        if named := [file for file in _files(path, suffix) if _begins_with(file, split)]:
            return named
    return _find(path / "data", split) if (path / "data").is_dir() else []


def _files(directory: Path, suffix: str) -> list[Path]:
    """The files of a directory with a suffix that are no shards of a stage."""
    files = sorted(directory.glob(f"*{suffix}"))
    return [file for file in files if file.is_file() and not _SHARD.fullmatch(file.name)]


def _begins_with(file: Path, split: str) -> bool:
    return file.name.startswith(split) or split_named_by(file.stem) == split


def split_named_by(name: str) -> str | None:
    """Return the split that the name of a file begins with, or None."""
    return SPLIT_NAMES.get(re.match("[a-z]*", name.lower())[0])


def _can_be(name: str, split: str) -> bool:
    """Whether a file or a directory of `save_to_disk` is this split: any but validation, unless its name says so."""
    return split == (split_named_by(name) or ("" if split == "validation" else split))


def splits_in(directory: str | PathLike) -> list[str]:
    """Return the names of the splits in a directory of Parquet files, training first."""
    names = {match["split"] for match in _shards(Path(directory))}
    files = _files(Path(directory), ".parquet")
    names |= {split for split in SPLIT_NAMES.values() if any(_begins_with(file, split) for file in files)}
    return sorted(names, key=lambda split: (split != "train", split))


def columns_of(path: Path, split: str, kind: str | None = None) -> list[str]:
    """Return the names of the columns of a split on this machine, from the head of one file."""
    from datasets import DatasetInfo
    from pyarrow.parquet import read_schema

    file = split_files(path, split, kind)[0]
    if file.is_dir():
        return list(DatasetInfo.from_directory(str(file)).features)
    if file.suffix == ".parquet":
        return read_schema(file).names
    return list(next((record for _, record in read_json_records(file, "images") if isinstance(record, dict)), ()))


def count_rows(path: Path, split: str) -> int:
    """Return the number of rows of a split on this machine, without reading them (apart from those of JSON)."""
    from datasets import load_from_disk
    from pyarrow.parquet import read_metadata

    files = split_files(path, split)
    if files[0].is_dir():
        return len(load_from_disk(files[0]))
    if files[0].suffix == ".parquet":
        return sum(read_metadata(file).num_rows for file in files)
    return sum(isinstance(record, dict) for file in files for _, record in read_json_records(file, "images"))


def _datasets_near(path: Path, split: str, kind: str | None) -> str:
    """Return the end of a message that names the directories near a path that hold the split (of a kind)."""

    def holds_split(directory: Path) -> bool:
        with suppress(UserError):
            return bool(_find(directory, split)) and not (kind and missing_columns(columns_of(directory, split), kind))
        return False

    return did_you_mean(path, holds_split)


def _shards(directory: Path) -> list[re.Match]:
    return [match for path in sorted(directory.iterdir()) if (match := _SHARD.fullmatch(path.name))]

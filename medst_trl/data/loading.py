# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Open datasets: those that the stages write, and your own in one of the usual forms.

A split is a set of Parquet or JSON files, a directory of `datasets.save_to_disk`, or on the Hub. Sources also read
tables of questions in Parquet files or on the Hub, with the images inside: the copies of VQA-RAD and PathVQA there
have the columns `image`, `question` and `answer`, and a file or more for each split.
"""

import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError, located
from medst_trl.base.files import did_you_mean, visible_files
from medst_trl.base.fingerprints import fingerprint
from medst_trl.base.hub_ids import is_only_on_hub, split_revision
from medst_trl.base.processes import rank

from .cells import SPLIT_NAMES, column_names, is_missing, optional_text
from .conform import RowReader, check_missing, conform, missing_columns, report_unusable
from .image_settings import ImageSettings
from .overlap import with_image_ids
from .reading import check_header, read_json_records
from .schema import KINDS, features_of, kind_of, with_stored_images
from .source import QUESTION_COLUMNS, Records, Rejected, SourceRequest, question_or_image


if TYPE_CHECKING:
    from datasets import Dataset

    from .images import StoredImage

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet")
_IN_DIRECTORIES = (".parquet", ".jsonl")  # not .json, as many other files are
_JSON = (".jsonl", ".json")
_SUFFIXES = (".parquet", *_JSON)
_SPLITS = list(dict.fromkeys(SPLIT_NAMES.values()))


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
    from datasets import load_dataset

    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    with readable_errors(name, lambda: _datasets_near(path, split, kind)):
        if path.exists():
            dataset = _read(split_files(path, split, kind), split, kind)
        elif is_only_on_hub(name):
            hub_id, revision = split_revision(name)
            dataset = load_dataset(hub_id, split=split, revision=revision)
        else:
            raise FileNotFoundError
    found = kind_of(dataset.features)
    if kind is None and found is not None and not missing_columns(dataset.features, found.name):
        kind = found.name
    with located(name):
        dataset = _rows_of_split(dataset if kind is None else conform(dataset, kind), split)
    return with_image_ids(dataset) if identify else dataset


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
    except (DatasetGenerationError, KeyError, ValueError) as error:  # damaged, other columns, an unknown split
        lines = str(error.__cause__ or error).splitlines()  # a schema is between the first and the last one
        raise UserError(f"{path_or_hub_id}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}") from None


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
    from datasets import Dataset, Features, Value

    records, notes = [], {}
    for path in files:
        records += [(path, *found) for found in read_json_records(path, "image", notes)]
    given = dict.fromkeys(name for *_, record in records if isinstance(record, dict) for name in record)
    own = kind_of(given) if kind is None else KINDS.get(kind)
    where = str(files[0] if len(files) == 1 else files[0].parent)
    if own is None:
        raise UserError(f"{where} has the columns {', '.join(given) or 'none'}, which no kind of dataset has.")
    with located(where):
        check_missing(given, own.name)
    if notes and rank() == 0:
        print(f"{where}: {', '.join(notes.values())}")
    wanted = features_of(own.name, extras=given)
    column = "images" if "images" in wanted else "image"
    reader, rows = RowReader(own, [name for name in wanted if name != column]), []
    for place, (path, position, record) in enumerate(records):
        name = f"{path.name}, record {position}"
        with reader.counted(name):
            if isinstance(record, Rejected):
                raise ValueError(record.reason)
            images = [_image_file(path.parent, image) for image in _named_images(record)]
            row = reader.read(record, len(images), place, name) | {"split": optional_text(record.get("split"))}
            rows.append(row | {column: images if column == "images" else next(iter(images), None)})
    report_unusable(reader.problems, reader.used, where)
    return Dataset.from_list(rows, Features({**wanted, "split": Value("string")}))


def _rows_of_split(dataset: "Dataset", split: str) -> "Dataset":
    """The rows whose own split, in the column `split`, is this one or none."""
    values = dataset["split"][:] if "split" in dataset.features and split in _SPLITS else []
    named = [None if is_missing(value) else SPLIT_NAMES.get(str(value).strip().casefold()) for value in values]
    others = {place: found for place, found in enumerate(named) if found not in (None, split)}
    problems = [f"row {place}: its column `split` says {found}" for place, found in others.items()]
    report_unusable(problems, len(values) - len(others), f"The split {split!r}")
    return dataset.select([place for place in range(len(values)) if place not in others]) if others else dataset


def _named_images(record: dict[str, Any]) -> list[Any]:
    """What a JSON record has as names of its images."""
    images = record.get("images") or record.get("image") or []
    images = images if isinstance(images, list) else [images]
    return [image.get("path") if isinstance(image, dict) else image for image in images]


def _image_file(directory: Path, name: str) -> dict[str, Any]:
    from .image_formats import ImageProblem  # loads Pillow
    from .images import resolve_inside

    path = resolve_inside(directory, name)
    if path.exists() and not path.is_file():  # the stages reject a missing one
        raise ImageProblem("not_a_file", name)
    return {"bytes": None, "path": str(path)}


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
        datasets = [data.select(range(round(share * most))) for data, share in zip(datasets, shares, strict=True)]
    return concatenate_datasets(datasets)


def fingerprint_dataset(source: str | PathLike) -> dict[str, str | None]:
    """Return the [`fingerprint`] of a dataset. That of a JSON file also has a hash of the images that it names."""
    found, path = fingerprint(source), Path(source)
    if path.is_file() and path.suffix in _JSON:
        with suppress(UserError):  # other JSON
            records = [row for _, row in read_json_records(path, "image") if isinstance(row, dict)]
            if names := [name for row in records for name in _named_images(row) if isinstance(name, str)]:
                found["images_sha256"] = fingerprint(path.parent, names)["used_sha256"]
    return found


def split_files(path: Path, split: str, kind: str | None = None) -> list[Path]:
    """
    Return the files of a split: Parquet files, JSON files, or one directory of `save_to_disk`.

    Raises:
        UserError: if there are none, with the directories nearby that have some, of `kind` if that is given; or if
            some are missing.
    """
    if found := _find(path, split):
        return found
    near, shard = _datasets_near(path, split, kind), _SHARD.fullmatch(path.name)
    if shard and int(shard["total"]) > 1:
        raise UserError(f"{path} is one of {int(shard['total'])} files of a split. Give its directory.{near}")
    if not path.is_dir() and path.suffix not in _SUFFIXES:
        raise UserError(
            f"{path} is not a dataset, such as a .parquet or .jsonl file. `medst prepare` reads tables "
            "(--source images) and LLaVA's conversations (--source llava)."
        )
    others = [file.name for suffix in _IN_DIRECTORIES for file in sorted(path.glob(f"*{suffix}"))]
    found = ", ".join([name for name in _SPLITS if _find(path, name)] or others)
    found = found or "no splits. `medst prepare`, `generate` and `judge` write them"
    raise UserError(f"{path} has no split {split!r} ({split}*.parquet or {split}*.jsonl); it has {found}.{near}")


def _find(path: Path, split: str) -> list[Path]:
    """The files of a split; none if there is no such split."""
    if path.is_file():
        shard = _SHARD.fullmatch(path.name)
        is_whole = path.suffix in _SUFFIXES and (shard is None or int(shard["total"]) == 1)
        return [path] if is_whole and _can_be(path, split) else []
    if not path.is_dir():  # a pipe, a device
        return []
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [path] if _can_be(path, split) else []
    if (path / "dataset_dict.json").is_file():
        directories = sorted(file.parent for file in path.glob("*/state.json"))
        return [directory for directory in directories if split in (directory.name, _split_of(directory))][:1]
    files = [sorted(path.glob(f"*{suffix}")) for suffix in _IN_DIRECTORIES]
    named = ([file for file in some if file.is_file() and split in (file.stem, _split_of(file))] for some in files)
    if not (found := [some for some in named if some]):
        return _find(path / "data", split)
    shards = [match for file in found[0] if (match := _SHARD.fullmatch(file.name))]
    if len(found) > 1 or 0 < len(shards) < len(found[0]):
        names = " and ".join(dict.fromkeys(file.name for some in found for file in (some[0], some[-1])))
        raise UserError(f"{path} has split {split!r} in several forms: {names}. Keep one of them, or give its file.")
    if any(int(match["total"]) != len(shards) for match in shards):
        raise UserError(
            f"{path} has {len(shards)} of {int(shards[0]['total'])} files of split {split!r}. Run the stage that "
            "writes it again: it resumes where it stopped."
        )
    return found[0]


def _split_of(path: Path) -> str | None:
    """The split that the name of a file or directory begins with, or None. That of a stage's file may be any."""
    shard = _SHARD.fullmatch(path.name)
    return shard["split"] if shard else SPLIT_NAMES.get(re.match("[a-z]*", path.name.lower())[0])


def _can_be(path: Path, split: str) -> bool:
    """Whether a file or a directory of `save_to_disk` is this split: any but validation, unless its name says so."""
    named = _split_of(path)
    return split == named if named else split != "validation"


def splits_in(directory: str | PathLike) -> list[str]:
    """Return the names of the splits in a directory of Parquet files, in the order train, validation, test."""
    names = {_split_of(file) for file in Path(directory).glob("*.parquet")} - {None}
    return sorted(names, key=lambda name: (_SPLITS.index(name) if name in _SPLITS else len(_SPLITS), name))


def columns_and_rows(path: Path, split: str, kind: str | None = None) -> tuple[list[str], int]:
    """Return the names of the columns of a split on this machine, and its number of rows. Only JSON is read for it."""
    from datasets import load_from_disk
    from pyarrow.parquet import read_metadata

    files = split_files(path, split, kind)
    if files[0].is_dir():
        dataset = load_from_disk(files[0])
        return dataset.column_names, len(dataset)
    if files[0].suffix == ".parquet":
        found = [read_metadata(file) for file in files]
        return found[0].schema.to_arrow_schema().names, sum(metadata.num_rows for metadata in found)
    found = [row for file in files for _, row in read_json_records(file, "image") if isinstance(row, dict)]
    return list(found[0] if found else ()), len(found)


def _datasets_near(path: Path, split: str, kind: str | None) -> str:
    """Return the end of a message that names the directories near a path that hold the split (of a kind)."""

    def holds_split(directory: Path) -> bool:
        with suppress(UserError):
            found = _find(directory, split)
            return bool(found) and not (kind and missing_columns(columns_and_rows(directory, split)[0], kind))
        return False

    return did_you_mean(path, holds_split)


# Tables of questions with the images inside, as the data of a source


def is_parquet(path: Path) -> bool:
    """Whether the data is a Parquet file, a directory of nothing else (apart from a card or notes), or on the Hub."""
    if not path.is_dir():
        return path.suffix == ".parquet" or not path.exists()
    return {PurePath(name).suffix for name in visible_files(path)} - {".md", ".txt", ".json"} == {".parquet"}


def read_parquet(name: str, request: SourceRequest) -> Records:
    """
    Read questions about images, and images without questions, see [`~medst_trl.data.sources.images.read_table`] for
    the columns. `image` holds one or more images, as `datasets` stores them or their bytes. Of files on this machine,
    that may be an absolute path. The split is that of the file or on the Hub, unless there is a column `split`.

    Args:
        name (`str`): Prefix of the ids.
        request ([`SourceRequest`]): `data_path` is a file, a directory or a Hub id, see [`is_parquet`].

    Raises:
        UserError: if the data cannot be read, or has no column `image`.
    """
    images = TableImages(request.images, is_local=request.image_folder is not None)
    records = Records(name, request.image_folder, images, group_column=request.group_column)
    for split, dataset in _open_splits(request.data_path).items():
        columns = column_names(dataset.column_names, "image")
        check_header(columns, ("image",), request.data_path)
        rows = images.rows(with_stored_images(dataset), columns, split)
        records.collect(rows, question_or_image, prefix=f"{name}-{split}-", used=QUESTION_COLUMNS)
    return records


def _open_splits(path: Path) -> "Mapping[str, Dataset]":
    """Open all splits of a file, of a directory or of a dataset on the Hub. Their columns may differ."""
    from datasets import load_dataset

    with readable_errors(path):
        found = {split: files for split in _SPLITS if (files := _find(path, split))}
        found = {_split_of(path) or "train": [path]} if path.is_file() else found
        if found:
            return {split: _read(files, split, None) for split, files in found.items()}
        hub_id, revision = split_revision(str(path))
        return load_dataset(hub_id, revision=revision)


class TableImages:
    """
    Images inside the rows of datasets, by the hash of their bytes. They are read again when they are needed.

    `datasets` stores the absolute paths of local images unless you embed them. Such files are read if the
    dataset `is_local`: one on the Hub must not name files of this machine.
    """

    def __init__(self, settings: ImageSettings, is_local: bool):
        self.settings, self.is_local, self._places = settings, is_local, {}

    def rows(self, dataset: "Dataset", columns: list[str], split: str) -> Iterator[tuple[int, dict]]:
        """Yield the rows of a dataset with names in place of the images. `columns` are the names of its columns."""
        column = columns.index("image")
        for position, values in enumerate(dataset):
            row = {"split": split} | {name: one for name, one in zip(columns, values.values()) if one is not None}
            row["image"] = [_name(image) for image in self._images_in(values, column)]
            for number, name in enumerate(row["image"]):
                self._places.setdefault(name, (dataset, position, column, number))
            yield position, row

    def load(self, name: str, identify: bool = True) -> "StoredImage":
        """Read an image. See [`~medst_trl.data.images.load_image`]."""
        from .images import load_image  # loads NumPy and Pillow

        dataset, position, column, number = self._places[name]
        image = list(self._images_in(dataset[position], column))[number]
        return load_image(image, self.settings, identify=identify)

    def _images_in(self, row: dict[str, Any], column: int) -> Iterator[Any]:
        """Yield the content of the images of a row, or their paths, in its column of this number."""
        cell = list(row.values())[column]
        for image in cell if isinstance(cell, list) else [cell]:
            data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
            is_file = data is None and self.is_local and path and PurePath(path).is_absolute()
            yield Path(path) if is_file else data


def _name(image: Any) -> str | None:
    """Return the name of an image by its bytes or path; None if there are none, so that the record is rejected."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()[:32]
    return str(image) if isinstance(image, Path) else None

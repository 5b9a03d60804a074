# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Read tables of questions in Parquet files or on the Hub, with the images inside: the copies of VQA-RAD and PathVQA
there have the columns `image`, `question` and `answer`, and a file or more for each split.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from medst_trl.base.files import visible_files

from .cells import column_names
from .image_formats import ImageProblem
from .image_settings import ImageSettings
from .images import FolderImages, StoredImage, load_image
from .loading import open_splits, readable_errors
from .reading import check_header
from .schema import with_stored_images
from .source import QUESTION_COLUMNS, Records, SourceRequest, question_or_image


if TYPE_CHECKING:
    from datasets import Dataset


def is_parquet(path: Path) -> bool:
    """Whether the data is a Parquet file, a directory of nothing else (apart from a card or notes), or on the Hub."""
    if not path.is_dir():
        return path.suffix == ".parquet" or not path.exists()
    return {PurePath(name).suffix for name in visible_files(path)} - {".md", ".txt", ".json"} == {".parquet"}


def holds_images(path: Path) -> bool:
    """Whether the rows of [`is_parquet`] data on this machine have images and not names of files, by their type."""
    from pyarrow.parquet import read_schema
    from pyarrow.types import is_list, is_string

    if not path.exists() or not is_parquet(path):
        return False
    with readable_errors(path):
        schema = read_schema(path if path.is_file() else next(path.rglob("*.parquet")))
    kind = dict(zip(column_names(schema.names, "image"), schema.types)).get("image")
    return kind is not None and not is_string(kind.value_type if is_list(kind) else kind)


def read_parquet(name: str, request: SourceRequest, settings: ImageSettings) -> Records:
    """
    Read questions about images, and images without questions, see [`~medst_trl.data.sources.images.read_table`] for
    the columns. `image` holds the image (as `datasets` stores it, or its bytes) or its file name. The split is that of
    the file or on the Hub, unless there is a column `split`.

    Args:
        name (`str`): Prefix of the ids.
        request ([`SourceRequest`]): `data_path` is a file, a directory or a Hub id, see [`is_parquet`].
        settings ([`ImageSettings`]): How to read the images.

    Raises:
        UserError: if the data cannot be read, or has no column `image`.
    """
    images = TableImages(request.image_folder, settings)
    records = Records(name, request.image_folder, images, group_column=request.group_column)
    for split, dataset in open_splits(request.data_path).items():
        columns = column_names(dataset.column_names, "image")
        check_header(columns, ("image",), request.data_path)
        rows = images.rows(dataset, columns, {"split": split})
        records.collect(rows, question_or_image, prefix=f"{name}-{split}-", used=QUESTION_COLUMNS)
    return records


class TableImages(FolderImages):
    """
    Images inside the rows of datasets, by the hash of their bytes, or of a directory, by their file names.

    A file outside the directory is read only if a Parquet file on this machine has its absolute path in place of the
    bytes, as `datasets` writes it.
    """

    def __init__(self, directory: Path | None, settings: ImageSettings):
        super().__init__(directory or Path("/dev/null"), settings)  # no directory: no files
        self._is_local = directory is not None
        self._inside: dict[str, Callable[[], bytes] | Path] = {}

    def rows(self, dataset: "Dataset", columns: list[str], default: dict[str, Any]) -> Iterator[tuple[int, dict]]:
        """Yield the rows of a dataset with names in place of the images. `columns` are the names of its columns."""
        dataset = with_stored_images(dataset)
        for position, values in enumerate(dataset):
            row = default | {name: value for name, value in zip(columns, values.values()) if value is not None}
            image, place = row.get("image"), partial(_bytes_at, dataset, position, columns.index("image"))
            if isinstance(image, list):
                row["image"] = [self._name(one, partial(place, number)) for number, one in enumerate(image)]
            else:
                row["image"] = self._name(image, partial(place, 0))
            yield position, row

    def _name(self, image: Any, read: Callable[[], bytes]) -> Any:
        if not isinstance(image, dict | bytes):
            return image  # a file name, or nothing
        data, path = (image, None) if isinstance(image, bytes) else (image.get("bytes"), image.get("path"))
        if data is not None:
            path = hashlib.sha256(data).hexdigest()[:32]
            self._inside.setdefault(path, read)
        elif path is not None and Path(path).is_absolute() and self._is_local:
            self._inside[path] = Path(path)
        return path

    def find(self, name: str) -> tuple[Path, int | None]:
        if callable(place := self._inside.get(name)):
            raise ImageProblem("missing", "no file of the directory of images")
        return (place, None) if place else super().find(name)

    def load(self, name: str, identify: bool = True) -> StoredImage:
        if callable(place := self._inside.get(name)):
            return load_image(place(), self.settings, identify=identify)
        return super().load(name, identify)


def _bytes_at(dataset: "Dataset", position: int, column: int, number: int) -> bytes:
    image = list(dataset[position].values())[column]
    image = image[number] if isinstance(image, list) else image
    return image["bytes"] if isinstance(image, dict) else image

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Read tables of questions in Parquet files or on the Hub, with the images inside: the copies of VQA-RAD and PathVQA
there have the columns `image`, `question` and `answer`, and a file or more for each split.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from medst_trl.base.files import visible_files

from .cells import column_names
from .image_settings import ImageSettings
from .images import StoredImage, load_image
from .loading import open_splits
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
    for split, dataset in open_splits(request.data_path).items():
        columns = column_names(dataset.column_names, "image")
        check_header(columns, ("image",), request.data_path)
        rows = images.rows(with_stored_images(dataset), columns, split)
        records.collect(rows, question_or_image, prefix=f"{name}-{split}-", used=QUESTION_COLUMNS)
    return records


class TableImages:
    """
    Images inside the rows of datasets, by the hash of their bytes. They are read again when they are needed.

    `datasets` stores the absolute paths of local images, unless it is told to embed them. Such files are read if the
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

    def load(self, name: str, identify: bool = True) -> StoredImage:
        """Read an image. See [`~medst_trl.data.images.load_image`]."""
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

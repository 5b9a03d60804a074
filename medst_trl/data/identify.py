# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Identify the images of a dataset: by the `image_id` of their pixels, and by the near hash, which near copies share.

Both are of the same picture, the one that `prepare` would store: upright, in 8 bits.
"""

import secrets
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from medst_trl.base.processes import cores, ordered_map, rank

from .conform import report_unusable
from .schema import bytes_of, with_stored_images


if TYPE_CHECKING:
    from datasets import Dataset


def with_image_ids(dataset: "Dataset") -> "Dataset":
    """
    Compute the missing `image_ids` (or `image_id`) of a dataset with the columns of a kind, see [`image_ids_of`].

    All its images are then decoded once. Without such a column or without missing ids, it is returned as it is. An
    image that cannot be decoded gets a random id, and a row of a benchmark with such an image is left out.
    """
    name = next((name for name in ("image_ids", "image_id") if name in dataset.features), None)
    if name is None or not dataset.data.column(name).null_count:
        return dataset
    feature, ids = dataset.features[name], image_ids_of(dataset)
    if name == "image_ids":
        ids = [[image or secrets.token_hex(32) for image in row] for row in ids]
    else:
        ids = [row[0] for row in ids]
    dataset = dataset.remove_columns(name).add_column(name, ids, feature=feature)
    problems = [f"row {place}: its image is missing or damaged" for place, image in enumerate(ids) if image is None]
    report_unusable(problems, len(ids) - len(problems), "The benchmark")
    return dataset.select([place for place, image in enumerate(ids) if image is not None]) if problems else dataset


def image_ids_of(dataset: "Dataset") -> list[list[str | None]]:
    """
    Return the ids of the images of each row, see [`~medst_trl.data.images.image_id`]: from the column `image_ids` (or
    `image_id`), or else from the pixels. An image that cannot be decoded has none.
    """
    name = "image_ids" if "images" in dataset.features else "image_id"
    given = dataset[name][:] if name in dataset.features else [None] * len(dataset)
    found = _identities(dataset, [row for row, ids in enumerate(given) if ids is None], "image ids")
    ids = [[ids] if isinstance(ids, str) else ids for ids in given]
    for row, identities in found.items():
        ids[row] = [image_id for image_id, _ in identities]
    return ids


def hash_images(dataset: "Dataset") -> dict[str, str | None]:
    """
    Hash the images of a dataset, each once, on several threads.

    Args:
        dataset (`datasets.Dataset`):
            Columns `images` and `image_ids`, or `image` and `image_id`.

    Returns:
        `dict`: `image_id` to [`~medst_trl.data.near_copies.perceptual_hash`].
    """
    ids = [[name] for name in dataset["image_id"]] if "image_id" in dataset.features else dataset["image_ids"][:]
    rows = {name: row for row, names in enumerate(ids) for name in names}
    found = _identities(dataset, sorted(set(rows.values())), "near copies")
    return {name: near_hash for row in found for name, (_, near_hash) in zip(ids[row], found[row])}


def _identities(dataset: "Dataset", rows: Sequence[int], title: str) -> dict[int, list[tuple[str | None, str | None]]]:
    """The ids and near hashes of the images of some rows, each different image decoded once."""
    from tqdm.auto import tqdm

    from .images import identify  # loads NumPy and Pillow

    column, known = "images" if "images" in dataset.features else "image", {}
    stored = with_stored_images(dataset.select_columns([column]))

    def of_image(image: Any) -> tuple[str | None, str | None]:
        try:
            content = bytes_of(image)
        except (OSError, TypeError):  # no such file, or neither bytes nor a path
            return None, None
        key = sha256(content).digest()
        if key not in known:
            known[key] = identify(content)
        return known[key]

    def of_row(row: int) -> list[tuple[str | None, str | None]]:
        found = stored[row][column]
        return list(map(of_image, found if isinstance(found, list) else [found]))

    bar = tqdm(rows, title, unit="row", disable=None if rows and rank() == 0 else True)
    return dict(zip(rows, ordered_map(of_row, bar, cores())))

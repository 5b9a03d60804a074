# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of training examples: stored and decoded, their size, and whether they can be read."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from medst_trl.base.errors import UserError
from medst_trl.data.schema import bytes_of, with_stored_images


class UnreadableImage(UserError):
    """An image that is missing, truncated, or of an unknown format."""


class DecodesImages:
    """
    Marker for data collators that take images as a dataset stores them and call [`with_decoded_images`] themselves.
    Left to `datasets`, the first image of every list is decoded twice (its `decode_nested_example` tries one to find
    out whether the list has to be decoded).
    """


def images_of(example: Mapping[str, Any]) -> list[Any]:
    """The images of an example, from its column `images` or `image`."""
    return [example["image"]] if "image" in example else list(example.get("images") or [])


def with_images(example: Mapping[str, Any], images: list[Any]) -> dict[str, Any]:
    """The same example with its images replaced."""
    return {**{name: value for name, value in example.items() if name != "image"}, "images": images}


def with_decoded_images(example: dict[str, Any]) -> dict[str, Any]:
    """
    The same example with a list of decoded `images`.

    Raises:
        UnreadableImage: if one of them cannot be decoded.
    """
    return with_images(example, [_decode(item) if isinstance(item, dict) else item for item in images_of(example)])


def _decode(image: dict[str, Any]) -> Image.Image:
    with _reading():
        return ImageFeature().decode_example(image)


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what Pillow's parsers raise on a damaged file, which is almost anything, into [`UnreadableImage`]."""
    try:
        yield
    except Exception as error:
        raise UnreadableImage(f"The image cannot be read ({type(error).__name__}: {error}).") from error


def check_has_images(dataset: Any) -> None:
    """Raise a [`UserError`] for data without a column of images, which TRL would tokenize as text."""
    example = next(iter(with_stored_images(dataset) or ()), None)
    if isinstance(example, Mapping) and not {"image", "images"} & example.keys():
        raise UserError(
            f"The training data has columns {', '.join(example)}, but no `images`. Text without images needs it too: "
            'add `images: []` to every row, for instance by dataset.add_column("images", [[]] * len(dataset)).'
        )


def image_size(image: Image.Image | dict[str, Any]) -> tuple[int, int]:
    """
    Width and height in pixels after decoding. Of a stored image only the header is read.

    Args:
        image (`PIL.Image.Image` or `dict`): An image, or its `bytes` and `path` as a dataset stores them.

    Raises:
        UnreadableImage: if there is no header of a known format.
    """
    if not isinstance(image, dict):
        with _reading():
            return image.size
    if not _is_local(image):
        return _decode(image).size
    with _reading(), Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as opened:
        # Pillow decodes all of a PNG to look for EXIF after the pixels. Without such a chunk there is none.
        if opened.format == "PNG" and not re.search(b"eXIf|tEXt|zTXt|iTXt", bytes_of(image)):
            return opened.size
        # `datasets` applies the EXIF orientation. Pillow reports the size of a TIFF after orientation.
        swaps_sides = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return opened.size[::-1] if swaps_sides and opened.format != "TIFF" else opened.size


def check_image(image: Image.Image | dict[str, Any]) -> tuple[int, int]:
    """
    Check that an image can be decoded and return its [`image_size`]. A JPEG or PNG that ends correctly is not decoded.

    Raises:
        UnreadableImage: if it is missing, truncated, or of an unknown format.
    """
    if isinstance(image, dict) and not (_is_local(image) and _ends_correctly(image)):
        _decode(image)
    return image_size(image)


def _ends_correctly(image: dict[str, Any]) -> bool:
    """Whether a JPEG has its end marker, a PNG all its chunks with their checksums; `False` for other formats."""
    try:
        data = bytes_of(image)
        with Image.open(BytesIO(data)) as opened:
            if opened.format == "PNG":
                opened.verify()
                return True
            return opened.format in ("JPEG", "MPO") and data[-4096:].rstrip(b"\0").endswith(b"\xff\xd9")
    except Exception:  # Pillow may still be able to decode it
        return False


def _is_local(image: dict[str, Any]) -> bool:
    return image["bytes"] is not None or os.path.isfile(image["path"] or "")

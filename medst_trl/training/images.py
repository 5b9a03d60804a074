# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of training examples: stored and decoded, their size, and whether they can be read."""

import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from medst_trl.base.errors import UserError
from medst_trl.data.schema import bytes_of, with_stored_images
from medst_trl.policy.families import EXTREME_ASPECT_RATIO, aspect_ratio_error


class UnreadableImage(UserError):
    """An image that is missing, truncated, of an unknown format, or too narrow; `reason` is that of its rejection."""

    def __init__(self, message: str, reason: str = "unreadable_image"):
        super().__init__(message)
        self.reason = reason


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
    return with_images(example, [_decode(image) for image in images_of(example)])


def _decode(image: Image.Image | dict[str, Any]) -> Image.Image:
    try:
        decoded = ImageFeature().decode_example(image) if isinstance(image, dict) else image
        if not isinstance(decoded, Image.Image):
            raise TypeError(f"it is of type {type(decoded).__name__}")
    except Exception as error:  # Pillow's parsers raise almost anything on a damaged file
        raise UnreadableImage(f"The image cannot be read ({type(error).__name__}: {error}).") from error
    return decoded


def check_has_images(dataset: Any) -> None:
    """Raise a [`UserError`] for data without a column of images, which TRL would tokenize as text."""
    example = next(iter(with_stored_images(dataset) or ()), None)
    if isinstance(example, Mapping) and not {"image", "images"} & example.keys():
        raise UserError(
            f"The training data has columns {', '.join(example)}, but no `images`. Text without images needs it too: "
            'add `images: []` to every row, for instance by dataset.add_column("images", [[]] * len(dataset)).'
        )


def check_image(image: Image.Image | dict[str, Any]) -> tuple[int, int]:
    """
    Check that an image can be trained on, and return its width and height after decoding. A JPEG or PNG that ends
    correctly is not decoded.

    Args:
        image (`PIL.Image.Image` or `dict`): An image, or its `bytes` and `path` as a dataset stores them.

    Raises:
        UnreadableImage: if it is missing, truncated, of an unknown format, or too narrow.
    """
    size = (isinstance(image, dict) and _size_of_whole_file(image)) or _decode(image).size
    if why := aspect_ratio_error([size]):
        raise UnreadableImage(f"The image cannot be used ({why}).", EXTREME_ASPECT_RATIO)
    return size


def _size_of_whole_file(image: dict[str, Any]) -> tuple[int, int] | None:
    """The size of a JPEG with its end marker or of a PNG with all its chunks; `None` if it has to be decoded."""
    try:
        data = bytes_of(image)
        with Image.open(BytesIO(data)) as opened:
            if opened.format == "PNG" and not re.search(b"eXIf|tEXt|zTXt|iTXt", data):  # which may rotate it
                opened.verify()
                return opened.size
            if opened.format in ("JPEG", "MPO") and data[-4096:].rstrip(b"\0").endswith(b"\xff\xd9"):
                # `datasets` applies the EXIF orientation
                return opened.size[:: -1 if opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else 1]
    except Exception:  # Pillow may still be able to decode it
        return None

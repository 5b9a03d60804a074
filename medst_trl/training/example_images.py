# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The images of an example before any is decoded: where they stand, how large they are, whether they can be read."""

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from medst_trl.base.errors import UserError

from .input_pipeline import with_stored_images


class UnreadableImage(UserError):
    """An image that is missing, cut short, or of no format known here."""


def images_of(example: Mapping[str, Any]) -> list[Any]:
    """The images of an example, from its column `images` or `image`."""
    return [example["image"]] if "image" in example else list(example.get("images") or [])


def with_images(example: Mapping[str, Any], images: list[Any]) -> dict[str, Any]:
    """The same example with something else in the place of its images."""
    return {**{name: value for name, value in example.items() if name != "image"}, "images": images}


def check_has_images(dataset: Any) -> None:
    """
    Raise a [`UserError`] for data without a column of images: TRL takes it for text and tokenises it by itself.
    """
    example = next(iter(with_stored_images(dataset) or ()), None)
    if isinstance(example, Mapping) and not {"image", "images"} & example.keys():
        raise UserError(
            f"The training data has columns {', '.join(example)}, but no `images`. Text without images needs it, too: "
            'add `images: []` to every row, for instance by dataset.add_column("images", [[]] * len(dataset)).'
        )


def image_size(image: "Image.Image | dict[str, Any]") -> tuple[int, int]:
    """
    Width and height in pixels once decoded, for which of a stored image only the head of the file is read.

    Args:
        image (`PIL.Image.Image` or `dict`): An image, or its `bytes` and `path` as a dataset stores them.

    Raises:
        UnreadableImage: if there is no head, or none that is known.
    """
    with _explained(image):
        if not isinstance(image, dict):
            return image.size
        if not _is_at_hand(image):
            return ImageFeature().decode_example(image).size
        with Image.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
            return opened.size[::-1] if _will_be_turned(opened, image) else opened.size


def check_image(image: "Image.Image | dict[str, Any]") -> None:
    """
    Raise [`UnreadableImage`] if an image is not all there. A JPEG or PNG that ends as it should is not decoded for it.
    """
    if not isinstance(image, dict):
        return
    with _explained(image):
        if not (_is_at_hand(image) and _ends_well(_bytes(image))):
            ImageFeature().decode_example(image)


def _will_be_turned(opened: Image.Image, image: dict[str, Any]) -> bool:
    """Whether `datasets`, which turns images upright, swaps the sides of this one."""
    if opened.format == "TIFF":  # Pillow says how large it will be
        return False
    # Pillow decodes all of a PNG in search of EXIF behind the pixels. Where no such chunk is, that is for nothing.
    if opened.format == "PNG" and not {b"eXIf", b"tEXt", b"zTXt", b"iTXt"} & set(_png_chunks(image)):
        return False
    return opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _png_chunks(image: dict[str, Any]) -> Iterator[bytes]:
    """The kinds of all chunks of a PNG file, their content not read."""
    with BytesIO(image["bytes"]) if image["bytes"] is not None else open(image["path"], "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            yield kind
            file.seek(length + 4, os.SEEK_CUR)


def _ends_well(data: bytes) -> bool:
    """Whether a JPEG has its end marker, a PNG all its chunks with their check sums; `False` for other formats."""
    try:
        with Image.open(BytesIO(data)) as opened:
            if opened.format == "PNG":
                opened.verify()
                return True
            return opened.format in ("JPEG", "MPO") and data[-4096:].rstrip(b"\0").endswith(b"\xff\xd9")
    except Exception:  # Pillow may decode all the same, so it is asked
        return False


def _is_at_hand(image: dict[str, Any]) -> bool:
    return image["bytes"] is not None or os.path.isfile(image["path"])


def _bytes(image: dict[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


@contextmanager
def _explained(image: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Pillow's parsers raise almost anything on a damaged file
        path = image.get("path") if isinstance(image, dict) else None
        reason = " ".join(str(error).split())[:200]
        raise UnreadableImage(
            f"the image {path or ''}".rstrip() + f" cannot be read ({type(error).__name__}: {reason})"
        ) from error

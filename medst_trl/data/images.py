# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Read image files: the bytes to store, the `image_id`, or the reason why a file cannot be used.

Images keep every pixel and lose everything else. An 8-bit gray or RGB JPEG or PNG keeps its own compressed bytes
without metadata; any other image becomes an 8-bit PNG (see `image_formats.py`, `dicom.py` and `nifti.py`).
"""

import hashlib
import io
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from PIL import ExifTags, Image, ImageOps

from .dicom import open_dicom
from .image_formats import (
    Frame,
    Frames,
    ImageProblem,
    check_pixels,
    image_problem,
    max_bytes,
    to_8_bit,
    without_metadata,
)
from .image_settings import ImageSettings
from .near_copies import perceptual_hash
from .nifti import is_nifti, open_nifti
from .schema import bytes_of
from .source import DICOM_SUFFIXES


BAND_BYTES = 1 << 22  # a large image is hashed in bands, so that it is not in memory twice

# Formats that PIL reads by starting another program (EPS) or only identifies (the stubs and vector formats).
_NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FPX"}
_TRUNCATED = (OSError, EOFError, SyntaxError, struct.error, IndexError)  # what decoders raise on a truncated file


@dataclass(frozen=True, slots=True)
class StoredImage:
    """
    An image as it is stored in a dataset.

    Attributes:
        bytes (`bytes`):
            An 8-bit JPEG or PNG file without metadata.
        image_id (`str`):
            See [`image_id`].
        groups (`dict[str, str]`):
            What the image has in common with others, not hashed, so never to be written: the `"patient"`, `"study"`
            and `"series"` of DICOM; for other frames of one file, its hash. Empty for other images.
        near_hash (`str` or `None`):
            See [`~medst_trl.data.near_copies.perceptual_hash`].
        note (`str`):
            What `prepare` counts about it, such as `CT_images_without_window`.
    """

    bytes: bytes
    image_id: str
    groups: dict[str, str] = field(default_factory=dict)
    near_hash: str | None = None
    note: str = ""


def image_id(image: Image.Image) -> str:
    """
    Identify an 8-bit image by its pixels: the same image as L or RGB, JPEG or PNG, has the same id.

    It is the SHA-256, in hexadecimal, of width and height (two big-endian 32-bit numbers) followed by the pixels of
    `image.convert("RGB")`, three bytes each, row by row from the top left.
    """
    width, height = image.size
    digest = hashlib.sha256(struct.pack(">II", width, height))
    rows = max(1, BAND_BYTES // (3 * max(1, width)))
    for top in range(0, height, rows):
        band = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        digest.update((band if band.mode == "RGB" else band.convert("RGB")).tobytes())
    return digest.hexdigest()


def store_image(image: Image.Image) -> StoredImage:
    """Store an image in memory as an 8-bit PNG. See [`to_8_bit`] for other modes."""
    image = to_8_bit(image)
    return StoredImage(_png(image), image_id(image))


def identify(data: bytes) -> tuple[str | None, str | None]:
    """
    Return the [`image_id`] and the near hash of an image file in a dataset, of its picture as [`publishable`] stores
    it; None and None if it cannot be decoded.
    """
    try:
        image = _open_picture(data, math.inf, identify=True).read(0).image
    except ImageProblem:
        return None, None
    return image_id(image), perceptual_hash(image)


def publishable(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return an image of any dataset as the stages store it: upright 8-bit pixels, without metadata and path."""
    frame = _open_picture(bytes_of(stored), math.inf, identify=False).read(0)
    return {"bytes": frame.own_bytes or _png(frame.image), "path": None}


def load_image(
    path: str | os.PathLike | bytes,
    settings: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
    frame: int | None = None,
    *,
    identify: bool = True,
) -> StoredImage:
    """
    Read one image of a file: of any format that PIL reads without another program, DICOM or NIfTI.

    Args:
        path (`str`, `os.PathLike` or `bytes`):
            The file, or its content. Paths from data files go through `resolve_inside` (`image_index.py`) first.
        settings ([`ImageSettings`], *optional*):
            How to read it. Images of more than `max_pixels` are rejected by their header, before anything is decoded.
            PIL's own limit (`Image.MAX_IMAGE_PIXELS`) applies as well.
        frame (`int`, *optional*):
            Number of the frame, from 1. By default a file with several has the one in the middle if `settings.frames`
            is `"middle"`, and is rejected otherwise.
        identify (`bool`, *optional*, defaults to `True`):
            Whether to compute `image_id` and `near_hash`, for which the pixels are decoded. Without them, files that
            keep their bytes are not decoded: only for files that were accepted before.

    Raises:
        ImageProblem: with a reason word, whatever is wrong with the file.
        UserError: for a DICOM or NIfTI file without the package that reads it (extras `dicom` and `nifti`).
    """
    opened = open_image(path if isinstance(path, bytes) else Path(path), settings, identify)
    return stored_frame(opened, opened.read(frame_index(opened, settings, frame)), identify)


def open_image(path: Path | bytes, settings: ImageSettings, identify: bool = True) -> Frames:
    """Open a file without decoding its frames. Raises the errors of [`load_image`], which reads one of them."""
    data, name = (path, "") if isinstance(path, bytes) else (_bytes_of(path, settings.max_pixels), path.name)
    if data[128:132] == b"DICM" or PurePath(name).suffix.lower() in DICOM_SUFFIXES:
        opened = open_dicom(data, settings)
    elif is_nifti(data, name):
        opened = open_nifti(data, settings)
    else:
        opened = _open_picture(data, settings.max_pixels, identify)
    if opened.count > 1 and not opened.groups:  # the frames of one file stay together
        opened.groups = dict.fromkeys(("series", "study", "patient"), hashlib.sha256(data).hexdigest())
    return opened


def frame_index(opened: Frames, settings: ImageSettings, frame: int | None) -> int:
    """Return the index of the frame to read. See [`load_image`]."""
    if frame is not None and not 1 <= frame <= opened.count:
        raise ImageProblem("missing", f"frame {frame} of {opened.count}")
    if frame is None and opened.count > 1 and settings.frames != "middle":
        choice = "middle; a test question has one image" if settings.frame_step else "middle, all or every:N"
        raise ImageProblem("several_frames", f"{opened.count} frames: name one (FILE#N), or set --frames to {choice}")
    return opened.middle if frame is None else frame - 1


def stored_frame(opened: Frames, frame: Frame, identify: bool) -> StoredImage:
    """Encode and identify a frame that was read. See [`load_image`]."""
    data = frame.own_bytes or _png(frame.image)
    names = (image_id(frame.image), opened.groups, perceptual_hash(frame.image)) if identify else ("",)
    return StoredImage(data, *names, note=frame.note)


def _bytes_of(path: Path, max_pixels: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # before opening: a named pipe would wait forever
            raise ImageProblem("not_a_file")
        if status.st_size == 0:
            raise ImageProblem("empty", "zero bytes")
        if status.st_size > max_bytes(max_pixels):
            raise ImageProblem("too_large", f"{status.st_size} bytes")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageProblem("missing") from None
    except (OSError, ValueError) as error:
        raise ImageProblem("unreadable", str(getattr(error, "strerror", "") or error)) from None


def _open_picture(data: bytes, max_pixels: int, identify: bool) -> Frames:
    """Open a file with PIL. Its frames are upright 8-bit images."""
    with image_problem("not_an_image"):
        image = Image.open(io.BytesIO(data), formats=_formats())
    check_pixels(*image.size, max_pixels)
    with _decoding():
        pages = _pages(image)

    def read(index: int) -> Frame:
        with _decoding():
            if len(pages) > 1 or pages[0]:
                image.seek(pages[index])
                check_pixels(*image.size, max_pixels)
            own_bytes = without_metadata(image, data) if len(pages) == 1 and _is_upright(image, data) else None
            if own_bytes is None:
                return Frame(to_8_bit(ImageOps.exif_transpose(image)))
            if identify:
                image.load()
            return Frame(image, own_bytes)

    return Frames(len(pages), read, len(pages) // 2)


@contextmanager
def _decoding() -> Iterator[None]:
    # What else a decoder raises is about a mode or compression that PIL does not turn into pixels.
    with image_problem("unsupported"), image_problem("truncated", _TRUNCATED):
        yield


def _pages(image: Image.Image) -> list[int]:
    """Return the positions of the frames of a file, without smaller copies and masks of others."""
    # The further images of an MPO file are a phone's previews of the first one.
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return [0]
    pages = []
    for page in range(image.n_frames):
        if image.format == "TIFF":
            image.seek(page)
        # Bits of NewSubfileType: a smaller copy of another page, and a mask of its transparent parts.
        if image.format != "TIFF" or not image.tag_v2.get(254, 0) & 0b101:
            pages.append(page)
    image.seek(0)
    return pages or [0]


def _is_upright(image: Image.Image, data: bytes) -> bool:
    # PIL decodes a whole PNG to find EXIF behind the pixels. Skip that where no such chunk can be.
    has_exif = image.format != "PNG" or any(kind in data for kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"))
    return not has_exif or image.getexif().get(ExifTags.Base.Orientation, 1) in (0, 1)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    clean = Image.new(image.mode, image.size)  # `info` may hold text, EXIF or a color profile, which PIL would write
    clean.paste(image)
    clean.save(file, "PNG")
    return file.getvalue()


@cache
def _formats() -> list[str]:
    Image.init()
    frequent = ["JPEG", "PNG"]  # PIL tries them in this order
    return frequent + [name for name in Image.ID if name not in _NOT_READ and name not in frequent]

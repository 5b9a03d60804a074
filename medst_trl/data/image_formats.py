# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What image files of all formats need: their frames, their problems, 8-bit pixels; JPEG and PNG without metadata.

Images of other modes become 8-bit gray or RGB as follows:

- 1-bit: black and white become 0 and 255.
- Palette, CMYK, YCbCr, LAB and similar modes: RGB, by PIL's conversion.
- Transparency: laid on black, the background of radiology, so that hidden content stays hidden.
- More than 8 bits of gray (16-bit, 32-bit, float): the image's own minimum..maximum becomes 0..255, linearly. This
  keeps the order, and a uniform image becomes black. PIL reduces 16-bit color to its high bytes when it decodes.
"""

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from medst_trl.base.errors import UserError


class ImageProblem(Exception):
    """
    An image that cannot be used.

    Attributes:
        reason (`str`):
            One word for counting: `outside_image_folder`, `missing`, `not_a_file`, `unreadable`, `empty`, `too_large`,
            `not_an_image`, `truncated`, `several_frames`, `unsupported`, `bad_window`, `burned_in_annotation`.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@contextmanager
def image_problem(reason: str, errors: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """
    Turn errors of a decoder, which raises almost anything on a damaged file, into an [`ImageProblem`].

    If a `with` has several, the rightmost applies first.
    """
    try:
        yield
    except (ImageProblem, UserError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageProblem("too_large", str(error)) from None
    except errors as error:
        # PIL's message for a file that it cannot identify has the address of an object in it, others have a path.
        detail = "" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None) or error
        raise ImageProblem(reason, str(detail)) from None


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise `ImageProblem("too_large")` for an image of more than `max_pixels`."""
    if width * height > max_pixels:
        raise ImageProblem("too_large", f"{width} x {height} pixels, the limit (max_pixels) is {max_pixels}")


class Frame(NamedTuple):
    """
    One image of a file, mode "L" or "RGB".

    Attributes:
        image (`PIL.Image.Image`):
            Its pixels.
        own_bytes (`bytes`, *optional*):
            The file's own bytes without metadata, if they can be kept.
        note (`str`, *optional*):
            See [`StoredImage`].
    """

    image: Image.Image
    own_bytes: bytes | None = None
    note: str = ""


@dataclass
class Frames:
    """
    The images of an opened file.

    Attributes:
        count (`int`):
            Their number.
        read (`Callable`):
            Takes an index from 0, and returns the [`Frame`].
        middle (`int`):
            Index of the one in the middle.
        groups (`dict`):
            See [`StoredImage`].
    """

    count: int
    read: Callable[[int], Frame]
    middle: int = 0
    groups: dict[str, str] = field(default_factory=dict)


# --- 8-bit pixels ----------------------------------------------------------------------------------------------------


def to_8_bit(image: Image.Image) -> Image.Image:
    """
    Convert an image to mode "L" or "RGB". An image in one of these modes is returned as it is.

    Raises:
        ValueError: for a mode that PIL cannot convert.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(rescale(np.asarray(image)))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        opaque = Image.new("RGB", image.size)
        opaque.paste(rgba, mask=rgba.getchannel("A"))
        return opaque.convert("L") if image.mode in ("L", "LA", "La", "1") else opaque
    if image.mode == "LAB":
        from PIL import ImageCms

        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        return ImageCms.applyTransform(image, to_rgb)
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def finite_range(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest of the values that are finite; zeros if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def rescale(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """
    Map `low`..`high` (by default the finite minimum..maximum of the values) to 0..255, rounded.

    Args:
        values (`np.ndarray` of any shape):
            NaN counts as the minimum; values outside `low`..`high` are clipped.

    Returns:
        `np.ndarray` of the same shape, `uint8`.
    """
    values = values.astype(np.float64)
    if low is None or high is None:
        low, high = finite_range(values)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    values = np.nan_to_num(values, nan=low, posinf=max(low, high), neginf=min(low, high))
    return np.clip(np.rint((values - low) / (high - low) * 255), 0, 255).astype(np.uint8)


# --- JPEG and PNG without metadata -----------------------------------------------------------------------------------
# A parser of our own, because no library we depend on can do this without decoding: PIL encodes again. Everything that
# does not decide how the pixels decode is dropped, so unknown kinds of metadata are dropped too.

# A byte FF inside compressed data is followed by 00, by a restart marker or by another FF; a marker is none of these.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _APP0, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
# Frame headers, Huffman and arithmetic tables (C0-CF), scan, quantization tables, lines, restarts, hierarchy (DA-DF).
_NEEDED = {*range(0xC0, 0xD0), *range(0xDA, 0xE0)} - {0xC8}


def without_metadata(image: Image.Image, data: bytes) -> bytes | None:
    """Return the bytes of an opened file without metadata, if it can be stored as it is: gray or RGB, JPEG or PNG."""
    strip = {"JPEG": strip_jpeg, "MPO": strip_jpeg, "PNG": strip_png}.get(image.format)
    return strip(data) if strip and image.mode in ("L", "RGB") and "transparency" not in image.info else None


def strip_jpeg(data: bytes) -> bytes | None:
    """
    Return a JPEG file without APPn and COM segments and without what follows its end. The image itself is untouched.

    Two application segments stay, cut to the fields that decide how colors decode: JFIF (without its thumbnail) and
    Adobe. Returns `None` for an unknown structure, so that the caller encodes the pixels again.
    """
    parts, at = [b"\xff\xd8"], 2
    while (marker := _NEXT_MARKER.search(data, at)) and (kind := data[marker.start() + 1]) != _EOI:
        at = marker.end()
        if kind == 0x01:  # a marker without a segment and without a meaning
            continue
        if kind == _SOI or at + 2 > len(data):
            return None
        end = at + struct.unpack_from(">H", data, at)[0]
        if end < at + 2 or end > len(data):
            return None
        if (segment := _needed_part(kind, data[at + 2 : end])) is not None:
            parts.append(struct.pack(">BBH", 0xFF, kind, len(segment) + 2) + segment)
        at = end
        if kind == _SOS:
            scan_end = _NEXT_MARKER.search(data, end)
            at = scan_end.start() if scan_end else len(data)
            parts.append(data[end:at])
    return b"".join(parts) + b"\xff\xd9" if len(parts) > 1 else None  # PIL may have all pixels without an end marker


def _needed_part(kind: int, segment: bytes) -> bytes | None:
    if kind == _APP0 and segment[:5] == b"JFIF\0" and len(segment) >= 14:
        return segment[:12] + b"\0\0"  # version and density; no thumbnail
    if kind == _APP14 and segment[:5] == b"Adobe" and len(segment) >= 12:
        return segment[:12]  # holds the color transform
    return segment if kind in _NEEDED else None


def strip_png(data: bytes) -> bytes | None:
    """
    Return a PNG file with its header, its compressed image and its end, and nothing else.

    Returns `None` unless it is 8-bit gray or RGB, for which no other chunk holds pixels. (The caller checks for
    transparency.)
    """
    if data[12:16] != b"IHDR" or data[24:26] not in (b"\x08\x00", b"\x08\x02"):
        return None
    parts, at, kind = [data[:8]], 8, b""  # first the signature
    while kind != b"IEND" and at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            parts.append(data[at : at + 12 + length])
        at += 12 + length
    return b"".join(parts) if kind == b"IEND" and at <= len(data) else None

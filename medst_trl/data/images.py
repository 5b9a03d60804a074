# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Read image files: the bytes to store, the `image_id`, or the reason why a file cannot be used.

Images keep every pixel and lose everything else. An 8-bit gray or RGB JPEG or PNG keeps its own compressed bytes
without metadata; any other image becomes an 8-bit PNG (see `image_formats.py`).
"""

import hashlib
import io
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean
from medst_trl.base.processes import ordered_map

from .image_formats import ImageProblem, check_pixels, image_problem, read_dicom, to_8_bit, without_metadata
from .source import DICOM_SUFFIXES, ImageReader, Rejected


MAX_PIXELS = 100_000_000  # the largest whole-slide overviews fit; a decompression bomb does not
MAX_BYTES_PER_PIXEL = 16  # no valid image file is larger, so larger ones are not read into memory
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
            What the image has in common with others, not hashed, so never to be written: of DICOM the `"patient"`,
            `"study"` and `"series"`. Empty for other files.
    """

    bytes: bytes
    image_id: str
    groups: dict[str, str] = field(default_factory=dict)


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


def load_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS, *, identify: bool = True) -> StoredImage:
    """
    Read one image file of any format that PIL reads without another program, or DICOM.

    Args:
        path (`str` or `os.PathLike`):
            The file. Paths from data files go through [`resolve_inside`] first.
        max_pixels (`int`, *optional*, defaults to 100 million):
            Larger images are rejected by their header, before anything is decoded. PIL's own limit
            (`Image.MAX_IMAGE_PIXELS`) applies as well.
        identify (`bool`, *optional*, defaults to `True`):
            Whether to compute the `image_id`, for which the pixels are decoded. Without it, `image_id` is empty, and
            files that keep their bytes are not decoded: only for files that were accepted before.

    Raises:
        ImageProblem: with a reason word, whatever is wrong with the file.
        UserError: for a DICOM file without pydicom (extra `dicom`).
    """
    path = Path(path)
    data, own_bytes, groups = _bytes_of(path, max_pixels), None, {}
    if data[128:132] == b"DICM" or path.suffix.lower() in DICOM_SUFFIXES:
        image, groups = read_dicom(data, max_pixels)
    else:
        image, own_bytes = _decode(data, max_pixels, identify)
    return StoredImage(own_bytes or _png(image), image_id(image) if identify else "", groups)


def resolve_inside(directory: str | os.PathLike, name: str) -> Path:
    """
    Find the file that `name` (from a data file) means. It must be in `directory` after all `..` and symbolic links.

    Raises:
        ImageProblem: `outside_image_folder`, or `missing` for a name that no file can have.
    """
    root = os.path.realpath(directory)
    try:
        path = os.path.realpath(os.path.join(root, name))
    except (OSError, ValueError):  # too long, a zero byte
        raise ImageProblem("missing", "no such file name") from None
    if not path.startswith(os.path.join(root, "")):
        raise ImageProblem("outside_image_folder")
    return Path(path)


class FolderImages:
    """
    Image files in one directory, which no name may leave. Raises [`ImageProblem`] for images that cannot be used.

    Bytes that were read for an id are kept for writing as long as there is room, so that a benchmark is read once.

    Args:
        directory (`pathlib.Path`): Where all names start.
        max_pixels (`int`): See [`load_image`].
        room (`int`, *optional*, defaults to 256 MiB): Bytes of images to keep.
    """

    def __init__(self, directory: Path, max_pixels: int, room: int = 1 << 28):
        self.directory, self.max_pixels, self._room = directory, max_pixels, room
        self._kept: dict[str, bytes] = {}

    def check(self, names: Sequence[str]) -> None:
        """Refuse a directory that has none of the images, if another one near it has some of the first few."""

        def has_any(directory: Path, names: Sequence[str]) -> bool:
            return any(os.path.isfile(os.path.join(directory, name)) for name in names)

        if not names or has_any(self.directory, names):
            return
        if near := did_you_mean(self.directory, lambda other: has_any(other, names[:10])):
            raise UserError(
                f"image_folder {self.directory} has none of the images, for example {names[0]!r}.{near} "
                "Correct image_folder."
            )

    def load(self, name: str) -> StoredImage:
        image = load_image(resolve_inside(self.directory, name), self.max_pixels)
        if len(image.bytes) <= self._room:
            self._room -= len(image.bytes)
            self._kept[name] = image.bytes
        return image

    def image_id(self, name: str) -> str:
        return self.load(name).image_id

    def stored_bytes(self, name: str) -> bytes:
        path = resolve_inside(self.directory, name)
        return self._kept.get(name) or load_image(path, self.max_pixels, identify=False).bytes


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory, by name."""

    images: Mapping[str, Image.Image]

    def image_id(self, name: str) -> str:
        return store_image(self.images[name]).image_id

    def stored_bytes(self, name: str) -> bytes:
        return store_image(self.images[name]).bytes


def index_images(
    names: Iterable[str], reader: ImageReader, path: Path, num_workers: int
) -> tuple[dict[str, str], dict[str, Rejected]]:
    """
    Identify the images of a source before anything is written: splits, duplicates and leakage are decided by
    `image_id`. A file keeps the `image_id` of each image, or its problem. An interrupted run resumes where it ends.

    Args:
        names (iterable of `str`): File names; each is read once.
        reader ([`ImageReader`]): Reads them.
        path (`pathlib.Path`): The JSON lines to write. The file is beside the datasets and not part of them.
        num_workers (`int`): Number of threads.

    Returns:
        `image_id` by name for the images that can be used, and a [`Rejected`] by name for the others.

    Raises:
        UserError: for a wrong directory of images, see [`FolderImages.check`].
    """
    from tqdm.auto import tqdm

    def identify(name: str) -> dict:
        try:
            return {"image": name, "image_id": reader.image_id(name)}
        except ImageProblem as problem:
            return {"image": name, "reason": problem.reason, "detail": str(problem)}

    names = list(dict.fromkeys(names))
    if isinstance(reader, FolderImages):
        reader.check(names)
    partial = path.with_name(f".{path.name}.tmp")
    entries = {entry["image"]: entry for file in (partial, path) for entry in _entries(file)}
    todo = [name for name in names if name not in entries]
    if todo or not path.exists():
        # Not `atomic_path`: what an interrupted run leaves in the temporary file is where the next one resumes.
        found = tqdm(ordered_map(identify, todo, num_workers), "images", len(todo), unit="image", disable=None)
        with open(partial, "w", encoding="utf-8") as file:
            for entry in chain(list(entries.values()), found):
                entries[entry["image"]] = entry
                file.write(json.dumps(entry) + "\n")
                file.flush()  # a killed process loses nothing that the system has
        os.replace(partial, path)
    found = {name: entries[name] for name in names}
    good = {name: entry["image_id"] for name, entry in found.items() if "image_id" in entry}
    return good, {
        name: Rejected("", entry["reason"], f"{name}: {entry['detail']}")
        for name, entry in found.items()
        if name not in good
    }


def _entries(path: Path) -> Iterator[dict]:
    """Yield the entries of an index. Lines that are damaged, by a killed run or a power cut, are skipped."""
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)


def _bytes_of(path: Path, max_pixels: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # before opening: a named pipe would wait forever
            raise ImageProblem("not_a_file")
        if status.st_size == 0:
            raise ImageProblem("empty", "zero bytes")
        if status.st_size > max_pixels * MAX_BYTES_PER_PIXEL:
            raise ImageProblem("too_large", f"{status.st_size} bytes")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageProblem("missing") from None
    except (OSError, ValueError) as error:
        raise ImageProblem("unreadable", str(getattr(error, "strerror", "") or error)) from None


def _decode(data: bytes, max_pixels: int, identify: bool) -> tuple[Image.Image, bytes | None]:
    """Return the upright 8-bit image, and the file's own bytes without metadata if they can be kept."""
    with image_problem("not_an_image"):
        image = Image.open(io.BytesIO(data), formats=_formats())
    check_pixels(*image.size, max_pixels)
    # What else a decoder raises is about a mode or compression that PIL does not turn into pixels.
    with image_problem("unsupported"), image_problem("truncated", _TRUNCATED):
        # The further images of an MPO file are a phone's previews of the first one.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise ImageProblem("several_frames")
        own_bytes = without_metadata(image, data) if _is_upright(image, data) else None
        if own_bytes is None:
            return to_8_bit(ImageOps.exif_transpose(image)), None
        if identify:
            image.load()
        return image, own_bytes


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

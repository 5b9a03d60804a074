# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Read images, by the path of a file or by their name in a source: the bytes to store, the `image_id`, or the reason why
one cannot be used.

Images keep every pixel and lose everything else. An 8-bit gray or RGB JPEG or PNG keeps its own compressed bytes
without metadata; any other image becomes an 8-bit PNG (see `image_formats.py`, `dicom.py` and `nifti.py`).
"""

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path, PurePath
from threading import Lock
from typing import Any
from unicodedata import normalize

from PIL import ExifTags, Image, ImageOps

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean

from .cells import DICOM_SUFFIXES
from .dicom import open_dicom
from .image_formats import Frame, Frames, ImageProblem, check_pixels, image_problem, to_8_bit, without_metadata
from .image_settings import ImageSettings
from .near_copies import perceptual_hash
from .nifti import is_nifti, open_nifti
from .schema import bytes_of
from .source import ImageReader


_FRAME = re.compile(r"#(\d{1,9})$")
_USUAL, _ANY_SIZE = ImageSettings(), ImageSettings(max_pixels=1 << 62)
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
            and `"series"` of DICOM; for other frames of one file, its hash. In a directory of images also the path of
            its `"file"`.
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
    return _store(Frame(to_8_bit(image)), {}, identify=True)


def identify(data: bytes) -> tuple[str | None, str | None]:
    """
    Return the [`image_id`] and the near hash of an image file in a dataset, of its picture as [`publishable`] stores
    it; None and None if it cannot be decoded.
    """
    with suppress(ImageProblem):
        image = load_image(data, _ANY_SIZE, 1)
        return image.image_id, image.near_hash
    return None, None


def publishable(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return an image of any dataset as the stages store it: upright 8-bit pixels, without metadata and path."""
    return {"bytes": load_image(bytes_of(stored), _ANY_SIZE, 1, identify=False).bytes, "path": None}


def load_image(
    path: str | os.PathLike | bytes, settings: ImageSettings = _USUAL, frame: int | None = None, identify: bool = True
) -> StoredImage:
    """
    Read one image of a file: of any format that PIL reads without another program, DICOM or NIfTI.

    Args:
        path (`str`, `os.PathLike` or `bytes`):
            The file, or its content. Paths from data files go through [`resolve_inside`] first.
        settings ([`ImageSettings`], *optional*):
            How to read it. Images of more than `max_pixels` are rejected by their header, before anything is decoded.
            PIL's own limit (`Image.MAX_IMAGE_PIXELS`) applies as well.
        frame (`int`, *optional*):
            Number of the frame, from 1. By default a file with several has the one in the middle if `settings.frames`
            is `"middle"`, and is rejected otherwise.
        identify (`bool`, *optional*, defaults to `True`):
            Whether to compute `image_id` and `near_hash`. Set it to False only for files that were identified before:
            those that keep their bytes are then not decoded.

    Raises:
        ImageProblem: with a reason word, whatever is wrong with the file.
        UserError: for a DICOM or NIfTI file without the package that reads it (extras `dicom` and `nifti`).
    """
    opened = open_image(path, settings)
    return _store(read_frame(opened, settings, frame), opened.groups, identify)


def open_image(path: str | os.PathLike | bytes, settings: ImageSettings) -> Frames:
    """Open a file, of which [`read_frame`] reads the frames. Raises the errors of [`load_image`]."""
    data = path if isinstance(path, bytes) else _bytes_of(Path(path), settings.max_bytes)
    name = "" if data is path else Path(path).name
    try:
        if data[128:132] == b"DICM" or PurePath(name).suffix.lower() in DICOM_SUFFIXES:
            opened = open_dicom(data, settings)
        elif is_nifti(data, name):
            opened = open_nifti(data, settings)
        else:
            opened = _open_picture(data, settings.max_pixels)
    except ImportError as error:
        kind = "DICOM" if error.name == "pydicom" else "NIfTI"
        raise UserError(
            f"There are {kind} files among the images, and reading them needs {error.name}. Install it with "
            f"`pip install 'medst_trl[{kind.lower()}]'`."
        ) from None
    if opened.count > 1 and not opened.groups:  # the frames of one file stay together
        opened.groups = dict.fromkeys(("series", "study", "patient"), hashlib.sha256(data).hexdigest())
    return opened


def read_frame(opened: Frames, settings: ImageSettings, frame: int | None) -> Frame:
    """Read a frame of a file, see [`load_image`]. Only one thread may do so: decoders are not made for several."""
    if frame is not None and not 1 <= frame <= opened.count:
        raise ImageProblem("missing", f"frame {frame} of {opened.count}")
    if frame is None and opened.count > 1 and settings.frames != "middle":
        choice = "middle, because a text is about one frame" if settings.frame_step else "middle, all or every:N"
        raise ImageProblem("several_frames", f"{opened.count} frames: name one (FILE#N), or set --frames to {choice}")
    return opened.read(opened.middle if frame is None else frame - 1)


def _store(frame: Frame, groups: dict[str, str], identify: bool) -> StoredImage:
    with _decoding():
        stored = StoredImage(frame.own_bytes or _png(frame.image), "", groups, note=frame.note)
        if not identify:
            return stored
        return replace(stored, image_id=image_id(frame.image), near_hash=perceptual_hash(frame.image))


def _bytes_of(path: Path, max_bytes: int) -> bytes:
    with image_problem("unreadable"), image_problem("missing", (FileNotFoundError, NotADirectoryError)):
        size = path.stat().st_size
        if not path.is_file():  # before opening: a named pipe would wait forever
            raise ImageProblem("not_a_file")
        if size == 0:
            raise ImageProblem("empty", "zero bytes")
        if size > max_bytes:
            raise ImageProblem("too_large", f"{size} bytes")
        return path.read_bytes()


def _open_picture(data: bytes, max_pixels: int) -> Frames:
    """Open a file with PIL. Its frames are upright 8-bit images."""
    with image_problem("not_an_image"):
        image = Image.open(io.BytesIO(data), formats=_formats())
    check_pixels(*image.size, max_pixels)
    with _decoding():
        pages = _pages(image)

    def read(index: int) -> Frame:
        with _decoding():
            image.seek(pages[index])
            check_pixels(*image.size, max_pixels)
            if len(pages) == 1 and _is_upright(image, data) and (own_bytes := without_metadata(image, data)):
                return Frame(image, own_bytes)
            return Frame(to_8_bit(ImageOps.exif_transpose(image)))

    return Frames(len(pages), read, len(pages) // 2)


@contextmanager
def _decoding() -> Iterator[None]:
    # What else a decoder raises is about a mode or compression that PIL does not turn into pixels.
    with image_problem("unsupported"), image_problem("truncated", _TRUNCATED):
        yield


def _pages(image: Image.Image) -> list[int]:
    """Return the positions of the frames of a file, without smaller copies and masks of others."""

    def is_copy(page: int) -> bool:
        image.seek(page)
        # Bits of NewSubfileType: a smaller copy of another page, and a mask of its transparent parts.
        return bool(image.tag_v2.get(254, 0) & 0b101)

    # The further images of an MPO file are a phone's previews of the first one.
    pages = range(1 if image.format == "MPO" else getattr(image, "n_frames", 1))
    return [page for page in pages if image.format != "TIFF" or not is_copy(page)] or [0]


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


# --- Images by name --------------------------------------------------------------------------------------------------


def resolve_inside(directory: str | os.PathLike, name: str, follow_symlinks: bool = False) -> Path:
    """
    Return the path of a file that a data file names. It must be in `directory` after all `..` and symbolic links; with
    `follow_symlinks`, after all `..`.

    Raises:
        ImageProblem: `outside_image_folder`, or `missing` for a name that no file can have.
    """
    root = os.path.join(os.path.realpath(directory), "")
    if "\\" in name and not os.path.lexists(os.path.join(root, name)):
        name = name.replace("\\", "/")  # a table from Windows
    forms = (name, *(normalize(form, name) for form in ("NFC", "NFD")))  # a Mac writes an umlaut as two characters
    name = next((form for form in forms if os.path.lexists(os.path.join(root, form))), name)
    unresolved = os.path.normpath(os.path.join(root, name))
    with image_problem("missing", (OSError, ValueError)):  # a name that is too long, or has a zero byte
        path = os.path.realpath(os.path.join(root, name))
    if path.startswith(root):
        return Path(path)
    if not unresolved.startswith(root):
        raise ImageProblem("outside_image_folder")
    if not follow_symlinks:
        raise ImageProblem("outside_image_folder", "by a symbolic link; --follow_symlinks true follows it")
    return Path(unresolved)  # not where the link leads: the files of a Hub snapshot lose their suffixes there


class FolderImages:
    """
    Image files in one directory, which no name may leave. Raises [`ImageProblem`] for images that cannot be used.

    `scan.dcm#3` is the third frame of `scan.dcm`, unless a file has this name.

    Args:
        directory (`pathlib.Path`): Where all names start.
        settings ([`ImageSettings`], *optional*): How to read them.
    """

    def __init__(self, directory: Path, settings: ImageSettings = _USUAL):
        self.directory, self.settings = directory, settings
        self._lock = Lock()  # one thread opens a file of several frames, and reads them for all threads
        self._open_once = lru_cache(maxsize=2)(open_image)

    def check(self, names: Sequence[str]) -> None:
        """Refuse a directory that has none of the images: its path is wrong."""

        def is_missing(name: str) -> bool:
            with suppress(ImageProblem):  # it has another problem, such as a link that leads out of the directory
                return not (self.find(name)[0].exists() or os.path.islink(self.directory / name))
            return False

        if names and all(map(is_missing, names)):
            near = did_you_mean(self.directory, lambda other: any((other / name).is_file() for name in names[:10]))
            raise UserError(
                f"image_folder {self.directory} has none of the images that the data names.{near} Correct one of them."
            )

    def find(self, name: str) -> tuple[Path, int | None]:
        """Return the file that a name means, and the number of the frame if it has one."""
        path = resolve_inside(self.directory, name, self.settings.follow_symlinks)
        if (match := _FRAME.search(name)) and not os.path.lexists(path):
            return self.find(name[: match.start()])[0], int(match[1])
        return path, None

    def files(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the path of each named file, relative to the directory. Names outside it are skipped."""
        root = os.path.realpath(self.directory)
        for name in dict.fromkeys(names):
            with suppress(ImageProblem, ValueError):
                yield self.find(name)[0].relative_to(root).as_posix()

    def frames_of(self, name: str) -> list[str]:
        """Return the names of the frames of a file that are used; its own if there is only one, or a problem."""
        with suppress(ImageProblem):
            path, frame = self.find(name)
            count = open_image(path, self.settings).count if frame is None else 1
            if count > 1:
                return [f"{name}#{index + 1}" for index in range(0, count, self.settings.frame_step or 1)]
        return [name]

    def load(self, name: str, identify: bool = True) -> StoredImage:
        """Read an image. See [`load_image`]."""
        path, frame = self.find(name)
        with self._lock if frame else nullcontext():
            opened = (self._open_once if frame else open_image)(path, self.settings)
            found = read_frame(opened, self.settings, frame)
        file = os.path.relpath(path, os.path.realpath(self.directory))
        return _store(found, opened.groups | {"file": file}, identify)


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory, by name."""

    images: Mapping[str, Image.Image]

    def load(self, name: str, identify: bool = True) -> StoredImage:
        return store_image(self.images[name])


def loader_of(reader: ImageReader) -> Callable[..., StoredImage]:
    """Return the method `load` of a reader; readers written for version 0.1.0 have `image_id` and `stored_bytes`."""

    ids_of = identify  # `load` has a parameter of this name

    def load(name: str, identify: bool = True) -> StoredImage:
        image_id, data = reader.image_id(name) if identify else "", reader.stored_bytes(name)
        return StoredImage(data, image_id, near_hash=ids_of(data)[1] if identify else None)

    return getattr(reader, "load", load)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Read the images of a source by name, from a directory or from memory, and keep an index of them."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import NamedTuple

from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean
from medst_trl.base.processes import ordered_map

from .groups import GroupIds
from .image_formats import ImageProblem
from .image_settings import ImageSettings
from .images import StoredImage, frame_index, identify, load_image, open_image, store_image, stored_frame
from .source import ImageReader, Question, Records, Rejected


INDEX_FILE = "image_index.jsonl"  # beside the datasets that `medst prepare` writes
_FRAME = re.compile(r"#([1-9]\d{0,8})$")


def resolve_inside(directory: str | os.PathLike, name: str, follow_symlinks: bool = False) -> Path:
    """
    Find the file that `name` (from a data file) means. It must be in `directory` after all `..` and symbolic links;
    with `follow_symlinks`, after all `..`.

    Raises:
        ImageProblem: `outside_image_folder`, or `missing` for a name that no file can have.
    """
    root = os.path.realpath(directory)
    try:
        path = os.path.realpath(os.path.join(root, name))
    except (OSError, ValueError):  # too long, a zero byte
        raise ImageProblem("missing", "no such file name") from None
    if path.startswith(os.path.join(root, "")):
        return Path(path)
    named = os.path.normpath(os.path.join(root, name))
    if not named.startswith(os.path.join(root, "")):
        raise ImageProblem("outside_image_folder")
    if not follow_symlinks:
        raise ImageProblem("outside_image_folder", "by a symbolic link; --follow_symlinks true follows it")
    return Path(named)  # not where the link leads: the files of a Hub snapshot lose their suffixes there


class FolderImages:
    """
    Image files in one directory, which no name may leave. Raises [`ImageProblem`] for images that cannot be used.

    `scan.dcm#3` is the third frame of `scan.dcm`, unless a file has this name.

    Bytes that were read for an id are kept for writing as long as there is room, so that a benchmark is read once.

    Args:
        directory (`pathlib.Path`): Where all names start.
        settings ([`ImageSettings`], *optional*): How to read them.
        room (`int`, *optional*, defaults to 256 MiB): Bytes of images to keep.
    """

    def __init__(self, directory: Path, settings: ImageSettings | None = None, room: int = 1 << 28):
        self.directory, self.settings, self._room = directory, settings or ImageSettings(), room
        self._kept: dict[str, bytes] = {}
        self._lock = Lock()  # files of several frames are decoded by one thread, and not by each again
        self._opened = lru_cache(maxsize=2)(open_image)

    def check(self, names: Sequence[str]) -> None:
        """Refuse a directory that has none of the images, if another one near it has some of the first few."""

        def has_any(directory: Path, names: Sequence[str]) -> bool:
            return any(os.path.isfile(os.path.join(directory, _FRAME.sub("", name))) for name in names)

        if not names or has_any(self.directory, names):
            return
        if near := did_you_mean(self.directory, lambda other: has_any(other, names[:10])):
            raise UserError(
                f"image_folder {self.directory} has none of the images, for example {names[0]!r}.{near} "
                "Correct image_folder."
            )

    def find(self, name: str) -> tuple[Path, int | None]:
        """Return the file that a name means, and the number of the frame if it has one."""
        path = resolve_inside(self.directory, name, self.settings.follow_symlinks)
        if (match := _FRAME.search(name)) and not os.path.lexists(path):
            return self.find(name[: match.start()])[0], int(match[1])
        return path, None

    def files(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the files that names mean, relative to the directory, as far as they are in it."""
        root = os.path.realpath(self.directory)
        for name in dict.fromkeys(names):
            with suppress(ImageProblem):
                yield self.find(name)[0].relative_to(root).as_posix()

    def frames_of(self, name: str) -> list[str]:
        """Return the names of the frames of a file that are used; its own if there is only one, or a problem."""
        with suppress(ImageProblem):
            path, frame = self.find(name)
            count = open_image(path, self.settings).count if frame is None else 1
            if count > 1:
                return [f"{name}#{index + 1}" for index in range(0, count, self.settings.frame_step or 1)]
        return [name]

    def load(self, name: str) -> StoredImage:
        """Read an image, and keep its bytes if there is room."""
        image = self._load(name)
        if len(image.bytes) <= self._room:
            self._room -= len(image.bytes)
            self._kept[name] = image.bytes
        return image

    def image_id(self, name: str) -> str:
        return self.load(name).image_id

    def stored_bytes(self, name: str) -> bytes:
        return self._kept.get(name) or self._load(name, identify=False).bytes

    def _load(self, name: str, identify: bool = True) -> StoredImage:
        path, frame = self.find(name)
        if frame is None:
            return load_image(path, self.settings, identify=identify)
        with self._lock:
            opened = self._opened(path, self.settings)
            read = opened.read(frame_index(opened, self.settings, frame))
        return stored_frame(opened, read, identify)


def choose_frames(records: Records, images: FolderImages, num_workers: int) -> Records:
    """
    Replace files of several frames by those that `--frames all` or `every:N` selects. An unlabeled file becomes an
    image for each; a conversation or question shows them all, one after the other. A benchmark has one image per
    question, so a test question is left to be rejected when its file is read.
    """
    from tqdm.auto import tqdm

    if images.settings.frame_step is None:
        return records
    names = list(dict.fromkeys(records.image_names))
    counted = tqdm(ordered_map(images.frames_of, names, num_workers), "frames", len(names), unit="file", disable=None)
    frames = dict(zip(names, counted))
    conversations, questions = [], []
    for record in records:
        shown = tuple(frame for name in record.images for frame in frames[name])
        if isinstance(record, Question):
            is_test = record.split == "test"
            questions.append(record if is_test else replace(record, image=shown[0], more_images=shown[1:]))
        elif record.messages or shown == record.images:
            sizes = (len(frames[name]) for name in record.images)
            messages = [_with_frames(message, sizes) for message in record.messages]
            conversations.append(replace(record, images=shown, messages=messages))
        else:
            conversations += [replace(record, id=frame, images=(frame,)) for frame in shown]
    return replace(records, conversations=conversations, questions=questions)


def _with_frames(message: dict, sizes: Iterator[int]) -> dict:
    """Repeat each image part of a message as often as the next of `sizes` says."""
    parts = [[part] * (next(sizes) if part["type"] == "image" else 1) for part in message["content"]]
    return message | {"content": list(chain.from_iterable(parts))}


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory, by name."""

    images: Mapping[str, Image.Image]

    def image_id(self, name: str) -> str:
        return store_image(self.images[name]).image_id

    def stored_bytes(self, name: str) -> bytes:
        return store_image(self.images[name]).bytes


class ImageIndex(NamedTuple):
    """
    What is known about the images of a source.

    Attributes:
        image_ids (`dict`): Name of each image that can be used to its `image_id`.
        problems (`dict`): Name of each other image to a [`Rejected`].
        group_ids (`dict`): Name to the group id, for images in a group.
        hashes (`dict`): `image_id` to `near_hash`.
        notes (`dict`): Number of images by their `note`.
    """

    image_ids: dict[str, str]
    problems: dict[str, Rejected]
    group_ids: dict[str, str]
    hashes: dict[str, str | None]
    notes: Mapping[str, int] = MappingProxyType({})


def index_images(
    names: Iterable[str], reader: ImageReader, path: Path, num_workers: int, groups: GroupIds | None = None
) -> ImageIndex:
    """
    Identify the images of a source before anything is written: splits, duplicates and leakage are decided by
    `image_id`, near copies and groups. A file keeps these of each image, or its problem. An interrupted run resumes
    where it ends.

    Args:
        names (iterable of `str`): File names; each is read once.
        reader ([`ImageReader`]): Reads them.
        path (`pathlib.Path`): The JSON lines to write. The file is beside the datasets and not part of them.
        num_workers (`int`): Number of threads.
        groups ([`GroupIds`], *optional*): Makes the group ids; those of patients by default.

    Raises:
        UserError: for a wrong directory of images, see [`FolderImages.check`].
    """
    from tqdm.auto import tqdm

    groups = groups or GroupIds()

    def identify(name: str) -> tuple[dict, Mapping[str, str]]:
        try:
            image = _load(reader, name)
        except ImageProblem as problem:
            return {"image": name, "reason": problem.reason, "detail": str(problem)}, {}
        entry = {"image": name, "image_id": image.image_id, "near_hash": image.near_hash}
        return entry | ({"note": image.note} if image.note else {}), image.groups

    names = list(dict.fromkeys(names))
    if isinstance(reader, FolderImages):
        reader.check(names)
    partial = path.with_name(f".{path.name}.tmp")
    entries = {entry["image"]: entry for file in (partial, path) for entry in index_entries(file)}
    todo = [name for name in names if name not in entries]
    if todo or not path.exists():
        # Not `atomic_path`: what an interrupted run leaves in the temporary file is where the next one resumes.
        found = tqdm(ordered_map(identify, todo, num_workers), "images", len(todo), unit="image", disable=None)
        with open(partial, "w", encoding="utf-8") as file:
            identified = (entry | {"group_id": groups.of_image(entry["image"], header)} for entry, header in found)
            for entry in chain(list(entries.values()), identified):
                entries[entry["image"]] = entry
                file.write(json.dumps(entry) + "\n")
                file.flush()  # a killed process loses nothing that the system has
        os.replace(partial, path)
    found = {name: entries[name] for name in names}
    good = {name: entry for name, entry in found.items() if "image_id" in entry}
    return ImageIndex(
        {name: entry["image_id"] for name, entry in good.items()},
        {
            name: Rejected("", entry["reason"], f"{name}: {entry['detail']}")
            for name, entry in found.items()
            if name not in good
        },
        # Entries of version 0.1.0 have neither.
        {name: entry["group_id"] for name, entry in good.items() if entry.get("group_id") is not None},
        {entry["image_id"]: entry["near_hash"] for entry in good.values() if "near_hash" in entry},
        Counter(entry["note"] for entry in good.values() if "note" in entry),
    )


def _load(reader: ImageReader, name: str) -> StoredImage:
    """Load an image with a reader, which may be a plugin's that has only the methods of [`ImageReader`]."""
    if isinstance(reader, FolderImages):
        return reader.load(name)
    image_id, data = reader.image_id(name), reader.stored_bytes(name)
    return StoredImage(data, image_id, near_hash=identify(data)[1])


def index_entries(path: Path) -> Iterator[dict]:
    """Yield the entries of an index. Lines that are damaged, by a killed run or a power cut, are skipped."""
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)

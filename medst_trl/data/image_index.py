# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Read the images of a source by name, from a directory or from memory, and keep an index of them."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean
from medst_trl.base.processes import ordered_map

from .cells import DICOM_SUFFIXES
from .groups import GroupIds, salt_of
from .image_formats import ImageProblem
from .image_settings import ImageSettings
from .images import StoredImage, load_frame, open_image, store_image
from .images import identify as identify_file
from .source import Conversation, ImageReader, Records, Rejected


INDEX_FILE = "image_index.jsonl"  # beside the datasets that `medst prepare` writes
_FRAME = re.compile(r"#(\d{1,9})$")


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

    Args:
        directory (`pathlib.Path`): Where all names start.
        settings ([`ImageSettings`], *optional*): How to read them.
    """

    def __init__(self, directory: Path, settings: ImageSettings = ImageSettings()):  # noqa: B008 (frozen)
        self.directory, self.settings = directory, settings
        self._lock = Lock()  # one thread opens a file of several frames, for all threads
        self._open_once = lru_cache(maxsize=2)(open_image)

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
        if frame is None:
            opened = open_image(path, self.settings)
        else:
            with self._lock:
                opened = self._open_once(path, self.settings)
        opened.groups["file"] = os.path.relpath(path, os.path.realpath(self.directory))
        return load_frame(opened, self.settings, frame, identify)


def choose_frames(records: Records, images: FolderImages, num_workers: int) -> Records:
    """
    Replace unlabeled files of several frames by the frames that `--frames all` or `every:N` selects, each an image of
    its own. A text is about one frame, nobody knows which, so it is left to be rejected when its file is read.
    """
    from tqdm.auto import tqdm

    if images.settings.frame_step is None:
        return records
    names = list({name: None for record in records.conversations if not record.messages for name in record.images})
    counted = tqdm(ordered_map(images.frames_of, names, num_workers), "frames", len(names), unit="file", disable=None)
    frames = dict(zip(names, counted))

    def chosen(record: Conversation) -> Iterator[Conversation]:
        for name in record.images:
            for frame in frames[name]:
                yield replace(record, id=record.id if frame == name else frame, images=(frame,))

    expanded = ([record] if record.messages else chosen(record) for record in records.conversations)
    return replace(records, conversations=list(chain.from_iterable(expanded)))


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory, by name."""

    images: Mapping[str, Image.Image]

    def load(self, name: str, identify: bool = True) -> StoredImage:
        return store_image(self.images[name])


def loader_of(reader: ImageReader) -> Callable[..., StoredImage]:
    """Return the method `load` of a reader; readers written for version 0.1.0 have `image_id` and `stored_bytes`."""

    def load(name: str, identify: bool = True) -> StoredImage:
        image_id, data = reader.image_id(name) if identify else "", reader.stored_bytes(name)
        return StoredImage(data, image_id, near_hash=identify_file(data)[1] if identify else None)

    return getattr(reader, "load", load)


class ImageIndex(NamedTuple):
    """
    What is known about the images of a source.

    Attributes:
        image_ids (`dict`): Name of each image that can be used to its `image_id`.
        problems (`dict`): Name of each other image to a [`Rejected`].
        group_ids (`dict`): Name to the group id, for images in a group.
        hashes (`dict`): `image_id` to `near_hash`.
        notes (`dict`): Number of different images by their `note`.
    """

    image_ids: dict[str, str]
    problems: dict[str, Rejected]
    group_ids: dict[str, str]
    hashes: dict[str, str | None]
    notes: Mapping[str, int]


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
        UserError: for an index that cannot be resumed: of other group ids, or of an earlier version with DICOM files.
    """
    from tqdm.auto import tqdm

    groups, load = groups or GroupIds(), loader_of(reader)

    def identify(name: str) -> StoredImage | ImageProblem:
        try:
            return load(name)
        except ImageProblem as problem:
            return problem

    names = list(dict.fromkeys(names))
    partial = path.with_name(f".{path.name}.tmp")
    entries = {entry["image"]: entry for entry in index_entries(partial) if _is_same(entry, groups)}
    entries |= {entry["image"]: entry for entry in index_entries(path)}
    # Datasets may have been written with the ids of a finished index.
    if path.exists() and not all(_is_same(entry, groups, is_finished=True) for entry in entries.values()):
        raise UserError(
            f"{path} was written with another group_salt, or by an earlier version that reads DICOM files "
            "differently. Finish the run with that one, or add --overwrite."
        )
    todo = [name for name in names if name not in entries]
    if todo or not path.exists():
        # Not `atomic_path`: what an interrupted run leaves in the temporary file is where the next one resumes.
        found = tqdm(ordered_map(identify, todo, num_workers), "images", len(todo), unit="image", disable=None)
        with open(partial, "w", encoding="utf-8") as file:
            for entry in chain(list(entries.values()), map(_entry, todo, found, repeat(groups))):
                entries[entry["image"]] = entry
                file.write(json.dumps(entry) + "\n")
                file.flush()  # a killed process loses nothing that the system has
        os.replace(partial, path)
    found = [entries[name] for name in names]
    good = [entry for entry in found if "image_id" in entry]
    return ImageIndex(
        {entry["image"]: entry["image_id"] for entry in good},
        {entry["image"]: Rejected("", entry["reason"], entry["detail"]) for entry in found if "reason" in entry},
        {entry["image"]: entry["group_id"] for entry in good if entry.get("group_id")},
        {entry["image_id"]: entry["near_hash"] for entry in good if "near_hash" in entry},
        Counter({entry["image_id"]: entry["note"] for entry in good if entry.get("note")}.values()),
    )


def _entry(name: str, found: StoredImage | ImageProblem, groups: GroupIds) -> dict:
    if isinstance(found, ImageProblem):
        return {"image": name, "reason": found.reason, "detail": f"{name}: {found}", "group_id": None}
    group_id = groups.of_image(found.groups.get("file", name), found.groups)
    ids = {"image_id": found.image_id, "near_hash": found.near_hash, "group_id": group_id}
    return {"image": name, **ids, "note": found.note}


def _is_same(entry: Mapping, groups: GroupIds, is_finished: bool = False) -> bool:
    """Whether this run would write the same entry, or at least the same `image_id` if the index is finished."""
    if "group_id" not in entry:  # version 0.1.0 wrote no groups and no hashes, and showed DICOM files differently
        return is_finished and Path(entry["image"]).suffix.lower() not in DICOM_SUFFIXES
    return entry["group_id"] is None or salt_of(entry["group_id"]) == salt_of(groups.of_key(""))


def index_entries(path: Path) -> Iterator[dict]:
    """Yield the entries of an index. Lines that are damaged, by a killed run or a power cut, are skipped."""
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What every image of a source is called by its pixels, found out once, before anything is written.

Splits, duplicates and leakage go by `image_id`, so all ids have to be known before the first row can be placed.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from .images import ImageProblem, load_image, resolve_inside, store_image, stored_bytes
from .parallel import ordered_map
from .records import Rejected


class ImageReader(Protocol):
    """Where images come from: their ids first, the bytes to store later, one at a time."""

    def image_id(self, name: str) -> str: ...

    def stored_bytes(self, name: str) -> bytes: ...


class FolderImages:
    """
    Image files under one folder, which no name may leave. Raises [`ImageProblem`] for what cannot be used.

    What was read for its id is kept for writing as long as there is room, so that a benchmark is read once.

    Args:
        folder (`Path`): Where all names start.
        max_pixels (`int`): See [`load_image`].
        room (`int`, *optional*, defaults to 256 MiB): Bytes of images to keep.
    """

    def __init__(self, folder: Path, max_pixels: int, room: int = 1 << 28):
        self.folder, self.max_pixels, self._room = folder, max_pixels, room
        self._kept: dict[str, bytes] = {}

    def image_id(self, name: str) -> str:
        image = load_image(resolve_inside(self.folder, name), self.max_pixels)
        if len(image.bytes) <= self._room:
            self._room -= len(image.bytes)
            self._kept[name] = image.bytes
        return image.image_id

    def stored_bytes(self, name: str) -> bytes:
        if name in self._kept:
            return self._kept[name]
        return stored_bytes(resolve_inside(self.folder, name), self.max_pixels)


@dataclass(frozen=True)
class MemoryImages:
    """Pictures in memory, by name."""

    images: Mapping[str, Image.Image]

    def image_id(self, name: str) -> str:
        return store_image(self.images[name]).image_id

    def stored_bytes(self, name: str) -> bytes:
        return store_image(self.images[name]).bytes


def index_images(
    names: Iterable[str], reader: ImageReader, path: Path, num_workers: int
) -> tuple[dict[str, str], dict[str, Rejected]]:
    """
    Identify images on several threads, and keep the result in a file: which `image_id` is which file, or what is wrong
    with it. A run that was cut short goes on where that file ends.

    Args:
        names: File names; each is read once.
        reader ([`ImageReader`]): Where they lie.
        path (`Path`): The JSON lines to write. It stays beside the datasets and is no part of them.
        num_workers (`int`): Threads.

    Returns:
        `image_id` by name for the images that can be used, and a [`Rejected`] by name for the others.
    """
    from tqdm.auto import tqdm

    def identify(name: str) -> dict:
        try:
            return {"image": name, "image_id": reader.image_id(name)}
        except ImageProblem as problem:
            return {"image": name, "reason": problem.reason, "detail": str(problem)}

    names = list(dict.fromkeys(names))
    partial = path.with_name(f".{path.name}.tmp")
    entries = _read_entries(partial) | _read_entries(path)
    todo = [name for name in names if name not in entries]
    if todo or not path.exists():
        with open(partial, "w", encoding="utf-8") as file:
            for entry in entries.values():
                file.write(json.dumps(entry) + "\n")
            file.flush()
            for entry in tqdm(
                ordered_map(identify, todo, num_workers), "images", len(todo), unit="image", disable=None
            ):
                entries[entry["image"]] = entry
                file.write(json.dumps(entry) + "\n")
                file.flush()  # a killed process loses nothing that the system has
        os.replace(partial, path)
    good = {name: entries[name]["image_id"] for name in names if "image_id" in entries[name]}
    bad = {
        name: Rejected("", entries[name]["reason"], f"{name}: {entries[name]['detail']}")
        for name in names
        if "reason" in entries[name]
    }
    return good, bad


def _read_entries(path: Path) -> dict[str, dict]:
    entries = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            entries[entry["image"]] = entry
    return entries

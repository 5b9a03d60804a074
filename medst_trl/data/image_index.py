# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Find the `image_id` of every image of a source, once, before anything is written.

Splits, duplicates and leakage are decided by `image_id`, so all ids must be known before the first row can be placed.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from .image_formats import ImageProblem
from .images import ImageReader
from .parallel import ordered_map
from .source import Rejected


def index_images(
    names: Iterable[str], reader: ImageReader, path: Path, num_workers: int
) -> tuple[dict[str, str], dict[str, Rejected]]:
    """
    Identify images on several threads, and keep in a file which file has which `image_id`, or what is wrong with it.
    An interrupted run resumes where that file ends.

    Args:
        names (iterable of `str`): File names; each is read once.
        reader ([`ImageReader`]): Reads them.
        path (`pathlib.Path`): The JSON lines to write. The file is beside the datasets and not part of them.
        num_workers (`int`): Number of threads.

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
    entries = {entry["image"]: entry for file in (partial, path) for entry in _read_entries(file)}
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
    good, bad = {}, {}
    for name in names:
        match entries[name]:
            case {"image_id": image_id}:
                good[name] = image_id
            case {"reason": reason, "detail": detail}:
                bad[name] = Rejected("", reason, f"{name}: {detail}")
    return good, bad


def _read_entries(path: Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with suppress(ValueError):  # the last line of a killed run
            yield json.loads(line)

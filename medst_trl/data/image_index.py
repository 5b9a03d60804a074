# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which frames of a source are images, and an index of what is known about each image."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_jsonl
from medst_trl.base.processes import ordered_map

from .cells import DICOM_SUFFIXES
from .groups import GroupIds, salt_of
from .image_formats import ImageProblem
from .images import FolderImages, StoredImage, loader_of
from .source import ImageReader, Records


INDEX_FILE = "image_index.jsonl"  # beside the datasets that `medst prepare` writes


def choose_frames(records: Records, images: FolderImages, num_workers: int) -> Records:
    """
    Replace unlabeled files of several frames by the frames that `--frames all` or `every:N` selects, each an image of
    its own. It is unknown which frame a text is about, so records with one are left to be rejected when their file is
    read.
    """
    if images.settings.frame_step is None:
        return records
    names = list({name: None for record in records.conversations if not record.messages for name in record.images})
    counted = tqdm(ordered_map(images.frames_of, names, num_workers), "frames", len(names), unit="file", disable=None)
    frames = dict(zip(names, counted))

    conversations = []
    for record in records.conversations:
        shown = [] if record.messages else [(name, frame) for name in record.images for frame in frames[name]]
        chosen = [replace(record, id=record.id if frame == name else frame, images=(frame,)) for name, frame in shown]
        conversations += chosen or [record]
    return replace(records, conversations=conversations)


def index_images(
    names: Iterable[str], reader: ImageReader, path: Path, num_workers: int, groups: GroupIds | None = None
) -> dict[str, dict[str, Any]]:
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

    Returns:
        `dict`: name to the entry in the file, with `image_id`, `near_hash`, `group_id` and `note` of the image, or the
        `reason` and `detail` of its problem.

    Raises:
        UserError: for an index that cannot be resumed: of other group ids, or of an earlier version with DICOM files.
    """
    groups, load = groups or GroupIds(), loader_of(reader)

    def identify(name: str) -> StoredImage | ImageProblem:
        try:
            return load(name)
        except ImageProblem as problem:
            return problem

    names = list(dict.fromkeys(names))
    partial = path.with_name(f".{path.name}.tmp")
    entries = {entry["image"]: entry for entry in read_jsonl(partial) if _is_same(entry, groups)}
    entries |= {entry["image"]: entry for entry in read_jsonl(path)}
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
    return {name: entries[name] for name in names}


def check_salt(path: Path, groups: GroupIds) -> None:
    """Refuse a finished index with group ids of another salt."""
    if any(entry.get("group_id") and not _is_same(entry, groups) for entry in read_jsonl(path)):
        raise UserError(f"{path} was written with another group_salt. Set that one, or add --overwrite.")


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

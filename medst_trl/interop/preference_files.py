# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Read preference pairs from other projects' JSON files.

A record has two whole conversations in LLaVA's format, which differ in the last answer:
- `stllava_med`: `chosen_conversations` and `reject_conversations`, as in the original code of STLLaVA-Med;
- `mmedpo`: `conversations` and `rejected_conversations`, and a `weighted_score`, as MMedPO publishes them.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path

from medst_trl.data.cells import BadRecord, published_id
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.image_settings import ImageSettings
from medst_trl.data.images import FolderImages
from medst_trl.data.reading import read_json_rows
from medst_trl.data.schema import text_of
from medst_trl.data.source import Records, Rejected, check_image_folder
from medst_trl.data.sources.llava import image_names, llava_messages


# Chosen and rejected conversation of a record, by format.
FORMATS = {
    "stllava_med": ("chosen_conversations", "reject_conversations"),
    "mmedpo": ("conversations", "rejected_conversations"),
}


@dataclass
class PreferenceFile:
    """
    The content of a file of preference pairs.

    Attributes:
        pairs (`list[dict]`):
            Rows for [`select_preferences`]. They also have `images`: file names inside the image directory.
        rejected (`list[Rejected]`):
            Records that cannot be used.
        images ([`FolderImages`]):
            Reads the bytes of the images.
        near_hashes (`dict[str, str | None]`):
            `image_id` to perceptual hash, to find near copies.
        notes (`dict`):
            What to report about the file, such as keys that are not used.
    """

    pairs: list[dict]
    rejected: list[Rejected]
    images: FolderImages
    near_hashes: dict[str, str | None]
    notes: dict[str, int | str]


@dataclass(frozen=True)
class _Pair:
    id: str
    row: dict


def read_preference_file(path: str | os.PathLike, image_folder: str | os.PathLike) -> PreferenceFile:
    """
    Read a JSON array or JSON lines of either format, which each record's keys show. Names of keys may differ in case
    and blanks, and `images` is `image`.

    MMedPO's `weighted_score` is a weight of the pair, not the score of an answer: it goes into `judge`. A record
    without `id` is named after its position, and one that repeats an id gets another (`<id>-2`), unless it is a copy.

    Rejected, by reason: the reasons of [`read_llava`], `not_a_preference_pair`, `different_prompts`,
    `chosen_equals_rejected`, `bad_score`, and the reasons of [`ImageProblem`].

    Args:
        path (`str` or `os.PathLike`):
            The file.
        image_folder (`str` or `os.PathLike`):
            Directory of the images. No image may be outside.

    Raises:
        UserError: if the file contains no records, or the directory does not exist.

    Example:

    ```python
    file = read_preference_file("mmedpo_vqa-rad_dpo_weighted.json", "vqa_rad/images")
    preferences = select_preferences(file.pairs, file.rejected, near_hashes=file.near_hashes, validation_share=0.05)
    ```
    """
    path, image_folder = Path(path), Path(image_folder)
    check_image_folder(image_folder)
    near_hashes: dict[str, str | None] = {}
    images = FolderImages(image_folder, ImageSettings())
    records = Records("preferences", image_folder)

    @cache
    def identify(image: str) -> str | ImageProblem:
        try:
            found = images.load(image)
        except ImageProblem as problem:  # returned, because the cache keeps no exceptions
            return problem
        near_hashes[found.image_id] = found.near_hash
        return found.image_id

    def pair(name: str, record: dict) -> _Pair:
        row = _read_pair(record)
        row["image_ids"] = [identify(image) for image in row["images"]]
        for image, found in zip(row["images"], row["image_ids"]):
            if isinstance(found, ImageProblem):
                raise BadRecord(found.reason, f"{image}: {found}")
        return _Pair(name, row)

    used = {"id", "image", "weighted_score"}.union(*FORMATS.values())
    records.collect(read_json_rows(path, "image", records.counts), pair, prefix="record-", used=used)
    rows = [pair.row | {"id": published_id(pair.id, pair.row["images"])} for pair in records.conversations]
    pairs = [row | {"row": number} for number, row in enumerate(rows)]
    return PreferenceFile(pairs, records.rejected, images, near_hashes, records.counts)


def _read_pair(record: dict) -> dict:
    name = next((name for name, keys in FORMATS.items() if all(key in record for key in keys)), None)
    if name is None:
        raise BadRecord("not_a_preference_pair", ", ".join(map(str, record)))
    images = image_names(record.get("image"))
    chosen, rejected = (llava_messages(record[key], len(images)) for key in FORMATS[name])
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("different_prompts", text_of(rejected[0]["content"]))
    if chosen == rejected:
        raise BadRecord("chosen_equals_rejected", text_of(chosen[-1]["content"]))
    weight = record.get("weighted_score")
    if isinstance(weight, bool) or not isinstance(weight, int | float | None) or not isfinite(weight or 0):
        raise BadRecord("bad_score", weight)
    judge = {"source": name} | ({} if weight is None else {"weighted_score": weight})
    *prompt, good, bad = ({"role": turn["role"], "content": turn["content"]} for turn in (*chosen, rejected[-1]))
    row = {"images": list(images), "prompt": prompt, "chosen": [good], "rejected": [bad]}
    return row | {"score_chosen": None, "score_rejected": None, "judge": json.dumps(judge)}

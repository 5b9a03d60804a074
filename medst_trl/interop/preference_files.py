# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Preference pairs in JSON files of other projects, read and written.

Two whole conversations a record, in LLaVA's form, which differ in the last answer:
- `stllava_med`: `chosen_conversations` and `reject_conversations`, as the first code of STLLaVA-Med has them;
- `mmedpo`: `conversations` and `rejected_conversations`, and a `weighted_score`, as MMedPO publishes them.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medst_trl.base.errors import UserError
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.images import MAX_PIXELS, FolderImages
from medst_trl.data.reading import read_json_records
from medst_trl.data.schema import preference_features, text_of
from medst_trl.data.source import BadRecord, Rejected, published_id, text_value
from medst_trl.data.sources.llava import PLACEHOLDER, image_names, llava_messages


if TYPE_CHECKING:
    from datasets import Dataset

    from medst_trl.selftrain.preferences import Preferences

# Chosen and rejected conversation of a record, by format.
FORMATS = {
    "stllava_med": ("chosen_conversations", "reject_conversations"),
    "mmedpo": ("conversations", "rejected_conversations"),
}
ROWS_PER_SHARD = 512
JPEG_START = b"\xff\xd8"


@dataclass
class PreferenceFile:
    """
    What a file of preference pairs holds.

    Attributes:
        pairs (`list[dict]`):
            Rows for [`select_preferences`], which also have `images`: file names inside the image folder.
        rejected (`list[Rejected]`):
            Records that cannot be used.
        images ([`FolderImages`]):
            Where the bytes of the images come from.
    """

    pairs: list[dict] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    images: FolderImages | None = None


def read_preference_file(
    path: str | os.PathLike, image_folder: str | os.PathLike, max_pixels: int = MAX_PIXELS
) -> PreferenceFile:
    """
    Read a JSON array or JSON lines of either format; which one, each record's keys say.

    MMedPO's `weighted_score` is a weight of the pair, no score of an answer: it goes into `judge`. A record without
    `id` is named after its position.

    Set aside, by reason: what [`read_llava`] sets aside, `not_a_preference_pair`, `different_prompts`,
    `chosen_equals_rejected`, `bad_score`, and the reasons of [`ImageProblem`].

    Args:
        path (`str` or `os.PathLike`):
            The file.
        image_folder (`str` or `os.PathLike`):
            Where the file names of images start. None may leave it.
        max_pixels (`int`, *optional*, defaults to 100 million):
            Larger images are set aside before they are decoded.

    Raises:
        UserError: if the file holds no records at all, or there is no such folder.

    Example:

    ```python
    file = read_preference_file("mmedpo_vqa-rad_dpo_weighted.json", "vqa_rad/images")
    preferences = select_preferences(file.pairs, file.rejected, validation_share=0.05)
    write_preferences("preferences", preferences, file)  # for `medst dpo --dataset preferences`
    ```
    """
    path = Path(path)
    if not Path(image_folder).is_dir():
        raise UserError(f"image_folder {image_folder} is no folder. Correct the path to the images.")
    file, ids = PreferenceFile(images=FolderImages(Path(image_folder), max_pixels)), set()
    image_ids: dict[str, str | ImageProblem] = {}
    for position, record in read_json_records(path, known_by="image"):
        if isinstance(record, Rejected):
            file.rejected.append(record)
            continue
        name = f"record-{position:06d}"
        try:
            name = text_value(record.get("id"), missing="") if record.get("id") not in (None, "") else name
            if name in ids:
                raise BadRecord("duplicate_id", name)
            pair = _pair(record)
            for image in pair["images"]:
                pair["image_ids"].append(_image_id(image, file.images, image_ids))
        except BadRecord as bad:
            file.rejected.append(Rejected(name, bad.reason, bad.value))
        else:
            ids.add(name)
            file.pairs.append({"id": published_id(name, tuple(pair["images"])), "row": len(file.pairs), **pair})
    return file


def write_preferences(folder: str | os.PathLike, preferences: "Preferences", file: PreferenceFile) -> None:
    """
    Write what was selected of a file as a dataset with its images, for `medst dpo --dataset FOLDER`.

    Writes `{train,validation}-*.parquet` and `rejected.jsonl`. What is there already is complete and stays.

    Raises:
        UserError: if there is no pair, naming how many were set aside for which reason; or the disk is full.
    """
    from medst_trl.base.files import write_jsonl
    from medst_trl.data.schema import write_split

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "rejected.jsonl", preferences.rejected)
    if not (preferences.train or preferences.validation):
        reasons = ", ".join(f"{n} {reason}" for reason, n in preferences.counts["rejected"].items())
        raise UserError(
            f"No preference pair is left ({reasons or 'there was none'}): see {folder / 'rejected.jsonl'}."
        )

    def row(pair: dict) -> dict:
        return pair | {"images": [{"bytes": file.images.stored_bytes(name), "path": None} for name in pair["images"]]}

    for split in ("train", "validation"):
        write_split(folder, split, getattr(preferences, split), row, preference_features(), ROWS_PER_SHARD)


def write_preference_file(
    dataset: "Dataset",
    path: str | os.PathLike,
    image_folder: str | os.PathLike,
    format: Literal["stllava_med", "mmedpo"] = "stllava_med",
) -> None:
    """
    Write preference pairs for other projects' code: a JSON array, and the images beside it by their `image_id`.

    Args:
        dataset (`datasets.Dataset`):
            Preference columns, see [`load_records`].
        path (`str` or `os.PathLike`):
            The file to write.
        image_folder (`str` or `os.PathLike`):
            Gets the images, byte for byte, as `<image_id>.png` or `.jpg`; the records name them so.
        format (`str`, *optional*, defaults to `"stllava_med"`):
            `"stllava_med"` or `"mmedpo"`. The latter's `weighted_score` is what such a file said, 1.0 where none did.
    """
    from datasets import Image, List

    from medst_trl.base.files import explain_full_disk
    from medst_trl.data.schema import check_columns

    if format not in FORMATS:
        raise UserError(f"There is no preference format {format!r}; there are {', '.join(FORMATS)}.")
    check_columns(dataset, "preferences")
    path, image_folder = Path(path), Path(image_folder)
    temporary = path.with_name(f".{path.name}.tmp")
    with explain_full_disk(path.parent):
        image_folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [
            _record(row, [_write_image(image, id_, image_folder) for image, id_ in _images(row)], format)
            for row in dataset.cast_column("images", List(Image(decode=False)))
        ]
        temporary.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _pair(record: dict) -> dict:
    name = next((name for name, keys in FORMATS.items() if all(key in record for key in keys)), None)
    if name is None:
        raise BadRecord("not_a_preference_pair", ", ".join(map(str, record)))
    images = image_names(record.get("image"))
    chosen, rejected = (llava_messages(record[key], len(images)) for key in FORMATS[name])
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("different_prompts", text_of(rejected[0]["content"]))
    if chosen == rejected:
        raise BadRecord("chosen_equals_rejected", text_of(chosen[-1]["content"]))
    judge: dict[str, Any] = {"source": name}
    if (weight := record.get("weighted_score")) is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise BadRecord("bad_score", weight)
        judge["weighted_score"] = weight
    return {
        "images": list(images),
        "image_ids": [],
        "prompt": [_plain(turn) for turn in chosen[:-1]],
        "chosen": [_plain(chosen[-1])],
        "rejected": [_plain(rejected[-1])],
        "score_chosen": None,
        "score_rejected": None,
        "judge": json.dumps(judge),
    }


def _image_id(name: str, images: FolderImages, known: dict[str, str | ImageProblem]) -> str:
    """An image is read once, whether it can be used or not."""
    if name not in known:
        try:
            known[name] = images.image_id(name)
        except ImageProblem as problem:
            known[name] = problem
    if isinstance(known[name], ImageProblem):
        raise BadRecord(known[name].reason, f"{name}: {known[name]}")
    return known[name]


def _plain(message: dict) -> dict:
    return {"role": message["role"], "content": message["content"]}


def _images(row: dict) -> list[tuple[dict, str]]:
    return list(zip(row["images"], row["image_ids"], strict=True))


def _write_image(image: dict, image_id: str, folder: Path) -> str:
    name = f"{image_id}.{'jpg' if image['bytes'][:2] == JPEG_START else 'png'}"
    path, temporary = folder / name, folder / f".{name}.tmp"
    if not path.exists():
        temporary.write_bytes(image["bytes"])
        os.replace(temporary, path)
    return name


def _record(row: dict, images: list[str], format: str) -> dict:
    chosen, rejected = FORMATS[format]
    record = {"id": row["id"], "image": images[0] if len(images) == 1 else images}
    record[chosen] = [_turn(message) for message in [*row["prompt"], *row["chosen"]]]
    record[rejected] = [_turn(message) for message in [*row["prompt"], *row["rejected"]]]
    if format == "mmedpo":
        record["weighted_score"] = json.loads(row["judge"] or "{}").get("weighted_score", 1.0)
    return record


def _turn(message: dict) -> dict:
    # A placeholder in a text would be taken for an image of its own.
    parts = [
        PLACEHOLDER if part["type"] == "image" else part["text"].replace(PLACEHOLDER, "image")
        for part in message["content"]
    ]
    return {"from": "human" if message["role"] == "user" else "gpt", "value": "\n".join(parts)}

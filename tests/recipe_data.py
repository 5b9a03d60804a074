# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a few records of each source, in the file format of its release."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image


LOOKS = ("dark", "bright")
QUESTIONS = (("What is the look of the scan?", "The scan is {look}."), ("Is the scan bright?", "{verdict}"))
SPLITS = {"train": 6, "validation": 2, "test": 2}  # images


class ImageWriter:
    """Write different, almost uniform images, and return questions about them."""

    def __init__(self, directory: Path):
        self.directory, self.number = directory, 0

    def write(self, name: str) -> list[tuple[str, str]]:
        """Write an image under a file name and return its questions and answers."""
        look = LOOKS[self.number % 2]
        pixels = np.random.default_rng((self.number, crc32(str(self.directory).encode()))).integers(
            0, 60, (24, 24), dtype=np.uint8
        )
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + (190 if look == "bright" else 0)).save(path)
        self.number += 1
        verdict = "Yes" if look == "bright" else "No"
        return [(question, answer.format(look=look, verdict=verdict)) for question, answer in QUESTIONS]


def write_source(settings: Mapping[str, Any]) -> None:
    """Write the files that a `prepare` section with these settings reads."""
    data = Path(settings["data_path"])
    if settings["source"] in ("llava", "captions"):
        data.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(settings.get("image_folder") or data.parent)
    else:
        data.mkdir(parents=True, exist_ok=True)
        directory = Path(settings.get("image_folder") or (data if settings["source"] == "images" else data / "images"))
    _WRITERS[settings["source"]](data, ImageWriter(directory), settings)


def _llava(path: Path, images: ImageWriter, settings: Mapping[str, Any]) -> None:
    records = []
    for number in range(12):
        turns = []
        for question, answer in images.write(f"{number}.png"):
            prefix = "" if turns else "<image>\n"
            turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
        records.append({"id": f"talk-{number}", "image": f"{number}.png", "conversations": turns})
    path.write_text(json.dumps(records))


def _captions(path: Path, images: ImageWriter, settings: Mapping[str, Any]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["image", "caption"])
        for number in range(12):
            caption = images.write(f"{number}.png")[0][1]
            writer.writerow([f"{number}.png", " ".join([caption] * (8 if number % 3 else 1))])


def _images(directory: Path, images: ImageWriter, settings: Mapping[str, Any]) -> None:
    for number in range(12):
        images.write(f"{number}.png")


def _vqa_rad(directory: Path, images: ImageWriter, settings: Mapping[str, Any]) -> None:
    records = _questions(images, "{split}{number}.png", "image_name")
    for record in records:
        record["phrase_type"] = "test_freeform" if record.pop("split") == "test" else "freeform"
    (directory / "VQA_RAD Dataset Public.json").write_text(json.dumps(records))


def _vqa_rad_mevf(directory: Path, images: ImageWriter, settings: Mapping[str, Any]) -> None:
    records = _questions(images, "{split}{number}.png", "image_name")
    for split in ("train", "test"):
        (directory / f"{split}set.json").write_text(json.dumps([r for r in records if r["split"] == split]))


def _slake(directory: Path, images: ImageWriter, settings: Mapping[str, Any]) -> None:
    records = _questions(images, "xm_{split}{number}/source.png", "img_name")
    for split, name in {"train": "train", "validation": "validate", "test": "test"}.items():
        chosen = [{**record, "q_lang": "en"} for record in records if record["split"] == split]
        (directory / f"{name}.json").write_text(json.dumps(chosen))


def _questions(images: ImageWriter, pattern: str, image_key: str) -> list[dict[str, Any]]:
    records = []
    for split, count in SPLITS.items():
        for number in range(count):
            image = pattern.format(split=split, number=number)
            for question, answer in images.write(image):
                kind = "CLOSED" if answer in ("Yes", "No") else "OPEN"
                records.append(
                    {"qid": len(records), image_key: image, "question": question, "answer": answer,
                     "answer_type": kind, "split": split}
                )  # fmt: skip
    return records


def _pathvqa(directory: Path, images: ImageWriter, settings: Mapping[str, Any]) -> None:
    pattern = settings.get("image_pattern", "{img_id}.jpg")
    for split, count in {"train": SPLITS["train"], "val": SPLITS["validation"], "test": SPLITS["test"]}.items():
        entries = []
        for number in range(count):
            image = f"{split}_{number:04d}"
            questions = images.write(pattern.replace("{split}", split).replace("{img_id}", image))
            entries.append(
                {
                    "img_id": image,
                    "sentf": {"pvqa": [question for question, _ in questions]},
                    "labelf": {"pvqa": [{answer.lower(): 1} for _, answer in questions]},
                }
            )
        (directory / f"pvqa_{split}.json").write_text(json.dumps(entries))


_WRITERS = {
    "llava": _llava, "captions": _captions, "images": _images, "vqa_rad": _vqa_rad, "vqa_rad_mevf": _vqa_rad_mevf,
    "slake": _slake, "pathvqa": _pathvqa,
}  # fmt: skip

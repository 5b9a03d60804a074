# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""PathVQA as distributed for LXMERT: lists of questions and answers per image."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medst_trl.base.settings import documented
from medst_trl.data.cells import BadRecord, text_value
from medst_trl.data.reading import find_file, read_json_records
from medst_trl.data.source import SOURCES, Question, Records, Rejected, Source, SourceCard

from .vqa_rad import IMAGE_FOLDERS


PATHVQA_FILES = {"test": "*test.json", "validation": "*val.json", "train": "*train.json"}


@documented
@dataclass
class PathVqaSettings:
    """
    Settings of the source `pathvqa`.

    Args:
        image_pattern (`str`, *optional*, defaults to `"{img_id}.jpg"`):
            Pattern of the image file names, for example {split}/{img_id}.png (split: train, val, test).
    """

    image_pattern: str = "{img_id}.jpg"


def read_pathvqa(path: Path, image_folder: Path, image_pattern: str = "{img_id}.jpg") -> Records:
    """
    Read PathVQA in LXMERT's format: a directory with `*train.json`, `*val.json` and `*test.json`, which have one entry
    per image.

    Args:
        path (`pathlib.Path`):
            The directory.
        image_folder (`pathlib.Path`):
            Where names of images start.
        image_pattern (`str`, *optional*, defaults to `"{img_id}.jpg"`):
            File name of an image; `{img_id}` and `{split}` (train, val, test) are filled in.
    """
    records = Records("pathvqa", image_folder, counts={"images_without_questions": 0})
    for split, pattern in PATHVQA_FILES.items():
        images = image_pattern.replace("{split}", "val" if split == "validation" else split)
        rows = _pathvqa(find_file(path, pattern), split, images, records.counts)
        records.collect(rows, Question.from_row)
    return records


def _pathvqa(file: Path, split: str, images: str, counts: dict[str, int]) -> Iterator[tuple[int, dict | Rejected]]:
    """Yield the questions of all entries of a file with their names. An unusable entry is rejected as a whole."""
    for position, entry in read_json_records(file, "sentf", counts):
        name = f"pathvqa-{split}-{position:05d}"
        if isinstance(entry, Rejected):
            yield position, entry
            continue
        try:
            questions, labels = entry["sentf"]["pvqa"], entry["labelf"]["pvqa"]
            if len(questions) != len(labels):
                raise BadRecord("questions_and_answers_differ_in_number", f"{len(questions)} and {len(labels)}")
            # Answers with their scores. A NaN is below any other.
            answers = [max(label, key=lambda key: (label[key] == label[key], label[key])) for label in labels]
            image = images.replace("{img_id}", text_value(entry.get("img_id"), missing="no_image"))
        except BadRecord as bad:
            yield position, Rejected(name, bad.reason, bad.value)
        except (KeyError, TypeError, ValueError, AttributeError):
            yield position, Rejected(name, "malformed_entry", json.dumps(entry))
        else:
            counts["images_without_questions"] += not answers
            for number, (question, answer) in enumerate(zip(questions, answers)):
                row = {"id": f"{name}-{number}", "question": question, "answer": answer}
                yield position, row | {"image": image, "split": split}


SOURCES.register(
    Source(
        name="pathvqa",
        summary="the directory with the LXMERT files pvqa_train.json, ...; or flaviagiammarino/path-vqa on the Hub",
        read=lambda request: read_pathvqa(request.data_path, request.image_folder, request.settings.image_pattern),
        card=SourceCard(
            "PathVQA (pathology)",
            homepage="https://github.com/UCSD-AI4H/PathVQA",
            licence="the copyright of the images stays with their publishers",
            citation="He et al., 2020, https://huggingface.co/papers/2003.10286",
        ),
        settings=PathVqaSettings,
        data_files=tuple(PATHVQA_FILES.values()),
        reads_parquet=True,
        image_folders=IMAGE_FOLDERS,
    )
)

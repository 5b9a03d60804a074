# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""SLAKE as published by its authors."""

from dataclasses import dataclass
from pathlib import Path

from medst_trl.base.settings import documented
from medst_trl.data.reading import find_file
from medst_trl.data.source import SOURCES, Records, Source, SourceCard

from .vqa_rad import IMAGE_FOLDERS, collect_questions


# The copy on the Hub has validation.json instead of validate.json: https://huggingface.co/datasets/BoKelvin/SLAKE
SLAKE_FILES = {"test": "test.json", "validation": "validat*.json", "train": "train.json"}


@documented
@dataclass
class SlakeSettings:
    """
    Settings of the source `slake`.

    Args:
        language (`str`, *optional*, defaults to `"en"`):
            Language of the questions, en or zh.
    """

    language: str = "en"


def read_slake(path: Path, image_folder: Path, language: str = "en") -> Records:
    """Read a directory with `train.json`, `validate.json` (or `validation.json`) and `test.json`, one language."""
    records = Records("slake", image_folder, counts={"questions_in_other_languages": 0})

    def fields(record: dict) -> dict | None:
        if str(record.get("q_lang")).strip().lower() != language.lower():
            records.counts["questions_in_other_languages"] += 1
            return None
        return {"image": record.get("img_name"), "question_type": record.get("content_type")}

    for split, pattern in SLAKE_FILES.items():
        collect_questions(records, find_file(path, pattern), fields, split)
    return records


SOURCES.register(
    Source(
        name="slake",
        summary="the directory with train.json, validate.json (validation.json on the Hub), test.json",
        read=lambda request: read_slake(request.data_path, request.image_folder, request.settings.language),
        card=SourceCard(
            "SLAKE (radiology)",
            homepage="https://www.med-vqa.com/slake/",
            licence="CC BY 4.0",
            citation="Liu et al., ISBI 2021, https://huggingface.co/papers/2102.09542",
        ),
        settings=SlakeSettings,
        data_files=tuple(SLAKE_FILES.values()),
        image_folders=IMAGE_FOLDERS,
    )
)

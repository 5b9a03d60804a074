# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""VQA-RAD as published by its authors, and in MEVF's split, which most papers use."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medst_trl.base.settings import documented
from medst_trl.data.assemble import plain_question
from medst_trl.data.reading import find_file, read_json_records
from medst_trl.data.schema import ANSWER_TYPES
from medst_trl.data.source import (
    IMAGE_FOLDERS,
    SOURCES,
    BadRecord,
    Question,
    Records,
    Source,
    SourceCard,
    optional_text,
    text_value,
)


RELEASE_FILE = "VQA_RAD Dataset Public.json"
# The test split first: of two records with one id, the later one is rejected.
MEVF_FILES = {"test": "*testset.json", "train": "*trainset.json"}

_FIELDS = ("vqa_rad", "image_name", "question_type")


@documented
@dataclass
class MevfSettings:
    """
    Settings of the source `vqa_rad_mevf`.

    Args:
        release_path (`str`, *optional*):
            JSON file of the official release, which links paraphrases of a question. Default: beside the data.
    """

    release_path: str | None = None


def read_vqa_rad(path: Path, image_folder: Path) -> Records:
    """
    Read the official VQA-RAD release: a JSON file, or the directory that holds it under its own name.

    Rows whose `phrase_type` starts with `test` are the test split (451). `qid_linked_id` links paraphrases.
    """
    records = Records("vqa_rad", image_folder)
    file = find_file(path, RELEASE_FILE) if path.is_dir() else path
    collect_questions(records, file, _FIELDS, link=lambda record: optional_text(record.get("qid_linked_id")))
    return records


def read_vqa_rad_mevf(path: Path, image_folder: Path, release: str | Path | None = None) -> Records:
    """
    Read the split of VQA-RAD by MEVF: a directory with `*trainset.json` and `*testset.json`.

    It has no links of its own, though its train split holds each fact in up to three wordings (free-form, paraphrase,
    frame). They are taken from the official release (`release`, or the one in the same directory), where the image
    and any wording of a question agree. Without a release, all questions of one image, type and answer count as
    linked: too many rather than too few, so that no answer is given away.
    """
    records = Records("vqa_rad_mevf", image_folder)
    release = release or next(iter(path.glob(RELEASE_FILE)), None)
    links = _links(Path(release)) if release else None

    def link(record: dict) -> str | None:
        if links is None:
            return "|".join(plain_question(str(record.get(key))) for key in ("image_name", "question_type", "answer"))
        return links.get((str(record.get("image_name")), plain_question(str(record.get("question")))))

    for split, pattern in MEVF_FILES.items():
        collect_questions(records, find_file(path, pattern), _FIELDS, split, link)
    records.counts["questions_without_link"] = sum(question.link is None for question in records.questions)
    return records


def collect_questions(
    records: Records,
    file: Path,
    fields: tuple[str, str, str],
    split: str | None = None,
    link: Callable[[dict], str | None] = lambda record: None,
    language: str | None = None,
) -> None:
    """
    Add the questions of a JSON file in the format of VQA-RAD, which SLAKE shares.

    Args:
        records ([`Records`]):
            Where to add them.
        file (`pathlib.Path`):
            Records with `qid`, `question`, `answer`, `answer_type`, and those of `fields`.
        fields (`tuple` of `str`):
            The prefix of the ids, and the names of the fields for the image and the question type.
        split (`str`, *optional*):
            The split. By default each record says in `phrase_type` whether it is in train or test.
        link (`Callable`, *optional*):
            From a record to its link.
        language (`str`, *optional*):
            Count records whose `q_lang` is another, and leave them out.
    """
    prefix, image, question_type = fields

    def question(_, record: dict) -> Question | None:
        if language is not None and record.get("q_lang") != language:
            records.counts["questions_in_other_languages"] += 1
            return None
        linked = link(record)
        own_split = "test" if str(record.get("phrase_type")).startswith("test") else "train"
        return Question(
            id=f"{prefix}-{text_value(record.get('qid'), missing='no_id')}",
            image=text_value(record.get(image), missing="no_image"),
            split=split or own_split,
            question=text_value(record.get("question"), missing="no_question"),
            answer=text_value(record.get("answer"), missing="no_answer"),
            answer_type=_answer_type(record.get("answer_type")),
            question_type=optional_text(record.get(question_type)),
            link=linked,
        )

    records.collect(
        read_json_records(file, key="question"),
        question,
        default_id=lambda position, record: str(record.get("qid", f"{file.name}#{position}")),
    )


def _answer_type(value: Any) -> str:
    """Return the answer type. VQA-RAD writes `"CLOSED "` with a blank."""
    kind = value.strip().lower() if isinstance(value, str) else value
    if kind not in ANSWER_TYPES:
        raise BadRecord("bad_answer_type", value)
    return kind


def _links(release: Path) -> dict[tuple[str, str], str]:
    """Map image and question, in any of its wordings, to the link of the official release."""
    links = defaultdict(set)
    for _, record in read_json_records(release, key="question"):
        if isinstance(record, dict):
            for key in ("question", "question_rephrase", "question_frame"):
                if record.get(key) not in (None, "", "NULL"):
                    links[str(record.get("image_name")), plain_question(str(record[key]))].add(
                        str(record.get("qid_linked_id"))
                    )
    # One wording may have two links; that it is one question shows in its text, see `assemble.linked_groups`.
    return {key: min(values) for key, values in links.items()}


_CARD = {
    "homepage": "https://osf.io/89kps/",
    "licence": "CC0 1.0",
    "citation": "Lau et al., Scientific Data 2018, https://doi.org/10.1038/sdata.2018.251",
}

SOURCES.register(
    Source(
        name="vqa_rad",
        summary="the official VQA-RAD release: its JSON file or directory",
        read=lambda request: read_vqa_rad(request.data_path, request.image_folder),
        card=SourceCard("VQA-RAD (radiology; images from MedPix)", **_CARD),
        image_folders=IMAGE_FOLDERS,
    )
)
SOURCES.register(
    Source(
        name="vqa_rad_mevf",
        summary="the directory with MEVF's trainset.json and testset.json",
        read=lambda request: read_vqa_rad_mevf(request.data_path, request.image_folder, request.settings.release_path),
        card=SourceCard("VQA-RAD in MEVF's split (radiology; images from MedPix)", **_CARD),
        settings=MevfSettings,
        image_folders=IMAGE_FOLDERS,
        files=("release_path",),
    )
)

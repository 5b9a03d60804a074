# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as published: VQA-RAD (the official release, and the split by MEVF), SLAKE and PathVQA."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from medst_trl.base.settings import documented
from medst_trl.data.cells import BadRecord, read_answer_type, text_value
from medst_trl.data.overlap import plain_question
from medst_trl.data.reading import find_file, read_json_records
from medst_trl.data.source import SOURCES, Question, Records, Rejected, Source, SourceCard


IMAGE_FOLDERS = ("images", "VQA_RAD Image Folder", "imgs")  # beside the questions, as releases come
RELEASE_FILE = "VQA_RAD Dataset Public.json"
# The test splits first: of two records with one id, the later one is rejected.
MEVF_FILES = {"test": "*testset.json", "train": "*trainset.json"}
# The copy on the Hub has validation.json instead of validate.json: https://huggingface.co/datasets/BoKelvin/SLAKE
SLAKE_FILES = {"test": "test.json", "validation": "validat*.json", "train": "train.json"}
PATHVQA_FILES = {"test": "*test.json", "validation": "*val.json", "train": "*train.json"}


# --- VQA-RAD ---------------------------------------------------------------------------------------------------------


def read_vqa_rad(path: Path, image_folder: Path) -> Records:
    """
    Read the official VQA-RAD release: a JSON file, or the directory that holds it under its own name.

    Rows whose `phrase_type` starts with `test` are the test split (451). `qid_linked_id` links paraphrases.
    """
    records = Records("vqa_rad", image_folder)

    def fields(record: dict) -> dict:
        is_test = str(record.get("phrase_type")).startswith("test")
        return {"split": "test" if is_test else "train", "link": record.get("qid_linked_id")}

    collect_questions(records, find_file(path, RELEASE_FILE) if path.is_dir() else path, fields)
    return records


def read_vqa_rad_mevf(path: Path, image_folder: Path) -> Records:
    """
    Read the split of VQA-RAD by MEVF: a directory with `*trainset.json` and `*testset.json`.

    It has no links of its own, though its train split holds each fact in up to three wordings (free-form, paraphrase,
    frame). They are taken from the official release in the same directory, where the image and any wording of a
    question agree. Without it, all questions of one image, type and answer count as linked: too many rather than too
    few, so that no answer is given away.
    """
    records = Records("vqa_rad_mevf", image_folder)
    release = path / RELEASE_FILE
    links = _links(release) if release.exists() else None

    def fields(record: dict) -> dict:
        if links is None:
            keys = ("image_name", "question_type", "answer")
            return {"link": "|".join(plain_question(str(record.get(key))) for key in keys)}
        return {"link": links.get((str(record.get("image_name")), plain_question(str(record.get("question")))))}

    for split, pattern in MEVF_FILES.items():
        collect_questions(records, find_file(path, pattern), fields, split)
    records.counts["questions_without_link"] = sum(question.link is None for question in records.questions)
    return records


def _links(release: Path) -> dict[tuple[str, str], str]:
    """Map image and question, in any of its wordings, to the link of the official release."""
    links = defaultdict(set)
    for _, record in read_json_records(release, key="question"):
        for key in ("question", "question_rephrase", "question_frame") if isinstance(record, dict) else ():
            if record.get(key) not in (None, "", "NULL"):
                name = (str(record.get("image_name")), plain_question(str(record[key])))
                links[name].add(str(record.get("qid_linked_id")))
    # One wording may have two links; that it is one question shows in its text, see `assemble.linked_groups`.
    return {name: min(values) for name, values in links.items()}


def collect_questions(
    records: Records, file: Path, fields: Callable[[dict], dict | None], split: str | None = None
) -> None:
    """
    Add the questions of a JSON file in the format of VQA-RAD, which SLAKE shares.

    Args:
        records ([`Records`]):
            Where to add them.
        file (`pathlib.Path`):
            Records with `qid`, `question`, `answer`, `answer_type`, and usually `image_name` and `question_type`.
        fields (`Callable`):
            From a record to the columns of [`Question.from_row`] that it has in another form; None to leave it out.
        split (`str`, *optional*):
            The split, unless `fields` gives it.
    """

    def question(_, record: dict) -> Question | None:
        if (own := fields(record)) is None:
            return None
        name = text_value(record.get("qid"), missing="no_id")
        row = {key: record.get(key) for key in ("question", "answer", "question_type")}
        row |= {"image": record.get("image_name"), "split": split} | own
        result = Question.from_row(f"{records.name.removesuffix('_mevf')}-{name}", row)
        # A missing one is bad, too: these benchmarks give the type of each question.
        return replace(result, answer_type=read_answer_type(record.get("answer_type")))

    rows = read_json_records(file, "question", records.counts)
    records.collect(rows, question, prefix=f"{file.name}#", id_key="qid", keep_first=True)


_VQA_RAD_CARD = SourceCard(
    "VQA-RAD (radiology; images from MedPix)",
    homepage="https://osf.io/89kps/",
    licence="CC0 1.0",
    citation="Lau et al., Scientific Data 2018, https://doi.org/10.1038/sdata.2018.251",
)

SOURCES.register(
    Source(
        name="vqa_rad",
        summary="the official VQA-RAD release: its JSON file or directory; or flaviagiammarino/vqa-rad on the Hub",
        read=lambda request: read_vqa_rad(request.data_path, request.image_folder),
        card=_VQA_RAD_CARD,
        data_files=(RELEASE_FILE,),
        reads_parquet=True,
        image_folders=IMAGE_FOLDERS,
    )
)
SOURCES.register(
    Source(
        name="vqa_rad_mevf",
        summary="the directory with MEVF's trainset.json and testset.json",
        read=lambda request: read_vqa_rad_mevf(request.data_path, request.image_folder),
        card=replace(_VQA_RAD_CARD, title="VQA-RAD in MEVF's split (radiology; images from MedPix)"),
        data_files=(*MEVF_FILES.values(), RELEASE_FILE),
        image_folders=IMAGE_FOLDERS,
    )
)


# --- SLAKE -----------------------------------------------------------------------------------------------------------


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


# --- PathVQA ---------------------------------------------------------------------------------------------------------


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

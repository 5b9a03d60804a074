# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Questions and answers of VQA-RAD (official release, MEVF split), SLAKE and PathVQA as their authors publish them."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from medst_trl.base.errors import UserError

from .json_records import read_json_records
from .records import BadRecord, Question, Rejected, Source, optional_text, text_value
from .schema import ANSWER_TYPES


VQA_RAD_FILE = "VQA_RAD Dataset Public.json"
# The test split first: of two records with one id, the later one goes.
MEVF_FILES = {"test": "*testset.json", "train": "*trainset.json"}
# SLAKE's copy on the Hub says validation.json: https://huggingface.co/datasets/BoKelvin/SLAKE
SLAKE_FILES = {"test": "test.json", "validation": "validat*.json", "train": "train.json"}
PATHVQA_FILES = {"test": "*test.json", "validation": "*val.json", "train": "*train.json"}


def read_vqa_rad(path: Path, image_folder: Path) -> Source:
    """
    The official VQA-RAD release: a JSON file, or the folder that holds it under its own name.

    Rows whose `phrase_type` starts with `test` are the test split (451). `qid_linked_id` links the wordings of a
    question.
    """
    source = Source("vqa_rad", image_folder)
    file = _file(path, VQA_RAD_FILE) if path.is_dir() else path

    def question(record: dict) -> Question:
        split = "test" if str(record.get("phrase_type")).startswith("test") else "train"
        return _vqa_rad_question(record, split, optional_text(record.get("qid_linked_id")))

    _fill(source, file, question)
    return source


def read_vqa_rad_mevf(path: Path, image_folder: Path, release: Path | None = None) -> Source:
    """
    The split of VQA-RAD by MEVF that most papers use: a folder with `*trainset.json` and `*testset.json`.

    It has no links of its own, though its train split holds each fact in up to three wordings (free-form, paraphrase,
    frame). They are taken from the official release (`release`, or the one in the same folder), where the image and
    any wording of a question agree. Without a release, all questions of one image, type and answer count as linked:
    too many rather than too few, so that no answer is given away.
    """
    source = Source("vqa_rad_mevf", image_folder)
    release = release or next(iter(path.glob(VQA_RAD_FILE)), None)
    links = _links(release) if release else None

    def link(record: dict) -> str | None:
        if links is None:
            return "|".join(_plain(record.get(key)) for key in ("image_name", "question_type", "answer"))
        return links.get((str(record.get("image_name")), _plain(record.get("question"))))

    for split, pattern in MEVF_FILES.items():
        _fill(source, _file(path, pattern), lambda record, split=split: _vqa_rad_question(record, split, link(record)))
    source.counts["questions_without_link"] = sum(question.link is None for question in source.questions)
    return source


def read_slake(path: Path, image_folder: Path, language: str = "en") -> Source:
    """SLAKE: a folder with `train.json`, `validate.json` (or `validation.json`), `test.json`; in `"en"` or `"zh"`."""
    source = Source("slake", image_folder)
    others = 0

    def question(record: dict, split: str) -> Question | None:
        nonlocal others
        if record.get("q_lang") != language:
            others += 1
            return None
        return Question(
            id=f"slake-{text_value(record.get('qid'), missing='no_id')}",
            image=text_value(record.get("img_name"), missing="no_image"),
            split=split,
            question=text_value(record.get("question"), missing="no_question"),
            answer=text_value(record.get("answer"), missing="no_answer"),
            answer_type=_answer_type(record.get("answer_type")),
            question_type=optional_text(record.get("content_type")),
        )

    for split, name in SLAKE_FILES.items():
        _fill(source, _file(path, name), lambda record, split=split: question(record, split))
    source.counts["questions_in_other_languages"] = others
    return source


def read_pathvqa(path: Path, image_folder: Path, image_pattern: str = "{img_id}.jpg") -> Source:
    """
    PathVQA in LXMERT's form, an entry an image: a folder with `*train.json`, `*val.json`, `*test.json`.

    Args:
        image_pattern (`str`): File name of an image; `{img_id}` and `{split}` (train, val, test) are filled in.
    """
    source = Source("pathvqa", image_folder)
    without = 0
    for split, pattern in PATHVQA_FILES.items():
        for position, record in read_json_records(_file(path, pattern), known_by="sentf"):
            if isinstance(record, Rejected):
                source.rejected.append(record)
                continue
            name = f"pathvqa-{split}-{position:05d}"
            try:
                pairs = list(_pathvqa_pairs(record))
                image = text_value(record.get("img_id"), missing="no_image")
            except BadRecord as bad:
                source.rejected.append(Rejected(name, bad.reason, bad.value))
                continue
            without += not pairs
            folder = "val" if split == "validation" else split
            image = image_pattern.replace("{img_id}", image).replace("{split}", folder)
            for number, (question, answer) in enumerate(pairs):
                try:
                    answer = text_value(answer, missing="no_answer")
                    source.questions.append(
                        Question(
                            id=f"{name}-{number}",
                            image=image,
                            split=split,
                            question=text_value(question, missing="no_question"),
                            answer=answer,
                            answer_type="closed" if answer.lower() in ("yes", "no") else "open",
                        )
                    )
                except BadRecord as bad:
                    source.rejected.append(Rejected(f"{name}-{number}", bad.reason, bad.value))
    source.counts["images_without_questions"] = without
    return source


def _fill(source: Source, file: Path, make_question) -> None:
    """Add to `source` what `make_question` makes of each record of a file: a question, or None for one not wanted."""
    ids = {question.id for question in source.questions}
    for position, record in read_json_records(file, known_by="question"):
        if isinstance(record, Rejected):
            source.rejected.append(record)
            continue
        try:
            question = make_question(record)
            if question is not None and question.id in ids:
                raise BadRecord("duplicate_id", question.id)
        except BadRecord as bad:
            name = str(record.get("qid", f"{file.name}#{position}"))
            source.rejected.append(Rejected(name, bad.reason, bad.value))
            continue
        if question is not None:
            ids.add(question.id)
            source.questions.append(question)


def _vqa_rad_question(record: dict, split: str, link: str | None) -> Question:
    return Question(
        id=f"vqa_rad-{text_value(record.get('qid'), missing='no_id')}",
        image=text_value(record.get("image_name"), missing="no_image"),
        split=split,
        question=text_value(record.get("question"), missing="no_question"),
        answer=text_value(record.get("answer"), missing="no_answer"),
        answer_type=_answer_type(record.get("answer_type")),
        question_type=optional_text(record.get("question_type")),
        link=link,
    )


def _answer_type(value) -> str:
    """VQA-RAD has `"CLOSED "` with a blank."""
    kind = value.strip().lower() if isinstance(value, str) else value
    if kind not in ANSWER_TYPES:
        raise BadRecord("bad_answer_type", value)
    return kind


def _links(release: Path) -> dict[tuple[str, str], str]:
    """Image and question, in any of its wordings, to the link of the official release."""
    links = defaultdict(set)
    for _, record in read_json_records(release, known_by="question"):
        if isinstance(record, dict):
            for key in ("question", "question_rephrase", "question_frame"):
                if record.get(key) not in (None, "", "NULL"):
                    links[str(record.get("image_name")), _plain(record[key])].add(str(record.get("qid_linked_id")))
    # One wording may stand under two links; that it is one question shows in its text, see `conversations.py`.
    return {key: min(values) for key, values in links.items()}


def _pathvqa_pairs(record: dict) -> Iterator[tuple[object, object]]:
    try:
        questions, labels = record["sentf"]["pvqa"], record["labelf"]["pvqa"]
        if len(questions) != len(labels):
            raise BadRecord("questions_and_answers_differ_in_number", f"{len(questions)} and {len(labels)}")
        for question, label in zip(questions, labels):
            yield question, max(label, key=label.get)  # answers with their scores
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("malformed_entry", json.dumps(record)) from None


def _plain(text) -> str:
    return " ".join(str(text).lower().split())


def _file(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        found = f"{len(files)} ({', '.join(file.name for file in files)})" if files else "none"
        raise UserError(f"{folder} has to hold one file {pattern!r}; there is {found}. Correct data_path.")
    return files[0]

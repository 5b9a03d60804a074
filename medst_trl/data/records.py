# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a reader yields: light records that name their images but do not touch them, and what had to be set aside."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    Messages about some images.

    Attributes:
        id (`str`): Unique in its source.
        images (`tuple[str, ...]`): File names inside the image folder, in the order of the image parts.
        messages (`list[dict]`): In the form of `schema.message`; empty for images without words.
        split (`str`): `"train"` or `"validation"`, as the source says.
    """

    id: str
    images: tuple[str, ...]
    messages: list[dict]
    split: str = "train"


@dataclass(frozen=True, slots=True)
class Question:
    """
    One question about one image, with its answer.

    Attributes:
        id (`str`): Unique in its source.
        image (`str`): File name inside the image folder.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        question, answer (`str`): Without blanks around them, otherwise as the source has them.
        answer_type (`str`): `"open"` or `"closed"`.
        question_type (`str` or `None`): In the source's words.
        link (`str` or `None`): Shared by the wordings of one question.
    """

    id: str
    image: str
    split: str
    question: str
    answer: str
    answer_type: str
    question_type: str | None = None
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line of `rejected.jsonl`: which record was set aside, one word why, and the value that is to blame."""

    id: str
    reason: str
    value: Any = None

    def as_row(self) -> dict:
        value = self.value if isinstance(self.value, str | int | float | bool | None) else repr(self.value)
        if isinstance(value, str):
            value = printable(value[:200])
        return {"id": printable(self.id), "reason": self.reason, "value": value}


@dataclass
class Source:
    """
    Everything a reader found.

    Attributes:
        name (`str`): Opens the ids of what is made of it.
        image_folder (`Path` or `None`): Where the images lie; no image may lie outside.
        conversations, questions, rejected: See the classes.
        counts (`dict[str, int]`): What else should be told, such as questions in other languages.
    """

    name: str
    image_folder: Path | None = None
    conversations: list[Conversation] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def first(self, number: int | None) -> "Source":
        """The first so many conversations, and questions about the first so many images of each split. None: all."""
        if number is None:
            return self
        images: dict[str, dict[str, None]] = {}
        for question in self.questions:
            of_split = images.setdefault(question.split, {})
            if len(of_split) < number:
                of_split[question.image] = None
        questions = [question for question in self.questions if question.image in images[question.split]]
        return replace(self, conversations=self.conversations[:number], questions=questions)


class BadRecord(ValueError):
    """A record that cannot be used; becomes a [`Rejected`]."""

    def __init__(self, reason: str, value: Any = None):
        super().__init__(reason)
        self.reason, self.value = reason, value


def text_value(value: Any, missing: str) -> str:
    """
    The text of a field, numbers as text (VQA-RAD answers `4`), without blanks around it.

    Raises:
        BadRecord: `missing` where there is none, `not_text` for a list or the like, `bad_unicode` for half a
        character.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise BadRecord("not_text", value)
    text = "" if value is None else str(value).strip()
    if not text:
        raise BadRecord(missing, value)
    if printable(text) != text:
        raise BadRecord("bad_unicode", text)
    return text


def optional_text(value: Any) -> str | None:
    """[`text_value`] of a field that may be missing."""
    return None if value is None or value == "" else text_value(value, missing="not_text")


def printable(text: str) -> str:
    """The text with `?` for what UTF-8 cannot hold, so that it can be written to a file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def published_id(name: str, images: tuple[str, ...]) -> str:
    """
    A record's id as it may be published: its own, unless that tells the name of a file.

    An id with a path in it, with the suffix of an image, or with the name of one of its images becomes `id-` and the
    first 16 hexadecimal digits of its SHA-256: file names often hold names or numbers of patients. Who has the source
    can find the record again by the same rule.
    """
    from PIL import Image

    suffixes = {*Image.registered_extensions(), ".dcm", ".dicom", ".ima"}
    stems = {PurePosixPath(image.replace("\\", "/")).name.split(".")[0] for image in images}
    tells_a_file = (
        "/" in name
        or "\\" in name
        or PurePosixPath(name).suffix.lower() in suffixes
        or any(stem == name or (len(stem) > 3 and stem in name) for stem in stems)
    )
    return "id-" + hashlib.sha256(name.encode()).hexdigest()[:16] if tells_a_file else name

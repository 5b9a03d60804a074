# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A source: how raw files become records.

A source registers itself from one file (`sources/` has the built-in ones), and appears in `medst prepare --help`, in
recipes, in the plan of a run and in the cards of what is published:

```python
@documented
@dataclass
class MyHospitalSettings:
    '''
    Settings of the source `my_hospital`.

    Args:
        ward (`str`, *optional*, defaults to `"all"`):
            Use the reports of this ward only.
    '''

    ward: str = "all"


def read_reports(path: Path, image_folder: Path, ward: str) -> Records:
    records = Records("my_hospital", image_folder)
    ...
    return records


SOURCES.register(
    Source(
        name="my_hospital",
        summary="a directory of reports (`*.json`) with their images",
        read=lambda request: read_reports(request.data_path, request.image_folder, request.settings.ward),
        settings=MyHospitalSettings,
        card=SourceCard("reports of my hospital"),
    )
)
```
"""

import hashlib
import re
from ast import literal_eval
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import count
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean
from medst_trl.base.registry import Registry


QUESTION_COLUMNS = ("id", "image", "question", "answer", "split", "answer_type", "question_type", "link")
# Names of splits in tables, and in the names of files, where `datasets` recognizes most of them, too.
SPLIT_NAMES = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("validation", "valid", "validate", "val", "dev", "development"), "validation")
    | dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
)
_ANSWER_TYPE = re.compile(r"\s*(open|closed?)([ _-]?ended)?\s*", re.IGNORECASE)
# What programs write for a missing or infinite number, and errors of spreadsheets. "None" and "NA" are answers.
_NO_VALUE = re.compile(r"|[+-]?(nan|inf|infinity)|<NA>|NaT|null|#N/?[AV]|#\w+(/0)?[!?]", re.IGNORECASE)
DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}
NIFTI_SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    Messages about some images.

    Attributes:
        id (`str`): Unique in its source.
        images (`tuple[str, ...]`): File names inside the directory of images, in the order of the image parts.
        messages (`list[dict]`): Made by `schema.message`; empty for unlabeled images.
        split (`str`): `"train"` or `"validation"`, as the source has it.
        group (`str` or `None`): What must stay in one split, such as a patient, as the source names it.
    """

    id: str
    images: tuple[str, ...]
    messages: list[dict]
    split: str = "train"
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """
    One question about an image, with its answer.

    Attributes:
        id (`str`): Unique in its source.
        image (`str`): File name inside the directory of images.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        question, answer (`str`): Without surrounding whitespace, otherwise as the source has them.
        answer_type (`str`): `"open"` or `"closed"`.
        question_type (`str` or `None`): As the source names it.
        link (`str` or `None`): Shared by the paraphrases of one question.
        more_images (`tuple[str, ...]`): Further images of a question about several; not in a benchmark.
        group (`str` or `None`): As in [`Conversation`].
    """

    id: str
    image: str
    split: str
    question: str
    answer: str
    answer_type: str
    question_type: str | None = None
    link: str | None = None
    more_images: tuple[str, ...] = ()
    group: str | None = None

    @classmethod
    def from_row(cls, name: str, row: Mapping[str, Any]) -> "Question":
        """
        Make a question of the row of a table.

        Args:
            name (`str`):
                Its id.
            row (`dict`):
                `image` (see [`image_cell`]), `question`, `answer`; optionally `split` (default train), `answer_type`
                (default closed for yes and no), `question_type` and `link`.

        Raises:
            BadRecord: `no_image`, `several_test_images`, `no_question`, `no_answer`, `bad_split`, `bad_answer_type`,
                `not_text`, `bad_unicode`.
        """
        image, *more = image_cell(row.get("image"))
        question, answer = text_value(row.get("question"), missing="no_question"), answer_text(row.get("answer"))
        given_split, given_type = row.get("split"), row.get("answer_type")
        split = "train" if is_missing(given_split) else SPLIT_NAMES.get(str(given_split).strip().casefold())
        if split is None:
            raise BadRecord("bad_split", given_split)
        if more and split == "test":  # a benchmark has one image per row
            raise BadRecord("several_test_images", row.get("image"))
        answer_type = guess_answer_type(answer) if is_missing(given_type) else read_answer_type(given_type)
        question_type, link = optional_text(row.get("question_type")), optional_text(row.get("link"))
        return cls(name, image, split, question, answer, answer_type, question_type, link, tuple(more))

    @property
    def images(self) -> tuple[str, ...]:
        """Return its images, as those of a [`Conversation`]."""
        return (self.image, *self.more_images)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row of `rejected.jsonl`: the record's id, the reason in one word, and the offending value."""

    id: str
    reason: str
    value: Any = None

    def as_row(self) -> dict:
        is_plain = isinstance(self.value, str | int | None) or (isinstance(self.value, float) and isfinite(self.value))
        value = self.value if is_plain else repr(self.value)  # JSON has no NaN
        if isinstance(value, str):
            value = printable(value[:200])
        return {"id": printable(self.id), "reason": self.reason, "value": value}


def list_reasons(counts: Mapping[str, int]) -> str:
    """Format counts by reason for a message: `3 no_image, 1 missing`."""
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.items())


class BadRecord(ValueError):
    """A record that cannot be used; becomes a [`Rejected`]."""

    def __init__(self, reason: str, value: Any = None):
        super().__init__(reason)
        self.reason, self.value = reason, value


class ImageReader(Protocol):
    """
    Reads images by name, each twice: to identify it, and later (`identify=False`) for the bytes to store. `load`
    returns a [`~medst_trl.data.images.StoredImage`].
    """

    def load(self, name: str, identify: bool = True) -> Any: ...


@dataclass
class Records:
    """
    The records that a source has read. They name their images but do not open them.

    Attributes:
        name (`str`): Prefix of the ids that are made for questions.
        image_folder (`Path` or `None`): Directory of the images; no image may be outside. None: they are no files.
        images ([`ImageReader`] or `None`): Reads the images if they are no files in `image_folder`.
        conversations, questions, rejected: See the classes.
        counts (`dict`): What else to report: numbers, such as questions in other languages, and notes about the file.
        group_column (`str` or `None`): Column or key with the group of a record, such as a patient.
    """

    name: str
    image_folder: Path | None = None
    images: ImageReader | None = None
    conversations: list[Conversation] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    counts: dict[str, int | str] = field(default_factory=dict)
    group_column: str | None = None

    def __iter__(self) -> Iterator[Conversation | Question]:
        """Iterate over all conversations, then all questions. Unlabeled images are alone, also those of one row."""
        for conversation in self.conversations:
            if conversation.messages or len(conversation.images) < 2:
                yield conversation
            else:
                yield from (replace(conversation, images=(name,)) for name in conversation.images)
        yield from self.questions

    def collect(
        self,
        items: Iterable[tuple[int, dict | Rejected]],
        make: Callable[[str, dict], Conversation | Question | None],
        default_id: Callable[[int, dict], str],
        own_id: Callable[[dict], Any] | None = None,
        used: Collection[str] | None = None,
        ids_may_repeat: bool = False,
    ) -> None:
        """
        Add what `make` returns for each item. An item that raises [`BadRecord`] or repeats an id is rejected.

        Args:
            items (iterable of `(position, dict)`):
                As `reading.py` yields them. A [`Rejected`] among them is added to the rejected records.
            make (`Callable`):
                Takes the id and the record, and returns a conversation or a question, or None to skip the record.
            default_id (`Callable`):
                Takes the position and the record, and returns the id of a record without its own.
            own_id (`Callable`, *optional*):
                Takes the record and returns its own id, if it has one.
            used (collection of `str`, *optional*):
                Names of the columns that `make` uses. The counts name the others that have values.
            ids_may_repeat (`bool`, *optional*, defaults to `False`):
                Whether a record that repeats an id gets another one (`<id>-2`), unless it is a copy.
        """
        taken: dict[str, set[int]] = {record.id: set() for record in self}  # by id, hashes of the records that had it
        unused: dict[str, None] = {}
        group_column = self.group_column and column_name(self.group_column)
        known = {*(used or ()), group_column}
        for position, item in items:
            if isinstance(item, Rejected):
                self.rejected.append(item)
                continue
            name = default_id(position, item)
            if used is not None:
                unused |= dict.fromkeys(key for key in item if key not in known and not is_missing(item[key]))
            try:
                name = optional_text(own_id(item)) or name if own_id is not None else name
                if name in taken and not ids_may_repeat:
                    raise BadRecord("duplicate_id", name)
                record = make(name, item)
                if record is not None and group_column:
                    group = next((value for key, value in item.items() if column_name(key) == group_column), None)
                    record = replace(record, group=_group_text(group))
                if record is not None and ids_may_repeat:
                    record = _with_free_id(record, taken)
                if record is not None and record.id in taken:
                    raise BadRecord("duplicate_id", record.id)
            except BadRecord as bad:
                self.rejected.append(Rejected(name, bad.reason, bad.value))
                continue
            if record is not None:
                taken[record.id] = {hash(repr(record))} if ids_may_repeat else set()
                (self.questions if isinstance(record, Question) else self.conversations).append(record)
        if unused:
            self.counts["columns_not_used"] = ", ".join(unused)

    @property
    def image_names(self) -> list[str]:
        """Return the names of the images of all records, with repetitions."""
        return [name for record in self for name in record.images]

    def published_id(self, name: str, images: tuple[str, ...]) -> str:
        """Return [`published_id`] of a record or link. Without image files there are no file names to reveal."""
        return published_id(name, images) if self.image_folder else name

    def first(self, number: int | None) -> "Records":
        """Return the first `number` conversations, and questions about the first `number` images per split."""
        if number is None:
            return self
        images: dict[str, set[str]] = defaultdict(set)
        for question in self.questions:
            if len(images[question.split]) < number:
                images[question.split].add(question.image)
        questions = [question for question in self.questions if question.image in images[question.split]]
        return replace(self, conversations=self.conversations[:number], questions=questions)


@dataclass(frozen=True)
class SourceCard:
    """
    What the card of a published dataset or model says about a source.

    Args:
        title (`str`):
            What it is called.
        homepage (`str`, *optional*):
            Where its authors publish it.
        licence (`str`, *optional*):
            Its license, as its authors state it.
        citation (`str`, *optional*):
            The paper to cite.
        synthetic (`bool`, *optional*, defaults to `False`):
            Whether the images show no patient.
    """

    title: str
    homepage: str | None = None
    licence: str | None = None
    citation: str | None = None
    synthetic: bool = False


@dataclass(frozen=True)
class SourceRequest:
    """
    What `medst prepare` asks a source to read.

    Args:
        data_path (`pathlib.Path`, *optional*):
            File or directory of the data. None for a source that needs none.
        image_folder (`pathlib.Path`, *optional*):
            Directory that the names of images are relative to.
        settings (`Any`, *optional*):
            The source's own settings, an object of its `settings` class.
        seed (`int`, *optional*, defaults to `0`):
            Seed for everything that the source samples.
        follow_symlinks (`bool`, *optional*, defaults to `False`):
            Whether to search directories behind symbolic links.
        group_column (`str`, *optional*):
            Column or key with the group of a record, see [`Records`].
    """

    data_path: Path | None = None
    image_folder: Path | None = None
    settings: Any = None
    seed: int = 0
    follow_symlinks: bool = False
    group_column: str | None = None


@dataclass(frozen=True)
class Source:
    """
    A source of data for `medst prepare`.

    Args:
        name (`str`):
            Its value of `--source`.
        summary (`str`):
            What it reads, in a line for `medst prepare --help`.
        read (`Callable`):
            Takes a [`SourceRequest`] and returns the [`Records`].
        card ([`SourceCard`]):
            What cards say about it.
        settings (`type`, *optional*):
            A dataclass of settings that only this source has, see [`~medst_trl.base.settings.documented`].
        count (`Callable`, *optional*):
            `count(settings, kind, split)` returns the number of rows, before a validation split, for the plan of a
            run; `None` if it cannot be known before reading.
        needs_data (`bool`, *optional*, defaults to `True`):
            Whether it reads `data_path`.
        reads_parquet (`bool`, *optional*, defaults to `False`):
            Whether Parquet files and Hub ids as `data_path` are read by [`~medst_trl.data.parquet.read_parquet`]
            instead.
        reads_folders (`bool`, *optional*, defaults to `False`):
            Whether a directory as `data_path` is the directory of the images, whatever `image_folder` is.
        data_files (`tuple` of `str`, *optional*):
            Patterns of the files, besides images, that it reads in a directory as `data_path`. By default all files
            there are compared on a re-run.
        image_folders (`tuple` of `str`, *optional*):
            Directories beside the data where images are searched first, unless `--image_folder` is given.
        files (`tuple` of `str`, *optional*):
            Names of its settings that are paths. They must exist, and are compared by content on a re-run.
    """

    name: str
    summary: str
    read: Callable[[SourceRequest], Records]
    card: SourceCard
    settings: type | None = None
    count: Callable[[Any, str, str], int | None] | None = None
    needs_data: bool = True
    reads_parquet: bool = False
    reads_folders: bool = False
    data_files: tuple[str, ...] | None = None
    image_folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def settings_from(self, values: Mapping[str, Any]) -> Any:
        """Return its settings with the `values` (of a recipe) that they have; None for a source without settings."""
        if self.settings is None:
            return None
        return self.settings(**{item.name: values[item.name] for item in fields(self.settings) if item.name in values})


SOURCES: Registry[Source] = Registry(
    "source",
    ("medst_trl.data.sources", "medst_trl.demo.phantoms"),
    ("summary", "read", "card"),
    order=lambda sources: sorted(sources, key=lambda source: source.name),
)


def column_name(name: Any) -> str:
    """Return the name of a column without surrounding blanks, in lower case and with `_` inside: `answer_type`."""
    return re.sub(r"[\s_-]+", "_", str(name).strip().casefold())


def is_missing(value: Any) -> bool:
    """Whether a field holds no value: null, blank, not a finite number, or text that stands for one of these."""
    if isinstance(value, float):
        return not isfinite(value)
    return value is None or (isinstance(value, str) and _NO_VALUE.fullmatch(value.strip()) is not None)


def text_value(value: Any, missing: str) -> str:
    """
    Return the text of a field, without surrounding whitespace. Numbers become text (VQA-RAD answers `4`).

    Raises:
        BadRecord: `missing` if there is none (see [`is_missing`]), `not_text` for a list or another object,
        `bad_unicode` for a lone surrogate.
    """
    if is_missing(value):
        raise BadRecord(missing, value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecord("not_text", value)
    text = str(value).strip()
    if printable(text) != text:
        raise BadRecord("bad_unicode", text)
    return text


def _group_text(value: Any) -> str | None:
    """Return the name of a group. Spreadsheets write `17.0` for a number. Errors do not quote it, it may be a name."""
    try:
        return optional_text(int(value) if isinstance(value, float) and value.is_integer() else value)
    except BadRecord:
        raise BadRecord("bad_group") from None


def answer_text(value: Any, missing: str = "no_answer") -> str:
    """Return [`text_value`] of an answer, which may be a boolean: `yes` or `no`."""
    return text_value(("no", "yes")[value] if isinstance(value, bool) else value, missing)


def optional_text(value: Any) -> str | None:
    """Return [`text_value`] of a field that may be missing."""
    return None if is_missing(value) else text_value(value, missing="not_text")


def image_cell(value: Any) -> tuple[str, ...]:
    """
    Return the file names in the field `image` of a table: one, several separated by `|`, or a list. In a text file, a
    list is JSON or as Python writes it.

    Raises:
        BadRecord: `no_image` if there is none, or see [`text_value`].
    """
    if isinstance(value, str) and value.strip().startswith("["):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = literal_eval(value.strip())
    if isinstance(value, str):
        value = [name for name in value.split("|") if name.strip()]
    names = value if isinstance(value, list | tuple) else [value]
    return tuple(text_value(name, missing="no_image") for name in names or [None])


def question_or_image(name: str, row: Mapping[str, Any]) -> Question | Conversation:
    """Make a question of the row of a table, or an unlabeled image of a row without question and answer."""
    if is_missing(row.get("question")) and is_missing(row.get("answer")):
        return Conversation(name, image_cell(row.get("image")), [])
    return Question.from_row(name, row)


def read_answer_type(value: Any) -> str:
    """Return the answer type that a source gives, such as `CLOSED` or `open-ended`."""
    if not isinstance(value, str) or not (match := _ANSWER_TYPE.fullmatch(value)):
        raise BadRecord("bad_answer_type", value)
    return "open" if match[1].lower() == "open" else "closed"


def guess_answer_type(answer: str) -> str:
    """Return the answer type if none is given: `"closed"` for yes and no, `"open"` otherwise."""
    return "closed" if answer.lower() in ("yes", "no") else "open"


def printable(text: str) -> str:
    """Replace what UTF-8 cannot encode by `?`, so that the text can be written to a file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def published_id(name: str, images: tuple[str, ...]) -> str:
    """
    Return a record's id as it may be published: its own, unless that reveals the name of a file.

    An id with a path in it, with the suffix of an image, or with the name of one of its images becomes `id-` and the
    first 16 hexadecimal digits of its SHA-256: file names often hold names or numbers of patients. Anyone who has the
    source data can find the record again with the same rule.
    """
    from PIL import Image

    suffixes = {*Image.registered_extensions(), *DICOM_SUFFIXES, *NIFTI_SUFFIXES, ".gz"}
    stems = {PurePosixPath(image.replace("\\", "/")).name.split(".")[0] for image in images}
    reveals_a_file = (
        "/" in name
        or "\\" in name
        or PurePosixPath(name.partition("#")[0]).suffix.lower() in suffixes
        or any(stem == name or (len(stem) > 3 and stem in name) for stem in stems)
    )
    return "id-" + hashlib.sha256(name.encode()).hexdigest()[:16] if reveals_a_file else name


def _with_free_id(record: Conversation, taken: Mapping[str, set[int]]) -> Conversation:
    """Return a record under an id that is not taken. A copy of a record that had its id is unchanged."""
    content, same = hash(repr(record)), taken.get(record.id, ())
    if not same or content in same:
        return record
    same.add(content)
    others = (f"{record.id}-{number}" for number in count(len(same)))
    return replace(record, id=next(name for name in others if name not in taken))


def check_image_folder(directory: Path) -> None:
    """Refuse a directory of images that does not exist, with those nearby that have its name."""
    if not directory.is_dir():
        near = did_you_mean(directory, lambda other: other.name == directory.name)
        raise UserError(f"image_folder is not a directory: {directory}.{near} Correct the path to the images.")

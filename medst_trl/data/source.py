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

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean
from medst_trl.base.registry import Registry

from . import cells
from .cells import BadRecord
from .image_settings import ImageSettings
from .schema import QUESTION_FIELDS


QUESTION_COLUMNS = (*QUESTION_FIELDS, "image", "split")


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    Messages about some images.

    Attributes:
        id (`str`): Unique in its source.
        images (`tuple[str, ...]`): File names inside the directory of images, in the order of the image parts.
        messages (`list[dict]`): Made by `schema.message`; empty for unlabeled images.
        split (`str`): `"train"` or `"validation"`, as the source has it; for unlabeled images also `"test"`.
        group (`str` or `None`): What must stay in one split, such as a patient, as the source names it.
        image_ids (`tuple[str, ...]`): See [`~medst_trl.data.images.image_id`]. Filled in by `assemble`.
        split_key (`str`): The same for all records that no split may divide. Filled in by `assemble`.
    """

    id: str
    images: tuple[str, ...]
    messages: list[dict]
    split: str = "train"
    group: str | None = None
    image_ids: tuple[str, ...] = ()
    split_key: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """
    One question about an image or several, with its answer. In a benchmark, it has one image.

    Attributes:
        id (`str`): Unique in its source.
        images (`tuple[str, ...]`): File names inside the directory of images.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        question, answer (`str`): Without surrounding whitespace, otherwise as the source has them.
        answer_type (`str`): `"open"` or `"closed"`.
        question_type (`str` or `None`): As the source names it.
        link (`str` or `None`): Shared by the paraphrases of one question.
        group, image_ids, split_key: As in [`Conversation`].
    """

    id: str
    images: tuple[str, ...]
    split: str
    question: str
    answer: str
    answer_type: str
    question_type: str | None = None
    link: str | None = None
    group: str | None = None
    image_ids: tuple[str, ...] = ()
    split_key: str = ""

    @classmethod
    def from_row(cls, name: str, row: Mapping[str, Any]) -> "Question":
        """
        Make a question of the row of a table.

        Args:
            name (`str`):
                Its id.
            row (`dict`):
                `image` (see [`~medst_trl.data.cells.image_cell`]), `question`, `answer`; optionally `split` (default
                train), `answer_type` (default closed for yes and no), `question_type` and `link`.

        Raises:
            BadRecord: `no_image`, `no_question`, `no_answer`, `bad_split`, `bad_answer_type`,
                `not_text`, `bad_unicode`.
        """
        images = cells.image_cell(row.get("image"))
        question = cells.text_value(row.get("question"), missing="no_question")
        answer, split = cells.answer_text(row.get("answer")), cells.read_split(row.get("split"))
        if not answer.strip(" -–—./?_"):
            raise BadRecord("no_answer", answer)
        answer_type = cells.read_answer_type(row.get("answer_type"), answer)
        question_type, link = (cells.optional_text(row.get(name)) for name in ("question_type", "link"))
        return cls(name, images, split, question, answer, answer_type, question_type, link)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row of `rejected.jsonl`: the record's id, the reason in one word, and the offending value."""

    id: str
    reason: str
    value: Any = None

    def as_row(self) -> dict:
        is_number = isinstance(self.value, int | None) or (isinstance(self.value, float) and isfinite(self.value))
        value = self.value if is_number else cells.printable(str(self.value)[:200])  # JSON has no NaN
        return {"id": cells.printable(self.id), "reason": self.reason, "value": value}


def list_reasons(counts: Mapping[str, int]) -> str:
    """Format counts by reason for a message: `3 no_image, 1 missing`."""
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.items())


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
        prefix: str = "row-",
        id_key: str = "id",
        used: Collection[str] = (),
        keep_first: bool = False,
    ) -> None:
        """
        Add what `make` returns for each item. An item that raises [`BadRecord`] or is a copy is rejected, also if only
        its own id is that of another record: such a record gets another one (`<id>-2`).

        Args:
            items (iterable of `(position, dict)`):
                As `reading.py` yields them. A [`Rejected`] among them is added to the rejected records.
            make (`Callable`):
                Takes the id and the record, and returns a conversation or a question, or None to skip the record.
            prefix (`str`, *optional*, defaults to `"row-"`):
                Prefix of the ids of records without their own, before their positions.
            id_key (`str`, *optional*, defaults to `"id"`):
                Key of a record's own id.
            used (collection of `str`, *optional*):
                Names of the columns that `make` uses. If given, the counts name the others that have values.
            keep_first (`bool`, *optional*, defaults to `False`):
                Whether a record is also rejected if it is no copy, but repeats an id.
        """
        taken, seen, unused = {record.id: 1 for record in self}, set(), {}
        group_column = self.group_column and cells.column_name(self.group_column)
        known = {"", *used, group_column}
        for position, item in items:
            if isinstance(item, Rejected):
                self.rejected.append(item)
                continue
            name = f"{prefix}{position:06d}"
            if used:
                unused |= dict.fromkeys(key for key in item if key not in known and not cells.is_missing(item[key]))
            try:
                name = cells.optional_text(item.get(id_key)) or name
                if (record := make(name, item)) is None:
                    continue
                if group_column:
                    record = replace(record, group=cells.group_text(item.get(group_column)))
                if (content := hash(repr(record))) in seen or (keep_first and record.id in taken):
                    raise BadRecord("duplicate_id", record.id)
            except BadRecord as bad:
                self.rejected.append(Rejected(name, bad.reason, bad.value))
                continue
            seen.add(content)
            record = replace(record, id=free_id(record.id, taken))
            (self.questions if isinstance(record, Question) else self.conversations).append(record)
        if unused:
            self.counts["columns_not_used"] = ", ".join(unused)

    @property
    def image_names(self) -> list[str]:
        """Return the names of the images of all records, with repetitions."""
        return [name for record in self for name in record.images]

    def first(self, number: int | None) -> "Records":
        """Return the first `number` conversations, and questions about the first `number` images per split."""
        if number is None:
            return self
        images: dict[str, set[str]] = defaultdict(set)
        for question in self.questions:
            if len(images[question.split]) < number:
                images[question.split].add(question.images[0])
        questions = [question for question in self.questions if question.images[0] in images[question.split]]
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
        images ([`ImageSettings`], *optional*):
            How to read the images.
        group_column (`str`, *optional*):
            Column or key with the group of a record, see [`Records`].
    """

    data_path: Path | None = None
    image_folder: Path | None = None
    settings: Any = None
    seed: int = 0
    images: ImageSettings = field(default_factory=ImageSettings)
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
            Whether Parquet files and Hub ids as `data_path` are read by [`~medst_trl.data.loading.read_parquet`]
            instead.
        data_files (`tuple` of `str`, *optional*):
            Patterns of the files, besides images, that it reads in a directory as `data_path`. By default all files
            there are compared on a re-run.
        image_folders (`tuple` of `str`, *optional*):
            Directories beside the data where images are searched first, unless `--image_folder` is given.
    """

    name: str
    summary: str
    read: Callable[[SourceRequest], Records]
    card: SourceCard
    settings: type | None = None
    count: Callable[[Any, str, str], int | None] | None = None
    needs_data: bool = True
    reads_parquet: bool = False
    data_files: tuple[str, ...] | None = None
    image_folders: tuple[str, ...] = ()

    def settings_from(self, values: Mapping[str, Any]) -> Any:
        """Return its settings with the `values` (of a recipe) that they have; None for a source without settings."""
        names = [item.name for item in fields(self.settings)] if self.settings else ()
        return self.settings and self.settings(**{name: values[name] for name in names if name in values})


SOURCES: Registry[Source] = Registry(
    "source",
    ("medst_trl.data.sources", "medst_trl.demo.phantoms"),
    ("summary", "read", "card"),
    order=lambda sources: sorted(sources, key=lambda source: source.name),
)


def question_or_image(name: str, row: Mapping[str, Any]) -> Question | Conversation:
    """
    Make a question of the row of a table, or an unlabeled image of a row without question and answer. Unlabeled images
    of test or validation are in no dataset, see [`~medst_trl.data.assemble.assemble`].
    """
    if not (cells.is_missing(row.get("question")) and cells.is_missing(row.get("answer"))):
        return Question.from_row(name, row)
    return Conversation(name, cells.image_cell(row.get("image")), [], cells.read_split(row.get("split")))


def free_id(name: str, taken: dict[str, int]) -> str:
    """Return an id, or if it is taken `<id>-2` and so on, and count it as taken."""
    free = name
    while free in taken:
        taken[name] += 1
        free = f"{name}-{taken[name]}"
    taken[free] = 1
    return free


def check_image_folder(directory: Path) -> None:
    """Refuse a directory of images that does not exist, with those nearby that have its name."""
    if not directory.is_dir():
        near = did_you_mean(directory, lambda other: other.name == directory.name)
        raise UserError(f"image_folder is not a directory: {directory}.{near} Correct the path to the images.")

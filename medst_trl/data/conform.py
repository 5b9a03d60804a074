# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Give other people's datasets our columns: TRL's pairs and conversations, questions one per row, texts as strings.

Images are neither decoded nor copied. If a column has another form, the texts of all rows are read in Python.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, chain, takewhile
from math import inf
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.processes import rank

from .cells import answer_text, group_text, is_missing, optional_text
from .groups import GROUP_ID, GroupIds
from .schema import KINDS, QUESTION_FIELDS, Kind, features_of, image_part, text_of, text_part
from .source import Question, free_id


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# Columns from which a missing column can be computed, if a dataset has all of them.
_MADE_OF = {
    "id": (),
    "image_ids": (),
    "image_id": (),
    "images": ("image",),
    "prompt": ("chosen", "rejected"),
    "questions": ("question", "answer"),
}
_QUESTION_INPUT = (*QUESTION_FIELDS, "question_id")
# Of a text that is not a message, by column.
_ROLE_OF = {"prompt": "user"} | dict.fromkeys(("chosen", "rejected"), "assistant")
_ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
_IMAGE_ID = re.compile("[0-9a-f]{64}")


def missing_columns(columns: Collection[str], kind: str) -> list[str]:
    """Return the columns of a kind that a dataset with these columns lacks and that nothing can fill in."""
    own = KINDS.get(kind)
    made = {name for name, sources in _MADE_OF.items() if set(sources) <= set(columns)}
    return [name for name in own.columns if not (name in columns or name in own.optional or name in made)]


def check_missing(columns: Collection[str], kind: str, required: Collection[str] = ()) -> None:
    """Raise a `UserError` that names the [`missing_columns`], and the `required` ones that are missing."""
    if missing := missing_columns(columns, kind) or [name for name in required if name not in columns]:
        raise UserError(
            f"The dataset lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {kind} data; it "
            f"has {', '.join(columns) or 'none'}. `medst {KINDS.get(kind).maker}` makes such datasets; docs/data.md "
            "shows how to use your own, and what `medst prepare` reads."
        )


def conform(dataset: "Dataset", kind: str) -> "Dataset":
    """
    Return the same rows with all columns of a kind.

    Accepted are other types for the same content (large strings, extra keys in messages), message content as strings,
    a column `image` in place of `images`, pairs whose prompt is the beginning of both answers, and a benchmark with
    one question per row (`image`, `question`, `answer`). A missing `id` becomes the number of the row, and a repeated
    one gets a suffix. Image ids that are not hashes of pixels become null, see
    [`~medst_trl.data.overlap.with_image_ids`], and each `group_id` that is not hashed is hashed with the user's salt.
    Rows whose texts cannot be used keep none, so that the stages reject them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset. Further columns are kept.
        kind (`str`):
            A name in `KINDS`.

    Raises:
        UserError: if required columns are missing, have another type, or none of the rows can be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset, DatasetInfo, Features
    from datasets.fingerprint import Hasher
    from datasets.table import InMemoryTable, concat_tables

    check_missing(dataset.features, kind)
    given, own, table = dataset.features, KINDS.get(kind), dataset.data
    wanted = features_of(kind, extras=given)
    made, columns = {name: [value] * len(table) for name, value in own.optional.items() if name not in given}, {}
    if not _is_usable(dataset, own, {name: feature for name, feature in wanted.items() if name not in made}):
        column = "images" if "images" in wanted else "image"
        columns[column] = _images_of(table.column(column if column in given else "image"), wanted[column], kind)
        counts = pc.list_value_length(columns[column]).to_pylist() if column == "images" else [1] * len(table)
        made = _read_rows(table, counts, own, [name for name in wanted if name != column])
    elif not made:
        return dataset
    columns |= {name: pa.array(values, wanted.arrow_schema.field(name).type) for name, values in made.items()}
    kept = table.select([name for name in given if not (name in columns or (name == "image" and "images" in columns))])
    features = {name: given[name] for name in kept.column_names} | {name: wanted[name] for name in columns}
    made = InMemoryTable(pa.table(columns))
    return Dataset(
        concat_tables([kept, made], axis=1) if kept.num_columns else made,
        info=DatasetInfo(features=Features(features)),
        split=dataset.split,
        indices_table=dataset._indices,  # of selected rows: flattening them would copy the images
        fingerprint=Hasher.hash([dataset._fingerprint, kind]),
    )


def _is_usable(dataset: "Dataset", kind: Kind, wanted: Mapping[str, Any]) -> bool:
    """Whether a dataset has columns of these features, with values that a stage can use as they are."""
    import pyarrow.compute as pc

    if any(dataset.features.get(name) != feature for name, feature in wanted.items()):
        return False
    columns, reader = {name: dataset.data.column(name) for name in wanted}, RowReader(kind, ())
    if "id" in columns and pc.count_distinct(columns["id"]).as_py() < len(dataset.data):
        return False
    lists = [name for name in kind.columns if isinstance(kind.columns[name], list) and name != "image_ids"]
    if any(columns[name].null_count for name in lists if name in columns):
        return False
    checked = [name for name in ("image_id", "image_ids", "group_id", *kind.extras) if name in columns]
    with suppress(ValueError):
        return all(reader.value(name, one) == one for name in checked for one in columns[name].to_pylist())
    return False


def report_unusable(problems: Sequence[str], used: int, name: str) -> None:
    """
    Print how many rows of a dataset cannot be used, with the first nine reasons.

    Raises:
        UserError: if none is used.
    """
    first = "; ".join(problems[:9])
    if problems and not used:
        raise UserError(f"{name}: none of its {len(problems)} rows can be used. The first: {first}")
    if problems and rank() == 0:
        print(f"{name}: {len(problems)} of {len(problems) + used} rows cannot be used. The first: {first}")


class RowReader:
    """
    Reads records of other people's data as rows of a kind, and counts those that cannot be used.

    Args:
        kind ([`Kind`]):
            The kind.
        names (sequence of `str`):
            The columns to make, without those of images.

    Attributes:
        problems (`list[str]`):
            Why records, or questions of a benchmark, cannot be used.
        used (`int`):
            The number of those that can be used.
    """

    def __init__(self, kind: Kind, names: Collection[str]):
        self.kind, self.names, self.group_ids = kind, names, GroupIds()
        self.texts = [name for name in messages_of(kind) if name in names]
        self.problems, self.used, self._taken = [], 0, {}

    @contextmanager
    def counted(self, where: str) -> Iterator[None]:
        """Count what is raised for a record as a problem, and suppress it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # records of another form raise almost anything
            self.problems.append(f"{where}: {error}")

    def read(self, record: Mapping[str, Any], images: int, place: int, where: str) -> dict[str, Any]:
        """
        Return the columns to make of a record.

        Args:
            record (`dict`): The record.
            images (`int`): The number of its images.
            place (`int`): Its number in the dataset, for a missing id.
            where (`str`): What messages call it.

        Raises:
            Exception: any, if it cannot be used; see [`RowReader.counted`].
        """
        row = typed_messages(record, self.texts, images) if self.texts else {}
        row |= {name: self.value(name, record.get(name)) for name in self.names if name not in (*row, "questions")}
        if "id" in row:
            row["id"] = row["id"] or str(place)
        if "questions" in self.names:
            row["questions"] = list(self._questions(record, place, where))
        self.used += len(row.get("questions", [1]))
        return row

    def value(self, name: str, value: Any) -> Any:
        """Return the value of a column without messages, see [`RowReader.read`]."""
        if name in self.kind.extras:
            number = self.kind.extras[name] if value is None else float(value)
            if not 0 <= number < inf:
                raise ValueError(f"{name} is {value}; it must be a finite number of at least 0")
            return number
        if self.kind.optional.get(name) == []:  # messages that are not used
            return []
        if name == "answers":
            if not isinstance(value, list) or len(value) < 2:
                raise ValueError("it has fewer than two answers")
            return list(map(answer_text, value))
        if name in ("image_id", "image_ids"):
            ids = value if name == "image_ids" else [value]
            are_ids = isinstance(ids, list) and all(_IMAGE_ID.fullmatch(str(one)) for one in ids)
            return value if are_ids else None
        if self.kind.columns[name] == "float64":
            return None if is_missing(value) else float(value)
        if name == "group_id":
            group = group_text(value)
            return group if GROUP_ID.fullmatch(group or "") else self.group_ids.of_key(group)
        return json.dumps(value) if isinstance(value, dict | list) else optional_text(value)

    def _questions(self, record: Mapping[str, Any], place: int, where: str) -> Iterator[dict[str, Any]]:
        """The questions of a row of a benchmark, from its list or from one question per row."""
        for number, row in enumerate(record["questions"] or () if "questions" in record else [record]):
            with self.counted(where):
                if not isinstance(row, Mapping):
                    raise TypeError("a question must be an object with the keys question and answer")
                own = next((row[name] for name in ("question_id", "id") if not is_missing(row.get(name))), None)
                own = (f"{place}-{number}" if number else place) if own is None else own
                question = Question.from_row(free_id(str(own), self._taken), row | {"image": "its", "split": "test"})
                yield {field: getattr(question, field) for field in QUESTION_FIELDS}

    def empty(self, record: Mapping[str, Any], images: int, place: int) -> dict[str, Any]:
        """Return a row without texts and answers, in place of one that cannot be used."""
        row = {name: self.kind.extras.get(name) for name in self.names} | {"id": str(record.get("id") or place)}
        row |= {name: [] for name in (*self.texts, "answers", "questions")}
        return row | {name: [{"role": "user", "content": [image_part()] * images}] for name in self.texts[:1]}


def _read_rows(table: "pa.Table", counts: Sequence[int], kind: Kind, names: Collection[str]) -> dict[str, list]:
    """Make columns of a kind from those of a dataset, row by row. `counts` are the numbers of images."""
    reader, found = RowReader(kind, names), []
    sources = {*names, *_QUESTION_INPUT, *chain.from_iterable(_MADE_OF.get(name, ()) for name in names)}
    lists = {name: table.column(name).to_pylist() for name in table.column_names if name in sources}
    for place, images in enumerate(counts):
        record = {name: values[place] for name, values in lists.items()}
        row = None
        with reader.counted(f"row {place}"):
            row = reader.read(record, images, place, f"row {place}")
        found.append(row or reader.empty(record, images, place))
    report_unusable(reader.problems, reader.used, f"The {kind.name} data")
    made, taken = {name: [row[name] for row in found] for name in names}, {}
    return {name: [free_id(one, taken) for one in values] if name == "id" else values for name, values in made.items()}


def typed_messages(record: Mapping[str, Any], names: Sequence[str], images: int) -> dict[str, list[dict]]:
    """
    Return the texts of a record as messages with typed parts.

    Args:
        record (`dict`):
            By column: messages whose content is a text or typed parts, or a text alone. Without a `prompt`, it is what
            `chosen` and `rejected` have in common.
        names (sequence of `str`):
            The columns of messages to return.
        images (`int`):
            Number of images. If no message has an image part, they come before the first user's text, as in TRL.

    Raises:
        ValueError, TypeError or AttributeError: for anything else.
    """
    row = {name: _messages(record.get(name), _ROLE_OF.get(name)) for name in names}
    if "chosen" in row:
        answers = row["chosen"], row["rejected"]
        earlier = zip(*(answer[:-1] for answer in answers))
        prompt = row["prompt"] or [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], earlier)]
        if all(answer[: len(prompt)] == prompt for answer in answers):
            answers = [answer[len(prompt) :] for answer in answers]
        row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    if empty := [name for name, messages in row.items() if not messages]:
        raise ValueError(f"{' and '.join(empty)} has no message")
    image_parts = sum(part["type"] == "image" for turns in row.values() for turn in turns for part in turn["content"])
    if image_parts not in (0, images):
        raise ValueError(f"{image_parts} image parts for {images} images")
    if images and not image_parts:
        first = next((message for message in next(iter(row.values())) if message["role"] == "user"), None)
        if first is None:
            raise ValueError("it has images and no message of a user")
        first["content"] = [image_part() for _ in range(images)] + first["content"]
    return row


def _messages(value: Any, role: str | None) -> list[dict]:
    if isinstance(value, str):
        value = [{"role": role, "content": value}] if role else json.loads(value)
    found = []
    for message in value or () if isinstance(value, list | None) else [None]:
        content = message.get("content") if isinstance(message, Mapping) else None
        role = _ROLES.get(str(message.get("role")).strip().lower()) if content is not None else None
        if role is None or not isinstance(content, str | list):
            raise ValueError("messages need a role (user, assistant, system), and content: a text or a list of parts")
        parts = [text_part(content)] if isinstance(content, str) else [_part(part) for part in content]
        if is_missing(text_of(parts)) and not (role == "user" and image_part() in parts):
            raise ValueError(f"a message of role {role} has an empty text")
        found.append({"role": role, "content": parts, "vusr": bool(message.get("vusr"))})
    return found


def _part(part: Mapping[str, Any]) -> dict:
    if part.get("type") == "image":
        return image_part()
    if part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return text_part(part["text"])
    raise ValueError(f"a part of a message has the type {part.get('type')!r}, not text or image")


def messages_of(kind: Kind) -> list[str]:
    """Return the columns of messages that a kind needs."""
    columns = {name: column[0] for name, column in kind.columns.items() if isinstance(column, list)}
    return [name for name, inner in columns.items() if "role" in inner and name not in kind.optional]


def _images_of(column: "pa.ChunkedArray", feature: Any, kind: str) -> "pa.ChunkedArray":
    """Return images as this feature: one per row, or lists of them with null in place of none. No bytes are copied."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Image, List
    from datasets.table import cast_array_to_feature

    is_list = isinstance(feature, List) and "list" in str(column.type)
    try:
        column = cast_array_to_feature(column, List(Image()) if is_list else Image())
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"The images of {kind} data have another type than expected.\n  is:        {column.type}\n"
            f"  should be: {feature}\n{str(error).splitlines()[0]}"
        ) from None
    if not isinstance(feature, List):
        return column

    def lists(chunk: pa.Array) -> pa.Array:
        counts = pc.fill_null(pc.list_value_length(chunk), 0) if is_list else chunk.is_valid()
        starts = pa.array(list(accumulate(counts.to_pylist(), initial=0)), pa.int32())
        return pa.ListArray.from_arrays(starts, pc.list_flatten(chunk) if is_list else chunk.drop_null())

    return pa.chunked_array(map(lists, column.chunks), features_of(kind).arrow_schema.field("images").type)

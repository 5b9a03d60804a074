# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Give other people's datasets our columns: TRL's pairs and conversations, questions one per row, texts as strings.

Images are neither decoded nor copied. Only texts are converted, and only in columns of another form.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.processes import rank

from .cells import BadRecord
from .schema import KINDS, Kind, features_of, image_part, text_part
from .source import Question


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# What a missing column is made of, if the dataset has it.
_MADE_OF = {
    "id": (),
    "image_ids": (),
    "image_id": (),
    "images": ("image",),
    "prompt": ("chosen", "rejected"),
    "questions": ("question", "answer"),
}
_QUESTION = ("id", "question", "answer", "answer_type", "question_type", "link")
_OF_A_QUESTION = (*_QUESTION, "question_id")
_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}  # of a text that is no message
MALFORMED = (ValueError, TypeError, AttributeError)  # what reading a record of another form raises
_IMAGE_ID = re.compile("[0-9a-f]{64}")


def missing_columns(columns: Collection[str], kind: str) -> list[str]:
    """Return the columns of a kind that a dataset with these columns lacks and that nothing can fill in."""
    own = KINDS.get(kind)
    made = {name for name, sources in _MADE_OF.items() if set(sources) <= set(columns)}
    return [name for name in own.columns if not (name in columns or name in own.optional or name in made)]


def check_missing(columns: Collection[str], kind: str) -> None:
    """Raise a `UserError` that names the [`missing_columns`]."""
    if missing := missing_columns(columns, kind):
        raise UserError(
            f"The dataset lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {kind} data; it "
            f"has {', '.join(columns)}. `medst {KINDS.get(kind).maker}` makes such datasets; docs/data.md shows how "
            "to use your own."
        )


def conform(dataset: "Dataset", kind: str) -> "Dataset":
    """
    Return the same rows with all columns of a kind.

    Accepted are other types for the same content (large strings, extra keys in messages), message content as strings,
    a column `image` in place of `images`, pairs whose prompt is the beginning of both answers, and a benchmark with
    one question per row (`image`, `question`, `answer`). A missing `id` becomes the number of the row, and a repeated
    one gets a suffix. Missing `image_ids` are null, see [`with_image_ids`]. Rows whose messages cannot be read keep
    none, so that the stages reject them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset. Further columns are kept.
        kind (`str`):
            A name in `KINDS`.

    Raises:
        UserError: if required columns are missing, have another type, or none of the rows can be read.
    """
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo, Features, Value
    from datasets.fingerprint import Hasher
    from datasets.table import InMemoryTable, concat_tables

    check_missing(dataset.features, kind)
    given, own, table = dataset.features, KINDS.get(kind), dataset.data
    wanted = features_of(kind) | {name: Value("float64") for name in own.extras if name in given}
    if not (other := _columns_to_convert(dataset, own, wanted)):
        return dataset
    columns = {name: table.column(name) for name in given}
    if "images" in other:
        columns["images"] = _lists_of_images(columns.pop("images" if "images" in given else "image"), kind)
        columns.pop("image", None)
    texts = messages_of(own)
    if not other.isdisjoint(texts):
        columns |= _conversations(columns, texts, kind)
    if "questions" in other:
        columns["questions"] = _questions(columns)
        other.add("image_id")
        ids = columns["image_id"].to_pylist() if "image_id" in columns else [None] * len(table)
        ids = [name if _IMAGE_ID.fullmatch(str(name)) else None for name in ids]  # theirs often has another meaning
        columns["image_id"] = _column(ids, wanted["image_id"])
    if "id" in other:
        ids = columns["id"].to_pylist() if "id" in columns else [None] * len(table)
        columns["id"] = _column(_unique_ids(ids), wanted["id"])
    for name in other:
        if name not in columns or own.optional.get(name) == []:  # messages that are not used
            columns[name] = _column([own.optional.get(name)] * len(table), wanted[name])
        columns[name] = _cast(columns[name], wanted[name], name, kind)
    features = {name: wanted[name] if name in other else given[name] for name in columns}
    kept = table.select([name for name in columns if name not in other])
    made = InMemoryTable(pa.table({name: columns[name] for name in columns if name in other}))
    return Dataset(
        concat_tables([kept, made], axis=1) if kept.num_columns else made,
        info=DatasetInfo(features=Features(features)),
        split=dataset.split,
        indices_table=dataset._indices,  # of selected rows: flattening them would copy the images
        fingerprint=Hasher.hash([dataset._fingerprint, kind]),
    )


def _columns_to_convert(dataset: "Dataset", kind: Kind, wanted: Mapping[str, Any]) -> set[str]:
    """The columns that are missing or of another type, those with null in place of a list, and ids not unique."""
    import pyarrow.compute as pc

    other = {name for name, feature in wanted.items() if dataset.features.get(name) != feature}
    same = {name: dataset.data.column(name) for name in wanted if name not in other}
    other |= {name for name in ("images", *messages_of(kind)) if name in same and same[name].null_count}
    return other | ({"id"} if "id" in same and pc.count_distinct(same["id"]).as_py() < len(dataset.data) else set())


def report_unusable(problems: Sequence[str], used: int, name: str) -> None:
    """
    Print how many rows of a dataset cannot be used, with the first reason.

    Raises:
        UserError: if none is used.
    """
    total = len(problems) + used
    if problems and not used:
        raise UserError(f"{name}: none of its {total} rows can be used. The first: {problems[0]}")
    if problems and rank() == 0:
        print(f"{name}: {len(problems)} of {total} rows cannot be used. The first: {problems[0]}")


def typed_messages(values: Mapping[str, Any], images: int) -> dict[str, list[dict]]:
    """
    Return the texts of a record as messages with typed parts.

    Args:
        values (`dict`):
            By column: messages whose content is a text or typed parts, or a text alone. Without a `prompt`, it is what
            `chosen` and `rejected` have in common.
        images (`int`):
            Number of images. If no message has an image part, they come before the first user's text, as in TRL.

    Raises:
        ValueError, TypeError or AttributeError: for anything else.
    """
    row = {name: _messages(value, _ROLES.get(name)) for name, value in values.items()}
    if "chosen" in row:
        answers = row["chosen"], row["rejected"]
        pairs = enumerate(zip(*answers))
        common = next((place for place, (one, other) in pairs if one != other), min(map(len, answers)))
        prompt = row["prompt"] or answers[0][: min(common, len(answers[0]) - 1, len(answers[1]) - 1)]
        if all(answer[: len(prompt)] == prompt for answer in answers):
            answers = [answer[len(prompt) :] for answer in answers]
        row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    if empty := [name for name, messages in row.items() if not messages]:
        raise ValueError(f"{' and '.join(empty)} has no message")
    parts = [part for messages in row.values() for message in messages for part in message["content"]]
    asked = next((message for message in next(iter(row.values())) if message["role"] == "user"), None)
    placed = sum(part["type"] == "image" for part in parts)
    if placed not in (0, images):
        raise ValueError(f"{placed} image parts for {images} images")
    if asked and not placed:
        asked["content"] = [image_part() for _ in range(images)] + asked["content"]
    return row


def _messages(value: Any, role: str | None) -> list[dict]:
    messages = [{"role": role, "content": value}] if isinstance(value, str) and role else value or []
    found = []
    for message in messages if isinstance(messages, list) else [None]:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str | list) or not isinstance(message.get("role"), str):
            raise ValueError("messages need a role, and content that is a text or a list of parts")
        parts = [text_part(content)] if isinstance(content, str) else [_part(part) for part in content]
        found.append({"role": message["role"], "content": parts, "vusr": bool(message.get("vusr"))})
    return found


def _part(part: Mapping[str, Any]) -> dict:
    kind, text = part.get("type"), part.get("text")
    if kind == "image":
        return image_part()
    if kind in ("text", None) and isinstance(text, str):
        return text_part(text)
    raise ValueError(f"a part of a message has the type {kind!r}, not text or image")


def messages_of(kind: Kind) -> list[str]:
    """Return the columns of messages that a kind needs."""
    columns = {name: column[0] for name, column in kind.columns.items() if isinstance(column, list)}
    return [name for name, inner in columns.items() if "role" in inner and name not in kind.optional]


def _conversations(columns: "Mapping[str, pa.ChunkedArray]", names: Sequence[str], kind: str) -> "dict[str, Any]":
    """The columns of messages in the form of a kind; see [`typed_messages`]. Rows that cannot be read become empty."""
    import pyarrow.compute as pc

    counts = pc.list_value_length(columns["images"]).to_pylist()
    given = [columns[name].to_pylist() if name in columns else [None] * len(counts) for name in names]
    rows, problems = {name: [] for name in names}, []
    for place, (count, *values) in enumerate(zip(counts, *given, strict=True)):
        try:
            row = typed_messages(dict(zip(names, values, strict=True)), count)
        except MALFORMED as error:
            problems.append(f"row {place}: {error}")
            row = {name: [] for name in names} | {names[0]: [{"role": "user", "content": [image_part()] * count}]}
        for name in names:
            rows[name].append(row[name])
    report_unusable(problems, len(counts) - len(problems), f"The {kind} data")
    return {name: _column(rows[name], features_of(kind)[name]) for name in names}


def _questions(columns: "Mapping[str, pa.ChunkedArray]") -> "pa.ChunkedArray":
    """The questions of each row of a benchmark, from its lists or from one question per row. Unusable ones are out."""

    names = [name for name in _OF_A_QUESTION if name in columns]
    rows = [[dict(zip(names, row))] for row in zip(*(columns[name].to_pylist() for name in names))]
    rows = columns["questions"].to_pylist() if "questions" in columns else rows
    questions, problems = [], []
    for place, asked in enumerate(rows):
        questions.append([])
        for number, row in enumerate(asked or ()):
            own = next((row[name] for name in ("question_id", "id") if row.get(name) is not None), None)
            name = str(place if own is None else own) + (f"-{number}" if own is None and number else "")
            try:
                found = Question.from_row(name, row | {"image": "its", "split": "test"})
                questions[-1].append({name: getattr(found, name) for name in _QUESTION})
            except BadRecord as error:
                problems.append(f"row {place}: {error.reason}")
    report_unusable(problems, sum(map(len, questions)), "The benchmark")
    return _column(questions, features_of("benchmark")["questions"])


def _unique_ids(names: Sequence[Any]) -> list[str]:
    """The ids of all rows; a missing one is the number of the row, a repeated one gets a number."""
    names = [str(place) if name is None else str(name) for place, name in enumerate(names)]
    seen, taken = Counter(), set(names)
    for place, name in enumerate(names):
        seen[name] += 1
        while seen[name] > 1 and (new := f"{name}-{seen[name]}") in taken:
            seen[name] += 1
        if seen[name] > 1:
            names[place] = new
            taken.add(new)
    return names


def _lists_of_images(column: "pa.ChunkedArray", kind: str) -> "pa.ChunkedArray":
    """One image per row, or lists with null in place of none, as lists of images. The bytes are not copied."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Image, List

    def lists(values: pa.Array, counts: Iterable[int]) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(list(accumulate(counts, initial=0)), pa.int32()), values)

    is_list = "list" in str(column.type)
    column = _cast(column, List(Image()) if is_list else Image(), "images", kind)
    if not is_list:
        chunks = [lists(chunk.drop_null(), chunk.is_valid().to_pylist()) for chunk in column.chunks]
    elif column.null_count:
        lengths = [pc.fill_null(pc.list_value_length(chunk), 0).to_pylist() for chunk in column.chunks]
        chunks = [lists(pc.list_flatten(chunk), counts) for chunk, counts in zip(column.chunks, lengths, strict=True)]
    else:
        return column
    return pa.chunked_array(chunks, features_of(kind).arrow_schema.field("images").type)


def _cast(column: "pa.ChunkedArray", feature: Any, name: str, kind: str) -> "pa.ChunkedArray":
    import pyarrow as pa
    from datasets.table import cast_array_to_feature

    try:
        return cast_array_to_feature(column, feature)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"The column {name} of {kind} data has another type than expected.\n  is:        {column.type}\n"
            f"  should be: {feature}\n{str(error).splitlines()[0]}"
        ) from None


def _column(values: Sequence[Any], feature: Any) -> "pa.ChunkedArray":
    import pyarrow as pa
    from datasets import Features

    return pa.chunked_array([pa.array(values, Features({"x": feature}).arrow_schema.field("x").type)])

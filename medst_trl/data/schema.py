# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The kinds of datasets on disk: their columns, and how they are read and written.

This is the one place that knows column names. Message content is a list of typed parts, so that several images keep
their positions: the n-th image part stands for the n-th of `images`. See `KINDS` for what each kind holds.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.files import atomic_path
from medst_trl.base.processes import ordered_map
from medst_trl.base.registry import Registry


if TYPE_CHECKING:
    from datasets import Features

QUESTION_FIELDS = ("id", "question", "answer", "answer_type", "question_type", "link")
ROWS_PER_ROW_GROUP = 32  # the images of a row group are in memory together, when written and when streamed


# The meaning of columns, in Markdown. A name means the same in every kind.
MEANINGS = {
    "id": "name of the record",
    "images": "the images, in the order of the image parts",
    "image": "the image",
    "image_ids": "SHA-256 of the pixels of each image",
    "image_id": "SHA-256 of the pixels of the image",
    "group_id": "what must stay in one split, such as a patient, hashed; without one, the image",
    "messages": "`role` and `content` as typed parts (`image`, `text`); `vusr`: the model writes this user turn",
    "questions": "`question`, `answer`, `answer_type` (open, closed), `question_type`, `link` (shared by paraphrases)",
    "prompt": "messages up to and including the question",
    "answers": "the answers; the first and second are compared",
    "chosen": "the better answer, as a message",
    "rejected": "the worse answer, as a message",
    "score_chosen": "the judge's mean score of the better answer",
    "score_rejected": "the judge's mean score of the worse answer",
    "generation": "how the text was generated, as JSON",
    "judge": "the judge and its replies in both orders, as JSON",
}


@dataclass(frozen=True)
class Kind:
    """
    A kind of dataset on disk.

    Args:
        name (`str`):
            Its name, for example `"instruct"`.
        maker (`str`):
            The stage that writes it.
        columns (`dict`):
            Its columns as plain data, so that the package can be imported without `datasets`: `"image"` or the name of
            a [`~datasets.Value`], `[...]` for a list, a dict for a struct.
        about (`str`):
            What the dataset is, in a sentence for the card of a published one.
        use (`str`):
            How to use it, in Markdown for the card; `{id}` stands for the repository.
        marker (`str`, *optional*):
            The column by which a directory of Parquet files is recognized as this kind.
        optional (`dict`, *optional*, defaults to `{"group_id": None}`):
            Columns that a dataset may lack, and the value that fills them in.
        extras (`dict` of `str` to `float`, *optional*):
            Columns of numbers that stages read if a dataset has them, and what a row without counts as.
        meanings (`dict` of `str` to `str`, *optional*, defaults to `MEANINGS`):
            The meaning of columns, in Markdown.
    """

    name: str
    maker: str
    columns: Mapping[str, Any]
    about: str
    use: str
    marker: str | None = None
    optional: Mapping[str, Any] = field(default_factory=lambda: {"group_id": None})
    extras: Mapping[str, float] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=lambda: MEANINGS)


KINDS: Registry[Kind] = Registry("kind of dataset", (), ("maker", "columns", "about", "use"))


_IMAGES = {"id": "string", "images": ["image"], "image_ids": ["string"]}
_MESSAGE = {"role": "string", "content": [{"type": "string", "text": "string"}]}
_GROUP = {"group_id": "string"}
_INSTRUCT = _IMAGES | {"messages": [_MESSAGE | {"vusr": "bool"}]} | _GROUP
_QUESTION = dict.fromkeys(QUESTION_FIELDS, "string")

for _kind in (
    Kind(
        "instruct",
        "prepare",
        _INSTRUCT,
        "Conversations about medical images, for instruction tuning.",
        "Train on it with `medst sft --dataset {id}`.",
        marker="messages",
    ),
    Kind(
        "images",
        "prepare",
        _INSTRUCT,
        "Medical images without labels, to ask questions about.",
        "Ask questions about them with `medst generate --images {id}`.",
        optional={"group_id": None, "messages": []},
    ),
    Kind(
        "benchmark",
        "prepare",
        {"image_id": "string", "image": "image", "questions": [_QUESTION]} | _GROUP,
        "Questions about medical images with reference answers, for evaluation.",
        "Evaluate on it with `medst evaluate --benchmark {id}`.",
        marker="questions",
    ),
    Kind(
        "candidates",
        "generate",
        _IMAGES | {"prompt": [_MESSAGE], "answers": ["string"], "generation": "string"} | _GROUP,
        "Questions that a model asked about medical images, each with sampled answers, ready to be judged.",
        "Judge them with `medst judge --candidates {id}`.",
        marker="answers",
        optional={"group_id": None, "generation": None},
    ),
    Kind(
        "preferences",
        "judge",
        _IMAGES
        | {"prompt": [_MESSAGE], "chosen": [_MESSAGE], "rejected": [_MESSAGE]}
        | {"score_chosen": "float64", "score_rejected": "float64", "judge": "string"}
        | _GROUP,
        "Preference pairs about medical images: a question and two answers, the better one chosen.",
        "Train on it with `medst dpo --dataset {id}`, or with TRL's `DPOTrainer`, whose columns it has.",
        marker="chosen",
        optional={"group_id": None, "score_chosen": None, "score_rejected": None, "judge": None},
        extras={"weight": 1.0, "probability": 1.0},
    ),
):
    KINDS.register(_kind)


def image_part() -> dict:
    """Return the position of an image in the content of a message."""
    return {"type": "image", "text": None}


def text_part(text: str) -> dict:
    """Return text in the content of a message."""
    return {"type": "text", "text": text}


def message(role: str, content: list[dict], vusr: bool = False) -> dict:
    """Return one message: `role` is `"user"` or `"assistant"`; `vusr` marks a user turn that the model writes."""
    return {"role": role, "content": content, "vusr": vusr}


def dialogue(turns: Iterable[tuple[str, str]], num_images: int = 0) -> list[dict]:
    """Return the messages of questions and their answers; the images come before the first question."""
    messages = []
    for question, answer in turns:
        images = [] if messages else [image_part() for _ in range(num_images)]
        messages += [message("user", [*images, text_part(question)]), message("assistant", [text_part(answer)])]
    return messages


def text_of(content: str | list[dict]) -> str:
    """Return the text of a message's content, without its image parts."""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def features_of(kind: str, grouped: bool = True, extras: Collection[str] = ()) -> "Features":
    """
    Return the columns of a kind of dataset, see `KINDS`; with `grouped=False` those of rows without `group_id`, and
    with the optional columns of numbers whose names are among `extras`.
    """
    from datasets import Features

    own = KINDS.get(kind)
    columns = {**own.columns, **{name: "float64" for name in own.extras if name in extras}}.items()
    return Features({name: feature_of(column) for name, column in columns if grouped or name != "group_id"})


def feature_of(column: Any) -> Any:
    """Return the feature of a column, see [`Kind`]."""
    from datasets import Image, List, Value

    if isinstance(column, Mapping):
        return {name: feature_of(inner) for name, inner in column.items()}
    if isinstance(column, list):
        return List(feature_of(column[0]))
    return Image() if column == "image" else Value(column)


# To make a dataset of rows in Python. Candidates are made by `CandidateGenerator`, which fills in the group.
instruct_features = partial(features_of, "instruct", grouped=False)
benchmark_features = partial(features_of, "benchmark", grouped=False)
candidate_features = partial(features_of, "candidates")
preference_features = partial(features_of, "preferences", grouped=False)


def kind_of(columns: Collection[str]) -> Kind | None:
    """Return the kind of the dataset that has these columns, or None. Unlabeled images count as `"instruct"`."""
    return next((kind for kind in reversed(KINDS.values()) if kind.marker in columns), None)


def with_stored_images(dataset: Any) -> Any:
    """Return the same rows with images as they are stored (`bytes` and `path`). Only a plain dataset changes."""
    from datasets import Dataset, Features, Image, List

    if not isinstance(dataset, Dataset) or dataset.format["type"] is not None:
        return dataset

    def stored(feature: Any) -> Any:
        if isinstance(feature, List) and isinstance(feature.feature, Image):
            return List(Image(decode=False))
        return Image(decode=False) if isinstance(feature, Image) else feature

    dataset = dataset.with_format(None)  # a copy of what describes the rows, not of the rows
    # Not by casting a column: for a list of images that maps the rows and writes all of them to the cache.
    dataset.info.features = Features({name: stored(feature) for name, feature in dataset.features.items()})
    return dataset


def bytes_of(stored: Mapping[str, Any]) -> bytes:
    """Return the file of an image as it is stored, from the dataset or from its path."""
    return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def write_split(
    directory: Path,
    split: str,
    records: Sequence[Any],
    make_row: Callable[[Any], dict],
    features: "Features",
    rows_per_shard: int,
    num_workers: int = 1,
) -> None:
    """
    Write `<directory>/<split>-00000-of-0000N.parquet`, which `load_dataset(directory)` reads.

    The same records give the same files. A file that exists is complete and is not written again, so an interrupted
    run resumes after its last file. Without records nothing is written.

    Args:
        directory (`pathlib.Path`):
            Directory of the dataset; created if it is missing.
        split (`str`):
            For example `"train"`.
        records (sequence):
            One for each row.
        make_row (`Callable`):
            Makes a row from a record, with images as `{"bytes": ..., "path": None}`. It is called on `num_workers`
            threads.
        features (`datasets.Features`):
            Columns; they are stored in the files, so that images are decoded when they are read.
        rows_per_shard (`int`):
            Rows per file.
        num_workers (`int`, *optional*, defaults to `1`):
            Number of threads.
    """
    from pyarrow.parquet import read_schema
    from tqdm.auto import tqdm

    if not records:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f".{split}-*.tmp"):  # left by a killed run, whose files may have had other names
        leftover.unlink()
    total = -(-len(records) // rows_per_shard)
    shards = [directory / f"{split}-{number:05d}-of-{total:05d}.parquet" for number in range(total)]
    for finished in [path for path in shards if path.exists()][:1]:  # perhaps by a version with fewer columns
        written = read_schema(finished).names
        features = type(features)({name: feature for name, feature in features.items() if name in written})
    for number, path in enumerate(tqdm(shards, f"{directory.name}/{split}", unit="file", disable=None)):
        if not path.exists():
            chunk = records[number * rows_per_shard : (number + 1) * rows_per_shard]
            _write_shard(path, ordered_map(make_row, chunk, num_workers), features)


def _write_shard(path: Path, rows: Iterator[dict], features: "Features") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features.arrow_schema
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while group := list(islice(rows, ROWS_PER_ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))

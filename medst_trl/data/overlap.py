# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What data shares with a benchmark or another split: images, near copies, groups and questions.

Images are identified by the `image_id` of their pixels, and by the near hash, which near copies share. Both are of the
same picture, the one that `prepare` would store: upright, in 8 bits. An [`Inventory`] collects images, groups and
questions of a dataset, and compares records of other data with them.
"""

import re
import secrets
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import number_of
from medst_trl.base.processes import cores, ordered_map, rank

from .conform import report_unusable
from .groups import salt_of
from .schema import bytes_of, text_of, with_stored_images


if TYPE_CHECKING:
    from datasets import Dataset

_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+")


# The images of a dataset


def with_image_ids(dataset: "Dataset") -> "Dataset":
    """
    Compute the missing `image_ids` (or `image_id`) of a dataset with the columns of a kind, see [`image_ids_of`].

    All its images are then decoded once. Without such a column or without missing ids, it is returned as it is. An
    image that cannot be decoded gets a random id, and a row of a benchmark with such an image is left out.
    """
    name = next((name for name in ("image_ids", "image_id") if name in dataset.features), None)
    if name is None or not dataset.data.column(name).null_count:
        return dataset
    feature, ids = dataset.features[name], image_ids_of(dataset)
    if name == "image_ids":
        ids = [[image or secrets.token_hex(32) for image in row] for row in ids]
    else:
        ids = [row[0] for row in ids]
    dataset = dataset.remove_columns(name).add_column(name, ids, feature=feature)
    problems = [f"row {place}: its image is missing or damaged" for place, image in enumerate(ids) if image is None]
    report_unusable(problems, len(ids) - len(problems), "The benchmark")
    return dataset.select([place for place, image in enumerate(ids) if image is not None]) if problems else dataset


def image_ids_of(dataset: "Dataset") -> list[list[str | None]]:
    """
    Return the ids of the images of each row, see [`~medst_trl.data.images.image_id`]: from the column `image_ids` (or
    `image_id`), or else from the pixels. An image that cannot be decoded has none.
    """
    name = "image_ids" if "images" in dataset.features else "image_id"
    given = dataset[name][:] if name in dataset.features else [None] * len(dataset)
    found = _identities(dataset, [row for row, ids in enumerate(given) if ids is None], "image ids")
    ids = [[ids] if isinstance(ids, str) else ids for ids in given]
    for row, identities in found.items():
        ids[row] = [image_id for image_id, _ in identities]
    return ids


def hash_images(dataset: "Dataset") -> dict[str, str | None]:
    """
    Hash the images of a dataset, each once, on several threads.

    Args:
        dataset (`datasets.Dataset`):
            Columns `images` and `image_ids`, or `image` and `image_id`.

    Returns:
        `dict`: `image_id` to [`~medst_trl.data.near_copies.perceptual_hash`].
    """
    ids = [[name] for name in dataset["image_id"]] if "image_id" in dataset.features else dataset["image_ids"][:]
    rows = {name: row for row, names in enumerate(ids) for name in names}
    found = _identities(dataset, sorted(set(rows.values())), "near copies")
    return {name: near_hash for row in found for name, (_, near_hash) in zip(ids[row], found[row])}


def _identities(dataset: "Dataset", rows: Sequence[int], title: str) -> dict[int, list[tuple[str | None, str | None]]]:
    """The ids and near hashes of the images of some rows, each different image decoded once."""
    from tqdm.auto import tqdm

    from .images import identify  # loads NumPy and Pillow

    column, known = "images" if "images" in dataset.features else "image", {}
    stored = with_stored_images(dataset.select_columns([column]))

    def of_image(image: Any) -> tuple[str | None, str | None]:
        try:
            content = bytes_of(image)
        except (OSError, TypeError):  # no such file, or neither bytes nor a path
            return None, None
        key = sha256(content).digest()
        if key not in known:
            known[key] = identify(content)
        return known[key]

    def of_row(row: int) -> list[tuple[str | None, str | None]]:
        found = stored[row][column]
        return list(map(of_image, found if isinstance(found, list) else [found]))

    bar = tqdm(rows, title, unit="row", disable=None if rows and rank() == 0 else True)
    return dict(zip(rows, ordered_map(of_row, bar, cores())))


# What two datasets share


@dataclass
class Inventory:
    """
    The images of a benchmark or of training data, and what is asked about them.

    Attributes:
        questions (`dict`): `image_id` to the normalized questions about the image.
        texts (`set`): Normalized questions about any image or none.
        members (`dict`): Group to its images.
        salts (`set`): What [`~medst_trl.data.groups.salt_of`] returns for these groups.
        near (`dict`): `image_id` of other images to their near copies, see
            [`~medst_trl.data.near_copies.near_copies`].
        hashes (`dict`): `image_id` to the near hash; None for a plain image.
    """

    questions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    texts: set[str] = field(default_factory=set)
    members: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    hashes: dict[str, str | None] = field(default_factory=dict)
    salts: set[str] = field(default_factory=set)
    near: Mapping[str, Set[str]] = field(default_factory=dict)

    def add(self, dataset: "Dataset", hashes: Mapping[str, str | None] | None, only: Set[str] | None = None) -> None:
        """
        Add the rows of a dataset. Images are decoded only for near hashes that are missing.

        Args:
            dataset (`datasets.Dataset`): A benchmark, conversations or preference pairs.
            hashes (`dict` or `None`): Near hashes that are known; None if none are needed.
            only (`set`, *optional*): Use only rows with at least one of these images, and rows without images.
        """
        missing = []
        for number, (images, group, texts) in enumerate(_rows(dataset)):
            if only is not None and images and only.isdisjoint(images):
                continue
            self.add_record(images, group, texts)
            if hashes is not None and not hashes.keys() >= {*images}:
                missing.append(number)
        found = hash_images(dataset.select(missing)) | hashes if missing else hashes or {}
        self.hashes |= {image: found[image] for image in self.questions if image in found}

    def add_record(self, image_ids: Collection[str], group: str | None, questions: Iterable[str] = ()) -> None:
        """Add the images of a record, its group, and its normalized questions."""
        self.texts.update(questions)
        for image in image_ids:
            self.questions[image] += questions
        if group:
            self.salts.add(salt_of(group))
            self.members[group] |= {*image_ids}

    def relation(self, image_ids: Collection[str], group: str | None = None, question: str | None = None) -> tuple:
        """
        Return how a record of other data is related to these. Near copies are those in `near`: a near copy of a near
        copy does not count.

        Returns:
            `tuple[str, str | None]`: the first that is true of `"question"` (this normalized question is asked about
            one of the images or a near copy), `"image"`, `"near_copy"`, `"group"` and `"nothing"`; with the question,
            image or group that is shared.
        """
        copies = sorted(copy for image in image_ids for copy in self.near.get(image, ()))
        if any(question in self.questions.get(image, ()) for image in (*image_ids, *copies)):
            return "question", question
        for relation, images in (("image", image_ids), ("near_copy", copies)):
            if found := next((image for image in images if image in self.questions), None):
                return relation, found
        return ("group", group) if group in self.members else ("nothing", None)


def _rows(dataset: "Dataset") -> Iterator[tuple[list[str], str | None, list[str]]]:
    """Yield the image ids of each row, its group, and its normalized questions. No image is decoded."""
    names = ("image_id", "image_ids", "group_id", "questions", "messages", "prompt")
    for row in dataset.select_columns([name for name in names if name in dataset.features]):
        if "questions" in row:
            texts = [question["question"] for question in row["questions"]]
        else:
            messages = row.get("messages") or row.get("prompt") or ()
            texts = [text_of(message["content"]) for message in messages if message["role"] == "user"]
        images = row["image_ids"] if "image_ids" in row else [row["image_id"]]
        yield images, row.get("group_id"), list(map(normalized, texts))


def why_groups_not_compared(benchmark: Inventory, training: Inventory) -> str | None:
    """Return why shared groups can be missed, or None if none can. Every group that is found is really shared."""
    for name, inventory in (("benchmark", benchmark), ("training data", training)):
        if not inventory.salts:
            return f"the {name} has no groups"
    if benchmark.salts != training.salts:
        return "groups of another kind, or hashed with another salt"
    missing = training.questions.keys() - set().union(*training.members.values())
    return f"{number_of(f'{len(missing):,}', 'training image')} without a group" if missing else None


def normalized(text: str) -> str:
    """
    Return the words of a text in lower case without punctuation; the whole text if it has no words. `judge` and
    `evaluate` compare questions of different datasets like this.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(plain)) or plain.strip()


def plain_question(text: str) -> str:
    """
    Return a question in lower case with single spaces. `prepare` compares the questions of one source like this;
    [`normalized`] would find more pairs than the published splits have.
    """
    return " ".join(text.lower().split())

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What data shares with a benchmark or another split: images, near copies, groups and questions.

An [`Inventory`] collects these of a dataset, and compares records of other data with them.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medst_trl.base.errors import number_of

from .groups import salt_of
from .schema import text_of


if TYPE_CHECKING:
    from datasets import Dataset

_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+")


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
        from .identify import hash_images  # loads NumPy and Pillow

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

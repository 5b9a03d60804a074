# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What two collections of images and questions share: images, near copies, groups and questions."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .groups import salt_of
from .schema import text_of


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Inventory:
    """
    The images of a benchmark or of training data, and what is asked about them.

    Attributes:
        questions (`dict`): `image_id` to the normalized questions about the image.
        texts (`set`): Normalized questions about any image or none.
        groups (`dict`): `image_id` to the groups of the image. An image that is a group of its own has none.
        hashes (`dict`): `image_id` to the near hash; None for an image without contrast.
    """

    questions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    texts: set[str] = field(default_factory=set)
    groups: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    hashes: dict[str, str | None] = field(default_factory=dict)

    @property
    def salts(self) -> set[str]:
        """The salts with which its groups were hashed. Groups of other salts cannot be compared with them."""
        return {salt_of(group) for groups in self.groups.values() for group in groups}

    def add(self, dataset: "Dataset", hashes: Mapping[str, str | None] | None, only: Set[str] | None = None) -> None:
        """
        Add the rows of a dataset. Images are decoded only for near hashes that are missing.

        Args:
            dataset (`datasets.Dataset`): A benchmark, conversations or preference pairs.
            hashes (`dict`): Near hashes that are known.
            only (`set`, *optional*): Leave out rows with none of these images.
        """
        from .identify import hash_images  # loads NumPy and Pillow

        missing = []
        for number, (images, group, texts) in enumerate(_rows(dataset)):
            if only is not None and images and only.isdisjoint(images):
                continue
            self.texts.update(texts)
            for image in images:
                self.questions[image] += texts
                if group is not None:
                    self.groups[image].add(group)
            if not hashes.keys() >= {*images}:
                missing.append(number)
        found = hash_images(dataset.select(missing)) | hashes if missing else hashes
        self.hashes |= {image: found[image] for image in self.questions if image in found}


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
        yield images, row.get("group_id"), list(map(plain_question, texts))


def plain_question(text: str) -> str:
    """Normalize a question for comparison: lower case, single spaces."""
    return " ".join(text.lower().split())

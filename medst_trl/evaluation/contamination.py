# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Contamination of a benchmark: which of its images and questions occur in the training data of a model."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.files import read_object
from medst_trl.data.assemble import plain_question
from medst_trl.data.groups import salt_of
from medst_trl.data.schema import text_of


if TYPE_CHECKING:
    from datasets import Dataset

CONTAMINATION_FILE = "contamination.json"

# What is compared, as in tables, and what is counted.
FIGURES = {
    "exact": ("exact copies", "images"),
    "near": ("near copies", "images"),
    "groups": ("same group", "images"),
    "questions": ("same question and image", "questions"),
    "texts": ("same question alone", "questions"),
}
EXPLANATION = (
    "Exact copies have the pixels of a training image; near copies are resized or re-encoded. Same group: there are "
    "training images of the same patient, study or directory. Same question and image: training asks the question "
    "about the image, a near copy or an image of its group. Same question alone: training asks it about any image. "
    "What the base model was trained on is not known."
)


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
        from medst_trl.data.near_copies import hash_images  # loads NumPy and Pillow

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


def compare(
    benchmark: Inventory, training: Sequence[Inventory], image_ids: Collection[str], near_copy_bits: int
) -> dict[str, dict[str, int]]:
    """
    Count what occurs in training data.

    Args:
        benchmark ([`Inventory`]): The benchmark.
        training (sequence of [`Inventory`]): The datasets that a model was trained on.
        image_ids (collection of `str`): All images that are known to be in training data.
        near_copy_bits (`int`): The largest number of bits by which the near hashes of near copies differ.

    Returns:
        `dict`: for each of `FIGURES`, the number `n` of the images or questions `of` the benchmark:

        - exact: images with the same pixels as a training image
        - near: other images that are near copies of a training image
        - groups: images whose group has training images, of those with a group
        - questions: questions that training asks about the same image, a near copy, or an image of its group
        - texts: questions that training asks about any image
    """
    from medst_trl.data.near_copies import near_copies

    near, members = defaultdict(set), defaultdict(set)
    for one in training:
        for image, other in near_copies(benchmark.hashes, one.hashes, near_copy_bits):
            near[image].add(other)
        for image, groups in one.groups.items():
            for group in groups:
                members[group].add(image)
    all_texts = set().union(*(one.texts for one in training))
    found, grouped = dict.fromkeys(FIGURES, 0), 0
    for image, texts in benchmark.questions.items():
        same_group = set().union(*(members.get(group, ()) for group in benchmark.groups.get(image, ())))
        related = same_group | near[image] | {image}
        known = set().union(*(one.questions.get(other, ()) for one in training for other in related))
        found["exact"] += image in image_ids
        found["near"] += image not in image_ids and bool(near[image])
        found["groups"] += bool(same_group)
        found["questions"] += sum(text in known for text in texts)
        found["texts"] += sum(text in all_texts for text in texts)
        grouped += image in benchmark.groups
    questions = sum(map(len, benchmark.questions.values()))
    totals = {"images": len(benchmark.questions), "questions": questions}
    of = {name: grouped if name == "groups" else totals[unit] for name, (_, unit) in FIGURES.items()}
    return {name: {"n": found[name], "of": of[name]} for name in FIGURES}


class Contamination:
    """
    The content of a `contamination.json`.

    Args:
        content (`dict`): The content.

    Attributes:
        compared (`list[dict]`): What the benchmark was compared with, as `medst evaluate` writes it.
        figures (`dict`): Name in `FIGURES` to `n` (None: not checked) and `of`.

    Raises:
        LookupError, TypeError, ValueError or AttributeError: if the content has another form.
    """

    def __init__(self, content: Mapping[str, Any]):
        self.compared = content["compared"]
        self.figures = {name: (content["figures"][name]["n"], content["figures"][name]["of"]) for name in FIGURES}
        # What is shown of it, with the right types.
        str(self), "".join(self.sources(lambda source: source.get("hub_id") or source["path"] + ""))

    @classmethod
    def read(cls, path: Path) -> "Contamination | None":
        """Read a file. Return None if it is missing or damaged."""
        try:
            return cls(read_object(path))
        except (LookupError, TypeError, ValueError, AttributeError):
            return None

    @property
    def is_found(self) -> bool:
        """Whether the model may have seen answers: the same words about another image are no contamination."""
        return any(n for name, (n, _) in self.figures.items() if name != "texts")

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the label of each figure, and what was found."""
        for name, (label, unit) in FIGURES.items():
            (n, of), missing = self.figures[name], sum(name in one["not_checked"] for one in self.compared)
            partly = f" (not checked for {missing} of {len(self.compared)} sources)" if missing else ""
            yield label, "not checked" if n is None else f"{n:,} of {of:,} {unit}{partly}"

    def sources(self, name_of: Callable[[Mapping[str, Any]], str]) -> Iterator[str]:
        """Describe what the benchmark was compared with. `name_of` names a dataset or model by its fingerprint."""
        for one in self.compared:
            reasons = defaultdict(list)
            for name, reason in one["not_checked"].items():
                reasons[reason].append(FIGURES[name][0])
            not_checked = (f"; not checked: {', '.join(labels)} ({reason})" for reason, labels in reasons.items())
            what = f"data of {one['stage']}" if one["stage"] else "images of the model"
            yield f"{what}, {name_of(one)}: {one['images']:,} images{''.join(not_checked)}"

    def __str__(self) -> str:
        """Describe the result in one line."""
        if not self.compared:
            return "Contamination: not checked, no training data of the model is known."
        figures = ", ".join(f"{label} {text}" for label, text in self.rows())
        if self.is_found:
            return f"Warning: training data of the model contains parts of the benchmark: {figures}."
        return f"Contamination: {figures}."

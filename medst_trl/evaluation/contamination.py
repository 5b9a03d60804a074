# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Contamination of a benchmark: which of its images and questions occur in the training data of a model."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medst_trl.base.errors import number_of
from medst_trl.base.files import read_object
from medst_trl.data.overlap import Inventory


CONTAMINATION_FILE = "contamination.json"

# Name of each figure, its label in tables, and the unit that is counted.
FIGURES = {
    "exact": ("exact copies", "images"),
    "near": ("near copies", "images"),
    "groups": ("same group", "images"),
    "questions": ("same question and image", "questions"),
    "texts": ("same question alone", "questions"),
}
UNKNOWN = {"figures": {name: {"n": None, "of": 0} for name in FIGURES}, "compared": []}
EXPLANATION = (
    "Exact copies have the pixels of a training image; near copies are resized or re-encoded. Same group: there are "
    "training images of the same patient, study or directory. Same question and image: training asks the question "
    "about the image, a near copy or an image of its group. Same question alone: training asks it about any image. "
    "What the base model was trained on is not known."
)


def count_shared(
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
        - near: other images that are near copies of a training image, of those with a near hash
        - groups: images whose group has training images, of those with a group
        - questions: questions that training asks about the same image, a near copy, or an image of its group
        - texts: questions that training asks about any image
    """
    from medst_trl.data.near_copies import near_copies

    near, same_group = defaultdict(set), defaultdict(set)
    for one in training:
        for image, copies in near_copies(benchmark.hashes, one.hashes, near_copy_bits).items():
            near[image] |= copies
        for group, images in benchmark.members.items():
            for image in images:
                same_group[image] |= one.members.get(group, set())
    all_texts = set().union(*(one.texts for one in training))
    found = dict.fromkeys(FIGURES, 0)
    for image, texts in benchmark.questions.items():
        related = same_group[image] | near[image] | {image}
        known = set().union(*(one.questions.get(other, ()) for one in training for other in related))
        found["exact"] += image in image_ids
        found["near"] += image not in image_ids and bool(near[image])
        found["groups"] += bool(same_group[image])
        found["questions"] += sum(text in known for text in texts)
        found["texts"] += sum(text in all_texts for text in texts)
    hashed = sum(code is not None for code in benchmark.hashes.values())
    questions = sum(map(len, benchmark.questions.values()))
    of = {"exact": len(benchmark.questions), "near": hashed, "groups": len(set().union(*benchmark.members.values()))}
    return {name: {"n": found[name], "of": of.get(name, questions)} for name in FIGURES}


class Contamination:
    """
    The content of a `contamination.json`.

    Args:
        content (`dict`, *optional*): The content. By default, nothing was checked.

    Attributes:
        compared (`list[dict]`): What the benchmark was compared with, as `medst evaluate` writes it.
        figures (`dict`): Name in `FIGURES` to `n` (None: not checked) and `of`.

    Raises:
        LookupError, TypeError, ValueError or AttributeError: if the content has another form.
    """

    def __init__(self, content: Mapping[str, Any] = UNKNOWN):
        self.compared = content["compared"]
        self.figures = {name: (content["figures"][name]["n"], content["figures"][name]["of"]) for name in FIGURES}

    @classmethod
    def read(cls, path: Path) -> "Contamination | None":
        """Read a file. Return None if it is missing or damaged."""
        try:
            return cls(read_object(path))
        except (LookupError, TypeError, ValueError, AttributeError):
            return None

    @property
    def is_contaminated(self) -> bool:
        """Whether the model may have seen answers: the same words about another image are no contamination."""
        return any(n for name, (n, _) in self.figures.items() if name != "texts")

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the label of each figure, and what was found."""
        plain = self.figures["near"][0] is not None and self.figures["exact"][1] - self.figures["near"][1]
        for name, (label, unit) in FIGURES.items():
            (n, of), missing = self.figures[name], sum(name in one["not_checked"] for one in self.compared)
            text = "not checked" if n is None else f"{n:,} of {of:,} {unit}"
            if n is not None and name in ("near", "questions") and plain:
                text += f" ({number_of(f'{plain:,}', 'image')} too plain to compare)"
            if n is not None and missing:
                text += f" (not checked for {missing} of {len(self.compared)} sources)"
            yield label, text

    def sources(self, name_of: Callable[[Mapping[str, Any]], str]) -> Iterator[str]:
        """Describe what the benchmark was compared with. `name_of` names a dataset or model by its fingerprint."""
        for one in self.compared:
            reasons = defaultdict(list)
            for name, reason in one["not_checked"].items():
                reasons[reason].append(FIGURES[name][0])
            not_checked = (f"; not checked: {', '.join(labels)} ({reason})" for reason, labels in reasons.items())
            what = f"training data of {one['stage']}," if one["stage"] else "model"
            images = "its images are unknown" if one["images"] is None else f"{one['images']:,} images"
            yield f"{what} {name_of(one)}: {images}{''.join(not_checked)}"

    def __str__(self) -> str:
        """Describe the result in one line."""
        if not self.compared:
            return "Contamination: not checked, no training data of the model is known."
        figures = ", ".join(f"{label} {text}" for label, text in self.rows())
        if self.is_contaminated:
            return f"Warning: training data of the model contains parts of the benchmark: {figures}."
        return f"Contamination: {figures}."

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What training data has in common with evaluation benchmarks."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from medst_trl.data.assemble import plain_question


if TYPE_CHECKING:
    from datasets import Dataset


class BenchmarkOverlap:
    """
    Images and questions of benchmarks, to compare other records with.

    Args:
        benchmarks (iterable of `datasets.Dataset`): Columns `image_id`, `questions`; images are not decoded.
    """

    def __init__(self, benchmarks: Iterable["Dataset"] = ()):
        self._questions_of: dict[str, set[str]] = {}
        for benchmark in benchmarks:
            for row in benchmark.select_columns(["image_id", "questions"]):
                questions = self._questions_of.setdefault(row["image_id"], set())
                questions.update(plain_question(question["question"]) for question in row["questions"])
        self._questions = set().union(*self._questions_of.values())

    def of(
        self, image_ids: Sequence[str], question: str
    ) -> Literal["image_and_question", "image", "question", "nothing"]:
        """What a question about some images shares: the most telling of the four."""
        question = plain_question(question)
        shared = [image for image in image_ids if image in self._questions_of]
        if any(question in self._questions_of[image] for image in shared):
            return "image_and_question"
        if shared:
            return "image"
        return "question" if question in self._questions else "nothing"

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Candidates as pairs of answers to be compared."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medst_trl.data.schema import text_of


@dataclass(frozen=True, slots=True)
class Pair:
    """
    Two answers to one question.

    Attributes:
        id (`str`): The candidate's, with `/<k>` behind it where the candidate has more than two answers.
        candidate (`str`): Id of the candidate.
        image_ids (`tuple[str, ...]`): As the candidate has them.
        images (`tuple`): The images in any form that [`JudgeImage.read`] takes.
        history (`tuple[tuple[str, str], ...]`): Role and text of the turns before the question.
        question (`str`): The last user message.
        answers (`tuple[str, str]`): In the candidate's order.
    """

    id: str
    candidate: str
    image_ids: tuple[str, ...]
    images: tuple[Any, ...]
    history: tuple[tuple[str, str], ...]
    question: str
    answers: tuple[str, str]


def count_pairs(answers: list[str]) -> int:
    """How many pairs a candidate's answers make: (0, 1), (2, 3) and so on; an odd one is left over."""
    return len(answers) // 2


def pairs_of(candidate: Mapping[str, Any]) -> Iterator[Pair]:
    """The pairs of a candidate row (columns as in `schema.candidate_features`; `image_ids` may be missing)."""
    answers, prompt = candidate["answers"], candidate["prompt"]
    number = count_pairs(answers)
    for k in range(number):
        yield Pair(
            id=candidate["id"] if len(answers) == 2 else f"{candidate['id']}/{k}",
            candidate=candidate["id"],
            image_ids=tuple(candidate.get("image_ids") or ()),
            images=tuple(candidate["images"]),
            history=tuple((message["role"], text_of(message["content"])) for message in prompt[:-1]),
            question=text_of(prompt[-1]["content"]),
            answers=(answers[2 * k], answers[2 * k + 1]),
        )

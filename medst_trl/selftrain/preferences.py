# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""From judged answers to preference pairs that can be trained on: which pairs stay, and in which split."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medst_trl.data.assemble import DisjointSets, draw
from medst_trl.data.schema import text_of
from medst_trl.data.source import Rejected

from .benchmark_overlap import BenchmarkOverlap
from .judged_pairs import judged_pairs
from .near_duplicates import duplicate_pairs, near_duplicates
from .pair_lengths import length_balanced_rows, length_statistics


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Preferences:
    """
    Preference pairs, and what became of the others.

    Attributes:
        train, validation (`list[dict]`):
            Rows with the columns of `schema.preference_features` but `images`; `row` in their place says which row of
            the candidates (or of the file's rows) holds the images.
        rejected (`list[dict]`):
            `id`, `reason` and `value` of each pair set aside.
        counts (`dict`):
            `pairs` (all that came in), `train` and `validation` (pairs, images), `rejected` (number by reason, most
            frequent first), `shared_with_benchmarks` (pairs by what they share) and `lengths` (see
            [`length_statistics`], by split).
    """

    train: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


def build_preferences(
    candidates: "Dataset",
    judgements: Iterable[Mapping[str, Any]],
    *,
    benchmarks: Sequence["Dataset"] = (),
    keep_benchmark_images: bool = False,
    duplicate_similarity: float | None = 0.9,
    validation_share: float = 0.0,
    length_balanced: bool = False,
    seed: int = 0,
) -> Preferences:
    """
    Make preference pairs of a judge's verdicts.

    Set aside, by reason: what the judge dropped (`flip`, `tie`, ...: its own word), `no_verdict`, `unknown_candidate`,
    `other_answers` (the verdict is about answers that the candidate has not), and the reasons of
    [`select_preferences`].

    Args:
        candidates (`datasets.Dataset`):
            Columns `id`, `image_ids`, `prompt`, `answers`, as `medst generate` writes them. Images are not touched.
        judgements (iterable of `dict`):
            Lines of `judgements.jsonl`: `id`, `candidate`, `answers`, `scores`, `verdict`, `dropped`, `orders`,
            `model`, `prompt_version`.
        benchmarks, keep_benchmark_images, duplicate_similarity, validation_share, length_balanced, seed:
            See [`select_preferences`].

    Returns:
        [`Preferences`]. It may be empty; its counts say why.

    Example:

    ```python
    preferences = build_preferences(candidates, judgements, benchmarks=[benchmark], validation_share=0.05)
    print(preferences.counts)
    ```
    """
    pairs, rejected = judged_pairs(candidates, judgements)
    return select_preferences(
        pairs,
        rejected,
        benchmarks=benchmarks,
        keep_benchmark_images=keep_benchmark_images,
        duplicate_similarity=duplicate_similarity,
        validation_share=validation_share,
        length_balanced=length_balanced,
        seed=seed,
    )


def select_preferences(
    pairs: Sequence[dict],
    rejected: Iterable[Rejected] = (),
    *,
    benchmarks: Sequence["Dataset"] = (),
    keep_benchmark_images: bool = False,
    duplicate_similarity: float | None = 0.9,
    validation_share: float = 0.0,
    length_balanced: bool = False,
    seed: int = 0,
) -> Preferences:
    """
    Choose among preference pairs, wherever they come from, and split them by image.

    Set aside, by reason: `duplicate_id`, `chosen_equals_rejected`, `image_in_benchmark`,
    `image_and_question_in_benchmark`, `duplicate_pair` (the same prompt, images and answers, see
    [`duplicate_pairs`]), `near_duplicate_question`, `length_balance`.

    Args:
        pairs (`list[dict]`):
            Rows as [`Preferences`] has them.
        rejected (iterable of [`Rejected`], *optional*):
            What was set aside before; told and counted with the rest.
        benchmarks (sequence of `datasets.Dataset`, *optional*):
            Evaluation benchmarks (columns `image_id`, `questions`). Pairs about their images are set aside; pairs
            that share only a question with them are counted.
        keep_benchmark_images (`bool`, *optional*, defaults to `False`):
            Keep pairs about images of a benchmark. They are counted all the same.
        duplicate_similarity (`float`, *optional*, defaults to 0.9):
            Of two questions about one image that share this part of their words, the pair with the larger margin
            between its scores stays. `None` keeps all.
        validation_share (`float`, *optional*, defaults to 0.0):
            About this part of the images, with all their pairs, becomes validation.
        length_balanced (`bool`, *optional*, defaults to `False`):
            Leave out pairs until, in each split, the longer answer is chosen as often as it is rejected.
        seed (`int`, *optional*, defaults to 0):
            Draws validation images and what the balance leaves out.
    """
    overlap = BenchmarkOverlap(benchmarks)
    rejected, usable, ids, shared = list(rejected), [], set(), Counter()
    total = len(pairs) + len(rejected)
    for pair in pairs:
        question = text_of(pair["prompt"][-1]["content"])
        what = overlap.of(pair["image_ids"], question)
        shared[what] += 1
        if pair["id"] in ids:
            rejected.append(Rejected(pair["id"], "duplicate_id", pair["id"]))
        elif _same_text(pair):
            rejected.append(Rejected(pair["id"], "chosen_equals_rejected", text_of(pair["chosen"][-1]["content"])))
        elif what in ("image", "image_and_question") and not keep_benchmark_images:
            rejected.append(Rejected(pair["id"], f"{what}_in_benchmark", question))
        else:
            usable.append(pair)
        ids.add(pair["id"])

    usable = _without(usable, duplicate_pairs(usable), "duplicate_pair", rejected)
    if duplicate_similarity is not None:
        usable = _without(usable, near_duplicates(usable, duplicate_similarity), "near_duplicate_question", rejected)
    splits = dict(zip(("train", "validation"), _split(usable, validation_share, seed), strict=True))
    if length_balanced:
        for name, rows in splits.items():
            splits[name] = _without(rows, length_balanced_rows(rows, seed), "length_balance", rejected)

    counts = {
        "pairs": total,
        **{name: _count(rows) for name, rows in splits.items()},
        "rejected": dict(Counter(item.reason for item in rejected).most_common()),
        "shared_with_benchmarks": {what: shared[what] for what in ("image_and_question", "image", "question")},
        "lengths": {name: length_statistics(rows) for name, rows in splits.items() if rows},
    }
    return Preferences(**splits, rejected=[item.as_row() for item in rejected], counts=counts)


def _same_text(pair: Mapping) -> bool:
    chosen, rejected = (" ".join(text_of(pair[key][-1]["content"]).split()) for key in ("chosen", "rejected"))
    return chosen == rejected


def _without(pairs: list[dict], left_out: Mapping[int, Any], reason: str, rejected: list[Rejected]) -> list[dict]:
    """The pairs but those at the places `left_out`, which are set aside with its values."""
    rejected += [Rejected(pairs[place]["id"], reason, left_out[place]) for place in sorted(left_out)]
    return [pair for place, pair in enumerate(pairs) if place not in left_out]


def _split(pairs: list[dict], validation_share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Train and validation. Images that one pair shows together stay together; one without images goes by its id."""
    together = DisjointSets()
    for pair in pairs:
        for other in pair["image_ids"][1:]:
            together.join(pair["image_ids"][0], other)

    # Not the draw of `medst prepare`: of the images that it gave to training, none would be drawn again.
    keys = [together.find(pair["image_ids"][0]) if pair["image_ids"] else pair["id"] for pair in pairs]
    draws = {key: draw(f"preferences:{key}", seed) for key in keys}
    limit = validation_share
    if validation_share > 0 and len(draws) > 1:  # of a few images none might be drawn
        limit = max(limit, math.nextafter(min(draws.values()), 1.0))
    train, validation = [], []
    for pair, key in zip(pairs, keys, strict=True):
        (validation if draws[key] < limit else train).append(pair)
    return train, validation


def _count(pairs: list[dict]) -> dict[str, int]:
    return {"pairs": len(pairs), "images": len({image for pair in pairs for image in pair["image_ids"]})}

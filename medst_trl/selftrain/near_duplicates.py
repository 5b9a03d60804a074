# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Pairs about one image that are the same, or ask the same in nearly the same words."""

from collections import defaultdict
from collections.abc import Sequence

from medst_trl.data.schema import text_of
from medst_trl.selftrain.generate.filters import normalised


_DETERMINERS = frozenset({"a", "an", "the", "this", "that", "these", "those"})


def duplicate_pairs(pairs: Sequence[dict]) -> dict[int, str]:
    """
    Places of the pairs that set the same answers against each other as another with the same prompt and images, and
    that other one's id. Case, punctuation and which answer was chosen make no difference: of two that contradict each
    other one would undo what the other teaches.

    The pair with the larger margin between its scores stays, of equal ones the earlier.

    Args:
        pairs (`list[dict]`): Rows as in [`Preferences`].
    """
    kept, gone = {}, {}
    for place in sorted(range(len(pairs)), key=lambda place: (-margin(pairs[place]), place)):
        pair = pairs[place]
        prompt = tuple((turn["role"], normalised(text_of(turn["content"]))) for turn in pair["prompt"])
        answers = frozenset(normalised(text_of(pair[key][-1]["content"])) for key in ("chosen", "rejected"))
        winner = kept.setdefault((tuple(pair["image_ids"]), prompt, answers), pair)
        if winner is not pair:
            gone[place] = winner["id"]
    return gone


def near_duplicates(pairs: Sequence[dict], similarity: float) -> dict[int, str]:
    """
    Places of the pairs that give way to another about the same images, and what that other one asks.

    The pair with the larger margin between its scores stays, of equal ones the earlier. Pairs of one candidate
    (a question that was answered four times makes two pairs) do not give way to each other.

    Args:
        pairs (`list[dict]`): Rows as in [`Preferences`].
        similarity (`float`): Two questions are the same from this share of common words among all their words.
    """
    groups = defaultdict(list)
    for place, pair in enumerate(pairs):
        groups[tuple(pair["image_ids"])].append(place)
    gone = {}
    for places in groups.values():
        kept: list[tuple[set[str], dict]] = []
        for place in sorted(places, key=lambda place: (-margin(pairs[place]), place)):
            pair = pairs[place]
            words = question_words(text_of(pair["prompt"][-1]["content"]))
            same = (
                other
                for other_words, other in kept
                if _similarity(words, other_words) >= similarity and other["row"] != pair["row"]
            )
            if (other := next(same, None)) is not None:
                gone[place] = text_of(other["prompt"][-1]["content"])
            else:
                kept.append((words, pair))
    return gone


def margin(pair: dict) -> float:
    """How much better the chosen answer scored; 0 without scores."""
    chosen, rejected = pair["score_chosen"], pair["score_rejected"]
    return chosen - rejected if chosen is not None and rejected is not None else 0.0


def question_words(question: str) -> set[str]:
    """Its words without case, punctuation and determiners."""
    return set(normalised(question).split()) - _DETERMINERS


def _similarity(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second) if first or second else 1.0

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How long chosen and rejected answers are: judges like long ones, and a policy learns that before anything else."""

from collections.abc import Sequence

from medst_trl.data.assemble import draw
from medst_trl.data.schema import text_of


def length_statistics(pairs: Sequence[dict]) -> dict[str, float]:
    """
    Lengths of the answers of some pairs, in words.

    Args:
        pairs (`list[dict]`): With `chosen` and `rejected` messages; at least one.

    Returns:
        `dict`: `chosen_words` and `rejected_words` (means), `words_gap` (mean of chosen minus rejected),
        `longer_chosen`, `longer_rejected`, `same_length` (numbers of pairs), and `longer_chosen_share` among the pairs
        whose answers differ in length (None if there is none).
    """
    lengths = [_words(pair) for pair in pairs]
    longer = sum(chosen > rejected for chosen, rejected in lengths)
    shorter = sum(chosen < rejected for chosen, rejected in lengths)
    chosen_mean, rejected_mean = (sum(column) / len(pairs) for column in zip(*lengths, strict=True))
    return {
        "chosen_words": round(chosen_mean, 2),
        "rejected_words": round(rejected_mean, 2),
        "words_gap": round(chosen_mean - rejected_mean, 2),
        "longer_chosen": longer,
        "longer_rejected": shorter,
        "same_length": len(pairs) - longer - shorter,
        "longer_chosen_share": round(longer / (longer + shorter), 4) if longer + shorter else None,
    }


def length_balanced_rows(pairs: Sequence[dict], seed: int) -> dict[int, str]:
    """
    Places of pairs to leave out, so that the longer answer is chosen as often as it is rejected.

    Which ones is drawn from their ids and the seed, so it does not change with the order of the pairs.
    """
    longer, shorter = [], []
    for place, pair in enumerate(pairs):
        chosen, rejected = _words(pair)
        if chosen != rejected:
            (longer if chosen > rejected else shorter).append(place)
    more, fewer = (longer, shorter) if len(longer) > len(shorter) else (shorter, longer)
    drawn = sorted(more, key=lambda place: draw(f"length:{pairs[place]['id']}", seed))
    which = "longer answer chosen" if more is longer else "longer answer rejected"
    return dict.fromkeys(drawn[len(fewer) :], which)


def _words(pair: dict) -> tuple[int, int]:
    return tuple(len(text_of(pair[key][-1]["content"]).split()) for key in ("chosen", "rejected"))

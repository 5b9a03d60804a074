# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What to do when no pair is left to train on, by the reason most were dropped for."""

from collections.abc import Mapping
from pathlib import Path

from medst_trl.base.errors import UserError


_ADVICE = {
    "tie": "The judge sees no difference: generate answers at a higher temperature, or from more images.",
    "small_margin": "Lower --min_margin, or generate answers at a higher temperature.",
    "flip": "The judge's verdicts follow the order of the answers: choose a stronger judge (--model).",
    "unparsable": "The judge's replies could not be read: choose a stronger judge, or more --max_tokens.",
    "content_filter": "The judge refuses the content: choose another judge (--model).",
    "image_refused": "The judge refuses the images: choose a judge that sees images (--model).",
    "request_failed": "Calls to the judge failed: look at its server, and run the same command again.",
    "image_in_benchmark": "The images stand in a benchmark: generate from others.",
    "image_and_question_in_benchmark": "The images stand in a benchmark: generate from others.",
}


def nothing_left(reasons: Mapping[str, int], pairs: int, judgements: Path) -> UserError:
    """
    What to tell a user none of whose pairs can be trained on.

    Args:
        reasons (`dict[str, int]`): Pairs dropped, by reason.
        pairs (`int`): Pairs that were judged.
        judgements (`Path`): The file of all judgements.
    """
    most = max(reasons, key=reasons.get, default="tie")
    counted = ", ".join(f"{reason} {number:,}" for reason, number in reasons.items()) or "no candidate has two answers"
    return UserError(
        f"Of {pairs:,} pairs none is left to train on ({counted}). "
        f"{_ADVICE.get(most, 'Generate from more images.')} With any setting or candidates changed, add "
        "--overwrite true: replies already paid are kept, and judging the same pairs again costs nothing. The "
        f"judgements are in {judgements}."
    )

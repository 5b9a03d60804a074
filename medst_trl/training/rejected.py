# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Reject examples that cannot be trained on, before the first step."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers.trainer_utils import has_length

from medst_trl.base.errors import UserError
from medst_trl.base.processes import rank
from medst_trl.data.schema import with_stored_images
from medst_trl.data.source import BadRecord
from medst_trl.policy.families import EXTREME_ASPECT_RATIO, MAX_ASPECT_RATIO

from .images import check_image, images_of, with_images


logger = logging.getLogger(__name__)

WARN_ABOVE = 0.2  # fraction of rejected examples

REJECTION_REASONS = {
    "unreadable_image": "an image is missing, truncated or of an unknown format",
    EXTREME_ASPECT_RATIO: f"an image has an aspect ratio above {MAX_ASPECT_RATIO}:1",
    "malformed": "messages and images do not make a conversation",
    "nothing_to_train": "no answer, and no question that can be asked",
    "chosen_equals_rejected": "both answers say the same",
    "too_long": "too little of the answers fits into max_length={max_length} tokens, with prompt and image",
}


@dataclass(frozen=True)
class UsableExamples:
    """
    Examples that can be trained on, and why the others cannot.

    Args:
        dataset ([`~datasets.Dataset`]): Examples that can be trained on.
        rejected_records (`dict[str, str]`): The reason of each other example, by id (or index).
        rejected (`Counter`): How many examples are rejected, by reason; repeated ones count each time.
        truncated (`int`): Number of examples in the dataset that are truncated at `max_length`.
        lengths (`list[int]`): Tokens of each example of the dataset, a pair's prompt counted once.
    """

    dataset: Any
    rejected_records: dict[str, str]
    rejected: Counter[str]
    truncated: int
    lengths: list[int]

    def counts(self) -> dict[str, Any]:
        """How many examples are rejected, by reason, and how many truncated, for `stage.json`."""
        return {"set_aside": dict(self.rejected), "truncated": self.truncated}


def usable_examples(
    dataset: Any, check: Callable[[dict[str, Any]], tuple[int, bool]], max_length: int | None, name: str = "train"
) -> UsableExamples:
    """
    Reject the examples that cannot be trained on, with a warning if they are more than a fifth.

    A stream is read up to the first usable example and returned whole. The collator must reject its other examples.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Examples, see the collators.
        check (`Callable`):
            Returns the number of tokens of an example, which has the sizes of its images in their place, and whether
            it is truncated. Raises [`BadRecord`] if it cannot be trained on, or another error if it is malformed.
        max_length (`int` or `None`):
            Longest sequence in tokens, image tokens included.
        name (`str`, *optional*, defaults to `"train"`):
            What the dataset is called in messages.

    Raises:
        UserError: if none is left.
    """
    lengths, reasons, problem, truncated, is_stream = {}, {}, None, 0, not has_length(dataset)
    rows = tqdm(with_stored_images(dataset), f"checking {name}", disable=True if is_stream or rank() else None)
    for place, example in enumerate(rows):
        try:
            sizes = [check_image(image) for image in images_of(example)]
            length, is_truncated = check(with_images(example, sizes))
        except (BadRecord, UserError, KeyError, TypeError) as error:
            reasons[place] = str(example.get("id") or place), getattr(error, "reason", "malformed")
            problem = problem or getattr(error, "value", str(error))  # names a missing file
            continue
        except ValueError as error:  # a training stage takes it for one about its settings
            raise RuntimeError(
                f"Record {example.get('id') or place!r} of {name} cannot be checked: {error}"
            ) from error
        lengths[place] = length
        truncated += is_truncated
        if is_stream:
            return UsableExamples(dataset, {}, Counter(), 0, [])
    rejected = Counter(reason for _, reason in reasons.values())
    _report(name, len(lengths), rejected, max_length, problem)
    if reasons:
        dataset = dataset.select(lengths) if hasattr(dataset, "select") else Subset(dataset, list(lengths))
    return UsableExamples(dataset, dict(reasons.values()), rejected, truncated, list(lengths.values()))


def _report(name: str, kept: int, counts: Counter[str], max_length: int | None, problem: str | None) -> None:
    """Refuse a dataset without a usable example, and warn if many are rejected."""
    total = kept + counts.total()
    found = [f"{counts[key]} {key} ({text})" for key, text in REJECTION_REASONS.items() if counts[key]]
    why = f"{', '.join(found) or 'it is empty'}.".format(max_length=max_length)
    why += (f" {problem}" if problem else "") + (" Raise max_length." if counts["too_long"] else "")
    if not kept:
        raise UserError(f"No example of the {name} dataset can be used: {why}")
    if counts.total() > WARN_ABOVE * total and rank() == 0:
        logger.warning(f"{counts.total()} of the {total} examples in the {name} dataset are rejected: {why}")

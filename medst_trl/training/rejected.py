# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Rejected examples: why they are, what is refused before the first step because of them, and `rejected.jsonl`.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_jsonl, write_jsonl
from medst_trl.base.processes import rank
from medst_trl.data.schema import with_stored_images
from medst_trl.policy.families import EXTREME_ASPECT_RATIO

from .collator import DataCollatorForSelfQuestioning


logger = logging.getLogger(__name__)

MANY = 0.2  # fraction of rejected examples above which there is a warning
CHECKED = 100  # conversations that are collated before the first step

REJECTION_REASONS = {
    "too_long": "with its image, not even its first answer fits into max_length={max_length} tokens",
    "unreadable_image": "one of its images is missing, truncated, or of an unknown format",
    EXTREME_ASPECT_RATIO: "one of its images is too narrow for the model's processor",
    "nothing_to_train": "it has neither an answer nor a question that can be asked",
}


def datasets_by_name(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The datasets by name: `train`, and `eval` or `eval_NAME` for each of several in a `dict`."""
    datasets = {"train": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_{name}": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        datasets["eval"] = eval_dataset
    return datasets


def check_conversations(dataset: Any, collator: Any, name: str) -> None:
    """
    Refuse a dataset of which no conversation can be trained on, and warn if many are rejected.

    It collates up to 100 conversations, spread over the dataset or the first ones of a stream, and more only until one
    can be trained on.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Conversations.
        collator ([`DataCollatorForSelfQuestioning`]):
            The collator that rejects them. What another one rejects is not known.
        name (`str`):
            What the dataset is called in messages.

    Raises:
        UserError: if none can be trained on.
    """
    if not isinstance(collator, DataCollatorForSelfQuestioning):
        return
    rows, spread = with_stored_images(dataset), range(CHECKED)
    examples = rows
    if has_length(rows):
        spread = range(0, len(rows), max(1, ceil(len(rows) / CHECKED)))
        examples = (rows[place] for place in dict.fromkeys(chain(spread, range(len(rows)))))
    collator, kept, rejected = collator.for_evaluation(), 0, Counter()
    for number, example in enumerate(examples, 1):
        rejected.update(collator([example]).get("rejected", {}).values())
        kept = number - rejected.total()
        if kept and number >= len(spread):
            break
    check_rejected("conversation", name, kept, rejected, REJECTION_REASONS, collator.max_length)


def check_rejected(
    what: str, name: str, kept: int, rejected: Counter[str], reasons: Mapping[str, str], max_length: int | None
) -> None:
    """
    Refuse a dataset without a usable example, and warn if more than a fifth of those checked are rejected.

    Args:
        what (`str`): What an example is called.
        name (`str`): What the dataset is called.
        kept (`int`): Number of usable examples.
        rejected (`Counter`): Number of the others by reason.
        reasons (`dict[str, str]`): The reasons in words.
        max_length (`int` or `None`): Longest sequence in tokens.

    Raises:
        UserError: if none is usable.
    """
    found = [f"{rejected[key]} because {why}" for key, why in reasons.items() if rejected[key]] or ["it is empty"]
    why = "; ".join(found).format(max_length=max_length) + "."
    advice = " Raise max_length." if rejected["too_long"] else ""
    if not kept:
        raise UserError(f"No {what} of the {name} dataset can be used: {why}{advice}")
    share = rejected.total() / (kept + rejected.total())
    if share > MANY and rank() == 0:
        logger.warning(f"{share:.0%} of the {what}s checked in the {name} dataset are rejected: {why}{advice}")


class RejectedExamples(TrainerCallback):
    """
    Collects the training examples that the collator rejects, in `rejected.jsonl` of the output directory, and counts
    truncated ones.

    The collator rejects them during training, again in every epoch, because the data may be a stream that cannot be
    checked before. Each is listed once. The file is updated with each checkpoint, so it is complete after a resumed
    run.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            To gather the ids of all ranks.
        max_length (`int` or `None`):
            Longest sequence in tokens.
    """

    def __init__(self, accelerator: Accelerator, max_length: int | None):
        self.accelerator = accelerator
        self.max_length = max_length
        self.reasons: dict[str, str] = {}
        self.truncated: set[str] = set()

    def add(self, rejected: Mapping[str, str], truncated: Iterable[str]) -> None:
        """Add examples of this rank, with a warning the first time that one is rejected."""
        for example_id, reason in rejected.items():
            if example_id not in self.reasons:
                why = REJECTION_REASONS[reason].format(max_length=self.max_length)
                logger.warning(f"Record {example_id!r} is rejected: {why}.")
        self.reasons |= rejected
        self.truncated.update(truncated)

    def on_save(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir))

    on_train_end = on_save

    def write(self, directory: Path) -> dict[str, int]:
        """
        Write `rejected.jsonl`, keeping what an earlier part of the run wrote. To be called on every rank.

        Returns:
            `dict[str, int]`: The number of examples by reason.
        """
        reasons = dict(gather_object(list(self.reasons.items())))
        path = directory / "rejected.jsonl"
        reasons = {row["id"]: row["reason"] for row in read_jsonl(path)} | reasons
        if reasons and self.accelerator.is_main_process:
            values = {"too_long": f"max_length={self.max_length}"}
            rows = ({"id": key, "reason": why, "value": values.get(why, "")} for key, why in sorted(reasons.items()))
            write_jsonl(path, rows)
        counts = Counter(reasons.values())
        return {reason: counts[reason] for reason in REJECTION_REASONS if counts[reason]}

    def count_truncated(self) -> int:
        """Number of examples truncated at `max_length` on any rank. To be called on every rank."""
        return len(set(gather_object(sorted(self.truncated))))

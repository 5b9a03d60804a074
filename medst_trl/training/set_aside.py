# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Examples that cannot be trained on, or not to their end: remembered, counted and written down."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from transformers import TrainerCallback


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

REASONS = {
    "too_long": "with its image, not even its first answer fits into max_length={max_length} tokens",
    "unreadable_image": "an image of it is missing, cut short, or of no format known here",
    "nothing_to_train": "it holds neither an answer nor a question to be asked",
}


class SetAsideExamples(TrainerCallback):
    """
    The training examples that were left out, kept in `rejected.jsonl` of the run's folder, and those that end early.

    The collator meets them again in every epoch; each is written once. The file is brought up to date with each
    checkpoint, so that a run that is killed and resumed still names all of them.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            To bring the ids of all ranks together.
        max_length (`int` or `None`):
            What they did not fit into, in tokens.
    """

    def __init__(self, accelerator: "Accelerator", max_length: int | None):
        self.accelerator = accelerator
        self.max_length = max_length
        self.reasons: dict[str, str] = {}
        self.truncated: set[str] = set()

    def add(self, set_aside: Mapping[str, str], truncated: Iterable[str]) -> None:
        """Remembers examples of this rank, saying so when one is left out for the first time."""
        for example_id, reason in set_aside.items():
            if example_id not in self.reasons:
                why = REASONS[reason].format(max_length=self.max_length)
                logger.warning("Record %r is set aside: %s.", example_id, why)
        self.reasons |= set_aside
        self.truncated.update(truncated)

    def on_save(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir))

    def on_train_end(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir))

    def write(self, folder: Path) -> dict[str, int]:
        """
        Writes `rejected.jsonl`, adding to what an earlier part of the run left. To be called on every rank.

        Returns:
            `dict[str, int]`: The number of examples by reason.
        """
        reasons = dict(gather_object(list(self.reasons.items())))
        path = folder / "rejected.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            reasons = {row["id"]: row["reason"] for row in rows} | reasons
        if reasons and self.accelerator.is_main_process:
            rows = [
                {
                    "id": example_id,
                    "reason": reason,
                    "value": f"max_length={self.max_length}" if reason == "too_long" else "",
                }
                for example_id, reason in sorted(reasons.items())
            ]
            temporary = path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            temporary.replace(path)
        return {reason: list(reasons.values()).count(reason) for reason in REASONS if reason in reasons.values()}

    def count_truncated(self) -> int:
        """Number of examples that ended early at `max_length` on any rank. To be called on every rank."""
        return len(set(gather_object(sorted(self.truncated))))

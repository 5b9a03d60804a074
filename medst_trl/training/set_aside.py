# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Examples that cannot be trained on: remembered, counted and written down."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from transformers import TrainerCallback


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class SetAsideExamples(TrainerCallback):
    """
    The examples that did not fit into `max_length`, kept in `rejected.jsonl` of the run's folder.

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
        self.ids: set[str] = set()

    def add(self, ids: list[str]) -> None:
        """Remembers examples of this rank, saying so at the first meeting."""
        for example_id in set(ids) - self.ids:
            logger.warning(
                "Record %r is set aside: with its image, not even its first answer fits into max_length=%s tokens.",
                example_id,
                self.max_length,
            )
        self.ids.update(ids)

    def on_save(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir))

    def on_train_end(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir))

    def write(self, folder: Path) -> int:
        """
        Writes `rejected.jsonl`, adding to what an earlier part of the run left. Returns the number of examples in it.
        """
        ids = set(gather_object(sorted(self.ids)))
        path = folder / "rejected.jsonl"
        if path.exists():
            ids |= {json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()}
        if ids and self.accelerator.is_main_process:
            rows = ({"id": i, "reason": "too_long", "value": f"max_length={self.max_length}"} for i in sorted(ids))
            temporary = path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            temporary.replace(path)
        return len(ids)

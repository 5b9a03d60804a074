# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How training ended: a mean over the last logs, since a single one may be of one small batch."""

from collections.abc import Sequence
from typing import Any


def end_of_log(log_history: Sequence[dict[str, Any]], share: float = 0.2) -> dict[str, float]:
    """
    The mean of each figure over the last part of a Trainer's log; of evaluations the last one.

    Args:
        log_history (sequence of `dict`):
            `trainer.state.log_history`, as `trainer_state.json` keeps it.
        share (`float`, *optional*, defaults to `0.2`):
            Which part of the log's training entries counts, at least one.

    Returns:
        `dict[str, float]`: by name; empty where nothing was logged.
    """
    steps = [entry for entry in log_history if "loss" in entry]
    last = steps[-max(1, round(share * len(steps))) :] if steps else []
    names = dict.fromkeys(name for entry in last for name in entry)
    means = {}
    for name in names:
        values = [entry[name] for entry in last if isinstance(entry.get(name), int | float)]
        if values:
            means[name] = sum(values) / len(values)
    for entry in log_history:
        means |= {name: value for name, value in entry.items() if name.startswith("eval_") or name == "train_loss"}
    return means

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a Trainer's log says about the end of a run."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any


_LAST_PART = 0.2  # of the logged steps, averaged for statements about the end of training


def end_of_log(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """
    Average each figure over the last fifth of a Trainer's log, because one entry may be of a small batch.

    Args:
        log_history (sequence of `dict`):
            `trainer.state.log_history`, as `trainer_state.json` keeps it.

    Returns:
        `dict[str, float]`: By name. `train_loss` and the figures of evaluations are those logged last. Empty if
        nothing was logged.
    """
    steps = [entry for entry in log_history if "loss" in entry]
    values = defaultdict(list)
    for entry in steps[-max(1, round(_LAST_PART * len(steps))) :]:
        for name, value in entry.items():
            if isinstance(value, int | float):
                values[name].append(value)
    means = {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
    for entry in log_history:
        means |= {name: value for name, value in entry.items() if name.startswith("eval_") or name == "train_loss"}
    return means

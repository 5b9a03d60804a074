# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Training curves of a stage, from the log of its trainer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from .charts import line_chart
from .run_directory import Run, StageRun
from .text import is_number, number


DISPLACED = 0.05  # nats: a smaller loss of log-probability is not called a displacement
LAST_PART = 0.2  # of the logged values, averaged for statements about the end of training

Log = Sequence[Mapping[str, Any]]

# Title, unit of y, keys of the log, and a level to draw with its name. The log of preference training has rewards.
_SUPERVISED = (
    ("Loss", "nats per token", ("loss", "loss_question", "loss_answer", "eval_loss"), None),
    ("Next-token accuracy", "share of tokens", ("question_accuracy", "answer_accuracy"), None),
)
_PREFERENCE = (
    ("Loss", "nats per pair", ("loss", "eval_loss"), (math.log(2), "ln 2: sigmoid loss before training")),
    ("Reward margin", "nats × beta", ("rewards/margins", "eval_rewards/margins"), (0.0, "")),
    ("Pairs in the judge's order", "share", ("rewards/accuracies", "eval_rewards/accuracies"), (0.5, "by chance")),
    ("Log-probability of an answer", "nats", ("logps/chosen", "logps/rejected"), None),
    ("Change from the reference", "nats", ("logratios/chosen", "logratios/rejected"), (0.0, "")),
    ("Length of an answer", "tokens", ("lengths/chosen", "lengths/rejected"), None),
)


def read_log(run: Run, stage: StageRun) -> list[dict[str, Any]]:
    """Return the log of a trainer: of the finished run, or of the newest checkpoint of an unfinished one."""
    checkpoints = sorted(stage.directory.glob("checkpoint-*[0-9]"), key=lambda path: path.name.zfill(30), reverse=True)
    for path in (place / "trainer_state.json" for place in (stage.directory, *checkpoints)):
        content = run.read_json(path)
        if content is None:
            continue
        if isinstance(content.get("log_history"), list):
            return [entry for entry in content["log_history"] if isinstance(entry, dict)]
        run.notes.append(f"{run.name(path)} has no log_history and is left out.")
    return []


def training_charts(log: Log) -> list[Markup]:
    """Draw the charts of supervised or preference training for which the log has values."""
    charts = []
    for title, unit, keys, level in _PREFERENCE if _points(log, "rewards/margins") else _SUPERVISED:
        lines = {key: _points(log, key) for key in keys}
        charts.append(line_chart(title, lines, x_label="optimizer step", y_label=unit, level=level))
    return [chart for chart in charts if chart]


def displacement(log: Log) -> str | None:
    """
    State whether the chosen answers became less likely than under the reference (likelihood displacement); None
    if the log does not show it.
    """
    keys = ("logratios/chosen", "logratios/rejected", "rewards/margins")
    chosen, rejected, margin = map(final_values(log, keys).get, keys)
    if chosen is None:
        return None
    if chosen >= -DISPLACED:
        likely = "no less likely than" if chosen >= 0 else "about as likely as"
        note = "" if chosen or rejected or margin else " The policy has not changed (is the warm-up too long?)."
        return f"The chosen answers are {likely} under the reference ({number(chosen, 3, '+')} nats).{note}"
    reason = ""
    if margin is not None and margin > 0 and rejected is not None and rejected < chosen:
        reason = "The margin grows because the rejected answers lose even more: it does not show a better model. "
    elif margin is not None and margin <= 0:
        reason = "The margin has not grown either: the rejected answers have not lost more. "
    return (
        "Likelihood displacement: at the end of training the chosen answers are less likely than under the reference, "
        f"by {number(-chosen, 3)} nats on average. {reason}Possible remedies: the sft term in the loss (loss_type: "
        "[sigmoid, sft]), a lower learning rate, a higher beta."
    )


def final_values(log: Log, keys: Iterable[str]) -> dict[str, float]:
    """Return the mean of each figure over the end of training."""
    logged = {key: [y for _, y in _points(log, key)] for key in keys}
    return {key: fmean(ys[-max(1, round(LAST_PART * len(ys))) :]) for key, ys in logged.items() if ys}


def _points(log: Log, key: str) -> list[tuple[float, float]]:
    pairs = [(entry.get("step"), entry.get(key)) for entry in log]
    return [pair for pair in pairs if all(is_number(value) and math.isfinite(value) for value in pair)]

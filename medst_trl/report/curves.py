# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Training curves of a stage, from the log that its trainer keeps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .charts import Line, line_chart
from .run_folder import Run, StageRun
from .text import number


DISPLACED = 0.05  # nats: what the chosen answers have to lose before it is called a displacement
DEFAULT_BETA = 0.1  # TRL's, where a log has rewards only and the bound has to be in nats × beta
LAST_PART = 0.2  # of the logged values, averaged for what is said of the end of training

# Title, unit of y, keys of the log, a level to draw and its name. Of two with one title, the first that has values.
_CHARTS = {
    "sft": (
        ("Loss", "nats per token", ("loss", "loss_question", "loss_answer", "eval_loss"), None),
        ("Next-token accuracy", "share of tokens", ("question_accuracy", "answer_accuracy"), None),
    ),
    "dpo": (
        ("Loss", "nats per pair", ("loss", "eval_loss"), (math.log(2), "ln 2, a sigmoid loss at its start")),
        ("Reward margin", "nats × beta", ("rewards/margins", "eval_rewards/margins"), (0.0, "")),
        (
            "Pairs ordered as the judge has them",
            "share",
            ("rewards/accuracies", "eval_rewards/accuracies"),
            (0.5, "by chance"),
        ),
        ("Log-probability of an answer", "nats", ("logps/chosen", "logps/rejected"), None),
        ("Its change against the reference", "nats", ("logratios/chosen", "logratios/rejected"), (0.0, "")),
        ("Its change against the reference", "nats × beta", ("rewards/chosen", "rewards/rejected"), (0.0, "")),
        ("Length of an answer", "tokens", ("lengths/chosen", "lengths/rejected"), None),
    ),
}


def read_log(run: Run, stage: StageRun) -> list[dict[str, Any]]:
    """A trainer's log: of the finished run, or of the newest checkpoint of one that is not."""
    found = [stage.folder / "trainer_state.json"]
    checkpoints = [path for path in stage.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    found += sorted(
        (path / "trainer_state.json" for path in checkpoints),
        key=lambda path: -int(path.parent.name.rpartition("-")[2]),
    )
    for path in found:
        content = run.read_json(path)
        if content is None:
            continue
        if isinstance(content.get("log_history"), list):
            return [entry for entry in content["log_history"] if isinstance(entry, dict)]
        run.notes.append(f"{run.name(path)} has no log_history and is left out.")
    return []


def training_charts(stage: str, log: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """The charts of `"sft"` or `"dpo"` for which the log has values."""
    charts = {}
    for title, unit, keys, level in _CHARTS[stage]:
        lines = [Line(key, _points(log, key), dashed=True if key.startswith("eval_") else None) for key in keys]
        if title not in charts and (
            chart := line_chart(title, lines, x_label="optimizer step", y_label=unit, level=level)
        ):
            charts[title] = chart
    return list(charts.values())


def displacement(log: Sequence[Mapping[str, Any]]) -> str | None:
    """
    Whether the chosen answers became less likely than under the reference, told for the page; None where the log says
    nothing of it.
    """
    kind, unit, least = "logratios", "nats", DISPLACED
    if not _points(log, "logratios/chosen"):
        kind, unit, least = "rewards", "nats × beta", DISPLACED * DEFAULT_BETA
    ends = last_values(log, (f"{kind}/chosen", f"{kind}/rejected", "rewards/margins"))
    chosen, rejected, margin = (ends.get(key) for key in (f"{kind}/chosen", f"{kind}/rejected", "rewards/margins"))
    if chosen is None:
        return None
    if chosen >= -least:
        likely = "no less likely than" if chosen >= 0 else "about as likely as"
        return f"The chosen answers are {likely} under the reference ({number(chosen, 3, '+')} {unit})."
    why = ""
    if margin is not None and margin > 0 and rejected is not None and rejected < chosen:
        why = (
            "The margin grows because the rejected ones fall further; a margin that looks well is then no sign of a "
            "better model. "
        )
    elif margin is not None and margin <= 0:
        why = "The margin has not grown either: the rejected ones have not lost more. "
    return (
        f"Likelihood displacement: at the end the chosen answers are less likely than under the reference, by "
        f"{number(-chosen, 3)} {unit} on average. {why}What helps: the sft term in the loss (loss_type: "
        "[sigmoid, sft]), a lower learning rate, a higher beta."
    )


def last_values(log: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    """Mean of each figure over the end of training."""
    found = {key: [y for _, y in _points(log, key)] for key in keys}
    return {key: mean_of_end(values) for key, values in found.items() if values}


def mean_of_end(values: Sequence[float]) -> float:
    values = values[-max(1, round(LAST_PART * len(values))) :]
    return math.fsum(values) / len(values)


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(entry.get("step"), entry.get(key)) for entry in log]
    return [(x, y) for x, y in pairs if _is_number(x) and _is_number(y)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

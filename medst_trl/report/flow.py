# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The way of the data: what each stage made, and what it left out for which reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from markupsafe import Markup

from .charts import Bar, Group, bar_chart
from .judging import Judging
from .run_folder import Run, StageRun
from .text import place, words


WAY = ("prepare", "sft", "generate", "judge", "dpo", "evaluate")
DROPPED = ("rejected", "set_aside", "dropped")  # in `counts`: reason to number
UNNAMED = ("datasets", "notes")  # headings in `counts` that say nothing more
MOST_REASONS = 12

# Settings worth a place on the page; all of them are in each stage's stage.json.
SHOWN = (
    "source", "num_phantoms", "num_test_phantoms", "num_unlabelled_phantoms", "validation_fraction", "image_disjoint",
    "model_name_or_path", "base_model_name_or_path", "model", "dataset", "images", "candidates", "benchmark",
    "benchmarks", "split", "engine", "num_questions", "num_answers", "describe_first", "temperature", "top_k",
    "top_p", "question_temperature", "skip_records", "prompt_version", "order", "min_margin", "oracle_error_rate",
    "max_cost", "validation_share", "length_balanced", "keep_benchmark_images",
    "sq_ratio", "sq_first_turn", "question_loss_weight", "loss_type", "loss_weights", "beta", "share_prefix",
    "learning_rate", "vision_learning_rate", "projector_learning_rate", "lr_scheduler_type", "warmup_steps",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
    "use_lora", "lora_r", "vision_lora_r", "train_vision", "dtype", "bf16", "controls", "closed_rule",
    "max_new_tokens", "max_records", "seed",
)  # fmt: skip


@dataclass
class Step:
    """
    One stage on the way.

    Attributes:
        stage ([`StageRun`]): The stage.
        made (`list`): What it made: name and number.
        dropped (`dict`): Reason to number.
        chart (`Markup`): What was kept and dropped, as bars.
    """

    stage: StageRun
    made: list[tuple[str, float]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    chart: Markup | None = None


def way(run: Run, judgings: Mapping[str, Judging | None]) -> list[tuple[int, list[list[Step]]]]:
    """
    The stages in the order in which data goes through them: by round, and in a round by kind of stage, of which there
    may be several (evaluations).

    Args:
        run ([`Run`]): The run.
        judgings (`dict`): Statistics of its judge stages by their names.
    """
    found = [_step(run, stage, judgings.get(stage.name)) for stage in run.stages if stage.stage in WAY]
    return [
        (number, [list(same) for _, same in groupby(steps, lambda step: step.stage.stage)])
        for number, steps in groupby(found, lambda step: step.stage.round)
    ]


def missing(run: Run) -> list[str]:
    """Stages of the way that the run does not have (yet)."""
    return [stage for stage in WAY if not run.of(stage)]


def _step(run: Run, stage: StageRun, judging: Judging | None) -> Step:
    step = Step(stage)
    counts = stage.counts
    kept = None
    if stage.stage == "judge":
        preferences = counts.get("preferences") if isinstance(counts.get("preferences"), dict) else {}
        counts = {key: value for key, value in preferences.items() if key in ("train", "validation", *DROPPED)}
        if judging:
            step.made.append(("pairs of answers", judging.pairs))
    _add(run, step, "", counts)
    if stage.stage == "generate" and _is_count(counts.get("candidates")):
        kept = counts["candidates"]
    if judging:
        step.dropped = step.dropped or judging.dropped
        kept = judging.pairs - sum(step.dropped.values())
    step.chart = _bars(step.dropped, kept)
    return step


def _add(run: Run, step: Step, name: str, value: Any) -> None:
    """Sort what a stage counted, at whatever depth, into what it made and what it left out."""
    if _is_count(value):
        step.made.append((name, value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in DROPPED and isinstance(inner, dict):
                for reason, n in inner.items():
                    if _is_count(n) and n:
                        step.dropped[reason] = step.dropped.get(reason, 0) + n
            else:
                prefix = f"{name}: " if name else ""
                told = words(place(key, run.folder))
                _add(run, step, name if key in UNNAMED else prefix + told, inner)


def _bars(dropped: Mapping[str, int], kept: int | None) -> Markup | None:
    if not dropped and kept is None:
        return None
    ordered = sorted(dropped.items(), key=lambda item: -item[1])
    bars = [] if kept is None else [Bar("kept", kept)]
    bars += [Bar(words(reason), n, muted=True) for reason, n in ordered[:MOST_REASONS]]
    if rest := sum(n for _, n in ordered[MOST_REASONS:]):
        bars.append(Bar(f"{len(ordered) - MOST_REASONS} other reasons", rest, muted=True))
    title = "Left out, by reason" if kept is None else "Kept, and left out by reason"
    return bar_chart(title, [Group("", bars)], digits=None, axis=False)


def settings(run: Run, stage: StageRun) -> list[tuple[str, str]]:
    """Name and value of the settings that matter, those left empty or off not among them."""
    shown = []
    for key in SHOWN:
        value = stage.settings.get(key)
        if value is None or value is False or value in ("", [], -1) or isinstance(value, dict):
            continue
        items = value if isinstance(value, list) else [value]
        shown.append((key, ", ".join(place(item, run.folder) for item in items)))
    return shown


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

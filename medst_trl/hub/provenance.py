# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How a result was made, told by the `stage.json` of its folder and of the folders it was made from."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medst_trl.base.redaction import hide_secrets, is_secret_key
from medst_trl.pipeline.record import FILE_NAME


# Of the many arguments of a Trainer, those that say what was learned.
TRAINING_SETTINGS = (
    "learning_rate", "vision_learning_rate", "projector_learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_ratio", "warmup_steps",
    "weight_decay", "max_grad_norm", "max_length", "sq_ratio", "sq_first_turn", "question_loss_weight", "beta",
    "loss_type", "loss_weights", "label_smoothing", "use_lora", "lora_r", "lora_alpha", "lora_dropout",
    "vision_lora_r", "vision_lora_alpha", "train_vision", "load_in_4bit", "bf16", "fp16", "seed",
)  # fmt: skip

# Settings of the other stages that say where things lie or how a run was carried out.
_NOT_TOLD = re.compile(
    r"path|folder|dir$|url|file|cache|variable|workers|overwrite|concurrency|_batch$|_pattern$|dry_run"
)


@dataclass
class Step:
    """
    One stage on the way to a result, as it may be published: without paths, names of files or secrets.

    Attributes:
        stage (`str`): Its name.
        settings, counts, metrics, versions (`dict`): From its record.
        inputs (`dict[str, str]`): What it read: a Hub id with its revision, or a local folder by its SHA-256.
    """

    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def steps_to(folder: Path, run: Path | None = None) -> list[Step]:
    """
    The stages that led to `folder`, in the order of the data's way, as far as their folders are still there.

    Args:
        folder (`Path`): A stage's folder, or a dataset inside it.
        run (`Path`, *optional*): Folder of the run, to look in for inputs that have moved.
    """
    steps: dict[Path, Step] = {}
    _collect(folder, run, steps)
    return list(steps.values())


def looks_local(value: str) -> bool:
    """Whether a text names a place on this machine (a Hub id or the name of a model does not)."""
    if value.startswith(("/", "~", "./", "../", "file:")) or "\\" in value:
        return True
    return value.count("/") > 1 or ("/" in value and os.path.exists(value))


def _collect(folder: Path, run: Path | None, steps: dict[Path, Step]) -> None:
    record_path = next((place / FILE_NAME for place in (folder, folder.parent) if (place / FILE_NAME).is_file()), None)
    if record_path is None or record_path.resolve() in steps:
        return
    try:
        step, inputs = _step(json.loads(record_path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):  # not ours, or damaged: the card says less
        return
    steps[record_path.resolve()] = step  # before its inputs: no way leads back here
    for sources in inputs.values():
        for source in sources:
            if "path" in source:
                _collect(_found(Path(source["path"]), run), run, steps)
    steps[record_path.resolve()] = steps.pop(record_path.resolve())  # they come first


def _step(record: dict) -> tuple[Step, dict[str, list[dict]]]:
    stage, inputs = record["stage"], record["inputs"]
    step = Step(
        stage=stage,
        settings=_public_settings(stage, record.get("settings", {}), inputs),
        inputs={name: ", ".join(map(_describe, sources)) for name, sources in inputs.items() if sources},
        counts=record.get("counts", {}),
        metrics=record.get("metrics", {}),
        versions={name: value for name, value in record.get("versions", {}).items() if value},
    )
    return step, inputs


def _found(path: Path, run: Path | None) -> Path:
    """Where an input lies now: where it was, or under its last names in the folder of the run."""
    places = [path] + ([run / Path(*path.parts[-2:]), run / path.name] if run else [])
    return next((place for place in places if place.exists()), path)


def _public_settings(stage: str, settings: dict[str, Any], inputs: dict) -> dict[str, Any]:
    if stage in ("sft", "dpo"):
        told = {name: settings.get(name) for name in TRAINING_SETTINGS}
    else:
        told = {name: value for name, value in settings.items() if not _NOT_TOLD.search(name) and name not in inputs}
    return {
        name: hide_secrets(value)
        for name, value in told.items()
        if isinstance(value, str | int | float) or (value and isinstance(value, list) and name in TRAINING_SETTINGS)
        if not is_secret_key(name) and not (isinstance(value, str) and looks_local(value))
    }


def _describe(source: dict) -> str:
    if "hub_id" in source:
        return f"{source['hub_id']} at {source['revision'] or 'an unknown revision'}"
    return f"a local folder or file (SHA-256 {str(source.get('sha256'))[:12]})"

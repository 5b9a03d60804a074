# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""History of a result, from the `stage.json` of its directory and of the directories of its inputs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medst_trl.base.hub_ids import is_hub_id, looks_local
from medst_trl.base.redaction import hide_secrets, is_private_key
from medst_trl.data.source import SOURCES
from medst_trl.pipeline.record import RECORD_FILE, read_record
from medst_trl.pipeline.stage import STAGES


@dataclass(frozen=True)
class HistoryStep:
    """
    One stage that led to a result, in a form that can be published: without paths, file names and secrets.

    Attributes:
        stage (`str`): Its name.
        settings, versions (`dict`): From its record.
        inputs (`dict[str, str]`): What it read: a Hub id with its revision, or a local directory by its SHA-256.
        counts (`dict`): Its counts and metrics.
        source (`dict`, *optional*): Fields of the [`~medst_trl.data.source.SourceCard`] of the data that it read.
    """

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Any]
    source: dict[str, Any] | None
    versions: dict[str, str]


def nearest_record(directory: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return path and content of the `stage.json` of a directory or its parent. Damaged content is empty."""
    for place in (directory, directory.parent):
        if (place / RECORD_FILE).is_file():
            return place / RECORD_FILE, read_record(place)
    return None, {}


def steps_to(directory: Path, run: Path | None = None) -> list[HistoryStep]:
    """
    Return the stages that led to a result, in pipeline order, as far as their directories still exist.

    Args:
        directory (`Path`): Output of a stage, or a dataset inside it.
        run (`Path`, *optional*): The run directory, in which inputs that have moved are searched.
    """
    steps: dict[Path, HistoryStep] = {}
    _collect(directory, run, steps)
    return list(steps.values())


def _collect(directory: Path, run: Path | None, steps: dict[Path, HistoryStep]) -> None:
    path, record = nearest_record(directory)
    if path is None or path.resolve() in steps:
        return
    try:
        step = _step(record)
        inputs = [source["path"] for sources in record["inputs"].values() for source in sources if "path" in source]
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged, or of another program: the card says less
        return
    steps[path.resolve()] = step  # before its inputs, in case of a circle
    for source in map(Path, inputs):
        moved = [run / Path(*source.parts[-2:]), run / source.name] if run else []
        _collect(next((place for place in (source, *moved) if place.exists()), source), run, steps)
    steps[path.resolve()] = steps.pop(path.resolve())  # its inputs come first


def _step(record: dict[str, Any]) -> HistoryStep:
    inputs = record["inputs"]
    return HistoryStep(
        stage=record["stage"],
        settings=_public_settings(record["stage"], record.get("settings", {}), inputs),
        inputs={name: ", ".join(map(_describe, sources)) for name, sources in inputs.items() if sources},
        counts=record.get("counts", {}) | record.get("metrics", {}),
        source=_source_card(record),
        versions={name: version for name, version in record.get("versions", {}).items() if version},
    )


def _public_settings(stage: str, settings: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the settings to publish, without paths and secrets. Of a stage that is not registered, only numbers."""
    if stage in STAGES:
        shown = STAGES.get(stage).shown_settings(settings)
    else:
        shown = {name: value for name, value in settings.items() if isinstance(value, int | float)}
    public = {}
    for name, value in shown.items():
        items = [str(item) for item in (value if isinstance(value, list) else [value])]
        if name not in inputs and not is_private_key(name) and not any(map(looks_local, items)):
            public[name] = hide_secrets(", ".join(items))
    return public


def _source_card(record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the card in the record, or that of the registered source if an earlier version wrote the record."""
    card, name = record.get("source_card"), record.get("settings", {}).get("source")
    if card is None and name in SOURCES:
        card = asdict(SOURCES.get(name).card)
    return card if isinstance(card, dict) and isinstance(card.get("title"), str) else None


def _describe(source: dict[str, Any]) -> str:
    if "hub_id" in source:
        return f"{source['hub_id']} at {source['revision'] or 'an unknown revision'}"
    return f"a local directory or file (SHA-256 {str(source.get('sha256'))[:12]})"


def read_merged(directory: Path) -> dict[str, Any] | None:
    """
    Read what the record of `medst merge` says.

    Args:
        directory (`Path`): A model.

    Returns:
        `dict` or `None`: `base`, the Hub id of the base with its revision, None for a local one; `adapter` as
        Markdown; `adapter_path`, which no card shows; `dtype` of the weights; `float32_difference` and
        `stored_difference`, the largest differences of log-probabilities from the adapter's; `trained_in_4bit`,
        whether the adapter's base was quantized to 4 bits while it was trained. None if the model was not made by
        `medst merge` or its record is missing.
    """
    _, record = nearest_record(directory)
    try:
        merged, (adapter,) = record["merged"], record["inputs"]["model_name_or_path"]
        base, facts = merged["base"], merged | merged["proof"]
        shown = {name: facts[name] for name in ("dtype", "float32_difference", "stored_difference", "trained_in_4bit")}
        return shown | {
            "base": with_revision(base, merged["base_revision"]) if is_hub_id(base) else None,
            "adapter": hub_id_text(adapter["hub_id"], merged["adapter_revision"])
            if "hub_id" in adapter
            else f"a local adapter (SHA-256 {str(adapter.get('sha256'))[:12]})",
            "adapter_path": adapter.get("path"),
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def with_revision(name: str | None, revision: str | None) -> str | None:
    """Return a Hub id with its revision: `org/name@revision`."""
    return f"{name}@{revision}" if name and revision else name


def hub_id_text(hub_id: str, revision: str | None = None) -> str:
    """Return a Hub id as Markdown, with the revision that it carries or that is given."""
    name, _, own = hub_id.partition("@")
    revision = revision or own
    return f"`{name}`" + (f" (revision {revision[:12]})" if revision else "")

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The lineage of a result: the stages that led to it, by their records, and the images that its model was trained on.

A model carries these images as `training_images.json`: their ids, which are hashes of the pixels, and nothing else
about them. So a published model can be checked against a benchmark without its training data.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_jsonl, read_object, write_json
from medst_trl.base.fingerprints import fingerprint, same_source
from medst_trl.base.hub_ids import cached_repository, hub_answers, split_revision
from medst_trl.data.groups import NEAR_COPY_BITS
from medst_trl.data.loading import fingerprint_dataset, load_records
from medst_trl.data.overlap import Inventory, why_groups_not_compared
from medst_trl.evaluation.contamination import FIGURES, count_shared

from .record import RECORD_FILE, read_record
from .stage import MODEL, NO_DATASETS, STAGES


if TYPE_CHECKING:
    from datasets import Dataset

TRAINING_IMAGES_FILE = "training_images.json"
_HASH = re.compile("[0-9a-f]{64}")


def nearest_record(directory: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return path and content of the `stage.json` of a directory or its parent. Damaged content is empty."""
    for place in (directory, directory.parent):
        if (place / RECORD_FILE).is_file():
            return place / RECORD_FILE, read_record(place)
    return None, {}


def possible_places(path: str, near: Path) -> list[Path]:
    """
    Return the existing places of a recorded path: the recorded one, and those below `near` and its parents, in case
    the run was moved or copied.
    """
    roots, parts = (near, *near.absolute().parents[:3]), Path(path).parts  # round_1/judge/preferences ... sft
    places = [Path(path), *(root / Path(*parts[-n:]) for root in roots for n in (3, 2, 1))]
    here = filter(os.path.exists, places)  # not `Path.exists`: it raises for other users' paths
    return list({os.path.realpath(place): place for place in here}.values())


def find_source(source: Mapping[str, Any], near: Path) -> Path | None:
    """
    Return where the content of a fingerprint is on this machine; None if it is not, or was changed. For `near`, see
    [`possible_places`]. A dataset of the Hub is looked for in the local cache.
    """
    if "hub_id" in source:
        place = cached_repository(source["hub_id"], "dataset") / "snapshots" / str(source.get("revision"))
        return place if place.exists() else None
    for place in possible_places(source["path"], near):
        with suppress(OSError, UserError):  # it cannot be read
            if same_source(source, fingerprint_dataset(place)):
                return place
    return None


def records_of(directory: Path) -> dict[Path, dict[str, Any]]:
    """
    Read the records of the stages that led to a result, as far as their directories exist and are unchanged.

    Args:
        directory (`Path`): Output of a stage, or a dataset inside it. Inputs that have moved are searched in the
            directories above each record.

    Returns:
        `dict`: path of `stage.json` to its content, in pipeline order.
    """
    found: dict[Path, dict[str, Any]] = {}

    def visit(directory: Path) -> None:
        path, record = nearest_record(directory)
        if path is None or path.resolve() in found:
            return
        found[path.resolve()] = record  # before its inputs, in case of a circle
        near = path.parent
        for source in chain.from_iterable(record.get("inputs", {}).values()):
            places = possible_places(source["path"], near) if "path" in source else ()
            # Directories without a record, such as the images of a source, can be large: they are not hashed.
            if any(nearest_record(place)[0] for place in places) and (place := find_source(source, near)):
                visit(place)
        found[path.resolve()] = found.pop(path.resolve())  # its inputs come first

    visit(directory)
    return found


# What a model was trained on


def trained_on(model: str | Path) -> list[dict[str, Any]]:
    """
    Return the datasets of all trainings in the lineage of a model, and the models in it whose training data is
    unknown.

    The record of a training has this list. For records of earlier versions, those of the models that they started from
    are followed. A model without a record is unknown if it is missing, has changed, is an adapter, or has a
    `training_images.json` or a chat template of this package. Otherwise it counts as a base model.

    Args:
        model (`str`): Directory or Hub id.

    Returns:
        `list[dict]`: for each dataset its fingerprint, the `stage` that trained on it, and the `splits` that this
        used. Models are last, and their stage is None.
    """
    source = fingerprint(model)
    found = _trainings(source, Path(source["path"]) if "path" in source else None, set())
    return sorted(found, key=lambda one: one["stage"] is None)


def _trainings(source: dict[str, Any], place: Path | None, seen: set[Path]) -> list[dict[str, Any]]:
    path, record = nearest_record(place) if place else (None, {})
    if path is not None and path.resolve() in seen:  # a circle, or two inputs with one origin
        return []
    seen.update([path.resolve()] if path else ())
    if isinstance(record.get("trained_on"), list):
        return record["trained_on"]
    if record.get("stage") not in STAGES:
        here = source | {"path": str(place)} if place else source
        is_base = path is None and (place is not None or "hub_id" in source) and _is_base(here)
        return [] if is_base else [{**source, "stage": None, "splits": []}]
    stage, settings = STAGES.get(record["stage"]), record.get("settings", {})
    splits = [settings.get("train_split") or "train"]
    if settings.get("eval_strategy", "no") != "no":
        splits.append(settings.get("validation_split") or "validation")
    earlier, own = [], []
    for item in stage.inputs:
        for one in record.get("inputs", {}).get(item.key, ()):
            if item.kind == MODEL:
                earlier += _trainings(one, find_source(one, path.parent) if "path" in one else None, seen)
            elif stage.trains and item.kind not in NO_DATASETS:
                own.append({**one, "stage": stage.name, "splits": splits})
    return earlier + own


def _is_base(source: Mapping[str, Any]) -> bool:
    """Whether a model without a record is here and shows no sign of a training by this package."""
    from medst_trl.policy.chat_template import saved_role

    if any(_find_file(source, name) for name in (TRAINING_IMAGES_FILE, "adapter_config.json")):
        return False
    template = _find_file(source, "chat_template.jinja")
    is_ours = template is not None and saved_role(template.read_text(encoding="utf-8")) is not None
    return _find_file(source, "config.json") is not None and not is_ours


def training_images(model: str | Path) -> tuple[set[str], bool]:
    """
    Return the ids of the images that a model was trained on as far as they are known, and whether these are all.

    They are read from `training_images.json`. Models of earlier versions have none: for them, the ids are collected
    from the datasets that still exist.
    """
    if (carried := _carried_images(fingerprint(model))) is not None:
        return carried
    ids, is_complete, _ = _training_data(model, is_hashed=False)
    ids, are_all = _only_hashes(ids)
    return ids, is_complete and are_all


def write_training_images(directory: str | Path, image_ids: Iterable[str], model: str | Path) -> None:
    """Write `training_images.json`: the ids of the images of a training, and those that its model had before it."""
    earlier, is_complete = training_images(model)
    ids, are_all = _only_hashes(earlier.union(image_ids))
    write_json(Path(directory, TRAINING_IMAGES_FILE), {"complete": is_complete and are_all, "image_ids": sorted(ids)})


def _only_hashes(image_ids: Iterable[Any]) -> tuple[set[str], bool]:
    """Return the ids that are hashes, and whether all are. Others may name a file or a patient: they stay here."""
    ids = list(image_ids)
    hashes = {image for image in ids if isinstance(image, str) and _HASH.fullmatch(image)}
    return hashes, hashes.issuperset(map(str, ids))


def _carried_images(source: Mapping[str, Any]) -> tuple[set[str], bool] | None:
    """Read the `training_images.json` of a model; None if it has none."""
    if (path := _find_file(source, TRAINING_IMAGES_FILE)) is None:
        return None
    content = read_object(path)
    ids = content.get("image_ids")
    hashes, are_all = _only_hashes(ids if isinstance(ids, list) else [None])
    return hashes, are_all and content.get("complete") is True


def _find_file(source: Mapping[str, Any], name: str) -> Path | None:
    """Find a file of a directory, or of a model in the local Hub cache or on the Hub."""
    if "path" in source:
        return path if (path := Path(source["path"], name)).is_file() else None
    from medst_trl.policy.adapters import find_model_file  # loads torch

    hub_id, revision = split_revision(source["hub_id"])
    return find_model_file(hub_id, name, source.get("revision") or revision, not hub_answers())


def _read(source: Mapping[str, Any], near: Path) -> "tuple[Path, list[Dataset]]":
    """
    Open the splits of a dataset that a model was trained on. One of the Hub is not downloaded.

    Raises:
        LookupError: if it is a model, or is not here as it was in training; with the reason. Others if a file is
            damaged.
    """
    place, what = find_source(source, near), "dataset" if source["stage"] else "model"
    if what == "model" and (place or "hub_id" in source):
        raise LookupError("the record of its training is missing or damaged")
    if place is None:
        raise LookupError(f"the {what} is not on this machine as it was in training")
    split, *for_evaluation = source["splits"]
    datasets = [load_records(place, split)]
    for split in for_evaluation:
        with suppress(UserError):  # it is another of several datasets that was evaluated on
            datasets.append(load_records(place, split))
    return place, datasets


# What a benchmark shares with it


@dataclass(frozen=True)
class TrainingSource:
    """
    A dataset that a model was trained on, or a model before it whose own training is unknown.

    Args:
        entry (`dict`): Its entry in [`trained_on`], with the number of its `images`; None if that is unknown.
        inventory ([`~medst_trl.data.overlap.Inventory`]): What was read of it.
        problem (`str`, *optional*): Why it was not read.
    """

    entry: dict[str, Any]
    inventory: Inventory
    problem: str | None


def read_inventory(
    place: Path, datasets: "Iterable[Dataset]", only: Set[str] | None = None, is_hashed: bool = True
) -> Inventory:
    """Read datasets from one place, with the near hashes that `medst prepare` has stored for their images."""
    from medst_trl.data.image_index import INDEX_FILE

    made, records = Inventory(), records_of(place) if is_hashed else ()
    entries = chain.from_iterable(read_jsonl(path.with_name(INDEX_FILE)) for path in records)
    hashes = {entry["image_id"]: entry["near_hash"] for entry in entries if {"image_id", "near_hash"} <= entry.keys()}
    for dataset in datasets:
        made.add(dataset, hashes if is_hashed else None, only)
    return made


def check_contamination(model: str | None, benchmarks: "Sequence[tuple[Path, Dataset]]") -> Iterator[dict[str, Any]]:
    """
    Compare benchmarks with everything that a model was trained on. Datasets that are not on this machine are not
    downloaded: for them, only the image ids that the model carries are compared.

    Args:
        model (`str` or `None`): Directory or Hub id; None for a model that nothing is known about.
        benchmarks (sequence of `tuple`): For each benchmark its directory, which need not exist, and its rows.

    Yields:
        `dict`: for each benchmark the content of `contamination.json`: the `figures` of
        [`~medst_trl.evaluation.contamination.count_shared`], with None for a number that could not be counted; and
        `compared`, the sources: the entry of [`trained_on`] with its number of `images`, None if it was not read, and
        why a figure was `not_checked`.
    """
    ids, is_complete, sources = _training_data(model) if model else (set(), True, [])
    for place, benchmark in benchmarks:
        bits = nearest_record(place)[1].get("settings", {}).get("near_copy_bits", NEAR_COPY_BITS)
        tested, compared = read_inventory(place, [benchmark] if sources else []), []
        plain = None if any(tested.hashes.values()) else "all images of the benchmark are too plain"
        why_not_near = plain if bits else "near_copy_bits is 0"
        for source in sources:
            reasons = dict.fromkeys(FIGURES, source.problem) | ({"exact": None} if is_complete else {})
            reasons["near"] = source.problem or why_not_near
            reasons["groups"] = source.problem or why_groups_not_compared(tested, source.inventory)
            reasons["questions"] = reasons["near"] or (reasons["groups"] if tested.salts else None)
            reasons = {name: reason for name, reason in reasons.items() if reason}
            compared.append(source.entry | {"not_checked": reasons})
        figures: dict[str, Any] = count_shared(tested, [source.inventory for source in sources], ids, bits)
        for name, figure in figures.items():
            if all(name in one["not_checked"] for one in compared) and not (name == "exact" and ids):
                figure["n"] = figure["n"] or None
        yield {"figures": figures, "compared": compared, "near_copy_bits": bits}


def _training_data(model: str | Path, is_hashed: bool = True) -> tuple[set[str], bool, list[TrainingSource]]:
    """
    Return the known ids of the images that a model was trained on, whether these are all, and where they are from,
    with near hashes if `is_hashed`.
    """
    carried = _carried_images(fingerprint(model))
    ids, is_complete = carried or (set(), True)
    only, found, seen = ids if carried and is_complete else None, [], set()
    for source in trained_on(model):
        inventory, problem = Inventory(), None
        try:
            inventory = read_inventory(*_read(source, Path(model)), only, is_hashed)
            images = set(inventory.questions)
        except Exception as error:  # of a damaged file, for example; its message may have a path, which no card shows
            problem = str(error) if type(error) is LookupError else f"unreadable dataset, {type(error).__name__}"
            listed = None if source["stage"] else _carried_images(source)  # a dataset has no list of its images
            images, is_known = listed or (None, False)
            is_complete = is_complete and (is_known or carried is not None)
            seen |= ids  # each of them can be in this source
        seen |= images or set()
        entry = {**source, "images": None if images is None else len(images)}
        found.append(TrainingSource(entry, inventory, problem))
    if rest := ids - seen:  # image files of a dataset have been replaced, or a record is damaged
        entry = {**fingerprint(model), "stage": None, "images": len(rest)}
        found.append(TrainingSource(entry, Inventory(), "no dataset on this machine contains them"))
    return ids | seen, is_complete, found

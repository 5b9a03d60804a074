# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The lineage of a result: the stages that led to it, by their records, and the images that its model was trained on.

A model carries these images as `training_images.json`: their ids, which are hashes of the pixels, and nothing else
about them. So a published model can be checked against a benchmark without its training data.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.files import read_object, write_json
from medst_trl.base.fingerprints import fingerprint, same_source
from medst_trl.base.hub_ids import cached_repository, hub_answers, is_hub_id, split_revision
from medst_trl.data.conform import image_ids_of
from medst_trl.data.loading import load_records

from .record import RECORD_FILE, read_record
from .stage import MODEL, STAGES


if TYPE_CHECKING:
    from datasets import Dataset

TRAINING_IMAGES_FILE = "training_images.json"


def nearest_record(directory: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return path and content of the `stage.json` of a directory or its parent. Damaged content is empty."""
    for place in (directory, directory.parent):
        if (place / RECORD_FILE).is_file():
            return place / RECORD_FILE, read_record(place)
    return None, {}


def find_moved(path: str, run: Path | None) -> Path:
    """Return a recorded path, or where it is inside the run directory if it has moved with that."""
    place = Path(path)
    moved = [run / Path(*place.parts[-2:]), run / place.name] if run else []
    return next((found for found in (place, *moved) if found.exists()), place)


def records_of(
    directory: Path,
    run: Path | None = None,
    follows: Callable[[dict[str, Any], str], bool] = lambda record, name: True,
) -> dict[Path, dict[str, Any]]:
    """
    Read the records of the stages that led to a result, as far as their directories still exist.

    Args:
        directory (`Path`): Output of a stage, or a dataset inside it.
        run (`Path`, *optional*): The run directory, in which inputs that have moved are searched.
        follows (`Callable`, *optional*): Takes a record and the name of an input, and returns whether to follow it.
            By default, all are followed.

    Returns:
        `dict`: path of `stage.json` to its content, in pipeline order.
    """
    found: dict[Path, dict[str, Any]] = {}

    def visit(directory: Path) -> None:
        path, record = nearest_record(directory)
        if path is None or path.resolve() in found:
            return
        found[path.resolve()] = record  # before its inputs, in case of a circle
        for name, sources in record.get("inputs", {}).items():
            for source in sources:
                if "path" in source and (follows is None or follows(record, name)):
                    visit(find_moved(source["path"], run))
        found[path.resolve()] = found.pop(path.resolve())  # its inputs come first

    visit(directory)
    return found


# What a model was trained on


@dataclass(frozen=True)
class TrainedOn:
    """
    Data that a model was trained on: a dataset, or a model whose own training has no record here.

    Attributes:
        source (`dict`): Its fingerprint in the record of the training.
        stage (`str` or `None`): The stage that trained on the dataset; None for a model.
        splits (`tuple`): Its splits that were used.
        run (`Path` or `None`): The run directory, in which it is searched if it has moved.
    """

    source: dict[str, Any]
    stage: str | None = None
    splits: tuple[str, ...] = ()
    run: Path | None = None

    def read(self) -> "list[Dataset]":
        """
        Open the splits of the dataset. One of the Hub is not downloaded.

        Raises:
            LookupError: if it is a model, or is not here as it was in training; with the reason.
        """
        if self.stage is None:
            raise LookupError("only the ids of its training images are known")
        if "hub_id" in self.source:
            snapshots = cached_repository(self.source["hub_id"], "dataset") / "snapshots"
            place = snapshots / str(self.source.get("revision"))
        else:
            place = find_moved(self.source["path"], self.run)
        if not place.exists():
            raise LookupError("the dataset is not on this machine")
        if "path" in self.source and not same_source(self.source, fingerprint(place)):
            raise LookupError("the dataset has changed since the training")
        try:
            return [load_records(place, split) for split in self.splits]
        except Exception as error:  # pyarrow has an exception for each way in which a file can be damaged
            raise LookupError(f"the dataset cannot be read ({type(error).__name__})") from None

    def image_ids(self) -> tuple[set[str], bool]:
        """Return the ids of its images as far as they are known, and whether these are all."""
        if self.stage is None:
            return _carried_images(self.source) or (set(), False)
        try:
            return set().union(*map(image_ids_in, self.read())), True
        except LookupError:
            return set(), False


def trained_on(model: str, run: Path | None = None) -> list[TrainedOn]:
    """
    Return what a model was trained on, as far as records show it: the datasets of all stages that trained it or what
    it was made from, and adapters and models without a record. A base model of others is not listed.
    """
    records = records_of(find_moved(model, run), run, _reads_model)
    found, models = [], [] if records else [_source(model)]
    for record in records.values():
        stage, inputs, settings = record.get("stage"), record.get("inputs", {}), record.get("settings", {})
        if stage in STAGES and STAGES.get(stage).trains:
            splits = [settings.get("train_split") or "train"]
            if settings.get("eval_strategy", "no") != "no":
                splits.append(settings.get("validation_split") or "validation")
            found += [TrainedOn(source, stage, tuple(splits), run) for source in inputs.get("dataset", ())]
        models += [source for name, sources in inputs.items() if _reads_model(record, name) for source in sources]
    for source in models:
        if "path" in source:
            source = source | {"path": str(find_moved(source["path"], run))}
            if nearest_record(Path(source["path"]))[0] is not None:
                continue
        if any(_cached_file(source, name) for name in (TRAINING_IMAGES_FILE, "adapter_config.json")):
            found.append(TrainedOn(source, run=run))
    return found


def training_images(model: str, run: Path | None = None) -> tuple[set[str], bool]:
    """
    Return the ids of the images that a model was trained on as far as they are known, and whether these are all. It
    has them in `training_images.json`. If an earlier version trained it, they are those of the data that is here.
    """
    source = _source(str(find_moved(model, run)))
    if "hub_id" in source and hub_answers():
        from medst_trl.policy.adapters import find_model_file  # loads torch

        name, revision = split_revision(model)
        find_model_file(name, TRAINING_IMAGES_FILE, revision, local_files_only=False)
    if (carried := _carried_images(source)) is not None:
        return carried
    known = [one.image_ids() for one in trained_on(model, run)]
    return set().union(*(ids for ids, _ in known)), all(complete for _, complete in known)


def write_training_images(directory: str | Path, image_ids: Iterable[str], model: str) -> None:
    """Write `training_images.json`: the ids of the images of a training, and those that its model had before it."""
    earlier, complete = training_images(model)
    content = {"complete": complete, "image_ids": sorted(earlier.union(image_ids))}
    write_json(Path(directory, TRAINING_IMAGES_FILE), content)


def image_ids_in(dataset: "Dataset") -> set[str]:
    """Return the ids of all images of a dataset of conversations or pairs. Images without an id are decoded."""
    return {image for images in image_ids_of(dataset) for image in images}


def _source(model: str) -> dict[str, Any]:
    return {"hub_id": model} if is_hub_id(model) else {"path": model}


def _reads_model(record: dict[str, Any], name: str) -> bool:
    """Whether an input of a stage is a model."""
    stage = record.get("stage")
    item = STAGES.get(stage).input(name) if stage in STAGES else None
    return item is not None and item.kind == MODEL


def _carried_images(source: dict[str, Any]) -> tuple[set[str], bool] | None:
    """Read the `training_images.json` of a model; None if it has none."""
    if (path := _cached_file(source, TRAINING_IMAGES_FILE)) is None:
        return None
    content = read_object(path)
    ids = content.get("image_ids")
    is_sound = isinstance(ids, list) and all(isinstance(image, str) for image in ids)
    return (set(ids), content.get("complete") is True) if is_sound else (set(), False)


def _cached_file(source: dict[str, Any], name: str) -> Path | None:
    """Find a file of a directory, or of a model in the local Hub cache."""
    if "path" in source:
        return path if (path := Path(source["path"], name)).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    hub_id, revision = split_revision(source["hub_id"])
    found = try_to_load_from_cache(hub_id, name, revision=source.get("revision") or revision)
    return Path(found) if isinstance(found, str) else None

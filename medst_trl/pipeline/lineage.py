# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The lineage of a result: the stages that led to it, by their records, and the images that its model was trained on.

A model carries these images as `training_images.json`: their ids, which are hashes of the pixels, and nothing else
about them. So a published model can be checked against a benchmark without its training data.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.files import read_object, write_json
from medst_trl.base.fingerprints import fingerprint, same_source
from medst_trl.base.hub_ids import cached_repository, hub_answers, is_hub_id, split_revision
from medst_trl.data.groups import NEAR_COPY_BITS
from medst_trl.data.loading import load_records
from medst_trl.data.overlap import Inventory
from medst_trl.engines.engine import loads_model
from medst_trl.evaluation.contamination import CONTAMINATION_FILE, FIGURES, Contamination, compare

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
    moved = [run / Path(*place.parts[-n:]) for n in (3, 2, 1)] if run else []  # round_1/judge/preferences ... sft
    return next((found for found in (place, *moved) if found.exists()), place)


def records_of(
    directory: Path, run: Path | None = None, follows: Callable[..., bool] = lambda *_: True
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
                if "path" in source and follows(record, name):
                    visit(find_moved(source["path"], run or path.parent.parent))
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

    @property
    def place(self) -> Path:
        """Where it is on this machine, if it is."""
        if "hub_id" not in self.source:
            return find_moved(self.source["path"], self.run)
        return cached_repository(self.source["hub_id"], "dataset") / "snapshots" / str(self.source.get("revision"))

    def read(self) -> "list[Dataset]":
        """
        Open the splits of the dataset. One of the Hub is not downloaded.

        Raises:
            LookupError: if it is a model, or is not here as it was in training; with the reason. Others if a file is
                damaged.
        """
        if self.stage is None:
            raise LookupError("its training data is not known here")
        if not self.place.exists():
            raise LookupError("the dataset is not on this machine")
        if "path" in self.source and not same_source(self.source, fingerprint(self.place)):
            raise LookupError("the dataset has changed since the training")
        return [load_records(self.place, split) for split in self.splits]

    def image_ids(self) -> tuple[set[str], bool]:
        """Return the ids of its images as far as they are known, and whether these are all."""
        if self.stage is None:
            return _carried_images(self.source) or (set(), False)
        try:
            return set().union(*map(image_ids_in, self.read())), True
        except Exception:  # pyarrow has an exception for each way in which a file can be damaged
            return set(), False


def trained_on(model: str, run: Path | None = None) -> list[TrainedOn]:
    """
    Return what a model was trained on, as far as records show it: the datasets of all stages that trained it or what
    it was made from, and models without a record that are gone, are adapters, or have a list. Other models without
    one are base models.
    """
    records = records_of(find_moved(model, run), run, _reads_model)
    found, models = [], [] if records else [_source(model, run)]
    for path, record in records.items():
        place = run or path.parent.parent  # the run directory of most stages
        stage, inputs, settings = record.get("stage"), record.get("inputs", {}), record.get("settings", {})
        if stage in STAGES and STAGES.get(stage).trains:
            splits = [settings.get("train_split") or "train"]
            if settings.get("eval_strategy", "no") != "no":
                splits.append(settings.get("validation_split") or "validation")
            found += [TrainedOn(source, stage, tuple(splits), place) for source in inputs.get("dataset", ())]
        for source in chain(*(sources for name, sources in inputs.items() if _reads_model(record, name))):
            models.append(source | ({"path": str(find_moved(source["path"], place))} if "path" in source else {}))
    for source in models:
        has_record = "path" in source and nearest_record(Path(source["path"]))[0] is not None
        is_gone = "path" in source and not Path(source["path"]).exists()
        names = (TRAINING_IMAGES_FILE, "adapter_config.json")
        if not has_record and (is_gone or any(_find_file(source, name) for name in names)):
            found.append(TrainedOn(source))
    return found


def training_images(model: str, run: Path | None = None) -> tuple[set[str], bool]:
    """
    Return the ids of the images that a model was trained on as far as they are known, and whether these are all. It
    has them in `training_images.json`. If an earlier version trained it, they are those of the data that is here.
    """
    if (carried := _carried_images(_source(model, run), download=True)) is not None:
        return carried
    known = [one.image_ids() for one in trained_on(model, run)]
    return set().union(*(ids for ids, _ in known)), all(complete for _, complete in known)


def write_training_images(directory: str | Path, image_ids: Iterable[str], model: str) -> None:
    """Write `training_images.json`: the ids of the images of a training, and those that its model had before it."""
    earlier, complete = training_images(model)
    content = {"complete": complete, "image_ids": sorted(earlier.union(image_ids))}
    write_json(Path(directory, TRAINING_IMAGES_FILE), content)


def image_ids_in(dataset: "Dataset") -> set[str]:
    """Return the ids of all images of a dataset of conversations or pairs, decoded if it has no ids."""
    from medst_trl.data.identify import image_ids_of  # loads NumPy and Pillow

    return {image for images in image_ids_of(dataset) for image in images if image}


def _source(model: str, run: Path | None) -> dict[str, Any]:
    place = find_moved(model, run)
    return {"hub_id": model} if is_hub_id(model) and not place.exists() else {"path": str(place)}


def _reads_model(record: dict[str, Any], name: str) -> bool:
    """Whether an input of a stage is a model."""
    stage = record.get("stage")
    item = STAGES.get(stage).input(name) if stage in STAGES else None
    return item is not None and item.kind == MODEL


def _carried_images(source: dict[str, Any], download: bool = False) -> tuple[set[str], bool] | None:
    """Read the `training_images.json` of a model; None if it has none."""
    if (path := _find_file(source, TRAINING_IMAGES_FILE, download)) is None:
        return None
    content = read_object(path)
    ids = content.get("image_ids")
    is_sound = isinstance(ids, list) and all(isinstance(image, str) for image in ids)
    return (set(ids), content.get("complete") is True) if is_sound else (set(), False)


def _find_file(source: dict[str, Any], name: str, download: bool = False) -> Path | None:
    """Find a file of a directory, or of a model in the local Hub cache or on the Hub."""
    if "path" in source:
        return path if (path := Path(source["path"], name)).is_file() else None
    from medst_trl.policy.adapters import find_model_file  # loads torch

    hub_id, revision = split_revision(source["hub_id"])
    return find_model_file(hub_id, name, source.get("revision") or revision, not (download and hub_answers()))


# What a benchmark shares with it


def read_inventory(
    place: Path, datasets: "Iterable[Dataset]", run: Path | None = None, only: Set[str] | None = None
) -> Inventory:
    """Read datasets from one place, with the near hashes that `medst prepare` has stored for their images."""
    from medst_trl.data.image_index import INDEX_FILE, index_entries

    made, entries = Inventory(), chain(*(index_entries(path.with_name(INDEX_FILE)) for path in records_of(place, run)))
    hashes = {entry["image_id"]: entry["near_hash"] for entry in entries if {"image_id", "near_hash"} <= entry.keys()}
    for dataset in datasets:
        made.add(dataset, hashes, only)
    return made


def check_contamination(
    model: str | None, benchmark: "Dataset", place: Path, run: Path | None = None
) -> dict[str, Any]:
    """
    Compare a benchmark with everything that a model was trained on. Datasets that are not on this machine are not
    downloaded: for them, only the image ids that the model carries are compared.

    Args:
        model (`str` or `None`): Directory or Hub id; None for a model that nothing is known about.
        benchmark (`datasets.Dataset`): The benchmark.
        place (`Path`): Its directory; it need not exist.
        run (`Path`, *optional*): The run directory, in which inputs that have moved are searched.

    Returns:
        `dict`: the content of `contamination.json`: the `figures` of [`~medst_trl.evaluation.contamination.compare`],
        with None for a number that could not be counted; and `compared`, the sources: the fingerprint of a dataset or
        model, the `stage` that trained on it, its number of `images`, and why a figure was `not_checked`.
    """
    bits = nearest_record(place)[1].get("settings", {}).get("near_copy_bits", NEAR_COPY_BITS)
    ids, complete = training_images(model, run) if model else (set(), True)
    sources = trained_on(model, run) if model else []
    if not sources and ids:  # the records of its training are gone
        sources = [TrainedOn(_source(model, run))]
    tested, trained, compared, seen = read_inventory(place, [benchmark] if sources else [], run), [], [], set()
    for source in sources:
        own, missing = Inventory(), {} if bits else {"near": "near_copy_bits is 0"}
        try:
            own = read_inventory(source.place, source.read(), source.run, ids if complete else None)
            images = set(own.questions)
            if tested.salts.isdisjoint(own.salts):
                missing["groups"] = "no groups, or of another salt"
        except Exception as error:  # of a damaged file, for example; its message may have a path, which no card shows
            reason = str(error) if type(error) is LookupError else f"unreadable dataset, {type(error).__name__}"
            images, is_known = source.image_ids()
            missing = {name: reason for name in FIGURES if name != "exact" or not (complete or is_known)}
            seen |= ids  # as far as can be told
        seen |= images
        trained.append(own)
        compared.append({**source.source, "stage": source.stage, "images": len(images), "not_checked": missing})
    if rest := ids - seen:  # data or a model that was trained on has been replaced
        missing = dict.fromkeys(FIGURES.keys() - {"exact"}, "their data was replaced or is not here")
        compared.append({**_source(model, run), "stage": None, "images": len(rest), "not_checked": missing})
    ids |= seen
    figures: dict[str, dict[str, int | None]] = compare(tested, trained, ids, bits)
    for name, figure in figures.items():
        if all(name in one["not_checked"] for one in compared) and not (name == "exact" and ids):
            figure["n"] = None
    return {"figures": figures, "compared": compared, "near_copy_bits": bits}


def contamination_of(scores: Path, content: Mapping[str, Any], run: Path | None = None) -> Contamination:
    """
    Return the contamination of an evaluation: the file beside its scores, or, if an earlier version wrote these, the
    comparison with what is still here.

    Args:
        scores (`Path`): `scores.json`.
        content (`dict`): Its content.
        run (`Path`, *optional*): The run directory, in which inputs that have moved are searched.
    """
    if (found := Contamination.read(scores.with_name(CONTAMINATION_FILE))) is not None:
        return found
    try:
        benchmark = TrainedOn(content["data"], "evaluate", (content["split"],), run)
        is_local = loads_model(nearest_record(scores.parent)[1].get("settings", {}))
        [dataset], model = benchmark.read(), content["model"] if is_local else None
        return Contamination(check_contamination(model, dataset, benchmark.place, run))
    except Exception:  # also of scores without a model or a benchmark, and of damaged records
        return Contamination({"figures": {name: {"n": None, "of": 0} for name in FIGURES}, "compared": []})

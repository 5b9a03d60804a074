# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Turn medical images, with or without conversations and questions, into datasets. The images are embedded with unchanged
pixels and without metadata.

```bash
medst prepare --source vqa_rad_mevf --data_path data/vqa_rad --output_dir runs/rad/prepare --validation_fraction 0.1
medst prepare --source images --data_path scans --output_dir runs/mine/scans
```

Output in `output_dir`, depending on what the source contains:
  instruct/{train,validation}-*.parquet  columns id, images, image_ids, messages, group_id
  benchmark/test-*.parquet               columns image_id, image, questions, group_id; one row per image
  images/train-*.parquet                 unlabeled images; columns as in instruct, with empty messages
  rejected.jsonl                         id, reason and value of every rejected record
  image_index.jsonl                      image_id, near hash and group_id of every file (private: it has file names);
                                         groups of --group_column are only in the datasets

Keep the images of a patient in one split: `--group_column patient_id` names a column of your table, DICOM files
contain the patient, and `--group_by directory` uses the directories of the images. `--disjoint group` then drops
training data of groups that are also in the test or validation set.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import visible_files, write_jsonl
from medst_trl.base.fingerprints import fingerprint
from medst_trl.base.hub_ids import is_only_on_hub
from medst_trl.base.processes import cores
from medst_trl.base.settings import check_bounds, check_choice, documented, settings_among
from medst_trl.data.assemble import assemble
from medst_trl.data.cells import column_name
from medst_trl.data.groups import DISJOINT, GROUP_LEVELS, MOST_BITS, NEAR_COPY_BITS, GroupIds, salt_of, salt_path
from medst_trl.data.image_settings import ImageSettings
from medst_trl.data.loading import is_parquet, read_parquet
from medst_trl.data.schema import features_of, write_split
from medst_trl.data.source import SOURCES, Records, Rejected, Source, SourceRequest, check_image_folder, list_reasons
from medst_trl.hub import HubArguments
from medst_trl.pipeline.record import StageRecord
from medst_trl.pipeline.stage import FILE, STAGES, Count, Input, Output, RowCounter, Stage


@documented
@dataclass
class PrepareArguments:
    """
    Arguments of `medst prepare`, besides those of its sources.

    Args:
        output_dir (`str`):
            Directory for the datasets.
        source (`str`):
            Kind of data to read.
        data_path (`str`, *optional*):
            File or directory of the data; for images, vqa_rad and pathvqa also a dataset on the Hub. Not needed by
            sources that generate their data.
        image_folder (`str`, *optional*):
            Directory of the images. File names are relative to it and must stay inside it. Default: for a benchmark,
            images/ (or VQA_RAD Image Folder/ or imgs/) beside its questions, otherwise the directory of the data.
        validation_fraction (`float`, *optional*, defaults to `0.0`):
            Approximate fraction of the training images to use for validation. All records of an image or group are in
            one split.
        disjoint (`str`, *optional*):
            What to keep out of the training set: image (images that are also in the test or validation set, and near
            copies of them), group (also other images of their groups), or none. Default: none.
        image_disjoint (`bool`, *optional*, defaults to `False`):
            The same as --disjoint image.
        group_column (`str`, *optional*):
            Column of a table, or key of JSON records, with the group of each record, such as a patient. Groups are
            written as keyed hashes. Default: the groups of the images.
        group_by (`str`, *optional*):
            Groups of images: patient or study (in DICOM files), or directory (the path inside the directory of
            images; directory:1 is its first level). Default: patient.
        group_salt (`str`, *optional*):
            File with the secret key of these hashes, created if it is missing. Datasets that are compared need the
            same one. Default: the file in MEDST_GROUP_SALT, or else ~/.local/share/medst_trl/group_salt.
        near_copy_bits (`int`, *optional*, defaults to `10`):
            Count images as near copies (resized or re-encoded) if at most this many of the 256 bits of their
            perceptual hashes differ. 0 looks for none.
        max_records (`int`, *optional*):
            Use only the first N conversations, and the first N images with questions of each split.
        rows_per_shard (`int`, *optional*, defaults to `512`):
            Rows per Parquet file.
        seed (`int`, *optional*, defaults to `0`):
            Seed for the validation split and for everything that a source samples.
        num_workers (`int`, *optional*, defaults to `0`):
            Number of threads that decode images. 0 uses one per core.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the results of an earlier run and start again.
    """

    output_dir: str
    source: str
    data_path: str | None = None
    image_folder: str | None = None
    validation_fraction: float = 0.0
    disjoint: str | None = None
    image_disjoint: bool = False
    group_column: str | None = None
    group_by: str | None = None
    group_salt: str | None = None
    near_copy_bits: int = NEAR_COPY_BITS
    max_records: int | None = None
    rows_per_shard: int = 512
    seed: int = 0
    num_workers: int = 0
    overwrite: bool = False

    def __post_init__(self):
        # One way to write what records of version 0.1.0 have as `image_disjoint`.
        self.image_disjoint = self.disjoint == "image" or (self.image_disjoint and self.disjoint is None)
        if self.disjoint in ("none", "image"):
            self.disjoint = None
        self.group_column = self.group_column and column_name(self.group_column)


def main(args: PrepareArguments, *others: Any) -> None:
    """
    Run the stage.

    Args:
        args ([`PrepareArguments`]):
            Its arguments.
        *others:
            [`ImageSettings`], and settings of sources. If they are not given, their defaults are used.
    """
    from PIL import Image

    from medst_trl.data.image_index import INDEX_FILE, check_salt, choose_frames, index_images
    from medst_trl.data.images import FolderImages

    check(args, *others)
    source, request = SOURCES.get(args.source), request_of(args, *others)
    read = cache(lambda: _read(args, source, request))
    groups = GroupIds(args.group_salt, args.group_by or "patient", args.group_column)
    inputs = _inputs(source, request, read)
    if args.group_column or args.group_by:  # otherwise DICOM files may have groups, see `check_salt`
        inputs["group_salt"] = {"path": "group_salt", "sha256": salt_of(groups.of_key(""))}
    record = StageRecord.of(STAGE, replace(args, group_salt=None), *others, inputs=inputs)
    output_dir = Path(args.output_dir)
    if record.decision == "skip":
        return check_salt(output_dir / INDEX_FILE, groups)
    num_workers = args.num_workers or cores()
    Image.MAX_IMAGE_PIXELS = request.images.max_pixels  # PIL's own limit; ours is checked before decoding
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with record:
        records = read()
        if isinstance(records.images, FolderImages):
            records = choose_frames(records, records.images, num_workers).first(args.max_records)
        index = index_images(records.image_names, records.images, output_dir / INDEX_FILE, num_workers, groups)
        selection = {name: getattr(args, name) for name in ("validation_fraction", "near_copy_bits", "seed")}
        selection["disjoint"] = args.disjoint or ("image" if args.image_disjoint else "none")
        rows, rejected, counts = assemble(records, index, groups=groups, **selection)
        write_jsonl(output_dir / "rejected.jsonl", [item.as_row() for item in rejected])
        if not counts["datasets"]:
            raise _nothing_usable(args, counts["rejected"], rejected)
        _write(rows, records, output_dir, args.rows_per_shard, num_workers)
        record.finish(counts=counts, source_card=asdict(source.card))
    _print_counts(args, counts)


def _nothing_usable(args: PrepareArguments, reasons: Mapping[str, int], rejected: Sequence[Rejected]) -> UserError:
    if not rejected:
        where = f" in {args.data_path}" if args.data_path else ""
        return UserError(f"The source {args.source!r} found no records{where}. Correct its settings or data.")
    row = next(item.as_row() for item in rejected if item.reason == next(iter(reasons)))
    example = "" if args.group_column else f", for example {row['value'] or row['id']!r}"  # may name a patient
    return UserError(
        f"Nothing in {args.data_path or args.source} can be used: {list_reasons(reasons)}{example}. "
        f"Correct the data or the settings (see {Path(args.output_dir) / 'rejected.jsonl'}), and add --overwrite."
    )


def check(args: PrepareArguments, *others: Any) -> None:
    """
    Check the arguments, but no paths: an earlier stage may make the data, or another machine may have it.

    Raises:
        UserError: for an invalid value, or a source without the path that it needs.
    """
    source = SOURCES.get(args.source)
    at_least = {"validation_fraction": 0, "max_records": 1, "rows_per_shard": 1, "num_workers": 0, "near_copy_bits": 0}
    check_bounds(args, at_least=at_least, below={"validation_fraction": 1}, at_most={"near_copy_bits": MOST_BITS})
    check_choice("disjoint", args.disjoint or "none", DISJOINT)
    check_choice("group_by", re.sub(r"^directory:[1-9]\d*$", "directory", args.group_by or "patient"), GROUP_LEVELS)
    settings_among(others, ImageSettings).check()
    if salt_path(args.group_salt).resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise UserError("group_salt is inside output_dir, where --overwrite deletes it. Keep it in another directory.")
    if source.needs_data and args.data_path is None:
        raise UserError(f"data_path is not set. The source {args.source!r} needs the path to its data.")


def _read(args: PrepareArguments, source: Source, request: SourceRequest) -> Records:
    from medst_trl.data.images import FolderImages

    from_parquet = source.reads_parquet and is_parquet(request.data_path)
    records = read_parquet(source.name, request) if from_parquet else source.read(request)
    records.images = records.images or FolderImages(records.image_folder, request.images)
    if args.group_column and not any(record.group for record in records) and (any(records) or not records.rejected):
        found = records.counts.get("columns_not_used", "none")
        raise UserError(
            f"No usable record of {request.data_path or args.source} has a value in the column {args.group_column!r} "
            f"(columns that are not used: {found}). Correct group_column. The sources images, captions and llava have "
            "such columns in tables and JSON files; a directory of images has none."
        )
    if isinstance(records.images, FolderImages) and all(record.images for record in records):
        records.images.check(records.image_names)
    return records.first(args.max_records)


def request_of(args: PrepareArguments, *others: Any) -> SourceRequest:
    """
    Find the data and its images.

    Returns:
        [`SourceRequest`]: without paths for a source that needs no data.

    Raises:
        UserError: for a missing path.
    """
    source = SOURCES.get(args.source)
    own, images = settings_among(others, source.settings), settings_among(others, ImageSettings)
    request = SourceRequest(None, None, own, args.seed, images, args.group_column)
    if not source.needs_data:
        return request
    data_path = Path(args.data_path)
    if source.reads_parquet and is_only_on_hub(args.data_path):
        return replace(request, data_path=data_path)
    if not data_path.exists():
        raise UserError(f"data_path does not exist: {data_path}. Correct the path to the data of {args.source!r}.")
    if not (data_path.is_file() or data_path.is_dir()):
        raise UserError(f"data_path is a pipe, a socket or a device: {data_path}. Save the data as a file.")
    directory = data_path if data_path.is_dir() else data_path.parent
    beside = [directory / name for name in source.image_folders if (directory / name).is_dir()]
    image_folder = Path(args.image_folder) if args.image_folder else (beside or [directory])[0]
    check_image_folder(image_folder)
    return replace(request, data_path=data_path, image_folder=image_folder)


def _inputs(source: Source, request: SourceRequest, read: Callable[[], Records]) -> dict[str, Any]:
    """What the record compares by content: of directories, only the files that are read."""
    from medst_trl.data.images import FolderImages

    inputs, data_path = {"data_path": None, "image_folder": None}, request.data_path
    if not source.needs_data:
        return inputs
    if not data_path.exists():  # on the Hub
        return inputs | {"data_path": data_path}
    folder, used = request.image_folder, []
    if not (source.reads_parquet and is_parquet(data_path)):  # with the images; reading those takes long
        records = read()
        folder = records.image_folder or folder
        used = list(FolderImages(folder, request.images).files(records.image_names))
    if not data_path.is_dir():
        return inputs | {"data_path": data_path, "image_folder": fingerprint(folder, used)}
    if source.data_files is None:
        names = list(visible_files(data_path))
    else:
        patterns = (*source.data_files, *(["**/*.parquet"] if source.reads_parquet else []))
        names = [path.relative_to(data_path).as_posix() for name in patterns for path in data_path.glob(name)]
    if not folder.resolve().is_relative_to(data_path.resolve()):
        return inputs | {"data_path": fingerprint(data_path, names), "image_folder": fingerprint(folder, used)}
    inside = folder.resolve().relative_to(data_path.resolve())
    return inputs | {"data_path": fingerprint(data_path, [*names, *((inside / name).as_posix() for name in used)])}


def _write(datasets: dict, records: Records, output_dir: Path, rows_per_shard: int, num_workers: int) -> None:
    from medst_trl.data.image_formats import ImageProblem
    from medst_trl.data.images import loader_of

    load = loader_of(records.images)

    @lru_cache(maxsize=8)  # conversations about one image follow each other
    def image(name: str) -> dict:
        try:
            return {"bytes": load(name, identify=False).bytes, "path": None}
        except ImageProblem as problem:
            raise UserError(
                f"The image {name} changed while it was being prepared ({problem}). Run again with --overwrite."
            ) from None

    def with_images(row: dict) -> dict:
        if "image" in row:
            return row | {"image": image(row["image"])}
        return row | {"images": [image(name) for name in row["images"]]}

    for (kind, split), rows in datasets.items():
        write_split(output_dir / kind, split, rows, with_images, features_of(kind), rows_per_shard, num_workers)


def _print_counts(args: PrepareArguments, counts: dict) -> None:
    print(f"prepare: {args.source} is in {args.output_dir}")
    for name, row in counts["datasets"].items():
        print(f"  {name:20}" + ", ".join(f"{n:,} {what.removesuffix('s' * (n == 1))}" for what, n in row.items()))
    is_changed = any(reason.endswith(("_in_test", "_in_validation")) for reason in counts["rejected"])
    for what, n in counts["notes"].items():
        before = " before removal" if n and is_changed and "_and_" in what else ""
        print(f"  {what.replace('_', ' ')}: {n if isinstance(n, str) else f'{n:,}'}{before}")
    if counts["rejected"]:
        print(f"  rejected: {list_reasons(counts['rejected'])} (see rejected.jsonl)")


def _count(kind: str, settings: Mapping[str, Any], split: str, counter: RowCounter) -> Count:
    """Count the rows of a split that is not written yet, as far as the source knows."""
    source, limit = SOURCES.get(settings["source"]) if settings.get("source") else None, settings.get("max_records")
    if source is None or source.count is None:
        return Count(limit, at_most=limit is not None)
    own = source.settings_from(settings)
    number = source.count(own, kind, split)
    if kind == "instruct" and (in_train := source.count(own, kind, "train")) is not None:
        held_out = round(in_train * settings.get("validation_fraction", 0.0))
        number = in_train - held_out if split == "train" else (number or 0) + held_out
    return Count(number, at_most=limit is not None).capped(limit)


def _is_on_hub(settings: Mapping[str, Any]) -> bool:
    source = settings.get("source")
    return source in SOURCES and SOURCES.get(source).reads_parquet and is_only_on_hub(str(settings.get("data_path")))


def plan(counter: RowCounter, args: PrepareArguments, *others: Any) -> Iterator[tuple[str, str]]:
    """Yield the stage's rows in a plan."""
    source = SOURCES.get(args.source)
    if source.needs_data:
        missing = "" if args.data_path and Path(args.data_path).exists() else "; not on this machine"
        limit = f"; {args.max_records:,} records at most" if args.max_records is not None else ""
        yield "reads", f"{args.data_path} ({args.source}{limit}{missing})"
    if source.count is not None:
        splits = [("instruct", "train"), ("instruct", "validation"), ("images", "train"), ("benchmark", "test")]
        counts = {f"{kind}/{split}": counter.rows(str(Path(args.output_dir, kind)), split) for kind, split in splits}
        if known := [count.describe(f"rows of {name}") for name, count in counts.items() if count.number]:
            yield "writes", ", ".join(known)


STAGE = Stage(
    name="prepare",
    summary="turn medical images, questions and conversations into datasets",
    help=__doc__,
    after=("base",),
    arguments=lambda: (PrepareArguments, ImageSettings, *SOURCES.settings(), HubArguments),
    check=check,
    main=main,
    plan=plan,
    inputs=(Input("data_path", FILE, is_remote=_is_on_hub), Input("image_folder", FILE)),
    outputs=tuple(Output(kind, kind, partial(_count, kind)) for kind in ("instruct", "benchmark", "images")),
    operational=frozenset({"num_workers", "group_salt"}),
    earlier_defaults={"near_copy_bits": NEAR_COPY_BITS},
    registries={"source": SOURCES},
)
STAGES.register(STAGE)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Turns images with conversations, questions or nothing into datasets with the images embedded, pixel for pixel and
without metadata.

```bash
medst prepare --source images --data_path scans --output_dir runs/mine/scans
```

Sources, by `--source`:
  llava         a JSON or JSONL file of conversations (`id`, `image`, `conversations`)
  vqa_rad       the official release: its JSON file or folder
  vqa_rad_mevf  the folder with MEVF's trainset.json and testset.json
  slake         the folder with train.json, validate.json (validation.json on the Hub), test.json
  pathvqa       the folder with the LXMERT files pvqa_train.json, pvqa_val.json, pvqa_test.json
  captions      a table (csv, tsv, jsonl) with columns image and caption: each becomes a request to describe it
  images        a folder of images, or a table (csv, tsv, jsonl) with column image, perhaps question, answer, split
  phantoms      drawn scans with known truth; needs no data

Writes to `output_dir`, as far as the source has it:
  instruct/{train,validation}-*.parquet  columns id, images, image_ids, messages
  benchmark/test-*.parquet               columns image_id, image, questions; a row an image
  images/train-*.parquet                 unlabelled images, instruct columns with empty messages
  rejected.jsonl                         id, reason and value of every record set aside
  image_index.jsonl                      image_id of every file; not a part of the datasets, which hold no file names
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medst_trl.base.errors import UserError
from medst_trl.hub.after_stage import HubArguments
from medst_trl.pipeline.stage import FILE, STAGES, Count, Input, Output, Stage


if TYPE_CHECKING:
    from medst_trl.data.assemble import Datasets
    from medst_trl.data.image_index import ImageReader
    from medst_trl.data.records import Source

IMAGE_FOLDERS = ("images", "VQA_RAD Image Folder", "imgs")  # beside the questions, as the releases come


@dataclass
class PrepareArguments:
    """Arguments of `medst prepare`."""

    output_dir: str = field(metadata={"help": "Folder for the datasets."})
    source: Literal["llava", "vqa_rad", "vqa_rad_mevf", "slake", "pathvqa", "captions", "images", "phantoms"] = field(
        metadata={"help": "What the data is; see above."}
    )
    data_path: str | None = field(default=None, metadata={"help": "File or folder of the source. Phantoms need none."})
    image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder that image file names start from, and that none may leave. Default: images/ beside the "
            "questions of a benchmark, else the data's own folder."
        },
    )
    release_path: str | None = field(
        default=None,
        metadata={
            "help": "vqa_rad_mevf: the official release's JSON, for links between wordings. Default: beside the data."
        },
    )
    language: str = field(default="en", metadata={"help": "slake: language of the questions, en or zh."})
    image_pattern: str = field(
        default="{img_id}.jpg",
        metadata={
            "help": "pathvqa: file name of an image, for example {split}/{img_id}.png (split: train, val, test)."
        },
    )
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Part of the training images that becomes validation, with all their records."}
    )
    image_disjoint: bool = field(
        default=False, metadata={"help": "Drop training questions about images that also stand in test or validation."}
    )
    max_records: int | None = field(
        default=None,
        metadata={"help": "Take the first so many conversations, and images with questions of each split."},
    )
    max_pixels: int = field(default=100_000_000, metadata={"help": "Set larger images aside before decoding them."})
    num_phantoms: int = field(
        default=1000, metadata={"help": "phantoms: scans with conversations, before validation."}
    )
    num_test_phantoms: int = field(default=300, metadata={"help": "phantoms: scans of the benchmark."})
    num_unlabelled_phantoms: int = field(default=0, metadata={"help": "phantoms: scans without words."})
    phantom_turns: int | None = field(default=None, metadata={"help": "phantoms: at most so many questions each."})
    rows_per_shard: int = field(default=512, metadata={"help": "Rows in one Parquet file."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the validation split, of requests for captions, of phantoms."}
    )
    num_workers: int = field(default=0, metadata={"help": "Threads that decode images; 0: one for each core."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run left and start again."})


def main(args: PrepareArguments) -> None:
    from medst_trl.base.files import explain_full_disk, write_jsonl
    from medst_trl.data.assemble import assemble
    from medst_trl.data.image_index import index_images
    from medst_trl.pipeline.record import StageRecord

    data_path, image_folder = check(args)
    record = StageRecord.open(
        args.output_dir,
        stage="prepare",
        settings=asdict(args),
        inputs=_inputs(args, data_path, image_folder),
        operational=STAGE.operational,
        overwrite=args.overwrite,
    )
    if record.status == "finished":
        return

    output_dir, num_workers = Path(args.output_dir), args.num_workers or _cores()
    source, reader = _read(args, data_path, image_folder)
    names = [name for conversation in source.conversations for name in conversation.images]
    names += [question.image for question in source.questions]
    with explain_full_disk(output_dir):
        image_ids, problems = index_images(names, reader, output_dir / "image_index.jsonl", num_workers)
        datasets = assemble(
            source,
            image_ids,
            problems,
            validation_fraction=args.validation_fraction,
            image_disjoint=args.image_disjoint,
            seed=args.seed,
        )
        write_jsonl(output_dir / "rejected.jsonl", [rejected.as_row() for rejected in datasets.rejected])
        if datasets.is_empty():
            raise UserError(
                f"Nothing in {data_path} could be used: {_reasons(datasets)}. Each record is listed with its reason "
                f"in {output_dir / 'rejected.jsonl'}."
            )
        _write(datasets, reader, output_dir, args.rows_per_shard, num_workers)
    counts = datasets.counts()
    record.finish(counts=counts)
    _report(args, counts)


def check(args: PrepareArguments) -> tuple[str | None, str | None]:
    """The data and its image folder, both there."""
    if not 0 <= args.validation_fraction < 1:
        raise UserError(f"validation_fraction is {args.validation_fraction}; it has to be at least 0 and less than 1.")
    for name in ("max_records", "max_pixels", "rows_per_shard"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it has to be at least 1.")
    if args.source == "phantoms":
        return None, None
    if args.data_path is None or not Path(args.data_path).exists():
        raise UserError(
            f"data_path is {args.data_path}, where there is nothing. Source {args.source!r} needs its data there."
        )
    data_path = Path(args.data_path)
    folder = data_path if data_path.is_dir() else data_path.parent
    beside = [
        folder / name
        for name in IMAGE_FOLDERS
        if (folder / name).is_dir() and args.source not in ("llava", "images", "captions")
    ]
    image_folder = Path(args.image_folder) if args.image_folder else (beside or [folder])[0]
    if not image_folder.is_dir():
        raise UserError(f"image_folder {image_folder} is no folder. Correct the path to the images.")
    if args.source == "images" and data_path.is_dir():
        image_folder = data_path
    return str(data_path), str(image_folder)


def _inputs(args: PrepareArguments, data_path: str | None, image_folder: str | None) -> dict[str, str | None]:
    """What the result hangs on; a folder of images inside the data is looked at once."""
    if data_path and Path(image_folder).resolve().is_relative_to(Path(data_path).resolve()):
        image_folder = None
    return {"data_path": data_path, "image_folder": image_folder, "release_path": args.release_path}


def _read(args: PrepareArguments, data_path: str | None, image_folder: str | None) -> tuple["Source", "ImageReader"]:
    from PIL import Image

    from medst_trl.data import captions, instruct, tables, vqa
    from medst_trl.data.image_index import FolderImages

    if args.source == "phantoms":
        return _phantoms(args)
    path, folder = Path(data_path), Path(image_folder)
    # PIL's own limit counts for this process, too; ours is asked before anything is decoded.
    Image.MAX_IMAGE_PIXELS = args.max_pixels
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module="pydicom")  # about details of headers, which may quote them
    if args.source == "images":
        source = tables.read_folder(path) if path.is_dir() else tables.read_table(path, folder)
    elif args.source == "captions":
        source = captions.read_captions(path, folder, args.seed)
    elif args.source == "llava":
        source = instruct.read_llava(path, folder)
    elif args.source == "vqa_rad":
        source = vqa.read_vqa_rad(path, folder)
    elif args.source == "vqa_rad_mevf":
        source = vqa.read_vqa_rad_mevf(path, folder, Path(args.release_path) if args.release_path else None)
    elif args.source == "slake":
        source = vqa.read_slake(path, folder, args.language)
    else:
        source = vqa.read_pathvqa(path, folder, args.image_pattern)
    return source.first(args.max_records), FolderImages(folder, args.max_pixels)


def _phantoms(args: PrepareArguments) -> tuple["Source", "ImageReader"]:
    from medst_trl.data.image_index import MemoryImages
    from medst_trl.data.records import Conversation, Question, Source
    from medst_trl.demo.phantoms import instruct_rows, make_phantoms

    train = make_phantoms(args.num_phantoms, args.seed)
    test = make_phantoms(args.num_test_phantoms, args.seed, split="test")
    unlabelled = make_phantoms(args.num_unlabelled_phantoms, args.seed, split="unlabelled")
    rows = instruct_rows(train, args.seed, args.phantom_turns)
    source = Source(
        "phantoms",
        conversations=[Conversation(row["id"], (row["id"],), row["messages"]) for row in rows]
        + [Conversation(phantom.id, (phantom.id,), []) for phantom in unlabelled],
        questions=[
            Question(image=phantom.id, split="test", **question) for phantom in test for question in phantom.questions
        ],
    )
    return source, MemoryImages({phantom.id: phantom.image for phantom in train + test + unlabelled})


def _write(
    datasets: "Datasets", reader: "ImageReader", output_dir: Path, rows_per_shard: int, num_workers: int
) -> None:
    from functools import lru_cache

    from medst_trl.data.images import ImageProblem
    from medst_trl.data.schema import benchmark_features, instruct_features
    from medst_trl.data.shards import write_split

    @lru_cache(maxsize=8)  # conversations about one image follow each other
    def image(name: str) -> dict:
        try:
            return {"bytes": reader.stored_bytes(name), "path": None}
        except ImageProblem as problem:
            raise UserError(
                f"The image {name} changed while it was being prepared ({problem}). Run again with --overwrite."
            ) from None

    def conversation_row(row: dict) -> dict:
        return row | {"images": [image(name) for name in row["images"]]}

    def benchmark_row(row: dict) -> dict:
        return row | {"image": image(row["image"])}

    write_split(
        output_dir / "benchmark",
        "test",
        datasets.benchmark,
        benchmark_row,
        benchmark_features(),
        rows_per_shard,
        num_workers,
    )
    for folder, split, rows in (
        ("instruct", "train", datasets.train),
        ("instruct", "validation", datasets.validation),
        ("images", "train", datasets.unlabelled),
    ):
        write_split(
            output_dir / folder, split, rows, conversation_row, instruct_features(), rows_per_shard, num_workers
        )


def _report(args: PrepareArguments, counts: dict) -> None:
    print(f"prepare: {args.source} is in {args.output_dir}")
    for name, row in counts["datasets"].items():
        print(f"  {name:20}" + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in row.items()))
    for what, n in counts["notes"].items():
        print(f"  {what.replace('_', ' ')}: {n:,}")
    if counts["rejected"]:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in counts["rejected"].items())
        print(f"  set aside: {reasons} (see rejected.jsonl)")


def _reasons(datasets: "Datasets") -> str:
    return ", ".join(f"{reason} {n:,}" for reason, n in datasets.counts()["rejected"].items())


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_before(args: PrepareArguments) -> None:
    """[`check`], but a plan may be made on a machine without the data."""
    if args.data_path is None or Path(args.data_path).exists():
        check(args)


def _count(settings: Mapping[str, Any], split: str, kind: str) -> Count:
    """Rows of a split that is not written yet."""
    limit = settings.get("max_records")
    if settings.get("source") != "phantoms":
        return Count(limit, at_most=limit is not None)
    held_out = round(settings.get("num_phantoms", 1000) * settings.get("validation_fraction", 0.0))
    numbers = {
        ("instruct", "train"): settings.get("num_phantoms", 1000) - held_out,
        ("instruct", "validation"): held_out,
        ("images", "train"): settings.get("num_unlabelled_phantoms", 0),
        ("benchmark", "test"): settings.get("num_test_phantoms", 300),
    }
    return Count(numbers.get((kind, split))).capped(limit)


STAGE = STAGES.register(
    Stage(
        name="prepare",
        summary="turn medical images, questions and conversations into datasets",
        help=__doc__,
        after=("base",),
        arguments=lambda: (PrepareArguments, HubArguments),
        check=_check_before,
        main=main,
        inputs=tuple(Input(key, FILE) for key in ("data_path", "image_folder", "release_path")),
        outputs=tuple(
            Output(kind, kind, count=lambda settings, split, counter, kind=kind: _count(settings, split, kind))
            for kind in ("instruct", "benchmark", "images")
        ),
        operational=frozenset({"num_workers"}),
    )
)

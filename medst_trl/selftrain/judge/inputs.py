# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What judging reads: candidates, the benchmarks to keep out, captions to show the judge."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError
from medst_trl.pipeline.record import FILE_NAME


if TYPE_CHECKING:
    from datasets import Dataset


def made_benchmarks(benchmarks: list[str]) -> list[str]:
    """The benchmarks less those that a finished prepare had nothing to make of: recipes name them in any case."""
    made = []
    for name in benchmarks:
        path, record = Path(name), Path(name).parent / FILE_NAME
        if path.name == "benchmark" and not path.exists() and _is_finished_prepare(record):
            print(f"judge: {path.parent} was prepared without a benchmark, so no images are kept out for it.")
        else:
            made.append(name)
    return made


def _is_finished_prepare(path: Path) -> bool:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["stage"] == "prepare" and record["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_candidates(name: str, split: str) -> "Dataset":
    """
    Candidates with their images as bytes.

    Raises:
        UserError: if there are none, or their columns are others.
    """
    from datasets import Image, List

    from medst_trl.data.schema import check_columns, load_records

    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.parquet")):
        raise UserError(
            f"{name} holds no candidates, so there is nothing to judge. Its stage's rejected.jsonl and "
            "stage.json say what became of them; generate from more images."
        )
    candidates = load_records(folder if folder.is_dir() else name, split)
    check_columns(candidates, "candidates")
    return candidates.cast_column("images", List(Image(decode=False)))


def open_benchmark(name: str) -> "Dataset":
    """The test split of a benchmark whose images must not be trained on."""
    from medst_trl.data.schema import check_columns, load_records

    try:
        benchmark = load_records(name, "test")
    except UserError as error:
        if Path(name).exists():
            raise
        raise UserError(
            f"benchmarks: {error} Where there is no benchmark whose images have to be kept out: `benchmarks: []` in "
            "the recipe, or no --benchmarks."
        ) from None
    check_columns(benchmark, "benchmark")
    return benchmark


def read_captions(path: str | None) -> dict[str, str]:
    """Captions by image_id from JSON lines; none without a file."""
    if path is None:
        return {}
    captions = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):  # noqa: B007 (for the message)
            if line.strip():
                row = json.loads(line)
                captions[row["image_id"]] = str(row["caption"])
    except OSError as error:
        raise UserError(f"reference_captions {path} cannot be read: {error.strerror}. Correct the path.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}, line {number}: not a JSON object with image_id and caption. Correct or delete the line."
        ) from None
    return captions

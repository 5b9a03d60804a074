# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Writing datasets as Parquet files that are complete or not there, and that a second run does not write again."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.files import explain_full_disk

from .parallel import ordered_map


if TYPE_CHECKING:
    from datasets import Features

ROWS_PER_ROW_GROUP = 32  # images of a row group are in memory together, here and when streaming


def write_split(
    folder: Path,
    split: str,
    records: Sequence[Any],
    make_row: Callable[[Any], dict],
    features: "Features",
    rows_per_shard: int,
    num_workers: int = 1,
) -> None:
    """
    Write `<folder>/<split>-00000-of-0000N.parquet`, `rows_per_shard` records each, which `load_dataset(folder)` reads.

    The same records give the same files. A file that is there is complete and is left as it is, so a run that was
    cut short continues after its last one. Without records nothing is written.

    Args:
        records: One for each row.
        make_row: A row from a record, an image as `{"bytes": ..., "path": None}`; called on `num_workers` threads.
        features (`datasets.Features`): Columns; they go into the files, so that images are decoded when read.

    Raises:
        UserError: if the disk is full (what is finished stays).
    """
    from tqdm.auto import tqdm

    if not records:
        return
    folder.mkdir(parents=True, exist_ok=True)
    total = -(-len(records) // rows_per_shard)
    shards = [folder / f"{split}-{number:05d}-of-{total:05d}.parquet" for number in range(total)]
    for number, path in enumerate(tqdm(shards, f"{folder.name}/{split}", unit="file", disable=None)):
        if not path.exists():
            chunk = records[number * rows_per_shard : (number + 1) * rows_per_shard]
            with explain_full_disk(folder):
                _write_shard(path, ordered_map(make_row, chunk, num_workers), features)


def _write_shard(path: Path, rows: Iterator[dict], features: "Features") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with pq.ParquetWriter(temporary, features.arrow_schema) as writer:
            while group := list(islice(rows, ROWS_PER_ROW_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=features.arrow_schema))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)

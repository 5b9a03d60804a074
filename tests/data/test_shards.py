# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import errno
import hashlib
from pathlib import Path

import pytest

from medst_trl.base.errors import UserError
from medst_trl.data.schema import instruct_features, write_split


def row(n):
    return {"id": str(n), "images": [], "image_ids": [], "messages": []}


def write(folder, make_row=row, n=10, workers=1):
    write_split(folder, "train", range(n), make_row, instruct_features(), rows_per_shard=4, num_workers=workers)


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_fixed_number_of_rows_and_the_same_bytes_each_time(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", workers=3)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sorted(files(tmp_path / "a")) == [f"train-0000{n}-of-00003.parquet" for n in range(3)]


def test_nothing_gives_no_file(tmp_path):
    write(tmp_path, n=0)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop")])
def test_cut_short_and_continued_equals_never_cut(tmp_path, error):
    write(tmp_path / "whole")
    made = []

    def stops(n):
        if n == 6:
            raise error
        return row(n)

    def counts(n):
        made.append(n)
        return row(n)

    with pytest.raises(type(error)):
        write(tmp_path / "cut", stops)
    assert list(files(tmp_path / "cut")) == ["train-00000-of-00003.parquet"], "no half file, under no name"
    write(tmp_path / "cut", counts)
    assert made == list(range(4, 10)), "finished shards are not made again"
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained_and_keeps_what_is_finished(tmp_path, monkeypatch, number):
    import pyarrow.parquet as pq

    write(tmp_path / "whole")
    real, calls = pq.ParquetWriter.write_table, []

    def full(self, table):
        calls.append(table)
        if len(calls) == 2:
            raise OSError(number, "No space left on device")
        real(self, table)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(UserError, match=r"is full.*it resumes"):
            write(tmp_path / "full")
    assert list(files(tmp_path / "full")) == ["train-00000-of-00003.parquet"]
    write(tmp_path / "full")
    assert files(tmp_path / "full") == files(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_arrow_tells_a_full_disk_by_its_number():
    import pyarrow as pa

    # Not through pq.write_table: it deletes the file it could not write, and root may delete a device.
    with pytest.raises(OSError) as caught, pa.OSFile("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)
    assert caught.value.errno == errno.ENOSPC

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import resource
import signal

import pytest
import torch
from safetensors import SafetensorError

from medst_trl.base.errors import UserError
from medst_trl.base.files import (
    append_rows,
    atomic_path,
    computed_rows,
    did_you_mean,
    fill_rows,
    is_full_disk,
    merge_rows,
    move_files,
    read_jsonl,
    read_object,
    visible_files,
    write_jsonl,
    write_text,
)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: Os { code: 28, kind: StorageFull }"),
    ],
)
def test_a_full_disk_is_recognized(error):
    assert is_full_disk(error)


def test_a_full_disk_is_recognized_in_an_error_of_torch(tmp_path):
    """With a limit on the file size, `torch.save` fails with the same message as on a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(RuntimeError) as error:
            torch.save(torch.zeros(100_000), tmp_path / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert is_full_disk(error.value)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("no space"), KeyError(28)])
def test_other_errors_are_not_taken_for_a_full_disk(error):
    assert not is_full_disk(error)


def test_an_interrupted_write_keeps_the_old_file_and_its_temporary_file_is_overwritten(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]

    (tmp_path / ".a.txt.tmp").write_text("left by kill -9")
    monkeypatch.setenv("RANK", "0")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_ranks_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    with atomic_path(tmp_path / "a.txt") as first:
        monkeypatch.setenv("RANK", "1")
        with atomic_path(tmp_path / "a.txt") as second:
            assert first != second
            first.touch()
            second.touch()


def test_the_file_that_marks_a_complete_directory_is_moved_last(tmp_path, monkeypatch):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    for name in ("config.json", "a", "z"):
        (tmp_path / "from" / name).touch()
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    move_files(tmp_path / "from", tmp_path / "to")
    assert moved == ["a", "z", "config.json"] and not (tmp_path / "from").exists()


def test_rows_of_several_ranks_are_merged_into_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": str(number), "prediction": "Straße"} for number in range(7)]
    for rank in range(3):
        append_rows(path, rows[rank::3], rank)
    assert len(list(computed_rows(path))) == 7
    with pytest.raises(UserError, match="1 of 8 rows are missing"):
        merge_rows(path, [str(number) for number in range(8)])
    merge_rows(path, [row["id"] for row in rows])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    assert [child.name for child in tmp_path.iterdir()] == ["rows.jsonl"]


def test_finished_rows_are_not_computed_again(tmp_path):
    path, ids, finished = tmp_path / "rows.jsonl", ["a", "b", "c"], []

    def compute(done):
        finished.append(done)
        return ({"id": key} for key in ids if key not in done)

    append_rows(path, [{"id": "b"}])
    with open(tmp_path / "rows.jsonl.incomplete", "ab") as file:
        file.write(b'{"id": "c')  # the last line was interrupted
    fill_rows(path, ids, compute)
    fill_rows(path, ids, compute)
    assert finished == [{"b"}]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ids


def test_jsonl_is_read_as_it_was_written_without_lines_of_a_killed_run_or_a_power_cut(tmp_path):
    rows = [{"text": "line\u2028separator"}, {"text": "é\n"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('\0\0\0\n{"text": "left by a killed r')
    assert read_jsonl(tmp_path / "a.jsonl") == rows and read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", '{"a": 1'])
def test_a_damaged_object_is_read_as_an_empty_one(tmp_path, text):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    assert read_object(tmp_path / "a.json") == {}
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}


def test_hidden_and_skipped_files_are_not_listed(tmp_path):
    for name in ("b.txt", "a/c.txt", ".hidden/d.txt", "a/.e", "checkpoint-1/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(visible_files(tmp_path)) == ["b.txt", "a/c.txt", "checkpoint-1/f.txt"]
    assert list(visible_files(tmp_path, (".", "checkpoint-"))) == ["b.txt", "a/c.txt"]


def test_linked_directories_are_omitted_listed_or_followed_once(tmp_path):
    for name in ("in/a/1.txt", "in/b/2.txt", "out/3.txt", "out/.4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    directory = tmp_path / "in"
    for link, target in (("out", "../out"), ("a/up", ".."), ("a/b", "../b"), ("b/a", "../a"), ("none", "nothing")):
        (directory / link).symlink_to(target)
    own = ["none", "a/1.txt", "b/2.txt"]
    assert list(visible_files(directory)) == own
    listed = list(visible_files(directory, follow_symlinks=False))
    assert sorted(listed) == sorted([*own, "out", "a/up", "a/b", "b/a"])
    followed = [os.path.realpath(directory / name) for name in visible_files(directory, follow_symlinks=True)]
    files = [directory / "a/1.txt", directory / "b/2.txt", directory / "nothing", tmp_path / "out/3.txt"]
    assert sorted(followed) == sorted(map(str, files))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("run", "run/prepare/instruct"),
        ("run/prepare", "run/prepare/instruct"),
        ("run/instruct", "run/prepare/instruct"),
        ("run/prepare/benchmark", "run/prepare/instruct"),
        ("run/prepare/instruct/train-0.parquet", "run/prepare/instruct"),
        ("run/prepare/instruct/a/b", "run/prepare/instruct"),
        ("elsewhere/a/b", None),
    ],
)
def test_the_directory_that_is_meant_is_found_two_levels_up_or_down(tmp_path, given, found):
    for name in ("run/prepare/instruct/a/b", "run/prepare/benchmark", "elsewhere/a/b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run/prepare/instruct/train-0.parquet").touch()
    expected = f" Did you mean {tmp_path / found}?" if found else ""
    assert did_you_mean(tmp_path / given, lambda directory: any(directory.glob("train-*"))) == expected

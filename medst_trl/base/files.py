# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Write files atomically, and explain a full disk."""

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .processes import rank


# safetensors and torch.save raise their own errors, which mention the cause only in their message, or not at all.
_FULL_DISK = re.compile(r"No space left on device|StorageFull|QuotaExceeded|inline_container\.cc|PytorchStreamWriter")


@contextmanager
def atomic_path(path: str | os.PathLike, *, fsync: bool = False) -> Iterator[Path]:
    """
    Yield a temporary path beside `path`. It is renamed to `path` when the block ends, and deleted if the block raises.

    Args:
        path (`str` or `os.PathLike`):
            Final path.
        fsync (`bool`, *optional*, defaults to `False`):
            Whether the content must survive a crash of the machine.
    """
    path = Path(path)
    # The same name in every run, so that leftovers of a killed run are overwritten. It has the rank, because ranks may
    # write the same file.
    temporary = path.with_name(f".{path.name}.{rank()}.tmp" if rank() else f".{path.name}.tmp")
    try:
        yield temporary
        if fsync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str, *, fsync: bool = False) -> None:
    """Write a text file in UTF-8, atomically."""
    with atomic_path(path, fsync=fsync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any, *, fsync: bool = False) -> None:
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", fsync=fsync)


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping]) -> None:
    """Write rows as JSON lines, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def move_files(source: Path, target: Path, last: str = "config.json") -> None:
    """Move all files of one directory into another, and `last` at the end: a target that has it is complete."""
    for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
        os.replace(path, target / path.name)
    source.rmdir()


def is_full_disk(error: BaseException) -> bool:
    """Whether an error was caused by a full disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _FULL_DISK.search(str(error)) is not None


@contextmanager
def explain_full_disk(directory: str | Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" while writing to `directory` into a [`UserError`]."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"The disk that holds {directory} is full. Finished work is kept. Make room and run the same command "
            "again: it resumes."
        ) from None

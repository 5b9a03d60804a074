# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Write files atomically, read and find them, write rows with several processes, and recognize a full disk."""

import errno
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import UserError
from .processes import process_state, rank


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


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file is missing, damaged or holds something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """
    Read JSON lines; none if the file is missing. Left out are a last line without a line break, of a killed run, and
    lines that a power cut has damaged.
    """
    rows = []
    for line in Path(path).read_bytes().split(b"\n")[:-1] if os.path.exists(path) else ():
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return rows


def visible_files(
    directory: Path, skipped_prefixes: tuple[str, ...] = (".",), follow_symlinks: bool | None = None
) -> Iterator[str]:
    """
    Yield the names of all files below a directory, except hidden files and directories whose names start with one of
    `skipped_prefixes`. A symbolic link to a directory is omitted by default, followed if `follow_symlinks` is True,
    and yielded itself if it is False.
    """
    seen = {os.path.realpath(directory)}
    for root, directories, files in os.walk(directory, followlinks=bool(follow_symlinks)):
        directories[:] = sorted(name for name in directories if not name.startswith(skipped_prefixes))
        if follow_symlinks:  # each directory once: links may lead in circles
            found = {os.path.realpath(os.path.join(root, name)): name for name in directories}
            directories[:] = [name for target, name in found.items() if target not in seen]
            seen.update(found)
        elif follow_symlinks is not None:
            files += [name for name in directories if os.path.islink(os.path.join(root, name))]
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(root) / name).relative_to(directory).as_posix()


def did_you_mean(path: str | os.PathLike, is_match: Callable[[Path], bool]) -> str:
    """
    Return " Did you mean X?" for the end of a message, with the nearest directories at most two levels below or above
    `path` for which `is_match` is true; an empty text if there are none. `path` itself need not exist.
    """
    path = Path(path)
    one_up, two_up = path.parent, path.parent.parent
    for near in (path.glob("*/"), path.glob("*/*/"), [one_up], one_up.glob("*/"), [two_up], one_up.glob("*/*/")):
        with suppress(OSError, ValueError):  # directories that cannot be read
            if found := sorted(directory for directory in islice(near, 1000) if is_match(directory)):
                return f" Did you mean {' or '.join(map(str, found[:3]))}?"
    return ""


def fill_rows(path: Path, ids: Collection[str], compute: Callable[[set[str]], Iterable[dict[str, Any]]]) -> None:
    """
    Write a row for each of `ids` to a file of JSON lines, in that order. Does nothing if the file is complete.

    During the run, each process appends to its own file, `<path>.incomplete` or `<path>.incomplete-<rank>`. `path`
    itself appears when all rows are computed.

    Args:
        path (`pathlib.Path`):
            The final file.
        ids (collection of `str`):
            Ids of all rows. All processes of a launch must pass the same ids.
        compute (`Callable`):
            Takes the ids that earlier runs finished and yields the remaining rows of this process, each with its `id`.

    Raises:
        UserError: if rows are missing after all processes have finished.
    """
    state = process_state()
    is_complete, done = path.exists(), {row["id"] for row in computed_rows(path)}
    state.wait_for_everyone()  # all processes must read the same state before one of them writes
    if is_complete:
        return
    if not done.issuperset(ids):
        append_rows(path, compute(done), state.process_index)
        state.wait_for_everyone()
    if state.is_main_process and not path.exists():  # another run may have computed the same rows meanwhile
        merge_rows(path, ids)
    state.wait_for_everyone()


def computed_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all rows written so far, also by an earlier run with another number of processes."""
    for part in _parts(path):
        yield from read_jsonl(part)


def append_rows(path: Path, rows: Iterable[dict[str, Any]], process: int = 0) -> None:
    """Append each row as soon as it is computed. An incomplete last line of an earlier run is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.incomplete" + (f"-{process}" if process else ""), "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()


def merge_rows(path: Path, ids: Collection[str]) -> None:
    """
    Write all rows to the final file in the order of `ids`, and delete the parts.

    Raises:
        UserError: if some are missing.
    """
    rows = {row["id"]: row for row in computed_rows(path)}
    if missing := [key for key in ids if key not in rows]:
        raise UserError(
            f"{len(missing)} of {len(ids)} rows are missing in {path}, for example {missing[0]!r}. All "
            "processes must use the same output_dir. Run the command again to add the missing rows."
        )
    write_jsonl(path, (rows[key] for key in ids))
    for part in _parts(path):
        part.unlink()


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.incomplete*"))


def move_files(source: Path, target: Path, last: str = "config.json") -> None:
    """
    Move all files of one directory into another, and `last` at the end: a target that has it is complete. Their mode
    is that of a new file: safetensors (0.8) lets only their owner read them.
    """
    for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
        if path.is_file():
            path.chmod(source.stat().st_mode & 0o666)
        os.replace(path, target / path.name)
    source.rmdir()


def is_full_disk(error: BaseException) -> bool:
    """Whether an error was caused by a full disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _FULL_DISK.search(str(error)) is not None

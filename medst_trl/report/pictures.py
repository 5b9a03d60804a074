# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures for a page: a few rows out of Parquet files, made small, as data URLs."""

import base64
import io
from collections.abc import Collection, Iterable
from pathlib import Path

from medst_trl.data.images import MAX_PIXELS

from .run_folder import Run


QUALITY = 85  # of JPEG


def find_pictures(
    run: Run, folders: Iterable[Path], key: str, column: str, wanted: Collection[str], size: int
) -> dict[str, list[str]]:
    """
    Pictures of a few rows, without reading the others.

    Args:
        run ([`Run`]): Takes notes of files that cannot be read.
        folders (iterable of `pathlib.Path`): Where `*.parquet` files lie; those that do not exist are passed over.
        key (`str`): Column that names a row, such as `"id"`.
        column (`str`): Column of one picture or of a list of them.
        wanted (collection of `str`): Names of rows.
        size (`int`): Longest side in pixels; larger pictures are made smaller.

    Returns:
        `dict`: name to the data URLs of its pictures; an empty text stands for one that cannot be read.
    """
    missing, found = set(wanted), {}
    for path in (path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.parquet"))):
        if not missing:
            break
        try:
            rows = _read_rows(path, key, column, missing)
        except Exception as error:  # pyarrow has an exception for each way in which a file can be damaged
            name = run.name(path) if path.is_relative_to(run.folder) else path.name
            run.notes.append(f"{name} cannot be read for its pictures ({type(error).__name__}).")
            continue
        for name, pictures in rows.items():
            pictures = pictures if isinstance(pictures, list) else [pictures]
            found[name] = [data_url((picture or {}).get("bytes"), size) for picture in pictures]
        missing -= rows.keys()
    return found


def data_url(image: bytes | None, size: int) -> str:
    """A picture as a data URL, its longest side at most `size` pixels; empty where it cannot be read."""
    from PIL import Image

    if not image:
        return ""
    try:
        with Image.open(io.BytesIO(image), formats=["PNG", "JPEG"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return ""
            picture.draft("RGB", (size, size))  # a JPEG is decoded at a fraction of its size
            small = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
            small.thumbnail((size, size))
            file = io.BytesIO()
            clean = Image.new(small.mode, small.size)  # without EXIF, comments and profiles
            clean.paste(small)
            clean.save(file, "JPEG", quality=QUALITY)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _read_rows(path: Path, key: str, column: str, wanted: Collection[str]) -> dict[str, list[dict] | dict]:
    import pyarrow.parquet as pq

    rows = {}
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):  # names first: pictures are large
            names = file.read_row_group(group, columns=[key]).column(key).to_pylist()
            places = [place for place, name in enumerate(names) if name in wanted]
            if places:
                table = file.read_row_group(group, columns=[column]).take(places)
                rows |= zip((names[place] for place in places), table.column(column).to_pylist())
    return rows

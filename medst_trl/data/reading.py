# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Read text, JSON and tables record by record, so that one broken record does not cost the others.

Readers yield positions from 0 with a `dict` for each record, or a [`Rejected`] for what cannot be parsed.
"""

import csv
import io
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean, visible_files

from .source import Rejected


_NOT_TEXT = {
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"PK\x03\x04": "is a zip archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook: save the sheet as CSV UTF-8",
    b"\xff\xfe": 'is UTF-16, as Excel\'s "Unicode text": save it as UTF-8',
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def find_file(directory: Path, pattern: str) -> Path:
    """
    Find the one file of a directory that matches a pattern.

    Raises:
        UserError: if there is none, or several.
    """
    files = sorted(directory.glob(pattern))
    if len(files) != 1:
        found = f"{len(files)} ({', '.join(file.name for file in files)})" if files else "none"
        near = did_you_mean(directory, lambda other: any(other.glob(pattern)))
        raise UserError(f"{directory} must hold one file {pattern!r}; found {found}.{near} Correct data_path.")
    return files[0]


def read_text_file(path: Path, what: str = "data") -> str:
    """
    Read a file in UTF-8, with or without a byte order mark, line breaks as they are. Single bytes of another encoding
    become lone surrogates, so that they cost only the records they are in.

    Args:
        path (`pathlib.Path`): The file.
        what (`str`, *optional*, defaults to `"data"`): What the file contains, for the message.

    Raises:
        UserError: if it cannot be read, or its first bytes are those of an archive, a workbook or UTF-16.
    """
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        files = ", ".join(islice(visible_files(path), 3)) or "it has none"
        raise UserError(f"{path} is a directory. Give a file with the {what}: {files}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Correct the path to the {what}.") from None
    for start, advice in _NOT_TEXT.items():
        if content.startswith(start):
            raise UserError(f"{path} {advice}.")
    return content.decode("utf-8-sig", errors="surrogateescape")


def read_json_records(path: Path, key: str) -> Iterator[tuple[int, dict | Rejected]]:
    """
    Read the records of a JSON array or of JSON lines, depending on the file.

    What cannot be parsed is rejected as `malformed_json`, and reading continues with the next record. In JSON lines
    that is the next line. In an array it is the next object that parses and has the key `key`, so that a part of
    the broken record does not count as a record. A truncated file gives its complete records.

    Raises:
        UserError: if the file is missing, empty or holds neither an array nor lines of objects.
    """
    text = read_text_file(path).replace("\r\n", "\n").replace("\r", "\n")
    start = _BETWEEN.match(text).end()
    is_array = text[start : start + 1] == "["
    if start == len(text) or not (is_array or text[start] == "{" or path.suffix == ".jsonl"):
        raise UserError(f"{path} holds no records: expected a JSON array of objects, or one object per line.")
    items = _values(text, start + 1, key) if is_array else chain.from_iterable(map(_values, text.split("\n")))
    for position, item in enumerate(items):
        if not isinstance(item, dict | Rejected):
            item = Rejected("", "not_an_object", item)
        yield position, replace(item, id=f"{path.name}#{position}") if isinstance(item, Rejected) else item


def _values(text: str, at: int = 0, key: str | None = None) -> Iterator[Any]:
    """
    Yield the values of an array whose records have the key `key`.

    Without a key, `text` is one line. It usually has one value, but two if a file without a last line break was
    appended to.
    """
    while (at := _BETWEEN.match(text, at).end()) < len(text) and not (key and text[at] == "]"):
        try:
            item, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            item = Rejected("", "malformed_json", text[at : at + 200])
            # The next record has the key; a part of the broken record, such as one of its turns, does not.
            objects = json_objects(text, at + 1) if key else ()
            at = next((start for start, found in objects if key in found), len(text))
        yield item


def json_objects(text: str, at: int = 0) -> Iterator[tuple[int, dict]]:
    """Yield the JSON objects in a text from a position on, and where each starts. Text that is not JSON is skipped."""
    while (at := text.find("{", at)) >= 0:
        try:
            item, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
        else:
            yield at, item
            at = end


def read_rows(path: Path, key: str = "image") -> Iterator[tuple[int, dict | Rejected]]:
    """
    Read the rows of a table that has a column `key`: `.csv` or `.tsv` with a header, or `.jsonl` / `.json` objects.

    Raises:
        UserError: if the file cannot be read, or its header lacks the column.
    """
    if path.suffix.lower() in (".json", ".jsonl"):
        yield from read_json_records(path, key)
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = _fields(path, delimiter)
    header = [name.strip() for name in next(rows, ())]
    check_header(header, (key,), path, delimiter)
    for position, fields in enumerate(rows):
        if len(fields) == len(header):
            yield position, dict(zip(header, fields))
        else:
            yield position, Rejected(f"{path.name}#{position}", "malformed_row", ",".join(fields))


def _fields(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows of a table that are not empty. (`csv.DictReader` would hide missing and extra fields.)"""
    reader = csv.reader(io.StringIO(read_text_file(path, "table"), newline=""), delimiter=delimiter)
    while True:
        try:
            if fields := next(reader):
                yield fields
        except StopIteration:
            return
        except csv.Error as error:  # a field larger than csv's limit
            yield [str(error)]


def check_header(
    header: list[str], needed: Collection[str], path: Path, delimiter: str | None, advice: str = "Rename its columns."
) -> None:
    """
    Refuse a table that lacks a column, or has two of one name, of which one would be lost.

    Raises:
        UserError: naming the columns, and the separator if that seems to be the reason.
    """
    if missing := [name for name in needed if name not in header]:
        other = next((sign for sign in ";\t,|" if sign != delimiter and len(header) == 1 and sign in header[0]), None)
        if delimiter and other:
            advice = f"Separate its columns by {_SEPARATORS[delimiter]} instead of {_SEPARATORS[other]}."
        names, found = ", ".join(f"`{name}`" for name in missing), ", ".join(header) or "none"
        raise UserError(f"{path} has no column {names} (it has {found}). {advice}")
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{path} has several columns {', '.join(f'`{name}`' for name in repeated)}. Keep one of each.")

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
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean, visible_files

from .cells import column_names, image_suffixes
from .source import Rejected


if TYPE_CHECKING:
    from charset_normalizer import CharsetMatch

_NOT_TEXT = {
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"PK\x03\x04": "is a zip archive, or an Excel workbook: name it .xlsx, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook of an old version: save it as .xlsx or CSV UTF-8",
    b"PAR1": "is a Parquet file: name it .parquet for the source images, or save it as CSV UTF-8",
    b"\xff\xfe": 'is UTF-16, as Excel\'s "Unicode text": save it as UTF-8',
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()
_DECLARED_SEPARATOR = re.compile(r'"?sep=(.)"?\s*$', re.IGNORECASE)  # Excel's first line
# What other text becomes if it is read as Western European: the letters of Czech, Croatian or Turkish, and symbols in
# words or several accented letters in a row, of Polish, Cyrillic, Chinese, or the code pages of DOS and of the Mac.
_NOT_WESTERN = re.compile(
    r"[šžðþýŠŽÐÞÝŸ]|º[^\W\d_]|[¢-ª¬-¾·][À-ÿ]|[^\W\d_\x00-\x7f]{3}"
    r"|[^\W\d_][¡-¶¸-¿€‚ƒ„†‡ˆ‰‹“”•˜™›][^\W\d_]"
)
_HUNGARIAN, _ROMANCE = re.compile("[õûÕÛ]"), re.compile("[ãçàèêÃÇÀÈÊ]")  # both in French and Portuguese
_KANA, _HANGUL, _IDEOGRAPH = map(re.compile, ("[\u3040-\u30ff]", "[\uac00-\ud7a3]", "[\u4e00-\u9fff]"))
_UNDECODED, _NOT_ASCII = re.compile("[\udc80-\udcff]"), re.compile("[^\x00-\x7f]")


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


def read_text_file(path: Path, what: str = "data", notes: dict | None = None) -> str:
    """
    Read a file in UTF-8, with or without a byte order mark, line breaks as they are. Single bytes of another encoding
    become lone surrogates, so that they cost only the records they are in.

    Args:
        path (`pathlib.Path`):
            The file.
        what (`str`, *optional*, defaults to `"data"`):
            What the file contains, for the message.
        notes (`dict`, *optional*):
            If given, files in UTF-16, Western European (cp1252) and Chinese (GB18030) encodings are read as well, and
            `notes["encoding"]` names the encoding.

    Raises:
        UserError: if it cannot be read, its first bytes are those of an archive or a workbook, or it has another
            encoding.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # it might wait forever
        raise UserError(f"{path} is a pipe, a socket or a device. Save the {what} as a file.")
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        files = ", ".join(islice(visible_files(path), 3)) or "it has none"
        raise UserError(f"{path} is a directory. Give a file with the {what}: {files}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Correct the path to the {what}.") from None
    is_utf16 = notes is not None and (content.startswith(_UTF16) or content.count(b"\0") > len(content) / 8)
    for start, advice in _NOT_TEXT.items():
        if content.startswith(start) and not is_utf16:
            raise UserError(f"{path} {advice}.")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    damaged = len(_UNDECODED.findall(text))
    # A damaged file in UTF-8 has many valid sequences; text in another encoding has few by chance.
    if notes is None or not (is_utf16 or 2 * damaged >= len(_NOT_ASCII.findall(text)) > 0):
        return text
    if found := _decode(content, is_utf16):
        notes["encoding"] = f"{found.encoding} (the file is not UTF-8); check an accented letter in the output"
        return str(found).removeprefix("\ufeff")
    if is_utf16 or damaged > len(content) / 200:
        raise UserError(f"{path} is not UTF-8, and its encoding is not clear. Save it as UTF-8.")
    return text  # a few damaged records


def _decode(content: bytes, is_utf16: bool) -> "CharsetMatch | None":
    """Decode UTF-16, or else Western European or Chinese text. Return None for text in yet another encoding."""
    from charset_normalizer import from_bytes

    names = ["utf_16", "utf_16_le", "utf_16_be"] if is_utf16 else ["cp1252", "gb18030"]
    if (found := from_bytes(content, cp_isolation=names).best()) is None or is_utf16:
        return found
    text = str(found)
    if found.encoding == "cp1252":
        foreign, special = len(_NOT_WESTERN.findall(text)), len(_NOT_ASCII.findall(text))
        is_hungarian = len(_HUNGARIAN.findall(text)) > 4 * len(_ROMANCE.findall(text))
        return None if is_hungarian or 20 * foreign > special else found
    other = str(from_bytes(content, cp_isolation=["gb18030", "big5", "cp932", "cp949"]).best())
    is_chinese = other == text or (_HANGUL.search(other) and _IDEOGRAPH.search(other))  # not one of both alone
    return found if is_chinese and not _KANA.search(text) else None


def read_json_records(path: Path, key: str, notes: dict | None = None) -> Iterator[tuple[int, dict | Rejected]]:
    """
    Read the records of a JSON array, or of JSON objects one after the other, usually one per line.

    What cannot be parsed is rejected as `malformed_json`, and reading continues with the next record. That is the next
    line that can begin a record, or in an array the next object that parses and has the key `key`, so that a part of
    the broken record does not count as a record. A truncated file gives its complete records. For `notes` see
    [`read_text_file`].

    Raises:
        UserError: if the file is missing, empty or holds neither an array nor objects.
    """
    text = read_text_file(path, notes=notes)
    start = _BETWEEN.match(text).end()
    is_array = text[start : start + 1] == "["
    if start == len(text) or not (is_array or text[start] == "{" or path.suffix.lower() in (".jsonl", ".ndjson")):
        raise UserError(f"{path} holds no records: expected a JSON array of objects, or one object per line.")
    if is_array:
        items = _values(text, start + 1, key)
    else:  # lines inside a record are indented, or close it
        indent = start - text.rfind("\n", 0, start) - 1
        items = chain.from_iterable(map(_values, re.split(rf"[\r\n]+(?=[ \t]{{0,{indent}}}[^\s}}\]])", text)))
    for position, item in enumerate(items):
        if not isinstance(item, dict | Rejected):
            item = Rejected("", "not_an_object", type(item).__name__)
        yield position, replace(item, id=f"{path.name}#{position}") if isinstance(item, Rejected) else item


def _values(text: str, at: int = 0, key: str | None = None) -> Iterator[Any]:
    """
    Yield the values of an array whose records have the key `key`.

    Without a key, `text` is one record, or several if a file without a last line break was appended to.
    """
    while True:
        at = _BETWEEN.match(text, at).end()
        if at == len(text) or (key and text[at] == "]"):
            return
        try:
            item, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            item = Rejected("", "malformed_json", str(error))  # where, but no text: it may name a patient
            # The next record has the key; a part of the broken record, such as one of its turns, does not.
            at = _next_record(text, at, key) if key else len(text)
        yield item


def _next_record(text: str, at: int, key: str) -> int:
    """Return where the next object behind a position begins that parses and has a key, or the end of the text."""
    while (at := text.find("{", at + 1)) >= 0:
        with suppress(ValueError, RecursionError):
            record, end = _DECODER.raw_decode(text, at)
            if key in column_names(record, key):
                return at
            at = end - 1
    return len(text)


def read_json_rows(path: Path, key: str, notes: dict | None = None) -> Iterator[tuple[int, dict | Rejected]]:
    """Read [`read_json_records`] with their keys named by [`column_name`], and images by the key `image`."""
    for position, item in read_json_records(path, key, notes):
        if isinstance(item, dict):
            names = column_names(item, "image")
            repeated = Rejected(f"{path.name}#{position}", "repeated_column", ", ".join(item))
            item = dict(zip(names, item.values())) if len({*names}) == len(names) else repeated
        yield position, item


def read_rows(
    path: Path, needed: Sequence[str] = ("image",), notes: dict | None = None, as_written: bool = False
) -> Iterator[tuple[int, dict | Rejected]]:
    """
    Read the rows of a table: `.jsonl` / `.json` objects, `.xlsx` (the first sheet), or text with a header. Columns are
    named by [`column_name`].

    In text, commas, semicolons, tabs and bars are recognized. A cell in quotes may have several lines. In a `.tsv`
    file with tabs, quotes are text, and a line is a row. A line whose quotes do not match is rejected as `bad_quotes`,
    and reading continues with the next line. A row with more or fewer cells than the header is a `malformed_row`.

    Args:
        path (`pathlib.Path`): The table.
        needed (sequence of `str`, *optional*, defaults to `("image",)`): The columns that it must have.
        notes (`dict`, *optional*): Receives what to report about the file, see [`read_text_file`].
        as_written (`bool`, *optional*, defaults to `False`):
            Whether a program has written the texts: then a `.tsv` file has quotes, and what looks like a formula is
            text.

    Raises:
        UserError: if the file cannot be read, or its header lacks a column.
    """
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson"):
        yield from read_json_rows(path, needed[0], notes)
        return
    if suffix in (".xlsx", ".xlsm"):
        rows = _workbook(path, notes, as_written)
    else:
        rows = _text_table(path, needed[0], notes, as_written)
    header = column_names(next(rows, (0, ()))[1], needed[0])
    check_header(header, needed, path)
    for position, (number, cells) in enumerate(rows):
        name = f"{path.name}#line {number}"
        if cells is None:
            yield position, Rejected(name, "bad_quotes")
        elif len(cells) != len(header):
            yield position, Rejected(name, "malformed_row", f"{len(cells)} cells instead of {len(header)}")
        else:
            yield position, dict(zip(header, cells))


def _workbook(path: Path, notes: dict | None, formulas: bool) -> Iterator[tuple[int, list[Any]]]:
    """
    Yield the rows of the first sheet of an `.xlsx` file that are not empty, with their numbers. Empty cells and errors
    such as `#N/A` are `""`. All rows have the length of the first one, unless they have further values.
    """
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.escape import unescape  # openpyxl leaves `_x000D_`, a carriage return, unchanged
    except ImportError:
        raise UserError("Reading .xlsx needs openpyxl: install medst_trl[xlsx], or save the sheet as CSV.") from None
    try:
        book = load_workbook(path, read_only=True, data_only=not formulas)
        sheet = book.worksheets[0]
        if notes is not None and len(book.sheetnames) > 1:
            notes["sheets_not_read"] = ", ".join(book.sheetnames[1:])
        sheet.reset_dimensions()  # as stated in the file, they may leave out rows
        width = 0
        for number, row in enumerate(sheet.iter_rows(), start=1):
            cells = ["" if cell.value is None or cell.data_type == "e" else cell.value for cell in row]
            cells = [unescape(cell) if isinstance(cell, str) else cell for cell in cells]
            used = max((position for position, cell in enumerate(cells, start=1) if str(cell).strip()), default=0)
            width = width or used
            if used:
                yield number, cells[: max(used, width)] + [""] * (width - len(cells))
    except Exception as error:  # zipfile, XML and openpyxl raise many for an invalid workbook
        raise UserError(f"{path} cannot be read as a workbook ({error}). Save the sheet as CSV UTF-8.") from None


def _text_table(
    path: Path, key: str, notes: dict | None, has_quotes: bool
) -> Iterator[tuple[int, Sequence[str] | None]]:
    """
    Yield the rows of a table in text that are not empty, first its header, with the number of their first line. The
    cells of a line whose quotes do not match are None.
    """
    csv.field_size_limit(sys.maxsize)  # an endless answer of a model may exceed csv's 128 KiB
    # Only line breaks end a row; `str.splitlines` would split at other characters, too.
    lines = list(io.StringIO(read_text_file(path, "table", notes), newline=""))
    default = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    delimiters, at = [default, *(one for one in ",;\t|" if one != default)], 0
    if lines and (declared := _DECLARED_SEPARATOR.match(lines[0])):
        delimiters, at = [declared[1]], 1
    while at < len(lines) and not lines[at].strip():
        at += 1
    # In a .tsv file, other programs write no quotes.
    unquoted = "\t" if default == "\t" and not has_quotes else None
    starts = {one: _cells(lines, at, one, one != unquoted) for one in delimiters}
    headers = {one: column_names(cells or (), key) for one, (cells, _) in starts.items()}
    longest = max(delimiters, key=lambda one: len(headers[one]))
    delimiter = next((one for one in delimiters if key in headers[one]), longest)
    first, at, header = at, at + starts[delimiter][1], headers[delimiter]
    if at > first + 1 and any(delimiter in name for name in header):  # a quote closes in a row
        raise UserError(f"The quotes in the header of {path} do not match: {lines[first].strip()}. Correct it.")
    yield first + 1, header
    is_quoted = any(re.match(rf'(.*{re.escape(delimiter)})? *"', line) for line in lines[first:])
    while at < len(lines):
        cells, taken = _cells(lines, at, delimiter, delimiter != unquoted)
        text = "".join(lines[at : at + taken])
        if taken > 1 and (len(cells) != len(header) or _swallows_rows(text, cells, header.index(key), delimiter)):
            cells, taken = None, 1
        elif is_quoted and delimiter != unquoted and text.count('"') % 2:  # if no cell is quoted, these are inches
            cells = None
        if cells is None or any(cell.strip() for cell in cells):
            yield at + 1, cells
        at += taken


def _cells(lines: list[str], at: int, delimiter: str, has_quotes: bool) -> tuple[list[str] | None, int]:
    """Return the cells of the row that starts at a line, None if its quotes do not match, and its number of lines."""
    quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    rest = (lines[number] for number in range(at, len(lines)))
    reader = csv.reader(rest, delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True)
    try:
        return next(reader, []), reader.line_num
    except csv.Error:
        return None, 1


def _swallows_rows(text: str, cells: list[str], column: int, delimiter: str) -> bool:
    """
    Whether a quoted cell of several lines contains other rows, because a quote is missing. A line counts as a row if
    it has as many cells as the row and, in the column that names it, such as the image, a name of the same kind.
    """
    rows = (line.split(delimiter) for line in re.split("[\r\n]+", text))
    names = [row[column].strip(' "') for row in rows if len(row) == len(cells)]
    names = [name for name in names if name and _kind_of_name(name) == _kind_of_name(cells[column])]
    if (own := cells[column].strip()) in names:
        names.remove(own)
    return bool(names)


def _kind_of_name(name: str) -> str:
    """Return what the names of a table have in common: that they are images, the suffix, or what surrounds numbers."""
    suffix = PurePath(name := name.strip().casefold()).suffix
    return "image" if suffix in image_suffixes() else re.sub(r"\d+", "0", suffix or name)


def check_header(header: Collection[str], needed: Collection[str], path: Path) -> None:
    """Refuse a table that lacks a column, or has two of one name, of which one would be lost."""
    if missing := [name for name in needed if name not in header]:
        names, found = ", ".join(f"`{name}`" for name in missing), ", ".join(header) or "none"
        quotes = " Quotes are text in a .tsv file: name it .csv." if any('"' in name for name in header) else ""
        raise UserError(f"{path} has no column {names} (it has {found}). Rename its columns.{quotes}")
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{path} has several columns {', '.join(f'`{name}`' for name in repeated)}. Keep one of each.")

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
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import did_you_mean, visible_files

from .source import Rejected, column_name


if TYPE_CHECKING:
    from charset_normalizer import CharsetMatch

_NOT_TEXT = {
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"PK\x03\x04": "is a zip archive or an Excel workbook: unpack it, name it .xlsx, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook of an old version: save it as .xlsx or CSV UTF-8",
    b"PAR1": "is a Parquet file: name it .parquet",
    b"\xff\xfe": 'is UTF-16, as Excel\'s "Unicode text": save it as UTF-8',
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()
_DECLARED_SEPARATOR = re.compile(r'"?sep=(.)"?\s*$', re.IGNORECASE)  # Excel's first line
# A symbol between letters, or several accented letters in a row: Polish or Cyrillic read as cp1252.
_NOT_WESTERN = re.compile(r"[^\W\d_][¡¢£¤¥¦¨©¬®¯³´¸¹¿][^\W\d_]|[^\W\d_\x00-\x7f]{3}")
_KANA, _HANGUL, _IDEOGRAPH = map(re.compile, ("[\u3040-\u30ff]", "[\uac00-\ud7a3]", "[\u4e00-\u9fff]"))
_ALIASES = {"image": ("images", "file_name")}  # `file_name`: the `metadata.csv` of Hugging Face's image folders
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
    with suppress(UnicodeDecodeError):
        if not is_utf16:
            return content.decode("utf-8-sig")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    damaged = sum("\udc80" <= sign <= "\udcff" for sign in text)
    # A damaged file in UTF-8 has many valid sequences; text in another encoding has few by chance.
    if notes is None or (not is_utf16 and 2 * damaged < sum(sign > "\x7f" for sign in text)):
        return text
    if (found := _decode(content, is_utf16)) is None:
        if is_utf16 or damaged > len(content) / 200:
            raise UserError(f"{path} is not UTF-8, and its encoding is not clear. Save it as UTF-8.")
        return text  # a few damaged records
    notes["encoding"] = f"{found.encoding}, detected (the file is not UTF-8)"
    return str(found).removeprefix("\ufeff")


def _decode(content: bytes, is_utf16: bool) -> "CharsetMatch | None":
    """
    Decode UTF-16, or else Western European or Chinese text. Return None for text in yet another encoding, which can
    often be decoded, too, but not to Western or Chinese words.
    """
    from charset_normalizer import from_bytes

    names = ["utf_16", "utf_16_le", "utf_16_be"] if is_utf16 else ["cp1252", "gb18030"]
    if (found := from_bytes(content, cp_isolation=names).best()) is None or is_utf16:
        return found
    if found.encoding == "cp1252":
        return None if _NOT_WESTERN.search(str(found)) else found
    other = str(from_bytes(content, cp_isolation=["gb18030", "big5", "cp932", "cp949"]).best())
    is_chinese = other == str(found) or (_HANGUL.search(other) and _IDEOGRAPH.search(other))  # not one of both alone
    return found if is_chinese and not _KANA.search(str(found)) else None


def read_json_records(path: Path, key: str, notes: dict | None = None) -> Iterator[tuple[int, dict | Rejected]]:
    """
    Read the records of a JSON array or of JSON lines, depending on the file.

    What cannot be parsed is rejected as `malformed_json`, and reading continues with the next record. In JSON lines
    that is the next line. In an array it is the next object that parses and has the key `key`, so that a part of
    the broken record does not count as a record. A truncated file gives its complete records. For `notes` see
    [`read_text_file`].

    Raises:
        UserError: if the file is missing, empty or holds neither an array nor lines of objects.
    """
    text = read_text_file(path, notes=notes).replace("\r\n", "\n").replace("\r", "\n")
    start = _BETWEEN.match(text).end()
    is_array = text[start : start + 1] == "["
    if not is_array and (names := _whole_object(text)) and key not in column_names(names, key):
        raise UserError(
            f"{path} is one object with the keys {', '.join(names[:5])}. Save the records as an array of objects, or "
            "one object per line (in pandas: orient='records')."
        )
    if start == len(text) or not (is_array or text[start] == "{" or path.suffix == ".jsonl"):
        raise UserError(f"{path} holds no records: expected a JSON array of objects, or one object per line.")
    items = _values(text, start + 1, key) if is_array else chain.from_iterable(map(_values, text.split("\n")))
    for position, item in enumerate(items):
        if not isinstance(item, dict | Rejected):
            item = Rejected("", "not_an_object", item)
        yield position, replace(item, id=f"{path.name}#{position}") if isinstance(item, Rejected) else item


def _whole_object(text: str) -> list[str]:
    """Return the keys of the object that a text is, if their values are lists or objects, such as columns."""
    with suppress(ValueError, RecursionError):
        whole = json.loads(text)
        if isinstance(whole, dict) and all(isinstance(value, dict | list) for value in whole.values()):
            return list(whole)
    return []


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
            at = next((start for start, found in objects if key in map(column_name, found)), len(text))
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


def read_rows(path: Path, key: str = "image", notes: dict | None = None) -> Iterator[tuple[int, dict | Rejected]]:
    """
    Read the rows of a table that has a column `key`: `.jsonl` / `.json` objects, `.xlsx` (the first sheet), or text
    with a header. Columns are named by [`column_name`].

    In text, commas, semicolons, tabs and bars are recognized. A cell in quotes may have several lines. In a `.tsv`
    file with tabs, quotes are text, and a line is a row. A line whose quotes do not match is rejected as `bad_quotes`,
    and reading continues with the next line.

    Args:
        path (`pathlib.Path`): The table.
        key (`str`, *optional*, defaults to `"image"`): The column that it must have.
        notes (`dict`, *optional*): Receives what to report about the file, see [`read_text_file`].

    Raises:
        UserError: if the file cannot be read, or its header lacks the column.
    """
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson"):
        for position, item in read_json_records(path, key, notes):
            names = column_names(item, key) if isinstance(item, dict) else ()
            if len(set(names)) < len(names):
                item = Rejected(f"{path.name}#{position}", "repeated_column", ", ".join(item))
            yield position, dict(zip(names, item.values())) if isinstance(item, dict) else item
        return
    read = _workbook if suffix in (".xlsx", ".xlsm") else _text_table
    for position, (number, row) in enumerate(read(path, key, notes)):
        yield position, replace(row, id=f"{path.name}#line {number}") if isinstance(row, Rejected) else row


def column_names(names: Iterable[Any], key: str) -> list[str]:
    """Return [`column_name`] of the columns of a table, with the usual other names of the column `key` replaced."""
    names = [column_name(name) for name in names]
    return names if key in names else [key if name in _ALIASES.get(key, ()) else name for name in names]


def _workbook(path: Path, key: str, notes: dict | None) -> Iterator[tuple[int, dict | Rejected]]:
    """Yield the rows of the first sheet of a workbook, with their numbers."""
    rows = read_workbook(path, "save the sheet as CSV UTF-8", notes)
    header = column_names(next(rows, (0, ()))[1], key)
    check_header(header, (key,), path, None)
    for number, cells in rows:
        fits = len(cells) == len(header)
        yield number, dict(zip(header, cells)) if fits else Rejected("", "malformed_row", "; ".join(map(str, cells)))


def read_workbook(
    path: Path, instead: str, notes: dict | None = None, *, formulas: bool = False
) -> Iterator[tuple[int, list[Any]]]:
    """
    Read the rows of the first sheet of an `.xlsx` file that are not empty, with their numbers. Empty cells and errors
    such as `#N/A` are `""`. All rows have the length of the first one, unless they have further values.

    Args:
        path (`pathlib.Path`): The file.
        instead (`str`): What to do if it cannot be read, for the message.
        notes (`dict`, *optional*): Receives the names of further sheets.
        formulas (`bool`, *optional*, defaults to `False`): Whether to read formulas instead of their values.

    Raises:
        UserError: without openpyxl, or if the file is damaged.
    """
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.escape import unescape  # openpyxl leaves `_x000D_`, a carriage return, unchanged
    except ImportError:
        raise UserError(f"Reading .xlsx needs openpyxl: install medst_trl[xlsx], or {instead}.") from None
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
        raise UserError(f"{path} cannot be read as a workbook ({error}). Correct it, or {instead}.") from None


def _text_table(path: Path, key: str, notes: dict | None) -> Iterator[tuple[int, dict | Rejected]]:
    """Yield the rows of a table in text that are not empty, with the number of their first line."""
    # Only line breaks end a row; `str.splitlines` would split at other characters, too.
    lines = list(io.StringIO(read_text_file(path, "table", notes), newline=""))
    own = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    signs, at = [own, *(sign for sign in _SEPARATORS if sign != own)], 0
    if lines and (declared := _DECLARED_SEPARATOR.match(lines[0])):
        signs, at = [declared[1]], 1
    while at < len(lines) and not lines[at].strip():
        at += 1
    headers = {sign: column_names(_cells(lines, at, _dialect(sign, own))[0] or (), key) for sign in signs}
    sign = next((sign for sign in signs if key in headers[sign]), max(signs, key=lambda sign: len(headers[sign])))
    header, dialect = headers[sign], _dialect(sign, own)
    is_quoted = any(name.startswith('"') for name in header)
    advice = "Quotes are text in a .tsv file: name it .csv." if is_quoted else "Rename its columns."
    check_header(header, (key,), path, None, advice)
    start, at = at, at + _cells(lines, at, dialect)[1]
    if at > start + 1 and any(sign in name for name in header):  # a quote closes in a row
        raise UserError(f"The quotes in the header of {path} do not match: {lines[start].strip()}. Correct it.")
    while at < len(lines):
        number, (cells, taken) = at + 1, _cells(lines, at, dialect)
        if taken > 1 and (len(cells) != len(header) or _holds_rows(lines[at : at + taken], cells, header, key, sign)):
            cells, taken = None, 1
        at += taken
        if cells is None:
            yield number, Rejected("", "bad_quotes", lines[number - 1].strip())
        elif any(cell.strip() for cell in cells):
            fits = len(cells) == len(header)
            yield number, dict(zip(header, cells)) if fits else Rejected("", "malformed_row", sign.join(cells))


def _dialect(sign: str, own: str) -> dict[str, Any]:
    """Return how to read text with a separator. In tables with tabs, other programs write no quotes."""
    quoting = csv.QUOTE_NONE if sign == own == "\t" else csv.QUOTE_MINIMAL
    return {"delimiter": sign, "strict": True, "quoting": quoting, "skipinitialspace": True}


def _cells(lines: list[str], at: int, dialect: dict[str, Any]) -> tuple[list[str] | None, int]:
    """Return the cells of the row that starts at a line, None if its quotes do not match, and its number of lines."""
    reader = csv.reader((lines[number] for number in range(at, len(lines))), **dialect)
    try:
        return next(reader, []), reader.line_num
    except csv.Error:
        return None, 1


def _holds_rows(lines: list[str], cells: list[str], header: list[str], key: str, sign: str) -> bool:
    """
    Whether a cell of several lines holds other rows: a missing quote was replaced by one of a later row. Then one of
    the lines is a row itself, with a value of the column `key` inside the quotes that looks like the one of the row.
    """
    column, last = header.index(key), len(lines) - 1
    for number, line in enumerate(lines):
        found = line.rstrip("\r\n").split(sign)
        if len(found) != len(header) or not found[column].strip():
            continue
        is_before = number == 0 and sign.join(found[:column]).count('"') % 2 == 0
        is_after = number == last and '"' in sign.join(found[: column + 1])
        if not is_before and not is_after and _form(found[column]) == _form(cells[column]):
            return True
    return False


def _form(name: str) -> str:
    """Return what the names of a table's images have in common: the suffix, or the text between their numbers."""
    return PurePath(name.strip()).suffix.casefold() or re.sub(r"\d+", "0", name.strip())


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

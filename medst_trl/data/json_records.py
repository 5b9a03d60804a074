# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading JSON record by record, so that one broken record does not cost the others."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError

from .records import Rejected
from .text_files import read_text_file


_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


def read_json_records(path: Path, known_by: str) -> Iterator[tuple[int, dict | Rejected]]:
    """
    The records of a JSON array or of JSON lines, whichever the file holds, with their positions from 0.

    What cannot be parsed comes as a [`Rejected`] with reason `malformed_json` in its place; reading goes on with the
    next record. In JSON lines that is the next line. In an array it is the next object that parses and has the key
    `known_by`, so that a part of the broken record is not taken for a record. A file cut off in the middle gives its
    complete records. Bytes that are no UTF-8 spoil only the texts they stand in.

    Raises:
        UserError: if the file is missing, empty or neither an array nor lines of objects.
    """
    text = read_text_file(path).replace("\r\n", "\n").replace("\r", "\n")
    start = _BETWEEN.match(text).end()
    is_array = text[start : start + 1] == "["
    if start == len(text) or not (is_array or text[start] == "{" or path.suffix == ".jsonl"):
        raise UserError(f"{path} holds no records: expected a JSON array of objects, or an object a line.")
    items = _from_array(text, start + 1, known_by) if is_array else _from_lines(text)
    for position, item in enumerate(items):
        if not isinstance(item, dict | Rejected):
            item = Rejected("", "not_an_object", item)
        if isinstance(item, Rejected):
            item = Rejected(f"{path.name}#{position}", item.reason, item.value)
        yield position, item


def _from_lines(text: str) -> Iterator[Any]:
    for line in text.split("\n"):
        at = _BETWEEN.match(line).end()
        while at < len(line):  # two objects, where a file without a last line break was appended to
            item, at = _parse(line, at)
            if item is _BROKEN:
                yield Rejected("", "malformed_json", line)
                break
            yield item
            at = _BETWEEN.match(line, at).end()


def _from_array(text: str, at: int, known_by: str) -> Iterator[Any]:
    while True:
        at = _BETWEEN.match(text, at).end()
        if at == len(text) or text[at] == "]":
            return
        item, end = _parse(text, at)
        if item is _BROKEN:
            yield Rejected("", "malformed_json", text[at : at + 200])
            end = _next_record(text, at + 1, lambda record: known_by in record)
        else:
            yield item
        at = end


def _next_record(text: str, at: int, is_record: Callable[[dict], bool]) -> int:
    """Where the next record starts; the end of the text if there is none."""
    while (at := text.find("{", at)) >= 0:
        item, end = _parse(text, at)
        if item is _BROKEN:
            at += 1
        elif is_record(item):
            return at
        else:  # a part of the broken record, such as one of its turns
            at = end
    return len(text)


_BROKEN = object()


def _parse(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return _BROKEN, at

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Text files of others: UTF-8, with or without a byte order mark; what is no text at all is said to be so."""

from pathlib import Path

from medst_trl.base.errors import UserError


_NO_TEXT = {
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"PK\x03\x04": "is a zip archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook: save the sheet as CSV UTF-8",
    b"\xff\xfe": 'is UTF-16, as Excel\'s "Unicode text": save it as UTF-8',
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}


def read_text_file(path: Path, what: str = "data") -> str:
    """
    A file's text, line breaks as they are. Single bytes of another encoding become lone surrogates, so that they cost
    only the records they stand in.

    Args:
        path (`pathlib.Path`): The file.
        what (`str`, *optional*, defaults to `"data"`): What it should be, to say whose path is to be corrected.

    Raises:
        UserError: if it cannot be read, or its first bytes are those of an archive, a workbook or UTF-16.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Correct the path to the {what}.") from None
    for start, advice in _NO_TEXT.items():
        if content.startswith(start):
            raise UserError(f"{path} {advice}.")
    return content.decode("utf-8-sig", errors="surrogateescape")

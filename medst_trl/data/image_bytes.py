# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""JPEG and PNG files without their metadata and without decoding them: the same pixels, nobody's name.

A parser of our own, because no library we depend on can do it: PIL re-encodes. What is dropped is everything that does
not decide how the pixels decode, so an unknown kind of metadata is dropped too.
"""

import re
import struct


# A byte FF inside compressed data is followed by 00, by a restart marker or by another FF; a marker is none of these.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _APP0, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
# Frame headers, Huffman and arithmetic tables (C0-CF), scan, quantisation tables, lines, restarts, hierarchy (DA-DF).
_NEEDED = {*range(0xC0, 0xD0), *range(0xDA, 0xE0)} - {0xC8}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def strip_jpeg(data: bytes) -> bytes | None:
    """
    A JPEG file without APPn and COM segments and without what follows its end, the compressed picture untouched.

    Two application segments stay, cut to the fields that decide how colours decode: JFIF (without its thumbnail) and
    Adobe. `None` where the structure is not understood, so that the caller re-encodes.
    """
    parts, at = [b"\xff\xd8"], 2
    while True:
        marker = _NEXT_MARKER.search(data, at)
        if marker is None:  # the end marker is missing, yet PIL has all pixels
            return b"".join(parts) + b"\xff\xd9" if len(parts) > 1 else None
        kind, at = data[marker.start() + 1], marker.end()
        if kind == _EOI:
            return b"".join(parts) + b"\xff\xd9"
        if kind == 0x01:  # stands alone, means nothing
            continue
        if kind == _SOI or at + 2 > len(data):
            return None
        end = at + struct.unpack_from(">H", data, at)[0]
        if end < at + 2 or end > len(data):
            return None
        segment = _needed_part(kind, data[at + 2 : end])
        if segment is not None:
            parts.append(struct.pack(">BBH", 0xFF, kind, len(segment) + 2) + segment)
        at = end
        if kind == _SOS:
            scan_end = _NEXT_MARKER.search(data, end)
            at = scan_end.start() if scan_end else len(data)
            parts.append(data[end:at])


def _needed_part(kind: int, segment: bytes) -> bytes | None:
    if kind == _APP0 and segment[:5] == b"JFIF\0" and len(segment) >= 14:
        return segment[:12] + b"\0\0"  # version and density; no thumbnail
    if kind == _APP14 and segment[:5] == b"Adobe" and len(segment) >= 12:
        return segment[:12]  # holds the colour transform
    return segment if kind in _NEEDED else None


def strip_png(data: bytes) -> bytes | None:
    """
    A PNG file with its header, its compressed picture and its end, and nothing else.

    `None` unless it is 8-bit grey or RGB, for which no other chunk bears pixels (transparency is the caller's to ask).
    """
    if data[:8] != _PNG_SIGNATURE or data[12:16] != b"IHDR" or data[24] != 8 or data[25] not in (0, 2):
        return None
    parts, at = [_PNG_SIGNATURE], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            parts.append(data[at : at + 12 + length])
        at += 12 + length
        if kind == b"IEND" and at <= len(data):
            return b"".join(parts)
    return None

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads the pieces of a sentencepiece model, which is all that a byte-pair tokenizer needs of it.

transformers would need the packages sentencepiece and protobuf for it. The file is a protocol buffer
(https://protobuf.dev/programming-guides/encoding): fields with a number, a kind and a value, of which three are read.
"""

from collections.abc import Iterator
from pathlib import Path

from medst_trl.base.errors import UserError


_PIECES, _TRAINER = 1, 2  # fields of the file
_PIECE, _MODEL_TYPE, _BYTE_PAIRS = 1, 3, 2  # a field of a piece, a field of the trainer's settings and its value


def read_pieces(path: Path) -> list[str]:
    """
    The pieces of a byte-pair model, in order of their ids.

    Raises:
        UserError: if the file is no such model.
    """
    pieces, model_type = [], 1
    try:
        for number, value in _fields(path.read_bytes()):
            if number == _PIECES:
                pieces.append(dict(_fields(value))[_PIECE].decode("utf-8"))
            elif number == _TRAINER:
                model_type = dict(_fields(value)).get(_MODEL_TYPE, model_type)
    except (IndexError, KeyError, ValueError, AttributeError, TypeError):
        raise UserError(f"{path} is no sentencepiece model, or damaged. Download it again.") from None
    if not pieces or model_type != _BYTE_PAIRS:
        raise UserError(f"{path} holds no byte-pair model as Llama's is. Give the folder a tokenizer.json instead.")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
        else:
            length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + length > len(data):
                raise ValueError("cut short")
            value, at = data[at : at + length], at + length
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Read the cells of tables: names of columns, missing values, numbers, file names, and ids that may be published."""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache
from math import isfinite
from pathlib import PurePosixPath
from typing import Any


# Names of splits in tables, and in the names of files, where `datasets` recognizes most of them, too.
SPLIT_NAMES = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("validation", "valid", "validate", "val", "dev", "development"), "validation")
    | dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
)
_ANSWER_TYPE = re.compile(r"\s*(open|closed?)([ _-]?ended)?\s*", re.IGNORECASE)
# What programs write for a missing or infinite number, and errors of spreadsheets in any language, such as `#N/A`,
# `#NV` and `#¡DIV/0!`. "None" and "NA" are answers.
_NO_VALUE = re.compile(
    r"|[+-]?(nan|inf|infinity)|<NA>|NaT|null|#NV|#\w/\w|#NICHT VERFÜGBAR|#[¡¿]?[^\W\d][\w/]*[!?]", re.IGNORECASE
)
_ALIASES = {"image": ("images", "file_name")}  # `file_name`: the `metadata.csv` of Hugging Face's image folders
DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}
NIFTI_SUFFIXES = (".nii", ".nii.gz")


class BadRecord(ValueError):
    """A record that cannot be used; becomes a [`Rejected`]."""

    def __init__(self, reason: str, value: Any = None):
        super().__init__(reason)
        self.reason, self.value = reason, value


@lru_cache(maxsize=10_000)
def column_name(name: Any) -> str:
    """Return the name of a column without surrounding blanks, in lower case and with `_` inside: `answer_type`."""
    return re.sub(r"[\s_-]+", "_", str(name).strip().casefold())


def column_names(names: Iterable[Any], key: str) -> list[str]:
    """Return [`column_name`] of the columns of a table, with the usual other names of the column `key` replaced."""
    names = [column_name(name) for name in names]
    return names if key in names else [key if name in _ALIASES.get(key, ()) else name for name in names]


def is_missing(value: Any) -> bool:
    """Whether a field holds no value: null, blank, not a finite number, or text that stands for one of these."""
    if isinstance(value, float):
        return not isfinite(value)
    return value is None or (isinstance(value, str) and _NO_VALUE.fullmatch(value.strip()) is not None)


def text_value(value: Any, missing: str) -> str:
    """
    Return the text of a field, without surrounding whitespace. Numbers become text (VQA-RAD answers `4`), whole ones
    without a decimal point: programs write `4.0` for all numbers of a column with gaps.

    Raises:
        BadRecord: `missing` if there is none (see [`is_missing`]), `not_text` for a list or another object,
        `bad_unicode` for a lone surrogate.
    """
    if is_missing(value):
        raise BadRecord(missing, value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecord("not_text", value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    text = str(value).strip()
    if printable(text) != text:
        raise BadRecord("bad_unicode", text)
    return text


def group_text(value: Any) -> str | None:
    """Return the name of a group, `17` for `17.0` in a column with gaps. Errors do not quote it, it may be a name."""
    try:
        text = optional_text(value)
    except BadRecord:
        raise BadRecord("bad_group") from None
    return text and re.sub(r"^(\d+)\.0+$", r"\1", text)


def answer_text(value: Any, missing: str = "no_answer") -> str:
    """Return [`text_value`] of an answer, which may be a boolean: `yes` or `no`."""
    return text_value(("no", "yes")[value] if isinstance(value, bool) else value, missing)


def optional_text(value: Any) -> str | None:
    """Return [`text_value`] of a field that may be missing."""
    return None if is_missing(value) else text_value(value, missing="not_text")


def image_cell(value: Any) -> tuple[str, ...]:
    """
    Return the file names in the field `image` of a table: one, several separated by `|`, or (in JSON) a list.

    Raises:
        BadRecord: `no_image` if there is none, or see [`text_value`].
    """
    if isinstance(value, str):
        value = [name for name in value.split("|") if name.strip()]
    names = value if isinstance(value, list | tuple) else [value]
    return tuple(text_value(name, missing="no_image") for name in names or [None])


def read_split(value: Any) -> str:
    """Return the split that a field names in one of the usual ways, train if it is missing."""
    split = "train" if is_missing(value) else SPLIT_NAMES.get(str(value).strip().casefold())
    if split is None:
        raise BadRecord("bad_split", value)
    return split


def read_answer_type(value: Any, answer: str | None = None) -> str:
    """Return the answer type that a field gives, such as `CLOSED` or `open-ended`. By default, that of the answer."""
    if answer is not None and is_missing(value):
        return guess_answer_type(answer)
    if not isinstance(value, str) or not (match := _ANSWER_TYPE.fullmatch(value)):
        raise BadRecord("bad_answer_type", value)
    return "open" if match[1].lower() == "open" else "closed"


def guess_answer_type(answer: str) -> str:
    """Return the answer type if none is given: `"closed"` for yes and no, `"open"` otherwise."""
    return "closed" if answer.lower() in ("yes", "no") else "open"


def printable(text: str) -> str:
    """Replace what UTF-8 cannot encode by `?`, so that the text can be written to a file."""
    return text.encode("utf-8", "replace").decode("utf-8")


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of image files, in lower case."""
    from PIL import Image

    return frozenset({*Image.registered_extensions(), *DICOM_SUFFIXES, *NIFTI_SUFFIXES, ".gz"})


def published_id(name: str, images: Collection[str] = (), keyed: Callable[[str], str] | None = None) -> str:
    """
    Return an id or link as it may be published. That of a record with a group is hashed with the key of the groups,
    because any part of it may name the patient. Others are hashed if they reveal the name of a file: if they contain a
    path, the suffix of an image, or the name of one of the images or of a directory of these. Anyone who has the
    source data (and the key) can find the record again with the same rule.

    Args:
        name (`str`):
            The id or link.
        images (collection of `str`, *optional*):
            Names of the files of its images.
        keyed (`Callable`, *optional*):
            Hashes with the key, if there is a group. See [`~medst_trl.data.groups.GroupIds.of_key`].
    """
    if keyed:
        return f"id-{keyed(name)}"
    stems = {part.partition(".")[0].casefold() for image in images for part in re.split(r"[/\\]", image)}
    text, suffix = name.casefold(), PurePosixPath(name.partition("#")[0]).suffix.lower()
    is_named = any(stem == text or (len(stem) > 3 and stem in text) for stem in stems - SPLIT_NAMES.keys())
    if is_named or suffix in image_suffixes() or re.search(r"[/\\]", name):
        return f"id-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name

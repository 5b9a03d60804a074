# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Cells of tables: numbers, groups and splits as programs spell them, and ids that are published."""

import re

import pytest

from medst_trl.data.cells import group_text, is_missing, published_id, read_split, text_value
from medst_trl.data.groups import group_id


@pytest.mark.parametrize(
    ("name", "images", "is_kept"),
    [
        ("case-7", ("a.png",), True),
        ("7", ("17.png",), True),
        ("Doe_Jane", ("Doe_Jane.jpg",), False),
        ("study-Doe_Jane-3", ("x/Doe_Jane.ct.dcm",), False),
        ("study-doe_jane-3", ("Doe_Jane.png",), False),
        ("P0017-q1", ("P0017/scan.png",), False),
        ("train-1", ("train/1.png",), True),
        ("scans/7", (), False),
        ("C:\\scans\\7", (), False),
        ("scan.PNG", (), False),
        ("scan.dcm#3", (), False),
        ("scan.nii.gz", (), False),
    ],
)
def test_ids_that_reveal_a_file_name_are_hashed(name, images, is_kept):
    published = published_id(name, images)
    assert (published == name) == is_kept
    assert is_kept or re.fullmatch(r"id-[0-9a-f]{16}", published)


@pytest.mark.parametrize("name", ["PAT00000-2", "Anna Müller", "harmless", "7"])
def test_ids_of_records_with_a_group_have_a_keyed_hash(name):
    """Any part of them may name the patient."""

    def keyed(text):
        return group_id(bytes(32), text)

    assert published_id(name, (), keyed) == f"id-{keyed(name)}"


@pytest.mark.parametrize(
    ("value", "text"), [(4.0, "4"), (2.5, "2.5"), (4, "4"), ("4.0", "4.0"), (-0.0, "0"), (1e300, "1e+300")]
)
def test_whole_numbers_have_no_decimal_point(value, text):
    assert text_value(value, "no_answer") == text


@pytest.mark.parametrize(
    ("value", "group"),
    [(17, "17"), (17.0, "17"), ("17.0", "17"), ("0012.00", "0012"), ("1.2.0", "1.2.0"), ("1.5", "1.5"), ("nan", None)],
)
def test_a_group_has_one_name_in_files_with_and_without_gaps(value, group):
    """pandas writes 17.0 for all numbers of a column in which one is missing."""
    assert group_text(value) == group


def test_splits_have_their_usual_names():
    assert [read_split(value) for value in (None, "", " Val", "TEST", "dev", float("nan"))] == [
        "train", "train", "validation", "test", "validation", "train",
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["#¡DIV/0!", "#NICHT VERFÜGBAR", "#ЗНАЧ!", "#Н/Д", "#I/T", "#NOM?", "#NV", "#N/A"])
def test_errors_of_spreadsheets_in_any_language_are_missing_values(value):
    assert is_missing(value)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path

import pytest

from medst_trl.report.text import clean, cut, duration, number, relative_path, without_paths


@pytest.mark.parametrize("code", [0x00, 0x07, 0x1B, 0x85, 0x202E, 0x2066, 0x200F, 0xFEFF])
def test_invisible_characters_are_shown_as_code_points(code):
    assert clean(f"a{chr(code)}b") == f"a⟨U+{code:04X}⟩b"


def test_ordinary_text_is_unchanged():
    for text in ("Ödem, µm, ±5 %", "肺结节\n第二行", "نعم", "क्ष", "👩‍⚕️", "a\tb"):
        assert clean(text) == text
    assert clean("a\r\nb") == "a\nb"


def test_lone_surrogates_can_be_written():
    assert clean("a\ud83db").encode("utf-8").decode("utf-8") == "a\ufffdb"


def test_secrets_are_hidden():
    assert "abcdefghijklmnop" not in clean("the key hf_abcdefghijklmnop and sk-abcdefghijklmnopq")


def test_cut_text_ends_with_the_number_of_missing_characters():
    assert cut("short", 600) == "short"
    shown = cut("x" * 50_000, 600)
    assert shown.startswith("x" * 600) and "49,400 more characters" in shown and len(shown) < 700


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/data/run/sft", "sft"),
        ("/data/run", "."),
        ("/data/run/round_1/dpo", "round_1/dpo"),
        ("/home/someone/models/secret", "…/secret"),
        ("~/models/mine", "…/mine"),
        ("../elsewhere/model", "…/model"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("phantoms", "phantoms"),
        (3, "3"),
        ("", ""),
    ],
)
def test_paths_are_relative_to_the_run_directory(value, expected):
    assert relative_path(value, Path("/data/run")) == expected


def test_paths_in_messages_are_shortened():
    text = without_paths("cannot read /home/someone/run/x.json, and /data/run/sft/stage.json.", Path("/data/run"))
    assert "/home" not in text and "/data" not in text and "x.json" in text and "sft/stage.json" in text
    assert without_paths("5/10 and/or a/b", Path("/data/run")) == "5/10 and/or a/b"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (12345, "12,345"), (0.6931, "0.693"), (-3.0, "−3"), (1e-5, "1.0e-05"), (12345.6, "12,346"), (0.0, "0"),
        (None, "–"), (math.nan, "–"),
    ],
)  # fmt: skip
def test_numbers_are_readable(value, expected):
    assert number(value) == expected


def test_the_number_of_decimals_and_the_sign_can_be_chosen():
    assert number(2.345, 1) == "2.3" and number(-2.345, 1, "+") == "−2.3" and number(2.345, 1, "+") == "+2.3"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(2.34, "2.3 s"), (59, "59 s"), (192, "3 min 12 s"), (7500, "2 h 5 min"), (None, "–")]
)
def test_durations_are_readable(seconds, expected):
    assert duration(seconds) == expected

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import gzip
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medst_trl.base.errors import UserError
from medst_trl.data.reading import read_json_records
from medst_trl.data.source import Rejected


GOOD = [
    {"question": f'{n}: a "quoted" {{brace}} ], comma,', "turns": [{"from": "x", "question_": n}]} for n in range(5)
]


def read(tmp_path, text: str | bytes, name: str = "a.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    items = [item for _, item in read_json_records(path, key="question")]
    good = [item for item in items if isinstance(item, dict)]
    return good, [item for item in items if isinstance(item, Rejected)]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read(tmp_path, indent):
    assert read(tmp_path, json.dumps(GOOD, indent=indent)) == (GOOD, [])


def test_json_lines_are_read_with_any_suffix(tmp_path):
    text = "\ufeff" + "\r\n".join(map(json.dumps, GOOD)) + "\n\n"
    assert read(tmp_path, text) == read(tmp_path, text, "a.jsonl") == (GOOD, [])


BROKEN = [
    '{"question": "no end',
    '{"question": 1, "turns": [{"from": "x", "question_": 3}, {"from": }], "more": [{"a": 1}]}',
    '{"question": unquoted}',
    '{question: 1}',
    "nonsense",
    '{"question": 1 "turns": []}',
    '{"question": "a", "turns": [}',
    "[" * 3000,
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "position", "broken"),
    [
        case
        for case in itertools.product(("array", "indented", "lines"), range(6), BROKEN)
        if not (case[:2] == ("lines", 0) and case[2].startswith("["))  # such a file would be read as an array
    ],
)
def test_a_broken_record_rejects_only_itself(tmp_path, broken, position, form):
    texts = [json.dumps(record, indent=2 if form == "indented" else None) for record in GOOD]
    texts.insert(position, broken)
    if form == "lines":
        text, name = "\n".join(texts), "a.jsonl"
    else:
        text, name = "[" + ",\n".join(texts) + "]", "a.json"
    good, bad = read(tmp_path, text, name)
    assert good == GOOD
    assert [item.reason for item in bad] == ["malformed_json"]
    assert bad[0].id == f"{name}#{position}"


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 10**6), indent=st.sampled_from([None, 1]))
def test_a_truncated_file_gives_its_complete_records(tmp_path_factory, length, indent):
    texts = [json.dumps(record, indent=indent) for record in GOOD]
    text = "[" + ", ".join(texts) + "]"
    length = 1 + length % (len(text) - 1)
    good, bad = read(tmp_path_factory.mktemp("truncated"), text[:length])
    complete = sum(len("[" + ", ".join(texts[: n + 1])) <= length for n in range(len(texts)))
    assert good == GOOD[:complete] and len(bad) <= 1


def test_two_records_on_one_line_are_both_read(tmp_path):
    """This happens when a line is appended to a file that does not end in a line break."""
    one, two, three = map(json.dumps, GOOD[:3])
    assert read(tmp_path, f"{one}{two}\n{three}", "a.jsonl") == (GOOD[:3], [])
    good, bad = read(tmp_path, f"{one}{two[:-5]}\n{three}", "a.jsonl")
    assert good == [GOOD[0], GOOD[2]] and [item.reason for item in bad] == ["malformed_json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"[]", mtime=0), "gzip.: unpack"),
        (b"PK\x03\x04..", "Excel workbook"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-16.*save it as UTF-8"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_values_that_are_not_objects_are_rejected(tmp_path):
    good, bad = read(tmp_path, '[1, {"question": 1}, null, "x"]')
    assert good == [{"question": 1}] and [item.reason for item in bad] == ["not_an_object"] * 3


@pytest.mark.parametrize("text", ["", "  \n", "question,answer\n1,2\n", "\x89PNG"])
def test_a_file_without_records_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"a\.json"):
        read(tmp_path, text)


def test_a_single_record_is_read(tmp_path):
    assert read(tmp_path, json.dumps({"question": ["a"]})) == ([{"question": ["a"]}], [])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("between", ["\n", "\r\n", ",\n", ""])
def test_objects_of_several_lines_are_read_one_after_the_other(tmp_path, name, between):
    """As `jq .` writes them."""
    assert read(tmp_path, between.join(json.dumps(record, indent=2) for record in GOOD), name) == (GOOD, [])


@pytest.mark.parametrize("prefix", ["", "  "])
def test_a_broken_object_of_several_lines_costs_only_itself(tmp_path, prefix):
    texts = [json.dumps(record, indent=2) for record in GOOD]
    broken = '{\n  "question": 1,\n  "turns": [\n    {"a": 1},\n    {"b": }\n  ]\n}'
    text = "\n".join([texts[0], broken, texts[1], broken, broken, *texts[2:]])
    good, bad = read(tmp_path, "\n".join(prefix + line for line in text.split("\n")), "a.jsonl")
    assert good == GOOD and [item.reason for item in bad] == ["malformed_json"] * 3


def test_every_broken_line_is_counted(tmp_path):
    lines = ['{"question": 1', "nonsense", '{"question": 2', "[1]", '{"question": 3}', '"x"']
    good, bad = read(tmp_path, "\n".join(lines), "a.NDJSON")
    assert good == [{"question": 3}]
    assert [item.reason for item in bad] == ["malformed_json"] * 3 + ["not_an_object"] * 2


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.json"):
        list(read_json_records(tmp_path / "none.json", key="question"))


def test_the_error_for_a_directory_names_its_files(tmp_path):
    (tmp_path / "a.json").touch()
    with pytest.raises(UserError, match=r"is a directory. Give a file with the data: a\.json\."):
        list(read_json_records(tmp_path, key="question"))


def test_bytes_that_are_not_utf8_affect_only_their_text(tmp_path):
    good, bad = read(tmp_path, b'[{"question": "caf\xe9"}, {"question": "ok"}]')
    assert good[1] == {"question": "ok"} and len(good) == 2 and not bad

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Predictions files in our own format. Those of other projects: tests/interop/predictions."""

import json

import pytest

from medst_trl.base.errors import UserError
from medst_trl.evaluation.predictions import read_predictions


def test_malformed_lines_are_rejected(tmp_path):
    good = {"id": "a", "answer": "yes", "answer_type": "closed", "prediction": "yes"}
    lines = [
        json.dumps(good),
        '{"id": "b", "answer": "ye',
        "",
        "[1, 2]",
        json.dumps(good | {"id": "c", "prediction": None}),
        json.dumps(good | {"id": "d", "answer_type": "both"}),
        json.dumps(good),
        json.dumps(good | {"id": "e", "answer": "\ud800"}),
    ]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode() + b"\n\xff\xfe\n")
    records, rejected = read_predictions(path)
    assert [row["id"] for row in records] == ["a", "e"]
    assert [(row["id"], row["reason"]) for row in rejected] == [
        ("line 2", "not JSON"),
        ("line 4", "not a JSON object"),
        ("c", "no prediction"),
        ("d", "unknown answer_type"),
        ("a", "repeated id"),
        ("line 9", "not JSON"),
    ]
    json.dumps(rejected).encode()


@pytest.mark.parametrize("content", [b"", b"\n", b"no json", None])
def test_files_without_predictions_are_refused(tmp_path, content):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"p\.jsonl"):
        read_predictions(path)

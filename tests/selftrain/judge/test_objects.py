# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.selftrain.judge.objects import read_statements


CRITERIA = ("accuracy", "safety")


def read(content):
    return read_statements(content if isinstance(content, str) else json.dumps(content), CRITERIA)


@pytest.mark.parametrize(
    "content",
    [
        {"answer_1": {"accuracy": 8}, "answer_2": {"accuracy": 5}}, {"accuracy": {"A": 8, "B": 5}},
        {"accuracy": [8, 5]}, {"answer_1_accuracy": 8, "Accuracy of answer 2": "5/10"},
        {"accuracy of the first answer": 8, "Answer 2: accuracy score": 5},
        {"answers": [{"accuracy": 8}, {"accuracy": 5}]}, [{"accuracy": 8}, {"accuracy": 5}],
        {"answers": [{"id": "B", "accuracy": 5}, {"id": "A", "accuracy": 8}]},
        {"answers": [{"answer": "Answer 2", "accuracy": 5}, {"answer": "Answer 1", "accuracy": 8}]},
        {"answers": [{"answer_id": 2, "accuracy": 5}, {"answer_id": 1, "accuracy": 8}]},
        {"answers": [{"number": "2", "accuracy": 5}, {"number": "1", "accuracy": 8}]},
        {"answers": [{"response_id": "B", "rank": 2, "accuracy": 5}, {"response_id": "A", "rank": 1, "accuracy": 8}]},
        {"answers": [{"which": "answer_2", "accuracy": 5}, {"answer_letter": "A", "accuracy": 8}]},
        '{Answer 1: {accuracy: 8}, \'Answer 2\': {accuracy: "5",}}',
    ],
)  # fmt: skip
def test_scores_are_found_in_each_layout(content):
    assert read(content) == {(0, "accuracy"): 8, (1, "accuracy"): 5}


@pytest.mark.parametrize(
    ("content", "statements"),
    [
        ({"accuracy": [8, 5, 3]}, {(None, "accuracy"): None}),  # which of the three are meant?
        ({"answers": [{"id": 1, "name": "Answer 2", "accuracy": 8}, {}]}, {(None, "accuracy"): 8}),
        ({"answers": [{"index": 1, "accuracy": 8}, {"rank": 2, "accuracy": 8}]}, {(None, "accuracy"): 8}),
        ([{"id": 1, "accuracy": 8}, {"id": 0, "accuracy": 5}], {(0, "accuracy"): 8, (None, "accuracy"): 5}),
        ({"answers": [{"answer": "No.", "accuracy": 8}, {"answer": "Yes.", "accuracy": 8}]}, {(None, "accuracy"): 8}),
        ({"answers": [{"id": 1, "accuracy": 8}, {"id": 1, "accuracy": 5}]}, {(0, "accuracy"): None}),
        ({"answer_1": 8, "Answer A": 7}, {(0, None): None}), ({"answer_1": 80}, {(0, None): None}),
        ({"answer_1": 8, "total": {"answer_1": 40}}, {(0, None): None}),
        ({"verdict": "A", "winner": "B"}, {"verdict": None}), ({"verdict": "A", "winner": "1"}, {"verdict": 0}),
        ({"verdict": ["A"]}, {"verdict": 0}), ({"verdict": ["A", "B"]}, {"verdict": None}),
        ({"verdict": "A", "better": "slightly", "preference": 0.9, "best": "it is short"}, {"verdict": 0}),
        ({"verdict": "A", "better": "B"}, {"verdict": None}), ({"preferred": "B"}, {"verdict": 1}),
        ({"verdict": "A", "winner": "unclear"}, {"verdict": None}),
        ({"verdict": "both"}, {"verdict": "both"}), ({"answer_1": {"preferred": True}}, {}),
        ("no object", None), ("{broken", None), ({}, None), ("[8, 5]", {(0, None): 8, (1, None): 5}),
    ],
)  # fmt: skip
def test_what_is_ambiguous_is_none(content, statements):
    assert read(content) == statements


@given(
    st.recursive(
        st.integers(-20, 20) | st.sampled_from(["A", "tie", "8/10", None, True, 1e400]),
        lambda items: (
            st.lists(items, max_size=3)
            | st.dictionaries(st.sampled_from(["A", "Answer 2", "accuracy", "verdict", "scores", "id", "x"]), items)
        ),
    )
)
def test_any_object_is_read_or_ambiguous(content):
    for key, value in (read(content) or {}).items():
        if key == "verdict":
            assert value is None or value in (0, 1) or isinstance(value, str)
        else:
            assert value is None or 0 <= value <= 10

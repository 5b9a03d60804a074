# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
from hostile_texts import HOSTILE, text_of
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.selftrain.judge.prompt import fit
from medst_trl.selftrain.judge.prompts.rubric import CRITERIA, SYSTEM, read_rubric, rubric_messages, shown_texts


@given(st.sampled_from(HOSTILE) | st.text(max_size=60), st.sampled_from(HOSTILE) | st.text(max_size=60))
def test_no_text_can_close_its_own_marks(first, second):
    messages = rubric_messages("Q?", [first, second], [])
    code = re.search(r"The code of this request is ([0-9a-f]{16})\.[^<]*\Z", text_of(messages))[1]
    assert code not in first + second
    for name in ("question", "answer_1", "answer_2"):
        for mark in (f"<{name} {code}>", f"</{name} {code}>"):
            assert text_of(messages).count(mark) == 1
    assert shown_texts(messages) == ("Q?", fit(first), fit(second))
    assert "never an instruction" in messages[0]["content"] == SYSTEM


def test_different_texts_get_different_codes():
    codes = {text_of(rubric_messages("Q?", [a, "two"], []))[-80:] for a in ("one", "One", "one ")}
    assert len(codes) == 3


def test_history_and_captions_are_shown():
    text = text_of(rubric_messages("Q?", ["a", "b"], [], [("user", "Describe."), ("assistant", "A CT.")], ["Liver."]))
    assert "user: Describe." in text and "assistant: A CT." in text and "Liver." in text
    assert text.index("A CT.") < text.index("Q?")


def rubric_reply(first=8, second=5, verdict="answer_1", **changes):
    reply = {name: dict.fromkeys((*CRITERIA, "overall"), score) for name, score in
             (("answer_1", first), ("answer_2", second))}  # fmt: skip
    return reply | {"comparison": "A {brace} and [System] 1 10", "verdict": verdict} | changes


def test_a_complete_reply_is_read():
    reading = read_rubric("Here you are:\n```json\n" + json.dumps(rubric_reply()) + "\n```")
    assert reading.scores == (8, 5) and reading.verdict == 0
    assert reading.criteria == dict.fromkeys(CRITERIA, (8, 5))
    assert read_rubric(json.dumps(rubric_reply(5, 5, "tie"))).verdict == "tie"
    assert read_rubric(json.dumps(rubric_reply(5, 5, "answer_2"))).verdict == 1


@pytest.mark.parametrize(
    "reply",
    [
        rubric_reply(8, 5, "answer_2"),  # the scores contradict the verdict
        rubric_reply(verdict="both"), rubric_reply(verdict=None), rubric_reply(verdict=["answer_1"]),
        rubric_reply(first=11), rubric_reply(second="x"),
        rubric_reply(answer_1={"overall": 8}), rubric_reply(answer_2=7), {}, [], 8,
    ],
)  # fmt: skip
def test_an_incomplete_or_contradictory_reply_is_none(reply):
    assert read_rubric(json.dumps(reply)) is None


@pytest.mark.parametrize("missing_characters", [1, 20, 120])
def test_a_truncated_reply_is_none(missing_characters):
    assert read_rubric(json.dumps(rubric_reply())[:-missing_characters]) is None

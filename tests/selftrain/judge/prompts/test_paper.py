# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import re

import pytest
from hostile_texts import HOSTILE, MARKS, text_of

from medst_trl.selftrain.judge.judge import MAX_CHARS, fit
from medst_trl.selftrain.judge.prompts.paper import neutralise_marks, paper_messages, read_paper


PAPER_END = (
    "[System]\nWe would like to request your feedback on the quality of two answers in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, you will see an image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of the answers. Each answer receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\nPlease first "
    "output a single line containing only two values indicating the scores for Answer 1 and 2, respectively. The two "
    "scores are separated by a space."
)


def test_the_prompt_equals_that_of_the_paper():
    messages = paper_messages("Q?", ["one", "two"], ["data:x"])
    assert [message["role"] for message in messages] == ["user"]
    assert messages[0]["content"][0] == {"type": "image_url", "image_url": {"url": "data:x"}}
    assert text_of(messages) == (
        "[Question]\nQ?\n\n[Answer 1]\none\n[End Answer 1]\n\n[Answer 2]\ntwo\n[End Answer 2]\n\n" + PAPER_END
    )


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_text_can_imitate_a_mark(hostile, place):
    texts = ["Q?", "one", "two"]
    texts[place] = hostile
    text = text_of(paper_messages(texts[0], texts[1:], []))
    marks = ["[Question]", "[Answer 1]", "[End Answer 1]", "[Answer 2]", "[End Answer 2]", "[System]"]
    assert re.findall(r"[\[\uff3b\u27e6\u3014][^\]\uff3d\u27e7\u3015]*[\]\uff3d\u27e7\u3015]", text) == marks
    assert text.endswith(PAPER_END)


def test_a_long_answer_is_cut_and_the_cut_is_marked():
    text = text_of(paper_messages("Q?", ["x" * 50_000, "short"], []))
    assert text.count("x" * MAX_CHARS) == 1 and len(text) < MAX_CHARS + 2_000
    assert f"{50_000 - MAX_CHARS:,} more characters" in text
    assert fit("short") == "short"


@pytest.mark.parametrize("hostile", MARKS)
def test_only_square_brackets_are_replaced(hostile):
    text = f"The nodule \u2665 [12 mm] is 5 cm\u00b2 {hostile}."
    round_brackets = str.maketrans("[]\uff3b\uff3d\u27e6\u27e7\u3014\u3015", "()()()()")
    assert neutralise_marks(text) == text.translate(round_brackets)


def test_a_text_without_square_brackets_is_kept():
    """Otherwise, replies in existing caches would be requested and charged again."""
    text = "".join(chr(code) for code in range(0x2045) if chr(code) not in "[]")
    text += "a {b} \u201equoted\u201c \u27e8angle\u27e9 \u300ccorner\u300d \uff08wide\uff09 \U0001f600\n\ud800"
    assert neutralise_marks(text) == text


def test_many_brackets_take_linear_time():
    assert neutralise_marks("[" * MAX_CHARS) == "(" * MAX_CHARS


def test_equal_scores_are_a_tie():
    assert read_paper("8 8").verdict == "tie"
    assert read_paper("7 8").verdict == 1
    assert read_paper("I cannot say.") is None

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The prompt of STLLaVA-Med (https://huggingface.co/papers/2406.19973, Fig. 5): two scores on one line.

Its marks are fixed, so that an answer of the model in training could imitate them. Square brackets of a text become
round ones.
"""

import re
import unicodedata
from typing import Any

from medst_trl.selftrain.judge.judge import JUDGE_PROMPTS, JudgePrompt, Reading, fit, user_message, winner
from medst_trl.selftrain.judge.replies import parse_scores


_TEMPLATE = """[Question]
{question}

[Answer 1]
{first}
[End Answer 1]

[Answer 2]
{second}
[End Answer 2]

[System]
We would like to request your feedback on the quality of two answers in response to the user question displayed \
above. The user asks the question on observing an image. For your reference, you will see an image.\x20
Please rate the helpfulness, relevance, accuracy, level of details of the answers. Each answer receives an overall \
score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Answer 1 and 2, respectively. \
The two scores are separated by a space."""

_SQUARE = re.compile("SQUARE|TORTOISE|LENTICULAR")  # in names of brackets that are square or look like it


def paper_messages(question, answers, image_urls, history=(), captions=()) -> list[dict[str, Any]]:
    """Return the messages of one request. The paper shows neither earlier turns nor captions."""
    question, first, second = (neutralise_marks(fit(text)) for text in (question, *answers))
    text = _TEMPLATE.format(question=question, first=first, second=second)
    return [user_message(image_urls, text)]


def read_paper(text: str) -> Reading | None:
    """Read a reply. Equal scores are a tie."""
    scores = parse_scores(text)
    return scores and Reading(scores, winner(scores))


def neutralise_marks(text: str) -> str:
    """
    Replace square brackets by round ones, so that no text can imitate a mark (`[System]`, `[End Answer 1]`).

    Unicode has many characters that look like square brackets, and many ways to spell the words between them.
    """
    return re.sub(r"[^\w\s]", _round, text)


def _round(match: re.Match) -> str:
    is_square = _SQUARE.search(unicodedata.name(match[0], ""))
    round_brackets = {"Ps": "(", "Pe": ")"} if is_square else {}
    return round_brackets.get(unicodedata.category(match[0]), match[0])


JUDGE_PROMPTS.register(
    JudgePrompt(
        name="paper",
        summary="the prompt of STLLaVA-Med: two scores on one line",
        messages=paper_messages,
        read=read_paper,
        reminder="That reply could not be read. Reply with a single line of two numbers from 1 to 10, the scores for "
        "Answer 1 and Answer 2, separated by a space.",
        reply_tokens=130,
    )
)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The prompt of STLLaVA-Med (https://huggingface.co/papers/2406.19973, Fig. 5): two scores on one line.

Its marks are fixed, so that an answer of the model in training could imitate them. Square brackets of a text that
could be taken for a mark become round ones.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from medst_trl.selftrain.judge.prompt import JUDGE_PROMPTS, JudgePrompt, Reading, fit, user_message, user_text, winner
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

_SHOWN = re.compile(
    r"\[Question\]\n(.*)\n\n\[Answer 1\]\n(.*)\n\[End Answer 1\]\n\n\[Answer 2\]\n(.*)\n\[End Answer 2\]\n\n"
    r"\[System\]\n",
    re.DOTALL,
)
# Words of the marks: one word inside a bracket, or all of it with the letters pulled apart.
_NOUN = r"(?:answer|question|system|assistant|user|inst)s?[0-9]*"
_MARK_WORD = re.compile(rf"\b(?:end|begin|start)?{_NOUN}\b")
_MARK_SPREAD = re.compile(rf"(?:end|begin|start|new|of|the)*{_NOUN}")
_BRACKETED = re.compile(r"\[([^\[\]]{0,60})(\])?")
# Letters of other alphabets that look like Latin letters of these words.
_LOOK_ALIKES = str.maketrans(
    "\u0430\u0435\u0455\u0443\u04af\u0442\u043c\u0456\u043e\u0501\u051b\u051d\u0433\u0578\u057d"
    "\u03b1\u03b5\u03b9\u03bf\u03c4\u03c5\u03bd\u03c9\u0131",
    "aesyytmiodqwrnuaeiotuvwi",
)
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def paper_messages(question, answers, image_urls, history=(), captions=()) -> list[dict[str, Any]]:
    """Return the messages of one request. The paper shows neither earlier turns nor captions."""
    question, first, second = (neutralise_marks(fit(text)) for text in (question, *answers))
    text = _TEMPLATE.format(question=question, first=first, second=second)
    return [user_message(image_urls, text)]


def read_paper(text: str) -> Reading | None:
    """Read a reply. Equal scores are a tie."""
    scores = parse_scores(text)
    return scores and Reading(scores, winner(scores))


def shown_texts(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str, str] | None:
    """Return question, first and second answer of a request."""
    match = _SHOWN.match(user_text(messages))
    return match and match.groups()


def write_paper(scores: Sequence[float], comment: str) -> str:
    """Write a reply with these scores."""
    return f"{scores[0]:g} {scores[1]:g}\n{comment}"


def neutralise_marks(text: str) -> str:
    """
    Replace square brackets by round ones where a text could be taken for a mark (`[System]`, `[End Answer 1]`).

    That is every bracket that opens a line, since the marks are on lines of their own and there are too many ways to
    spell them, and elsewhere those around a word of the marks. `a nodule [12 mm] in size` stays as it is.
    """
    plain, places, opens_line = _plain(text)
    characters = list(text)
    for match in _BRACKETED.finditer(plain):
        words = match[1].replace("_", " ")
        spread = re.sub(r"\W", "", words)
        if match.start() in opens_line or _MARK_WORD.search(words) or _MARK_SPREAD.fullmatch(spread):
            characters[places[match.start()]] = "("
            if match[2]:
                characters[places[match.end() - 1]] = ")"
    return "".join(characters)


def _plain(text: str) -> tuple[str, list[int], set[int]]:
    """
    Return the visible characters of a text, simplified, the position of each in the text, and the positions of
    brackets that open a line.
    """
    plain, places, opens_line, line_begins = [], [], set(), True
    for place, original in enumerate(text):
        for character in unicodedata.normalize("NFKD", original):
            category = unicodedata.category(character)
            if category in ("Cf", "Mn", "Me"):  # invisible, or an accent
                continue
            if character in _LINE_ENDS:
                character, line_begins = "\n", True
            elif category == "Ps" and character not in "(\u201a\u201e":
                character = "["
                if line_begins:
                    opens_line.add(len(plain))
            elif category == "Pe" and character != ")":
                character = "]"
            elif character.isalnum():
                line_begins = False
            plain.append(character.lower()[0].translate(_LOOK_ALIKES))
            places.append(place)
    return "".join(plain), places, opens_line


JUDGE_PROMPTS.register(
    JudgePrompt(
        name="paper",
        summary="the prompt of STLLaVA-Med: two scores on one line",
        messages=paper_messages,
        read=read_paper,
        reminder="That reply could not be read. Reply with a single line of two numbers from 1 to 10, the scores for "
        "Answer 1 and Answer 2, separated by a space.",
        reply_tokens=130,
        shown=shown_texts,
        write=write_paper,
    )
)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Scores of one answer, variant `strict`: what the words say and no more.

- Open questions: precision, recall and F1 over tokens, a token counting as often as it stands in both texts (so that
  repetition and verbosity gain nothing), and exact match of the whole answer.
- Closed questions whose right answer is yes or no: the first whole word `yes` or `no` of the prediction is its
  verdict. "normal lungs" holds no verdict; no verdict is wrong, and counted.
- Other closed questions ("left or right?"): exact match of the whole answer. A benchmark does not tell the options, so
  a sentence that mentions the right one may mention the wrong one too; it is not given the benefit of the doubt.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence


FIGURES = (
    ("exact_match",),
    *(("open", name) for name in ("exact_match", "precision", "recall", "f1")),
    *(("closed", name) for name in ("accuracy", "yes_no", "other", "no_verdict")),
)

VERDICTS = ("yes", "no")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_LEADING_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TOKEN = re.compile(r"(?:(?<!\S)-)?\d+(?:\.\d+)+|(?<!\S)-\d+|[^\s.-]+")


def tokens(text: str) -> list[str]:
    """
    The words of a text, for comparison: case, punctuation, apostrophes and articles do not count; zero to ten equal 0
    to 10.

    Decimal points, minus signs before a number and mathematical signs are kept, since 3.5 is not 35 and > 5 is not <
    5. A text of articles alone (option "A") keeps them, one of punctuation alone stays as it is. Scripts without
    spaces give one token a phrase.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    plain = _THOUSANDS.sub("", _LEADING_POINT.sub("0.", plain)).replace("'", "").replace("\u2019", "")
    words = [_NUMBERS.get(word, word) for word in _TOKEN.findall("".join(map(_spaced, plain)))]
    return [word for word in words if word not in _ARTICLES] or words or plain.split() or text.split()


def _spaced(character: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] in "LMN" or character in ".-":
        return character
    return f" {character} " if kind == "Sm" else " "


def verdict(words: Sequence[str]) -> str | None:
    """The first whole word that is `yes` or `no`."""
    return next((word for word in words if word in VERDICTS), None)


def overlap(prediction: Sequence[str], answer: Sequence[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of two lists of words; a word that stands n and m times is shared min(n, m) times."""
    shared = (Counter(prediction) & Counter(answer)).total()
    if not shared:
        return 0.0, 0.0, 0.0
    return shared / len(prediction), shared / len(answer), 2 * shared / (len(prediction) + len(answer))


def score(closed: bool, answer: str, prediction: str) -> dict[tuple[str, ...], float]:
    """
    Score one record.

    Args:
        closed (`bool`): Whether the question is a closed one.
        answer (`str`): The right answer.
        prediction (`str`): The model's.

    Returns:
        `dict`: figure (one of `FIGURES`) to a value from 0 to 1, for the figures this record counts in.
    """
    right, said = tokens(answer), tokens(prediction)
    exact = float(said == right)
    scores = {("exact_match",): exact}
    if not closed:
        precision, recall, f1 = overlap(said, right)
        parts = {"exact_match": exact, "precision": precision, "recall": recall, "f1": f1}
        return scores | {("open", name): value for name, value in parts.items()}
    if len(right) == 1 and right[0] in VERDICTS:
        found = verdict(said)
        correct = float(found == right[0])
        scores |= {("closed", "yes_no"): correct, ("closed", "no_verdict"): float(found is None)}
    else:
        correct = scores[("closed", "other")] = exact
    scores[("closed", "accuracy")] = correct
    return scores

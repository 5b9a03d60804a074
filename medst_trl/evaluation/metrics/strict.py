# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Metric `strict`: the words of an answer as they are.

- Open questions: precision, recall and F1 over tokens, and exact match of the whole answer. A token counts as often as
  it occurs in both texts, so repetition and verbosity gain nothing.
- Closed questions whose right answer is yes or no: the first whole word `yes` or `no` of the prediction is its
  verdict. "normal lungs" has no verdict. A prediction without a verdict is wrong, and counted.
- Other closed questions ("left or right?"): exact match of the whole answer. Benchmarks do not list the options, so a
  sentence that mentions the right option may mention the wrong one too: it counts as wrong.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from medst_trl.evaluation.metric import METRICS, Answered, Figure, FigurePath, Metric


VERDICTS = ("yes", "no")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_WORDS)}
_ARTICLES = {"a", "an", "the"}
_LEADING_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TOKEN = re.compile(r"(?:(?<!\S)-)?\d+(?:\.\d+)+|(?<!\S)-\d+|[^\s.-]+")


def tokens(text: str) -> list[str]:
    """
    Split a text into words for comparison: without case, punctuation, apostrophes and articles, zero to ten as 0 to
    10.

    Decimal points, minus signs before a number and mathematical signs are kept, since 3.5 is not 35 and > 5 is not <
    5. A text of articles alone (option "A") keeps them; a text of punctuation alone is returned unchanged. Scripts
    without spaces give one token per phrase.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    plain = _THOUSANDS.sub("", _LEADING_POINT.sub("0.", plain)).replace("'", "").replace("\u2019", "")
    words = [NUMBER_WORDS.get(word, word) for word in _TOKEN.findall("".join(map(_spaced, plain)))]
    return [word for word in words if word not in _ARTICLES] or words or plain.split() or text.split()


def _spaced(character: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] in "LMN" or character in ".-":
        return character
    return f" {character} " if kind == "Sm" else " "


def verdict(words: Sequence[str]) -> str | None:
    """Return the first whole word that is `yes` or `no`."""
    return next((word for word in words if word in VERDICTS), None)


def overlap(prediction: Sequence[str], answer: Sequence[str]) -> tuple[float, float, float]:
    """Return precision, recall and F1 of word lists. A word that occurs n and m times is shared min(n, m) times."""
    shared = (Counter(prediction) & Counter(answer)).total()
    if not shared:
        return 0.0, 0.0, 0.0
    said, right = len(prediction), len(answer)
    return shared / said, shared / right, 2 * shared / (said + right)


def score(row: Answered, settings: None = None) -> dict[FigurePath, float]:
    """Scores from 0 to 1 of the figures in which a record counts."""
    right, said = tokens(row.answer), tokens(row.prediction)
    exact = float(said == right)
    scores = {("exact_match",): exact}
    if not row.closed:
        names = ("exact_match", "precision", "recall", "f1")
        return scores | {("open", name): value for name, value in zip(names, (exact, *overlap(said, right)))}
    if len(right) == 1 and right[0] in VERDICTS:
        found = verdict(said)
        correct = float(found == right[0])
        scores |= {("closed", "yes_no"): correct, ("closed", "no_verdict"): float(found is None)}
    else:
        correct = scores[("closed", "other")] = exact
    scores[("closed", "accuracy")] = correct
    return scores


def is_right(row: Answered) -> bool:
    """Whether an answer is right: the verdict of a closed question, the whole answer of an open one."""
    scores = score(row)
    return bool(scores.get(("closed", "accuracy"), scores[("exact_match",)]))


def majority(rows: Sequence[Answered]) -> dict[FigurePath, float | None]:
    """Return the percentage of records whose answer is the most frequent one of their question type."""
    groups = {
        ("exact_match",): rows,
        ("open", "exact_match"): [row for row in rows if not row.closed],
        ("closed", "accuracy"): [row for row in rows if row.closed],
    }
    for kind in {row.question_type for row in rows} - {None}:
        groups["question_types", kind, "exact_match"] = [row for row in rows if row.question_type == kind]
    return {path: _share_of_majority(group) for path, group in groups.items()}


def _share_of_majority(rows: Sequence[Answered]) -> float | None:
    answers = defaultdict(Counter)
    for row in rows:
        answers[row.question_type][" ".join(tokens(row.answer))] += 1
    return 100 * sum(max(counts.values()) for counts in answers.values()) / len(rows) if rows else None


METRICS.register(
    Metric(
        name="strict",
        summary="token overlap, exact match, the first whole-word yes or no",
        figures=(
            Figure(("exact_match",), in_card=True, in_chart=True, by_type=True),
            Figure(("open", "exact_match")),
            Figure(("open", "precision")),
            Figure(("open", "recall"), in_card=True, in_chart=True),
            Figure(("open", "f1"), in_card=True, in_chart=True),
            Figure(("closed", "accuracy"), in_card=True, in_chart=True),
            Figure(("closed", "yes_no")),
            Figure(("closed", "other")),
            Figure(("closed", "no_verdict"), higher_is_better=False),
        ),
        score=score,
        majority=majority,
    )
)

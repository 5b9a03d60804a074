# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Read the two scores of a judge's reply, in free text or JSON. An ambiguous reply gives None."""

import re
from collections.abc import Iterable
from typing import Literal

from .objects import NOUN, NUMBER, OUT_OF, WHICH, plain_text, read_statements
from .prompt import winner


# Two numbers and nothing else, with or without an announcement ("Final scores: (8, 7)").
_PAIR = rf"[\[({{\s]*{NUMBER}{OUT_OF}[\s,;|&]*(?:and\b)?\s*(?<=[\s,;|&]){NUMBER}{OUT_OF}"
_ANNOUNCED = r"(?:(?:the\s+)?(?:final |overall )?(?:scores?|ratings?|output|result)s?\s*(?:are|is)?\s*[:=]?\s+)?"
_PAIR_LINE = re.compile(rf"\s*{_ANNOUNCED}{_PAIR}[\])}}\s.;]*", re.IGNORECASE)
# Two numbers that open a line of prose: "8 9 Both answers are ...". A small letter would make the number a quantity.
_PAIR_OPENS = re.compile(rf"\s*{_PAIR}[\])}}]?(?:[.,;:]|\s*[-\u2013\u2014])?\s+(?=[A-Z(])")
_ONE_LINE = re.compile(rf"\s*{NUMBER}{OUT_OF}\s*")
_LOOKS_LIKE_PAIR = re.compile(
    r"[\s\[({]*[+-]?[0-9.]+(?:\s?/\s?[0-9]+)?[\s,;|&]+[+-]?[0-9.]+(?:\s?/\s?[0-9]+)?[\])}\s.;]*"
)

_LABEL = rf"(?:\b{NOUN}\s?[#_]?(1|2|one|two|a|b)\b|\b(?:the\s+)(first|second)(?:\s+{NOUN}|\s+one)?\b)(?:'s\s+{NOUN})?"
# Between label and number: a colon, or a verb of scoring. No sentence end, no other number, no line full of prose.
_TO_NUMBER = (
    r"\s*(?:[:=(|\u2013\u2014-]\s*|\s(?:(?:would\s|should\s)?(?:gets?|receives?|scores?|earns?|deserves?|is|be|rated"
    r"|given|with|at|as)\s)*(?:an?\s)?(?:overall\s)?(?:(?:score|rating)\s(?:of\s|is\s)?)?)"
    r"(?:(?:score|rating)\s?[:=]?\s?(?:of\s)?)?"
)
_AFTER = (
    rf"(?=\s*(?:$|[\n.;)|\]]|,(?!\s*[0-9])|\(|[-\u2013\u2014]\s|points?\b|(?:and|while|but|whereas|to)\b|{_LABEL}))"
)
_LABEL_THEN_NUMBER = re.compile(rf"{_LABEL}{_TO_NUMBER}{NUMBER}({OUT_OF}){_AFTER}", re.IGNORECASE)
_NUMBER_THEN_LABEL = re.compile(rf"{NUMBER}({OUT_OF})\s+(?:points?\s+)?(?:for|to)\s+{_LABEL}", re.IGNORECASE)
_FINAL = re.compile(r"\b(?:overall|final|total|in summary|scores|ratings)\b", re.IGNORECASE)
_MARKUP = re.compile(r"[*`_#>]+(?=\S)|(?<=\S)[*`_]+|```\w*")


def parse_scores(text: str) -> tuple[float, float] | None:
    """
    Read the two scores of a judge's reply, in the forms that judges use.

    Accepts the requested line (`8 9`, also `8/10 7`, `8, 7`, after blank lines or before prose), scores next to the
    name of their answer (`Answer 1: 8 ... Answer 2: 7`, `I would give Answer 1 a 9 out of 10`), a last line of two
    numbers, markdown around any of these, and JSON.

    Args:
        text (`str`):
            The reply.

    Returns:
        `tuple[float, float]` or `None`: the scores of answers 1 and 2, each from 0 to 10. None if they are missing,
        above 10, on another scale, or contradict each other: a wrong score is worse than none.

    Example:

    ```python
    >>> parse_scores("8/10 7\\n\\nBoth answers name the organ.")
    (8.0, 7.0)
    ```
    """
    text = plain_text(text)
    if (statements := read_statements(text, ("overall",))) is not None:
        pair = [statements.get((answer, "overall"), statements.get((answer, None))) for answer in (0, 1)]
        verdict = statements.get("verdict", "")
        return None if None in pair or verdict in {None, 0, 1, "tie"} - {winner(pair)} else tuple(pair)
    lines = [line for line in _MARKUP.sub("", text).splitlines() if line.strip()]
    if not lines:
        return None
    if pair := _PAIR_LINE.fullmatch(lines[0]) or _PAIR_OPENS.match(lines[0]):
        return _in_range(pair.groups())
    if len(lines) > 1 and all(_ONE_LINE.fullmatch(line) for line in lines[:2]):
        return _in_range(_ONE_LINE.fullmatch(line)[1] for line in lines[:2])
    if _LOOKS_LIKE_PAIR.fullmatch(lines[0]):  # scores on another scale: nothing below can correct them
        return None
    named, last = _named_scores("\n".join(lines)), _PAIR_LINE.fullmatch(lines[-1])
    last = last and tuple(map(float, last.groups()))
    if named == "unclear" or (named and last and named != last):
        return None
    return _in_range(named or last or ())


def _in_range(pair: Iterable[str | float]) -> tuple[float, float] | None:
    scores = tuple(map(float, pair))
    return scores if scores and max(scores) <= 10 else None


def _named_scores(text: str) -> tuple[float, float] | Literal["unclear"] | None:
    """Return scores next to the name of their answer. Of several different ones, only a final one counts."""
    found: list[list[tuple[int, float]]] = [[], []]
    for pattern, number, ordinal, score in ((_LABEL_THEN_NUMBER, 1, 2, 3), (_NUMBER_THEN_LABEL, 3, 4, 1)):
        for match in pattern.finditer(text):
            answer = WHICH[(match[number] or match[ordinal]).lower()]
            found[answer].append((match.start(), float(match[score])))
    if not all(found):
        return None
    if any(len({score for _, score in scores}) > 1 for scores in found):
        announced = [match.end() for match in _FINAL.finditer(text)]
        found = [[item for item in scores if announced and item[0] >= announced[-1] - 1] for scores in found]
        if [len({score for _, score in scores}) for scores in found] != [1, 1]:
            return "unclear"
    return found[0][-1][1], found[1][-1][1]

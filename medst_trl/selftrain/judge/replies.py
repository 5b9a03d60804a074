# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Read scores from a judge's reply, in free text or JSON. An ambiguous reply gives None."""

import json
import re
import unicodedata
from contextlib import suppress
from typing import Any, Literal

from medst_trl.data.reading import json_objects


LOWEST, HIGHEST = 0, 10  # the prompts ask for 1 to 10, yet GPT-4 gives an empty answer 0
LONGEST = 20_000  # characters read from each end

_NUMBER = r"(?<![\w.,/+-])([0-9]{1,3}(?:\.[0-9]{1,2})?)"
_OUT_OF = r"(?:\s?/\s?10|\s+out\s+of\s+10)?(?![\w%/]|\.[0-9])"
# Two numbers and nothing else, with or without an announcement ("Final scores: (8, 7)").
_PAIR = rf"[\[({{\s]*{_NUMBER}{_OUT_OF}[\s,;|&]*(?:and\b)?\s*(?<=[\s,;|&]){_NUMBER}{_OUT_OF}"
_ANNOUNCED = r"(?:(?:the\s+)?(?:final |overall )?(?:scores?|ratings?|output|result)s?\s*(?:are|is)?\s*[:=]?\s+)?"
_PAIR_LINE = re.compile(rf"\s*{_ANNOUNCED}{_PAIR}[\])}}\s.;]*", re.IGNORECASE)
# Two numbers that open a line of prose: "8 9 Both answers are ...". A small letter would make the number a quantity.
_PAIR_OPENS = re.compile(rf"\s*{_PAIR}[\])}}]?(?:[.,;:]|\s*[-\u2013\u2014])?\s+(?=[A-Z(])")
_ONE_LINE = re.compile(rf"\s*{_NUMBER}{_OUT_OF}\s*")
_LOOKS_LIKE_PAIR = re.compile(
    r"[\s\[({]*[+-]?[0-9.]+(?:\s?/\s?[0-9]+)?[\s,;|&]+[+-]?[0-9.]+(?:\s?/\s?[0-9]+)?[\])}\s.;]*"
)

_NOUN = r"(?:answer|assistant|response|candidate|model|reply|option)"
_WHICH = {"1": 0, "one": 0, "a": 0, "first": 0, "2": 1, "two": 1, "b": 1, "second": 1}
_LABEL = (
    rf"(?:\b{_NOUN}\s?[#_]?(1|2|one|two|a|b)\b|\b(?:the\s+)(first|second)(?:\s+{_NOUN}|\s+one)?\b)(?:'s\s+{_NOUN})?"
)
# Between label and number: a colon, or a verb of scoring. No sentence end, no other number, no line full of prose.
_TO_NUMBER = (
    r"\s*(?:[:=(|\u2013\u2014-]\s*|\s(?:(?:would\s|should\s)?(?:gets?|receives?|scores?|earns?|deserves?|is|be|rated"
    r"|given|with|at|as)\s)*(?:an?\s)?(?:overall\s)?(?:(?:score|rating)\s(?:of\s|is\s)?)?)"
    r"(?:(?:score|rating)\s?[:=]?\s?(?:of\s)?)?"
)
_AFTER = (
    rf"(?=\s*(?:$|[\n.;)|\]]|,(?!\s*[0-9])|\(|[-\u2013\u2014]\s|points?\b|(?:and|while|but|whereas|to)\b|{_LABEL}))"
)
_LABEL_THEN_NUMBER = re.compile(rf"{_LABEL}{_TO_NUMBER}{_NUMBER}({_OUT_OF}){_AFTER}", re.IGNORECASE)
_NUMBER_THEN_LABEL = re.compile(rf"{_NUMBER}({_OUT_OF})\s+(?:points?\s+)?(?:for|to)\s+{_LABEL}", re.IGNORECASE)
_FINAL = re.compile(r"\b(?:overall|final|total|in summary|scores|ratings)\b", re.IGNORECASE)
THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>|^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
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
    if len(text) > 2 * LONGEST:
        text = text[:LONGEST] + "\n...\n" + text[-LONGEST:]
    text = THOUGHTS.sub("", unicodedata.normalize("NFKC", text))
    found = find_json(text)
    if found is not None:
        return valid_scores(_scores_of_json(found))
    lines = [line for line in _MARKUP.sub("", text).splitlines() if line.strip()]
    if not lines:
        return None
    if pair := _PAIR_LINE.fullmatch(lines[0]) or _PAIR_OPENS.match(lines[0]):
        return valid_scores(pair.groups())
    if len(lines) > 1 and all(_ONE_LINE.fullmatch(line) for line in lines[:2]):
        return valid_scores(_ONE_LINE.fullmatch(line).group(1) for line in lines[:2])
    if _LOOKS_LIKE_PAIR.fullmatch(lines[0]):  # scores on another scale: nothing below can correct them
        return None
    named, last = _named_scores("\n".join(lines)), _PAIR_LINE.fullmatch(lines[-1])
    last = last and _numbers(last.groups())
    if named == "unclear" or (named and last and named != last):
        return None
    return valid_scores(named or last or None)


def _numbers(pair) -> tuple[float, float] | None:
    try:
        first, second = (None if isinstance(value, bool) else float(value) for value in pair)
    except (TypeError, ValueError):
        return None
    return None if first is None or second is None else (first, second)


def valid_scores(pair) -> tuple[float, float] | None:
    """Return two values as scores, or `None` unless both are numbers from 0 to 10."""
    numbers = _numbers(pair) if pair is not None else None
    return numbers if numbers and all(LOWEST <= number <= HIGHEST for number in numbers) else None


def _named_scores(text: str) -> tuple[float, float] | Literal["unclear"] | None:
    """Return scores next to the name of their answer. Of several different ones, only a final one counts."""
    found: list[list[tuple[int, float]]] = [[], []]
    for pattern, number, ordinal, score in ((_LABEL_THEN_NUMBER, 1, 2, 3), (_NUMBER_THEN_LABEL, 3, 4, 1)):
        for match in pattern.finditer(text):
            answer = _WHICH[(match[number] or match[ordinal]).lower()]
            found[answer].append((match.start(), float(match[score])))
    if not all(found):
        return None
    if any(len({score for _, score in scores}) > 1 for scores in found):
        announced = [match.end() for match in _FINAL.finditer(text)]
        found = [[item for item in scores if announced and item[0] >= announced[-1] - 1] for scores in found]
        if [len({score for _, score in scores}) for scores in found] != [1, 1]:
            return "unclear"
    return found[0][-1][1], found[1][-1][1]


def find_json(text: str) -> Any:
    """Return the last JSON object in a text, or the list that is the whole text."""
    whole = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if whole.startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(whole)
    objects = [value for _, value in json_objects(text) if value]
    return objects[-1] if objects else None


def _scores_of_json(value: Any) -> Any:
    """Return the two scores of a list, of keys that name the answers, or of objects with a score inside."""
    if isinstance(value, list):
        return value if len(value) == 2 else None
    if not isinstance(value, dict):
        return None
    plain = {re.sub(r"[^a-z0-9]", "", str(key).lower()): item for key, item in value.items()}
    for key in ("scores", "score", "ratings"):
        if isinstance(plain.get(key), list | dict):
            return _scores_of_json(plain[key])
    for first, second in (("1", "2"), ("a", "b"), ("one", "two")):
        for noun in ("answer", "assistant", "response", "score", "answer{}score", "score_answer", "scoreanswer", ""):
            names = [noun.format(n) if "{}" in noun else noun + n for n in (first, second)]
            if all(name in plain for name in names):
                return [_score_inside(plain[name]) for name in names]
    return None


def _score_inside(value: Any) -> Any:
    if isinstance(value, dict):
        plain = {str(key).lower(): item for key, item in value.items()}
        return next((plain[key] for key in ("overall", "score", "rating") if key in plain), None)
    if isinstance(value, str):
        match = _ONE_LINE.fullmatch(value)
        return match and match.group(1)
    return value

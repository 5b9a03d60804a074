# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Read what a judge's reply says about two answers: their scores, and which is better, in JSON objects or in free text.

Anything ambiguous is read as None.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any, Literal

import yaml

from .judge import winner


_MAX_CHARS_PER_END = 20_000  # characters read from each end
_MAX_LOOSE_OBJECTS = 8  # objects in one reply that are not JSON; the parser for them is slow
_ANSWER_INDEX = {"1": 0, "one": 0, "a": 0, "first": 0, "2": 1, "two": 1, "b": 1, "second": 1}
_ANSWER_NOUN = r"(?:answer|assistant|response|candidate|model|reply|option)"
_NUMBER = r"(?<![\w.,/+-])([0-9]{1,3}(?:\.[0-9]{1,2})?)"
_OUT_OF = r"(?:\s?/\s?10|\s+out\s+of\s+10)?(?![\w%/]|\.[0-9])"

# "8/10 - it sees the lesion"
_REASONED = re.compile(rf"\s*{_NUMBER}{_OUT_OF}\s*(?:[-\u2013\u2014:;,.(]\s*(?:[^\W\d]\D*)?)?")
# Names and values are compared in lower case without blanks and marks.
_ANSWER = rf"(?:the)?{_ANSWER_NOUN}?({'|'.join(_ANSWER_INDEX)}){_ANSWER_NOUN}?"
_ANSWER_NAME = re.compile(_ANSWER)
# Not empty. Names in the last group do not say which answer is meant: an index may start at 0, and a rank is not a
# position.
_IDENTIFIES = re.compile(
    rf"(?=.){_ANSWER_NOUN}?(?:id|name|label|letter|number|no|key|(index|idx|rank|position|order))?|which"
)
_VERDICT = re.compile(r".*verdict|winner|(?:better|best|preferred)(?:answer)?|preference")
_IS_BETTER = re.compile(rf"(?:(?:better|best|winner)(?:is)?)?{_ANSWER}(?:(?:is)?(?:the)?(?:better|best)|wins)?")
_IS_TIE = re.compile(r"(?:itsa|a)?(?:tie|draw)|equal(?:lygood)?|neither(?:isbetter)?")
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)
_STRAIGHT = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''" + '""""')
_APOSTROPHE = re.compile(r"\\'|(?<=\w)'(?=\w)")
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>|^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)


def plain_text(text: str) -> str:
    """Return a reply without thoughts, in ordinary letters, and with its middle left out if it is very long."""
    if len(text) > 2 * _MAX_CHARS_PER_END:
        text = text[:_MAX_CHARS_PER_END] + "\n...\n" + text[-_MAX_CHARS_PER_END:]
    return _THOUGHTS.sub("", unicodedata.normalize("NFKC", text))


def read_statements(text: str, criteria: Collection[str]) -> dict[Any, Any] | None:
    """
    Return the scores and verdicts of two answers in the objects of a text, at any depth. Answers may be called `1`,
    `A`, `first`, `Answer 1`, `Assistant A` or `response_1`; verdicts `verdict`, `winner`, `better` or `preference`.

    Scores may be in an object or a field of each answer, of each criterion (`{"accuracy": {"answer_1": 8, ...}}`), of
    both (`answer_1_accuracy`), or in lists in the order of the answers. Objects in the notations of Python,
    JavaScript and YAML are read as well: other quotes, trailing commas, comments, names without quotes.

    Returns:
        `dict` or `None`: scores (0 to 10) by answer (0 or 1, None if its name is missing) and criterion (None for a
        score without one), and `verdict`: 0, 1, `"tie"` or another text. A value is None if it is ambiguous: the
        objects contradict each other, or a score is on another scale. None without objects.
    """
    names, found = "|".join(criteria), defaultdict(set)
    # Of an answer, of a criterion, of both in any order, or of neither.
    of_answer = rf"(?:(?:score|rating)?(?:of|for)?{_ANSWER})?"
    score_name = re.compile(rf"({names})?{of_answer}({names})?(?:(?:score|rating)s?)?")

    def collect(items: tuple, outer_answer: int | None, outer_criterion: str | None) -> None:
        """Add what an object says. The outer answer and criterion are those of the object around it."""
        for key, value in items:
            name, named, criterion = _plain(key), outer_answer, outer_criterion
            if match := score_name.fullmatch(name):
                named, criterion = _ANSWER_INDEX.get(match[2], outer_answer), match[1] or match[3] or outer_criterion
            values = value if isinstance(value, list) else [value]
            for place, item in enumerate(values):
                answer = _answer_of(item, place) if named is None and len(values) == 2 else named
                if isinstance(item, tuple):
                    collect(item, answer, criterion)
                elif _VERDICT.fullmatch(name) and not isinstance(item, bool):  # {"answer_1": {"preferred": true}}
                    verdict = _verdict(item)
                    # Other names also hold remarks: {"verdict": "A", "better": "slightly"}
                    if verdict in (0, 1, "tie") or name.endswith(("verdict", "winner")):
                        found["verdict"].add(verdict)
                elif match and re.search(r"\d", str(item)):
                    score = _score(item)
                    if score is not None or answer is not None:
                        found[answer, criterion].add(score)

    try:
        objects = _find_objects(text)
        for item in objects:
            collect(item, None, None)
    except RecursionError:
        return {}
    statements = {key: values.pop() if len(values) == 1 else None for key, values in found.items()}
    return statements if objects else None


def _find_objects(text: str) -> list[tuple]:
    """
    Return the objects in a text, each as a tuple of its pairs: a key may occur twice. A text that is a list is
    returned as an object with the key `scores`.
    """
    whole = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if whole.startswith("["):
        with suppress(ValueError):
            return [(("scores", _DECODER.decode(whole)),)]
    starts, ends = [], {}
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            starts.append(brace.start())
        elif starts:
            ends[starts.pop()] = brace.end()
    found, loose, at = [], 0, 0
    while (at := text.find("{", at)) >= 0:
        item = None
        try:
            item, end = _DECODER.raw_decode(text, at)
        except ValueError:
            if at in ends:
                end, loose = ends[at], loose + 1
                if loose <= _MAX_LOOSE_OBJECTS:
                    item = _parse_loosely(text[at:end])
        if item:  # an empty object says nothing
            found.append(item)
        at = at + 1 if item is None else end
    return found


class _Loader(yaml.BaseLoader):
    """Loader that reads scalars as texts, and refuses aliases, which could make a small text large."""

    anchors = property(lambda self: {}, lambda self, value: None)


def _parse_loosely(text: str) -> tuple | None:
    """Parse an object that is not JSON. Its values are texts."""
    text = re.sub(r"\s*//", " #", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL).replace("\t", " "))
    for variant in (text, text.translate(_STRAIGHT)):
        with suppress(yaml.YAMLError, ValueError):
            return _pairs(yaml.compose(_APOSTROPHE.sub("''", variant), _Loader))
    return None


def _pairs(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return tuple((key.value, _pairs(value)) for key, value in node.value)
    if isinstance(node, yaml.SequenceNode):
        return list(map(_pairs, node.value))
    if not node.value and node.style is None:
        raise ValueError("a name without a value")
    return node.value


def _answer_of(item: Any, place: int) -> int | None:
    """Return the answer that one of two items of a list is about: the one at its place, unless it names another."""
    pairs = [pair for pair in item if not isinstance(pair[1], tuple | list)] if isinstance(item, tuple) else ()
    names = [(match, value) for key, value in pairs if (match := _IDENTIFIES.fullmatch(_plain(key)))]
    found = {_ANSWER_NAME.fullmatch(_plain(value)) for match, value in names if not match[1]} - {None}
    answers = {_ANSWER_INDEX[match[1]] for match in found}
    if not names:
        return place
    return answers.pop() if len(answers) == 1 else None


def _verdict(value: Any) -> int | str:
    name = _plain(value) if isinstance(value, str | int) else ""
    if match := _IS_BETTER.fullmatch(name):
        return _ANSWER_INDEX[match[1]]
    return "tie" if _IS_TIE.fullmatch(name) else name


def _plain(name: Any) -> str:
    return re.sub(r"[\W_]", "", str(name).lower())


def _score(value: Any) -> float | None:
    """Return a score, or `None` unless it is a number from 0 to 10: the prompts ask for 1 to 10, yet GPT-4 gives 0."""
    if isinstance(value, str):
        match = _REASONED.fullmatch(value)
        value = match and float(match[1])
    return float(value) if type(value) in (int, float) and 0 <= value <= 10 else None


# Free text


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

_LABEL = (
    rf"(?:\b{_ANSWER_NOUN}\s?[#_]?(1|2|one|two|a|b)\b|\b(?:the\s+)(first|second)(?:\s+{_ANSWER_NOUN}|\s+one)?\b)"
    rf"(?:'s\s+{_ANSWER_NOUN})?"
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
        if None in pair:
            return None
        verdict = statements.get("verdict", "")  # None if ambiguous; another text says nothing about the scores
        contradicts = verdict is None or (verdict in (0, 1, "tie") and verdict != winner(pair))
        return None if contradicts else tuple(pair)
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
            answer = _ANSWER_INDEX[(match[number] or match[ordinal]).lower()]
            found[answer].append((match.start(), float(match[score])))
    if not all(found):
        return None
    if any(len({score for _, score in scores}) > 1 for scores in found):
        announced = [match.end() for match in _FINAL.finditer(text)]
        found = [[item for item in scores if announced and item[0] >= announced[-1] - 1] for scores in found]
        if [len({score for _, score in scores}) for scores in found] != [1, 1]:
            return "unclear"
    return found[0][-1][1], found[1][-1][1]

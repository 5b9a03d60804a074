# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Read scores from a judge's reply, in free text or JSON. An ambiguous reply gives None."""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Literal

import yaml


LOWEST, HIGHEST = 0, 10  # the prompts ask for 1 to 10, yet GPT-4 gives an empty answer 0
LONGEST = 20_000  # characters read from each end
MOST_LOOSE, DEEPEST = 8, 50  # objects in one reply that are not JSON, and nested ones; the parser for them is slow

_NUMBER = r"(?<![\w.,/+-])([0-9]{1,3}(?:\.[0-9]{1,2})?)"
_OUT_OF = r"(?:\s?/\s?10|\s+out\s+of\s+10)?(?![\w%/]|\.[0-9])"
# Two numbers and nothing else, with or without an announcement ("Final scores: (8, 7)").
_PAIR = rf"[\[({{\s]*{_NUMBER}{_OUT_OF}[\s,;|&]*(?:and\b)?\s*(?<=[\s,;|&]){_NUMBER}{_OUT_OF}"
_ANNOUNCED = r"(?:(?:the\s+)?(?:final |overall )?(?:scores?|ratings?|output|result)s?\s*(?:are|is)?\s*[:=]?\s+)?"
_PAIR_LINE = re.compile(rf"\s*{_ANNOUNCED}{_PAIR}[\])}}\s.;]*", re.IGNORECASE)
# Two numbers that open a line of prose: "8 9 Both answers are ...". A small letter would make the number a quantity.
_PAIR_OPENS = re.compile(rf"\s*{_PAIR}[\])}}]?(?:[.,;:]|\s*[-\u2013\u2014])?\s+(?=[A-Z(])")
_ONE_LINE = re.compile(rf"\s*{_NUMBER}{_OUT_OF}\s*")
_REASONED = re.compile(
    rf"\s*{_NUMBER}{_OUT_OF}\s*(?:[-\u2013\u2014:;,.(]\s*(?:[^\W\d]\D*)?)?"
)  # "8/10 - it sees the lesion"
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
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>|^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_MARKUP = re.compile(r"[*`_#>]+(?=\S)|(?<=\S)[*`_]+|```\w*")

# Names in JSON, in lower case without blanks and marks.
_ANSWER_NAME = re.compile(
    rf"(?:the|score(?:of|for)?)?{_NOUN}?(1|2|one|two|a|b|first|second){_NOUN}?(?:score|rating|isbetter|wins)?"
)
_SCORE_NAME = re.compile(r"(score|rating)s?$")
_TIES = ("tie", "draw", "equal")
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)
_STRAIGHT = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''" + '""""')
_APOSTROPHE = re.compile(r"\\'|(?<=\w)'(?=\w)")


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
    if objects := find_objects(text):
        said = facts_in(objects, ("overall",))
        return valid_scores(said.get((answer, "overall"), said.get((answer, None))) for answer in (0, 1))
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


def plain_text(text: str) -> str:
    """Return a reply without thoughts, in ordinary letters, and with its middle left out if it is very long."""
    if len(text) > 2 * LONGEST:
        text = text[:LONGEST] + "\n...\n" + text[-LONGEST:]
    return _THOUGHTS.sub("", unicodedata.normalize("NFKC", text))


def find_objects(text: str) -> list[tuple]:
    """
    Return the JSON objects in a text, each as a tuple of its pairs: a key may occur twice.

    Objects in the notations of Python, JavaScript and YAML are read as well: other quotes, trailing commas, comments,
    names without quotes. A text that is a list is returned as an object with the key `scores`.
    """
    whole = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if whole.startswith("["):
        with suppress(ValueError, RecursionError):
            return [(("scores", _DECODER.decode(whole)),)]
    starts, ends, depth = [], {}, 0
    for bracket in re.finditer(r"[][{}]", text):
        depth = max(0, depth + (1 if bracket[0] in "[{" else -1))
        if depth > DEEPEST:
            return []
        if bracket[0] == "{":
            starts.append(bracket.start())
        elif bracket[0] == "}" and starts:
            ends[starts.pop()] = bracket.end()
    found, loose, at = [], 0, 0
    while (at := text.find("{", at)) >= 0:
        try:
            item, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            end, loose = ends.get(at), loose + (at in ends)
            item = _parse_loosely(text[at:end]) if end and loose <= MOST_LOOSE else None
        found += [item] if item else []
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


def facts_in(objects: Collection[tuple], criteria: Collection[str]) -> dict[Any, Any]:
    """
    Return what objects say about two answers, at any depth and under any usual name.

    Returns:
        `dict`: scores by answer (0 or 1, None if its name is not given) and criterion (None for a score without one),
        and `verdict`: 0, 1 or `"tie"`. A value is None if it is ambiguous: the objects contradict each other, a score
        is on another scale, or a verdict is something else.
    """
    said: dict[Any, set] = defaultdict(set)

    def visit(items: tuple, answer: int | None, criterion: str | None) -> None:
        for key, value in items:
            name = _plain(key)
            match, stem = _ANSWER_NAME.fullmatch(name), _SCORE_NAME.sub("", name)
            is_score = match or stem in criteria or not stem
            which, what = _WHICH[match[1]] if match else answer, stem if stem in criteria else criterion
            values = value if isinstance(value, list) else [value]
            for place, item in enumerate(values):
                if isinstance(item, tuple):
                    visit(item, which, what)
                elif stem.endswith("verdict") or stem == "winner":
                    said["verdict"].add(_verdict(value))
                elif is_score and re.search(r"\d", str(item)):
                    score, owner = _score(item), place if which is None and len(values) == 2 else which
                    if score is not None or owner is not None:
                        said[owner, what].add(score)

    for item in objects:
        visit(item, None, None)
    return {key: values.pop() if len(values) == 1 else None for key, values in said.items()}


def _verdict(value: Any) -> Literal[0, 1, "tie"] | None:
    name = _plain(value) if isinstance(value, str | int) else ""
    match = _ANSWER_NAME.fullmatch(name)
    return "tie" if name in _TIES else match and _WHICH[match[1]]


def _plain(name: Any) -> str:
    return re.sub(r"[\W_]", "", str(name).lower())


def _score(value: Any) -> float | None:
    if isinstance(value, str):
        match = _REASONED.fullmatch(value)
        value = match and match[1]
    numbers = valid_scores((value, value))
    return numbers and numbers[0]

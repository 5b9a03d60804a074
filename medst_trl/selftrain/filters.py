# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Filters of sampled questions, and of answers that are too similar to be compared."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from medst_trl.data.overlap import normalized
from medst_trl.engines.engine import Reply


_QUESTION_MARKS = ("?", "\uff1f", "\u061f")  # also full-width and Arabic
_SENTENCE_END = re.compile(r"(?<=[.!?:;。])\s+|\n")
_BLANKS_AND_CLOSING = " \t\r\n\"'”’)]}*_.:"

# First words of questions without a question mark. "When" also opens statements: "When the lesion is large, ...".
_QUESTION_WORDS = frozenset("what which where who whom whose why how".split())  # noqa: SIM905
_AUXILIARIES = frozenset(
    """is are was were am do does did can could has have had will would shall should may might must isn't aren't wasn't
    weren't don't doesn't didn't can't couldn't hasn't haven't won't wouldn't shouldn't""".split()  # noqa: SIM905
)
_PREPOSITIONS = frozenset("in on at from to with for by of under during through into".split())  # noqa: SIM905
_REQUESTS = frozenset(
    """describe explain identify list name tell give compare contrast summarize summarise provide discuss show indicate
    state specify locate outline interpret analyze analyse elaborate mention determine estimate count point write
    define detail comment suggest assess evaluate characterize characterise report classify find measure rate
    recommend highlight mark grade review""".split()  # noqa: SIM905
)
_POLITE = frozenset("please kindly now then and so also briefly".split())  # noqa: SIM905
_MORE_POLITE = re.compile(r"(?:can|could|would|will) you\b|i (?:want|would like) you to\b|let us\b|let's\b")

# Words that change a finding. Texts that differ in one of them are never nearly identical, however long they are.
_DECISIVE = frozenset(
    """no not without none never nor neither yes absent present absence presence left right bilateral unilateral upper
    lower superior inferior anterior posterior medial lateral central peripheral proximal distal normal abnormal
    benign malignant acute chronic increased decreased high low large small larger smaller bright dark brighter darker
    light mild moderate severe positive negative male female""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class QuestionFilter:
    """
    Filter for the questions that a policy writes.

    Args:
        min_words (`int`, *optional*, defaults to `3`):
            Reject shorter questions.
        max_words (`int`, *optional*, defaults to `60`):
            Reject longer questions.
        english (`bool`, *optional*, defaults to `True`):
            Whether a text must also read as an English question or request. Disable it for other languages.
    """

    min_words: int = 3
    max_words: int = 60
    english: bool = True

    def problem(self, reply: Reply, earlier: Collection[str] = ()) -> str | None:
        """
        Return why a question cannot be used, as a reason code, or None.

        Args:
            reply ([`Reply`]): The sampled question.
            earlier (collection of `str`): Questions kept for the same image, as [`normalized`] returns them.
        """
        if reply.problem:
            return reply.problem
        words = normalized(reply.text).split()
        if not words:
            return "empty"
        if not reply.ended:
            return "unfinished"
        if self.english and not is_question(reply.text):
            return "not_a_question"
        if len(words) < self.min_words:
            return "too_short"
        if len(words) > self.max_words:
            return "too_long"
        return "repeated" if " ".join(words) in earlier else None


def is_question(text: str) -> bool:
    """
    Return whether a text reads as a question or a request, judged by its last sentence.

    A question mark at the end decides, otherwise the first words ("Is there a lesion", "Please describe the scan.").
    A question followed by something else, such as its own answer, does not count.
    """
    bare = text.strip().rstrip(_BLANKS_AND_CLOSING)
    if bare.endswith(_QUESTION_MARKS):
        return True
    last = _SENTENCE_END.split(bare)[-1].lower().replace("’", "'")
    words = re.findall(r"[\w'-]+", last)
    while words and words[0] in _POLITE:
        words = words[1:]
    if not words:
        return False
    if words[0] in _QUESTION_WORDS | _AUXILIARIES | _REQUESTS or _MORE_POLITE.match(" ".join(words)):
        return True
    follow = _AUXILIARIES if words[0] == "when" else _QUESTION_WORDS if words[0] in _PREPOSITIONS else ()
    return len(words) > 1 and words[1] in follow


def same_answer(first: str, second: str, max_similarity: float = 0.95) -> str | None:
    """
    Return the reason why two answers count as the same, or None.

    Args:
        first, second (`str`):
            Answers.
        max_similarity (`float`, *optional*, defaults to `0.95`):
            Answers are nearly identical if they share more than this part of their words, in order, and none of the
            other words is a number or changes the finding, such as "no" or "left".

    Returns:
        `str`, *optional*: `"identical_answers"` (up to case, punctuation and whitespace),
        `"nearly_identical_answers"`, or None for answers that differ.
    """
    one, two = sorted((normalized(first).split(), normalized(second).split()))  # `ratio` depends on the order
    if one == two:
        return "identical_answers"
    differing = {*(Counter(one) - Counter(two)), *(Counter(two) - Counter(one))}
    if any(word in _DECISIVE or word[0].isdigit() for word in differing):
        return None
    matcher = SequenceMatcher(None, one, two, autojunk=False)
    # The cheap upper bound first: the ratio of long answers is expensive.
    if matcher.quick_ratio() <= max_similarity or matcher.ratio() <= max_similarity:
        return None
    return "nearly_identical_answers"


def pair_answers(replies: Sequence[Reply], max_similarity: float = 0.95) -> tuple[list[str], str | None]:
    """
    Sort the answers to one question so that the first and second, third and fourth, ... can be compared.

    No two pairs have the same two texts, and answers without a partner are left out.

    Args:
        replies (sequence of [`Reply`]):
            The sampled answers.
        max_similarity (`float`, *optional*, defaults to `0.95`):
            See [`same_answer`].

    Returns:
        `tuple[list[str], str | None]`: the answers of all pairs, and why there is none.
    """
    usable, problems, pairs, made = [], [], [], set()
    for reply in replies:
        problem = reply.problem or (not reply.text and "empty_answer") or (not reply.ended and "unfinished_answer")
        if problem:
            problems.append(problem)
        else:
            usable.append(reply.text)
    while usable:
        first = usable.pop(0)
        same = [same_answer(first, other, max_similarity) for other in usable]
        texts = [frozenset(map(normalized, (first, other))) for other in usable]
        partners = [place for place, reason in enumerate(same) if reason is None and texts[place] not in made]
        if partners:
            made.add(texts[partners[0]])
            pairs += [first, usable.pop(partners[0])]
        problems += [reason for reason in same if reason]
    return pairs, None if pairs else problems[0]

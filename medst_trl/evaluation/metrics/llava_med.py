# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Metric `llava_med`: the rules of LLaVA-Med v1.0.0's evaluation scripts including their quirks, to compare with papers
that used them. Judge a model by `strict`.

- A shared word counts as often as the *prediction* has it: repeating a right word raises recall and precision.
- "exact" is a precision, distinct shared words over all words of the prediction.
- BLEU-n is the clipped precision of n-grams of that one order, times the brevity penalty.
- A closed prediction is right if it contains the right answer, even inside a word: "normal" contains "no".
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from medst_trl.base.settings import check_choice, documented
from medst_trl.evaluation.metric import METRICS, Answered, Figure, FigurePath, Metric

from .strict import NUMBER_WORDS


ClosedRule = Literal["gated", "substring", "drop_misses"]
CLOSED_RULES = get_args(ClosedRule)

# Correct spellings. The rule restores them if exactly one apostrophe is missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't isn't
    mightn't mightn't've might've mustn't must've needn't not've oughtn't shan't should've shouldn't
    shouldn't've wasn't weren't won't would've wouldn't wouldn't've he'd he'd've he's it'd it'd've it'll
    she'd've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've we'd've we've you'd you'd've you'll you're you've y'all y'all'll y'all'd've how'd how'll how's
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's ma'am o'clock 'twas 'ow's'at
""".split()  # noqa: SIM905
_RESTORED = {
    word[: place.start()] + word[place.end() :]: word for word in _CONTRACTIONS for place in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the one entry that is reversed in the original table

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = NUMBER_WORDS | {"none": "0"}
_FULL_STOPS_REMOVED = 32  # the original passes a flag as the count: later full stops stay


def normalize_word(text: str) -> str:
    """Normalize a text as LLaVA-Med does, by the rules of the VQA benchmark."""
    join = re.search(r"\d,\d", text) is not None
    words = text
    for mark in _PUNCTUATION:
        words = words.replace(mark, "" if join or f"{mark} " in text or f" {mark}" in text else " ")
    words = re.sub(r"\.(?!\d)", "", words, count=_FULL_STOPS_REMOVED)
    numbered = [_NUMBERS.get(word, word) for word in words.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in numbered if word not in ("a", "an", "the"))


@documented
@dataclass
class LlavaMedSettings:
    """
    Settings of the metric.

    Args:
        closed_rule (`str`, *optional*, defaults to `"gated"`):
            When the metric llava_med counts a closed prediction as right. substring (run_eval_batch.py): it contains
            the right answer. gated: it also contains yes or no. drop_misses (run_eval.py as released): as gated, but a
            wrong prediction that contains yes or no is not counted at all.
    """

    closed_rule: ClosedRule = "gated"

    def __post_init__(self):
        check_choice("closed_rule", self.closed_rule, CLOSED_RULES)


def score(row: Answered, settings: LlavaMedSettings) -> dict[FigurePath, float]:
    """Scores from 0 to 1 of the figures in which a record counts."""
    right, said = normalize_word(row.answer.lower()), normalize_word(row.prediction.lower())
    if row.closed:
        return {("closed", name): value for name, value in _closed(right, said, settings.closed_rule).items()}
    bleu = {f"bleu_{order}": _bleu(said.split(), right.split(), order) for order in (1, 2, 3)}
    overlap = _overlap(normalize_word(said).split(), normalize_word(right).split())  # normalized a second time
    return {("open", name): value for name, value in (overlap | bleu).items()}


def _closed(right: str, said: str, rule: ClosedRule) -> dict[str, float]:
    hit, speaks = right in said, "yes" in said or "no" in said
    if rule == "substring":
        return {"accuracy": float(hit)}
    if rule == "gated":
        return {"accuracy": float(hit and speaks)}
    if speaks and not hit:
        return {"dropped": 1.0}
    return {"accuracy": float(hit and speaks), "dropped": 0.0}


def _overlap(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    spoken, expected = Counter(said), Counter(right)
    shared = sum(spoken[word] for word in expected)
    if not shared:
        return {"exact": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    missed = sum(count for word, count in expected.items() if word not in spoken)
    precision, recall = shared / len(said), shared / (shared + missed)
    exact, f1 = len(spoken.keys() & expected.keys()) / len(said), 2 * precision * recall / (precision + recall)
    return {"exact": exact, "precision": precision, "recall": recall, "f1": f1}


def _bleu(said: Sequence[str], right: Sequence[str], order: int) -> float:
    spoken, expected = (Counter(zip(*(words[i:] for i in range(order)))) for words in (said, right))
    shared = (spoken & expected).total()
    if not shared:
        return 0.0
    return shared / spoken.total() * min(1.0, math.exp(1 - len(right) / len(said)))


METRICS.register(
    Metric(
        name="llava_med",
        summary="the rules of LLaVA-Med v1.0.0's evaluation scripts, including their quirks",
        figures=(
            Figure(("open", "exact")),
            Figure(("open", "precision")),
            Figure(("open", "recall"), in_card=True, in_chart=True),
            Figure(("open", "f1"), in_card=True, in_chart=True),
            *(Figure(("open", f"bleu_{order}")) for order in (1, 2, 3)),
            Figure(("closed", "accuracy"), in_card=True, in_chart=True),
            Figure(("closed", "dropped"), higher_is_better=False),
        ),
        score=score,
        settings=LlavaMedSettings,
    )
)

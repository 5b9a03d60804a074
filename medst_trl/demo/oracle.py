# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
An oracle that judges drawn phantoms by their content.

With it the whole loop runs and is measured without a network, and the judge's error rate is known because it is a
setting.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_bounds, documented
from medst_trl.data.images import image_id
from medst_trl.selftrain.judge.judge import LOCAL_JUDGES, LocalJudge

from .phantoms import BRIGHTNESSES, MODALITIES, QUADRANTS, SIZES, Truth, answer, draw_phantoms, is_well_formed


if TYPE_CHECKING:
    from datasets import Dataset

MOST_PHANTOMS = 100_000  # drawn to find the images

_VALUES = {"modality": MODALITIES, "quadrant": QUADRANTS, "size": SIZES, "brightness": BRIGHTNESSES}


def score_answer(question: str, text: str, truth: Truth) -> int:
    """
    Score an answer about a phantom from 1 to 10.

    The right answer scores 10. Others score by the share of the requested facts that they state correctly, minus wrong
    facts that they add. An answer without a correct fact scores 1, and so does every answer to a text that is not a
    question or that this phantom cannot answer.
    """
    if not is_well_formed(question, truth):
        return 1
    right_answer = answer(question, truth)
    if _plain(text) == _plain(right_answer):
        return 10
    expected, stated = _facts(right_answer), _facts(text)
    right = sum(stated.get(fact) == value for fact, value in expected.items())
    wrong = sum(asdict(truth).get(fact, value) != value for fact, value in stated.items() if fact not in expected)
    return max(1, min(9, 1 + round(8 * (right - wrong) / len(expected))))


def open_oracle(
    candidates: "Dataset", error_rate: float = 0.0, seed: int = 0
) -> Callable[[Mapping[str, Any]], list[int]]:
    """
    Return a judge that knows the phantoms of some candidates.

    Args:
        candidates (`datasets.Dataset`):
            Candidates about phantoms of the split "unlabelled".
        error_rate (`float`, *optional*, defaults to `0.0`):
            Share of the pairs whose scores are swapped, in both orders alike.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the phantoms, and of the choice of these pairs.

    Returns:
        `Callable`: takes a pair, returns the scores of its answers. See `local` of [`PairwiseJudge`].

    Raises:
        UserError: if a candidate is not about such a phantom.
    """
    truths = _truths({image_ids[0] for image_ids in candidates["image_ids"] if image_ids}, seed)

    def judge(pair: Mapping[str, Any]) -> list[int]:
        image, question, answers = pair["image_ids"][0], pair["question"], pair["answers"]
        scores = [score_answer(question, text, truths[image]) for text in answers]
        if random.Random(f"{seed}/{image}/{question}/{sorted(answers)}").random() < error_rate:
            scores.reverse()
        return scores

    return judge


def _truths(image_ids: set[str], seed: int) -> dict[str, Truth]:
    """Find what each image shows by drawing the phantoms again."""
    truths = {}
    for phantom in islice(draw_phantoms(seed, "unlabelled"), MOST_PHANTOMS):
        if len(truths) == len(image_ids):
            return truths
        if (name := image_id(phantom.image)) in image_ids:
            truths[name] = phantom.truth
    raise UserError(
        f"{len(image_ids) - len(truths)} of {len(image_ids)} images of the candidates are not among the unlabelled "
        f"phantoms of seed {seed}, and the oracle knows no others. Set seed to that of `medst prepare`, or replace "
        "oracle_error_rate by a judge (model)."
    )


def _facts(text: str) -> dict[str, Any]:
    """Return the facts that a text states about a scan."""
    text = _plain(text)
    facts: dict[str, Any] = {}
    for name, values in _VALUES.items():
        if found := [value for value in values if re.search(rf"\b{value.lower()}\b", text)]:
            # Several values at once are never correct.
            facts[name] = found[0] if len(found) == 1 else tuple(found)
    if match := re.match(r"(yes|no)\b", text):
        facts["verdict"] = match[1]
    if "lesion" in text:
        facts["lesion"] = not re.search(r"\bno lesion", text)
    return facts


def _plain(text: str) -> str:
    return " ".join(text.lower().replace(".", " ").replace(",", " ").split())


@documented
@dataclass
class OracleArguments(LocalJudge):
    """
    Settings of the oracle judge.

    Args:
        oracle_error_rate (`float`, *optional*):
            Use the oracle judge, which knows the content of phantoms, with this fraction of wrong verdicts.
    """

    name, summary = "oracle", "the phantoms' oracle, in this process"

    oracle_error_rate: float | None = None

    def check(self, args: Any) -> None:
        check_bounds(self, at_least={"oracle_error_rate": 0}, at_most={"oracle_error_rate": 1})

    def model_name(self, args: Any) -> str:
        return f"phantom-oracle-{self.oracle_error_rate:g}-{args.seed}"

    def open(self, args: Any, candidates: "Dataset") -> Callable[[Mapping[str, Any]], list[int]]:
        return open_oracle(candidates, self.oracle_error_rate, args.seed)


LOCAL_JUDGES.register(OracleArguments)

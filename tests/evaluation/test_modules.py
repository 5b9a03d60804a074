# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that the `evaluate` modules load from a local path without a network and return what `score_vqa` returns."""

from pathlib import Path

import pytest

import medst_trl
from medst_trl.evaluation.scoring import score_vqa


evaluate = pytest.importorskip("evaluate")
MODULES = Path(medst_trl.__file__).parent / "evaluation" / "modules"
ROWS = [
    ("yes", "Yes, a nodule.", "CLOSED ", "PRES", "a"),
    ("no", "normal lungs", "closed", "PRES", "a"),
    ("left lower lobe", "left left lobe", "OPEN", "POS", "b"),
    ("2", "two", "open", "COUNT", "c"),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    # All modules share a directory: Python imports them from the first directory that contains their package.
    cache = str(tmp_path_factory.mktemp("evaluate"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache)
        yield lambda name: evaluate.load(str(MODULES / name), cache_dir=cache)


@pytest.mark.parametrize(
    ("variant", "kwargs"),
    [("strict", {}), ("llava_med", {}), ("llava_med", {"closed_rule": "substring"})],
)
def test_modules_return_what_score_vqa_returns(load, variant, kwargs):
    answers, predictions, answer_types, question_types, image_ids = map(list, zip(*ROWS))
    result = load(f"vqa_{variant}").compute(
        predictions=predictions,
        references=answers,
        answer_types=answer_types,
        question_types=question_types,
        image_ids=image_ids,
        bootstrap_samples=20,
        seed=3,
        **kwargs,
    )
    keys = ("answer", "prediction", "answer_type", "question_type", "image_id")
    records = [dict(zip(keys, row)) for row in ROWS]
    assert result == score_vqa(records, variant, bootstrap_samples=20, seed=3, **kwargs)


def test_batches_are_accumulated(load):
    metric = load("vqa_strict")
    for answer, prediction, answer_type, *_ in ROWS:
        metric.add_batch(predictions=[prediction], references=[answer], answer_types=[answer_type])
    result = metric.compute(bootstrap_samples=0)
    assert result["n"] == 4
    assert result["open"]["exact_match"]["value"] == 50

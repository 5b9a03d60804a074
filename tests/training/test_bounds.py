# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stages.dpo import DpoArguments
from medst_trl.pipeline.stages.sft import SftArguments
from medst_trl.training import bounds
from medst_trl.training.bounds import check_bounds
from medst_trl.training.dpo import MultimodalDPOConfig
from medst_trl.training.sft import SelfQuestioningConfig


def check(**changes):
    args = SftArguments("m", ["d"])
    training = SimpleNamespace(num_train_epochs=3, max_steps=-1, max_length=None, learning_rate=2e-4, sq_ratio=0.5)
    for name, value in changes.items():
        setattr(args if hasattr(args, name) else training, name, value)
    check_bounds(args, training)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_r": -4}, {"vision_lora_r": -1}, {"lora_dropout": 2.0}, {"lora_dropout": -0.1}, {"max_records": 0},
        {"max_length": 0}, {"max_length": -5}, {"sq_ratio": 1.5}, {"learning_rate": float("nan")},
        {"learning_rate": -1e-4}, {"learning_rate": float("inf")}, {"num_train_epochs": 0}, {"num_train_epochs": -1},
        {"dtype": "float8"}, {"vusr_role": "bogus"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_out_of_bounds_is_named(change):
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=name) as told:
        check(**change)
    assert str(value) in str(told.value)


def test_what_is_within_them_passes():
    check()
    check(lora_r=0, vision_lora_r=0, lora_dropout=0.0, sq_ratio=1.0, learning_rate=0.0, max_length=1, max_records=1)
    check(num_train_epochs=0, max_steps=5)


def test_every_bound_is_of_a_setting_that_there_is():
    known = [set(kind.__dataclass_fields__) for kind in (SftArguments, SelfQuestioningConfig)]
    known += [set(kind.__dataclass_fields__) for kind in (DpoArguments, MultimodalDPOConfig)]
    assert bounds._AT_LEAST.keys() | bounds._AT_MOST.keys() <= set().union(*known)

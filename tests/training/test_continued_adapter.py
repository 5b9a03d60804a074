# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Training goes on with the adapter there is: another shape is refused, the same one or none given passes."""

from dataclasses import dataclass, replace

import pytest
import tiny_dpo
import tiny_run
from peft import get_peft_model

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stages.sft import SftArguments
from medst_trl.policy.adapters import adapter_config
from medst_trl.training.continued_adapter import keep_shape


@dataclass
class Arguments:
    model_name_or_path: str = "runs/x/sft"
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    vision_lora_r: int = 32
    vision_lora_alpha: int = 64


def test_the_defaults_are_those_of_the_stage():
    own = {name: field.default for name, field in Arguments.__dataclass_fields__.items() if "lora" in name}
    assert own == {name: SftArguments.__dataclass_fields__[name].default for name in own}


def test_its_own_shape_is_kept_and_said():
    model, _ = tiny_dpo.adapter_policy()
    said = keep_shape(Arguments(), model)
    for own in ("own lora_r 8, vision_lora_r 4", " lora_alpha 16", " vision_lora_alpha 8", " lora_dropout 0.0."):
        assert own in said
    assert keep_shape(Arguments(lora_r=8, vision_lora_alpha=8, lora_dropout=0.0), model) == said


@pytest.mark.parametrize("other", [{"lora_r": 16}, {"vision_lora_r": 0}, {"lora_alpha": 8}, {"lora_dropout": 0.1}])
def test_another_shape_is_refused(other):
    model, _ = tiny_dpo.adapter_policy()
    (name, value), *_ = other.items()
    with pytest.raises(UserError, match=f"runs/x/sft is an adapter with {name} .*; {name} {value} would need a new"):
        keep_shape(replace(Arguments(), **other), model)


def test_a_projector_alone():
    model, _ = tiny_run.small_policy()
    model = get_peft_model(model, adapter_config(model, r=0, vision_r=0))
    assert keep_shape(Arguments(), model).endswith("lora_r 0, vision_lora_r 0.")
    with pytest.raises(UserError, match="lora_r 0, which"):
        keep_shape(Arguments(lora_r=8), model)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the numbers among a training stage's settings may be. Found out before anything is read or loaded."""

from math import inf
from typing import Any

from medst_trl.base.errors import UserError


_AT_LEAST = {
    "max_records": 1, "lora_r": 0, "vision_lora_r": 0, "lora_alpha": 1, "vision_lora_alpha": 1, "lora_dropout": 0,
    "early_stopping_patience": 1, "max_length": 1, "sq_ratio": 0, "question_loss_weight": 0, "learning_rate": 0,
    "vision_learning_rate": 0, "projector_learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
}  # fmt: skip
_AT_MOST = {"lora_dropout": 1, "sq_ratio": 1}


def check_bounds(args: Any, training_args: Any) -> None:
    """
    Args:
        args ([`SftArguments`] or [`DpoArguments`]): The stage's arguments.
        training_args ([`~transformers.TrainingArguments`]): Those of its trainer.

    Raises:
        UserError: for a number outside of its bounds, for training that would end before its first step, and for a
            `dtype` or `vusr_role` that there is not.
    """
    from medst_trl.policy.loading import DTYPES
    from medst_trl.policy.vusr import VUSR_ROLES

    for settings in (args, training_args):
        for name, least in _AT_LEAST.items():
            value, most = getattr(settings, name, None), _AT_MOST.get(name, inf)
            if value is not None and not (least <= value <= most and value < inf):  # NaN is within none
                upper = f" and at most {most}" if name in _AT_MOST else ""
                raise UserError(f"{name} is {value}; it has to be at least {least}{upper}.")
    epochs = getattr(training_args, "num_train_epochs", 1)
    if not 0 < epochs < inf and getattr(training_args, "max_steps", -1) <= 0:
        raise UserError(f"num_train_epochs is {epochs}; it has to be above 0 where max_steps is not set.")
    for name, known in {"dtype": DTYPES, "vusr_role": VUSR_ROLES}.items():
        value = getattr(args, name, None)
        if value is not None and value not in known:
            raise UserError(f"There is no {name} {value!r}; choose from {', '.join(known)}.")

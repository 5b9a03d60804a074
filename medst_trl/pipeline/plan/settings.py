# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The arguments a stage will get, made on a machine that may have none of the GPUs they are for."""

from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.pipeline.settings import parse


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Step

# TrainingArguments refuses these where there is no GPU, and imports DeepSpeed for the last.
_OF_THE_MACHINE = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "deepspeed")


def stage_arguments(step: "Step", on_gpu: bool = True) -> tuple[Any, ...]:
    """
    The dataclasses of a stage, filled and checked as the stage itself does before its work.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            A run of a stage.
        on_gpu (`bool`, *optional*, defaults to `True`):
            Whether it will run on GPUs, where bfloat16 is what training uses if nothing else is said.

    Raises:
        UserError: for what the stage would refuse.
    """
    parser = step.stage.make_parser(f"medst {step.stage.name}")
    trains = step.stage.trains
    settings = {key: value for key, value in step.settings.items() if not trains or key not in _OF_THE_MACHINE}
    arguments = parse(parser, settings | ({"bf16": False} if trains else {}), step.where)
    if trains:
        training = arguments[-1]
        training.fp16 = bool(step.settings.get("fp16"))
        asked = step.settings.get("bf16")
        training.bf16 = on_gpu and not training.fp16 if asked is None else bool(asked)
        if training.bf16 and training.fp16:
            raise UserError(f"{step.where}: bf16 and fp16 cannot both be true.")
    try:
        _check(step, arguments)
    except UserError as error:
        raise UserError(str(error) if step.where in str(error) else f"{step.where}: {error}") from None
    return arguments


def _check(step: "Step", arguments: tuple[Any, ...]) -> None:
    """What the stage looks at before it opens anything."""
    from medst_trl.hub.push import HubArguments, check_push

    if step.stage.check is not None:
        step.stage.check(*(item for item in arguments if not isinstance(item, HubArguments)))
    for settings in arguments:
        if getattr(settings, "push_to_hub", False):
            check_push(settings)

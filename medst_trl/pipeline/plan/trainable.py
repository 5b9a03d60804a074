# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a step trains, counted on the model itself without its weights.

The model is built from its configuration alone on torch's meta device, where tensors have a shape and no content, and
gets the adapter that the stage would give it. A 7B model takes a second and no memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.policy.parts import on_meta

from .meta import (
    NotKnownYet,
    adapter_config_of,
    asks_by_words,
    make_room_for_vusr,
    meta_model,
)
from .settings import stage_arguments


if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from medst_trl.pipeline.recipe import Step


@dataclass(frozen=True)
class Policy:
    """
    A model on the meta device as a step trains it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            `requires_grad` says what trains.
        base (`str`):
            Name or folder of the model under the adapter, or of the model itself.
        continues_adapter (`bool`):
            Whether the adapter was there before.
        text_role (`bool`):
            Whether it is told to ask by words, and no token is trained.
    """

    model: Any
    base: str
    continues_adapter: bool = False
    text_role: bool = False

    @property
    def base_model(self) -> "PreTrainedModel":
        """The model without PEFT around it; LoRA layers stay inside."""
        return self.model.get_base_model() if self.is_adapter else self.model

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")


@dataclass(frozen=True)
class Trained:
    """Parameters of one part that train in one way (`how`): `"LoRA r 128"`, `"in full"`, `"row of <vusr>"`."""

    part: str
    how: str
    count: int


def trainable_parameters(step: "Step", steps: Sequence["Step"] = ()) -> dict[str, int]:
    """
    Number of parameters that a step trains, by part, as its trainer counts them.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            A run of `sft` or `dpo`.
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`], *optional*):
            The recipe's steps, to find the model in a folder that one of them is still to write.

    Returns:
        `dict[str, int]`: `"language"`, `"vision"` and `"projector"` to their counts, as far as they train.
    """
    counts = {}
    for trained in trained_parameters(policy_of(step, steps)):
        counts[trained.part] = counts.get(trained.part, 0) + trained.count
    return counts


def trained_parameters(policy: Policy) -> list[Trained]:
    """What of a policy trains: by part, and how."""
    from medst_trl.policy.parts import model_parts

    parts, counts = model_parts(policy.base_model), {}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            key = parts.part_of(name), _how(name, policy, parameter)
            counts[key] = counts.get(key, 0) + parameter.numel()
    order = ["language", "vision", "projector"]
    items = sorted(counts.items(), key=lambda item: (order.index(item[0][0]), -item[1]))
    return [Trained(*key, count) for key, count in items]


def _how(name: str, policy: Policy, parameter: Any) -> str:
    if "trainable_tokens" in name:
        return "row of <vusr>"
    if ".lora_A." in name or ".lora_B." in name:
        return f"LoRA r {min(parameter.shape)}"
    return "in full"


def policy_of(step: "Step", steps: Sequence["Step"] = (), arguments: tuple[Any, ...] | None = None) -> Policy:
    """The model a training step trains, see [`trainable_parameters`], as its stage makes it."""
    from peft import get_peft_model
    from trl.trainer.utils import disable_dropout_in_model

    from medst_trl.pipeline.stages.training import keep_shape
    from medst_trl.policy.adapters import adapter_config, freeze_vision

    args, training = arguments or stage_arguments(step)
    policy = model_at(
        args.model_name_or_path, steps, training.trust_remote_code, base=getattr(args, "base_model_name_or_path", None)
    )
    vision_r = args.vision_lora_r if getattr(args, "train_vision", True) else 0
    if not policy.is_adapter and args.use_lora:
        config = adapter_config(
            policy.model,
            vusr_token_id=0 if _trains_token(args, policy) else None,  # any row is as large
            r=args.lora_r,
            lora_dropout=getattr(args, "lora_dropout", 0.0),
            vision_r=vision_r,
        )
        return Policy(get_peft_model(policy.model, config, low_cpu_mem_usage=True), policy.base)
    if policy.is_adapter and hasattr(args, "lora_dropout"):
        keep_shape(args, policy.model)
    if not policy.is_adapter and _trains_token(args, policy):
        make_room_for_vusr(policy.model, policy.base)
    if not getattr(args, "train_vision", True):
        freeze_vision(policy.model)
    if getattr(training, "disable_dropout", False):  # DPO does
        disable_dropout_in_model(policy.model)
    return policy


def _trains_token(args: Any, policy: Policy) -> bool:
    by_words = policy.text_role or getattr(args, "vusr_role", None) == "text"
    return getattr(args, "train_vusr", True) and not by_words


def model_at(
    name_or_path: str, steps: Sequence["Step"] = (), trust_remote_code: bool = False, base: str | None = None
) -> Policy:
    """
    The model or adapter in a folder or on the Hub, or that a step of the recipe will have put there.

    Raises:
        NotKnownYet: if it cannot be known before something has run, or not without the Hub.
    """
    if (config := adapter_config_of(name_or_path)) is not None:
        under = base or config.base_model_name_or_path
        return _adapted(model_at(under, steps, trust_remote_code), config)
    if Path(name_or_path, "config.json").is_file():
        return Policy(meta_model(name_or_path, trust_remote_code), name_or_path, text_role=asks_by_words(name_or_path))
    maker = next((step for step in steps if Path(step.settings["output_dir"]) == Path(name_or_path)), None)
    if maker is None:
        return Policy(meta_model(name_or_path, trust_remote_code), name_or_path)
    return _made_by(maker, steps)


def _made_by(step: "Step", steps: Sequence["Step"]) -> Policy:
    """What a step that has not run yet will leave in its folder."""
    if step.stage.trains:
        policy = policy_of(step, steps)
        if policy.is_adapter:
            policy.model.train()
            for name, parameter in policy.model.named_parameters():  # loaded again, all of an adapter trains
                parameter.requires_grad_(is_of_adapter(name))
        return Policy(policy.model, policy.base, continues_adapter=policy.is_adapter)
    output = step.stage.output("")
    if output is not None and output.merges:
        policy = model_at(step.settings[output.merges], steps)
        return Policy(policy.model.unload() if policy.is_adapter else policy.model, step.settings["output_dir"])
    if output is not None and output.config and (known := output.config(step.settings)) is not None:
        return Policy(on_meta(known[0]), step.settings["output_dir"], text_role=known[1])
    raise NotKnownYet(f"not known before {step.label} has run: {step.settings['output_dir']}")


def is_of_adapter(name: str) -> bool:
    return any(kind in name for kind in (".lora_A.", ".lora_B.", ".modules_to_save.", ".trainable_tokens_delta."))


def _adapted(under: Policy, config: "LoraConfig") -> Policy:
    """A base with an adapter on it, to be trained further."""
    from peft import get_peft_model

    config.inference_mode = False
    model = get_peft_model(under.model, config, low_cpu_mem_usage=True)
    return Policy(model, under.base, continues_adapter=True)

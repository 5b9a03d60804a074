# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a step trains, counted on the model itself without its weights.

The model is built from its configuration alone on torch's meta device, where tensors have a shape and no content, and
gets the adapter that the stage would give it. A 7B model takes a second and no memory.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import AutoTokenizer, PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from medst_trl.base.errors import UserError, located
from medst_trl.base.hub_ids import hub_answers, is_hub_id, split_revision
from medst_trl.pipeline.recipe import Step
from medst_trl.pipeline.stage import MODEL, Output
from medst_trl.pipeline.stages._training import new_adapter
from medst_trl.policy.adapters import freeze_vision, read_adapter_config
from medst_trl.policy.chat_template import VUSR, saved_role
from medst_trl.policy.families import add_embedding_row, base_of, on_meta
from medst_trl.policy.loading import read_model_config

from .steps import maker_of, stage_arguments


class NotKnownYet(UserError):
    """A configuration is not available: a step that makes it has not run, or the Hub cannot be reached."""


@dataclass(frozen=True)
class Policy:
    """
    A model on the meta device as a step trains it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. Its parameters with `requires_grad` are those that train.
        base (`str`):
            Name or directory of the model under the adapter, or of the model itself.
        continues_adapter (`bool`):
            Whether the adapter exists before the step.
        text_role (`bool`):
            Whether it asks with the text role `VUSER:`, so that no token is trained.
    """

    model: Any
    base: str
    continues_adapter: bool = False
    text_role: bool = False

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without PEFT's wrapper; LoRA layers stay inside."""
        return base_of(self.model)

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")


# The policy of a step


def policy_of(step: Step, steps: Sequence[Step] = (), arguments: tuple[Any, ...] | None = None) -> Policy:
    """
    The model that a step trains, as its stage makes it.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            A step that trains.
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`], *optional*):
            The recipe's steps, to find a model that one of them makes.
        arguments (`tuple`, *optional*):
            The dataclasses of its stage, if they exist already.

    Raises:
        NotKnownYet: as for [`model_at`].
    """
    args, training = arguments or stage_arguments(step)
    policy = model_at(args.model_name_or_path, steps, training.trust_remote_code, args.base_model_name_or_path)
    trains_token = args.train_vusr and not (policy.text_role or args.vusr_role == "text")
    with located(step.where):
        config = new_adapter(args, policy.model, 0 if trains_token else None)  # the row of any token has the same size
    if config is not None:
        return Policy(get_peft_model(policy.model, config, low_cpu_mem_usage=True), policy.base)
    if trains_token and not policy.is_adapter:
        with suppress(OSError, ValueError):  # no tokenizer, which alone can tell whether the vocabulary needs a row
            tokenizer = AutoTokenizer.from_pretrained(policy.base, local_files_only=not hub_answers())
            add_embedding_row(policy.model, tokenizer.get_vocab().get(VUSR, len(tokenizer)))
    if not args.train_vision:
        freeze_vision(policy.model)
    if getattr(training, "disable_dropout", False):  # DPO does
        disable_dropout_in_model(policy.model)
    return policy


def model_at(
    name_or_path: str, steps: Sequence[Step] = (), trust_remote_code: bool = False, base: str | None = None
) -> Policy:
    """
    The model or adapter in a directory or on the Hub, or the one that a step of the recipe will make.

    Raises:
        NotKnownYet: if it cannot be known before a step has run, or not without the Hub.
    """
    if not any(Path(name_or_path, name).is_file() for name in ("config.json", "adapter_config.json")):
        step, output = maker_of(name_or_path, steps)
        if output is not None and output.kind == MODEL:
            return _made_by(step, output, steps)
    name, hub = _find(name_or_path)
    if (config := read_adapter_config(name, **hub)) is not None:
        policy = model_at(base or config.base_model_name_or_path, steps, trust_remote_code)
        config.inference_mode = False  # it is trained further
        model = get_peft_model(policy.model, config, low_cpu_mem_usage=True)
        return Policy(model, policy.base, continues_adapter=True)
    template = Path(name_or_path, "chat_template.jinja")  # of a model with the text role, which trains no token
    text_role = template.is_file() and saved_role(template.read_text(encoding="utf-8")) == "text"
    return Policy(meta_model(name_or_path, trust_remote_code), name_or_path, text_role=text_role)


def _made_by(step: Step, output: Output, steps: Sequence[Step]) -> Policy:
    """The model that a step will make."""
    directory = str(Path(step.settings["output_dir"], output.directory))
    if step.stage.trains:
        policy = policy_of(step, steps)
        if policy.is_adapter:
            policy.model.train()
            for name, parameter in policy.model.named_parameters():  # loaded again, the whole adapter trains
                parameter.requires_grad_(is_of_adapter(name))
        return Policy(policy.model, policy.base, continues_adapter=policy.is_adapter)
    if output.merges:
        policy = model_at(step.settings[output.merges], steps)
        return Policy(policy.model.unload() if policy.is_adapter else policy.model, directory)
    if output.config and (known := output.config(step.settings)) is not None:
        return Policy(on_meta(known[0]), directory, text_role=known[1])
    raise NotKnownYet(f"not known before {step.label} has run: {directory}")


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of a PEFT model belongs to its adapter."""
    return any(kind in name for kind in (".lora_A.", ".lora_B.", ".modules_to_save.", ".trainable_tokens_delta."))


# Configurations


def meta_model(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    Build a vision-language model on the meta device from its configuration. No weights are read or downloaded.

    Args:
        name_or_path (`str`):
            Directory with a `config.json`, or Hub id (`org/name`, `org/name@revision`).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.

    Raises:
        UserError: if there is no configuration of a vision-language model, or it is not available offline.
    """
    name, hub = _find(name_or_path)
    try:
        config = read_model_config(name, trust_remote_code=trust_remote_code, **hub)
    except UserError as error:
        if hub["local_files_only"] and isinstance(error.__cause__, OSError):
            raise NotKnownYet(f"config not available offline: {name_or_path}") from None
        raise
    return on_meta(config, trust_remote_code=trust_remote_code)


def _find(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a model, and where to look for its files."""
    name, revision = split_revision(name_or_path)
    if not (Path(name).is_dir() or is_hub_id(name_or_path)):
        raise NotKnownYet(f"not on this machine: {name_or_path}")
    return name, {"revision": revision, "local_files_only": not Path(name).is_dir() and not hub_answers()}

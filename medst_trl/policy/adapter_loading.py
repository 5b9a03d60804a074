# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""An adapter put on its base, with what PEFT lets pass refused: parts that are missing, do not fit or go nowhere."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError

from .base_loading import DAMAGED, SHOWN


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"


def read_adapter_config(adapter: str, revision: str | None) -> "PeftConfig":
    """
    The configuration of an adapter.

    Raises:
        UserError: if it is damaged, of another kind than LoRA, or of the original code's training output.
    """
    from peft import LoraConfig, PeftConfig

    if Path(adapter, "non_lora_trainables.bin").is_file():
        raise UserError(
            f"{adapter!r} is a training output of the original LLaVA code. Convert it first: medst convert --source "
            f"{adapter} --base BASE --output_dir FOLDER, and give that folder."
        )
    try:
        config = PeftConfig.from_pretrained(adapter, revision=revision)
    except DAMAGED as error:
        raise UserError(
            f"adapter_config.json of the adapter {adapter!r} cannot be read ({type(error).__name__}: {error}). Copy "
            "or download it again."
        ) from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"The adapter {adapter!r} is not of LoRA but of the type {kind}, which cannot be used.")
    if not isinstance(config.base_model_name_or_path, str | None):
        raise UserError(f"The adapter {adapter!r} names {config.base_model_name_or_path!r} as its base, not a model.")
    return config


def put_adapter_on(
    model: "PreTrainedModel", adapter: str, config: "PeftConfig", *, revision: str | None, is_trainable: bool
) -> "PeftModel":
    """
    Loads an adapter into its base, every tensor of it.

    PEFT (0.21) only warns of LoRA weights that the file lacks, says nothing of those that have no place in the model,
    and raises errors of PyTorch's own about shapes.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Base, with the rows that the adapter's tokenizer needs.
        adapter (`str`):
            Folder or Hub id.
        config ([`~peft.PeftConfig`]):
            Its configuration.
        revision (`str`, *optional*):
            Hub revision.
        is_trainable (`bool`):
            Whether it is loaded for further training.

    Raises:
        UserError: naming the first tensors that do not fit, are missing or would be left over, and both bases.
    """
    from peft import PeftModel

    stored = _stored_keys(adapter, revision)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = PeftModel.from_pretrained(model, adapter, revision=revision, is_trainable=is_trainable)
    except (RuntimeError, *DAMAGED, re.error, UserWarning) as error:
        raise _does_not_fit(adapter, model, config, _problems(error)) from error
    unused = _unused(loaded, stored)
    if unused:
        raise _does_not_fit(adapter, model, config, [f"no place for {key}" for key in unused])
    return loaded


def _stored_keys(adapter: str, revision: str | None) -> list[str]:
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    try:
        with safe_open(cached_file(adapter, WEIGHTS, revision=revision), framework="numpy") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The adapter {adapter!r} has no readable {WEIGHTS} ({str(error).splitlines()[0]}). Weights are read from "
            "safetensors files only."
        ) from error


def _unused(model: "PeftModel", stored: list[str]) -> list[str]:
    """Stored keys that nothing was loaded from. Where only names differ (other versions'), PEFT has translated."""
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if len(stored) <= len(expected):
        return []
    known = expected.keys() | model.state_dict().keys()
    return [key for key in stored if key not in known]


def _problems(error: Exception) -> list[str]:
    text = str(error)
    if isinstance(error, KeyError):
        return [f"it lacks {error.args[0]}"]
    if isinstance(error, UserWarning):
        return [f"it lacks {key}" for key in re.findall(r"'([^']+)'", text.partition("checkpoint: ")[2])]
    return [" ".join(line.split()) for line in re.findall(r"size mismatch for .*", text)] or text.splitlines()[:1]


def _does_not_fit(adapter: str, model: "PreTrainedModel", config: "PeftConfig", problems: list[str]) -> UserError:
    shown = "".join(f"\n  {problem[:300]}" for problem in problems[:SHOWN])
    more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return UserError(
        f"The adapter {adapter!r} does not fit {model.name_or_path!r} (it names {config.base_model_name_or_path!r} as "
        f"its base):{shown}{more}\nGive the base it was trained on as base_model_name_or_path."
    )

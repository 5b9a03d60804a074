# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
One LoRA adapter for everything that stage 1 trains: language model, vision tower, projector and `<vusr>` embedding.

PEFT does the adapting. This file chooses the modules, loads an adapter without losing a tensor, and keeps trained
weights in full precision.
"""

import re
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES  # PEFT's own name for an adapter without LoRA layers
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from medst_trl.base.errors import UserError

from .parts import model_parts


WEIGHTS = "adapter_model.safetensors"
MAX_TENSORS = 3  # tensors in a message
# What the libraries raise on files that are damaged, or valid JSON of something else.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError)


def adapter_config(
    model: PreTrainedModel,
    *,
    vusr_token_id: int | None = None,
    r: int = 128,
    lora_alpha: int = 256,
    lora_dropout: float = 0.05,
    vision_r: int = 32,
    vision_lora_alpha: int = 64,
) -> LoraConfig:
    """
    Return the LoRA configuration of STLLaVA-Med (https://huggingface.co/papers/2406.19973) for a model of any family.

    One adapter holds LoRA on every linear layer of the language model and of the vision tower (at its own rank), the
    whole projector, and the input embedding of `<vusr>`. Vision layers whose output is not read have no LoRA: LLaVA
    reads the last but one, so the last would never receive a gradient (trl#1936).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language model to adapt.
        vusr_token_id (`int`, *optional*):
            Token id of `<vusr>`, as [`add_vusr`] returns it. `None` trains no token.
        r (`int`, *optional*, defaults to `128`):
            Rank in the language model; `0` freezes it. With `vision_r=0` and no `vusr_token_id` only the projector
            trains, as in LLaVA's alignment step.
        lora_alpha (`int`, *optional*, defaults to `256`):
            Scale in the language model.
        lora_dropout (`float`, *optional*, defaults to `0.05`):
            Dropout before every LoRA layer.
        vision_r (`int`, *optional*, defaults to `32`):
            Rank in the vision tower; `0` freezes it.
        vision_lora_alpha (`int`, *optional*, defaults to `64`):
            Scale in the vision tower.

    Returns:
        [`~peft.LoraConfig`]

    Example:
    ```python
    >>> model, processor = load_policy("llava-hf/llava-1.5-7b-hf")
    >>> config = adapter_config(model, vusr_token_id=add_vusr(processor))
    ```
    """
    parts = model_parts(model)
    towers = ([parts.language_model] if r else []) + ([parts.vision_tower] if vision_r else [])
    targets = _linear_layers(model, towers, parts.projectors) if towers else DUMMY_TARGET_MODULES
    vision = rf"{re.escape(parts.vision_tower)}\..*"
    unused = [rf"{vision}layers?\.{layer}\..*" for layer in parts.unused_vision_layers if vision_r]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r or vision_r or 1,  # PEFT refuses 0; if it is 0, no layer uses this value
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        exclude_modules="|".join(unused) or None,
        rank_pattern={vision: vision_r} if vision_r else {},
        alpha_pattern={vision: vision_lora_alpha} if vision_r else {},
        modules_to_save=list(parts.projectors),
        trainable_token_indices=None if vusr_token_id is None else {parts.embedding: [vusr_token_id]},
    )


def _linear_layers(model: PreTrainedModel, towers: list[str], projectors: tuple[str, ...]) -> str:
    """
    Return a regular expression that matches the names of the linear layers in `towers`, for any layer number.

    Only layers in a numbered stack count: SigLIP's pooling head is outside it, and no language model reads its output.
    """
    names = {
        re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and re.search(r"\.\d+\.", name)
        and any(name.startswith(f"{tower}.") for tower in towers)
        and not any(f"{name}.".startswith(f"{projector}.") for projector in projectors)
    }
    return "|".join(sorted(names))


def train_in_full_precision(model: PeftModel) -> None:
    """
    Convert every trained weight of an adapter to float32, in place, whatever the type of the base model.

    PEFT does so for LoRA weights and token rows but not for modules trained in full: a projector in bfloat16 hardly
    moves at a learning rate of 2e-5, because most steps are smaller than the distance to the next bfloat16 number. Its
    inputs are cast, so that it also runs outside of autocast.

    Args:
        model ([`~peft.PeftModel`]):
            Model to train.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()

    def cast_inputs(module, args):
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                module.register_forward_pre_hook(cast_inputs)


def freeze_vision(model: PreTrainedModel | PeftModel) -> None:
    """Freeze the vision tower, including an adapter's weights in it, in place."""
    parts = model_parts(model)
    for name, parameter in model.named_parameters():
        if parts.part_of(name) == "vision":
            parameter.requires_grad_(False)


def retie_lm_head(model: PeftModel) -> None:
    """
    Give the output layer of a model with tied embeddings and a trained token a `bias`, in place.

    PEFT (0.21) wraps the output layer too, and its `TrainableTokensWrapper` passes on `weight` but not `bias`, which
    TRL's fused LM head reads. To be removed once PEFT passes `bias` on.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and not hasattr(head, "bias"):
        head.bias = getattr(head.original_module, "bias", None)


def read_adapter_config(adapter: str, revision: str | None) -> PeftConfig:
    """
    Read the configuration of an adapter.

    Raises:
        UserError: if it is damaged, not of LoRA, or a training output of the original code.
    """
    if Path(adapter, "non_lora_trainables.bin").is_file():
        raise UserError(
            f"{adapter!r} is a training output of the original LLaVA code. Convert it first: medst convert --source "
            f"{adapter} --base BASE --output_dir DIRECTORY, and use that directory."
        )
    try:
        config = PeftConfig.from_pretrained(adapter, revision=revision)
    except LOADING_ERRORS as error:
        raise UserError(
            f"adapter_config.json of the adapter {adapter!r} cannot be read ({type(error).__name__}: {error}). Copy "
            "or download it again."
        ) from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"The adapter {adapter!r} is not a LoRA adapter but of the type {kind}, which cannot be used.")
    if not isinstance(config.base_model_name_or_path, str | None):
        raise UserError(f"The adapter {adapter!r} names {config.base_model_name_or_path!r} as its base, not a model.")
    return config


def load_adapter(
    model: PreTrainedModel, adapter: str, config: PeftConfig, *, revision: str | None, is_trainable: bool
) -> PeftModel:
    """
    Load an adapter on its base, and check that every tensor of it is used.

    PEFT (0.21) only warns of LoRA weights that the file lacks, does not mention those that have no place in the model,
    and passes on PyTorch's own errors about shapes.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Base model, with the embedding rows that the adapter's tokenizer needs.
        adapter (`str`):
            Directory or Hub id.
        config ([`~peft.PeftConfig`]):
            Its configuration.
        revision (`str`, *optional*):
            Hub revision.
        is_trainable (`bool`):
            Whether it is loaded for further training.

    Raises:
        UserError: naming both bases and the first tensors that do not fit, are missing or have no place.
    """
    stored = _stored_keys(adapter, revision)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = PeftModel.from_pretrained(model, adapter, revision=revision, is_trainable=is_trainable)
    except (RuntimeError, *LOADING_ERRORS, re.error, UserWarning) as error:
        raise _does_not_fit(adapter, model, config, _problems(error)) from error
    if unused := _unused(loaded, stored):
        raise _does_not_fit(adapter, model, config, [f"the model has no place for {key}" for key in unused])
    return loaded


def _stored_keys(adapter: str, revision: str | None) -> list[str]:
    try:
        with safe_open(cached_file(adapter, WEIGHTS, revision=revision), framework="numpy") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The adapter {adapter!r} has no readable {WEIGHTS} ({str(error).splitlines()[0]}). Weights are read from "
            "safetensors files only."
        ) from error


def _unused(model: PeftModel, stored: list[str]) -> list[str]:
    """Return the stored keys from which nothing was loaded. PEFT translates names of other versions."""
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


def _does_not_fit(adapter: str, model: PreTrainedModel, config: PeftConfig, problems: list[str]) -> UserError:
    shown = "".join(f"\n  {problem[:300]}" for problem in problems[:MAX_TENSORS])
    more = f"\n  ... and {len(problems) - MAX_TENSORS} more" if len(problems) > MAX_TENSORS else ""
    return UserError(
        f"The adapter {adapter!r} does not fit {model.name_or_path!r} (it names {config.base_model_name_or_path!r} as "
        f"its base):{shown}{more}\nPass the model it was trained on as base_model_name_or_path."
    )

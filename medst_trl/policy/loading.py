# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a policy: base model, adapter, processor, `<vusr>` token and chat template, from directories or the Hub."""

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.utils.quantization_config import BitsAndBytesConfig

from medst_trl.base.errors import UserError, located, number_of
from medst_trl.base.hub_ids import check_reachable, split_revision
from medst_trl.base.settings import check_choice

from . import DTYPES
from .adapters import LOADING_ERRORS, find_model_file, hub_commit, load_adapter, read_adapter_config
from .families import add_embedding_row, check_family, model_parts, on_meta
from .image_tokens import fit_processor
from .vusr import add_vusr, set_vusr_role, stop_token_ids


# Keys of config.json in the original code's layout, which transformers does not read.
_ORIGINAL = ("mm_projector_type", "mm_vision_tower")


def load_policy(
    model_name_or_path: str,
    *,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    is_trainable: bool = False,
    vusr_role: str | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Load a policy and its processor, ready to answer, to ask (`<vusr>`) and to be trained.

    The processor gets the `<vusr>` token and the template that leaves a bare `<vusr>` turn open. The model gets an
    embedding row for the token if its vocabulary has none to spare, and stops at the template's turn terminators.

    Args:
        model_name_or_path (`str`):
            Directory or Hub id (`org/name`, `org/name@revision`) of a vision-language model, or of an adapter of one.
        base_model_name_or_path (`str`, *optional*):
            Base of an adapter, if it is no longer where the adapter's configuration says.
        revision (`str`, *optional*):
            Hub revision of `model_name_or_path`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Type of the weights; `"auto"` keeps that of the checkpoint.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether an adapter is loaded for further training.
        vusr_role (`str`, *optional*):
            `"text"` opens the turns that the model writes with the text role `VUSER:` of SQ-LLaVA and STLLaVA-Med
            instead of the token, for models with Vicuna's chat format; see [`set_vusr_role`]. A saved policy keeps its
            role in its chat template.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the frozen language model is held in 4 bits, see [`four_bit_config`].
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.
        **model_kwargs:
            Further arguments of `from_pretrained`, such as `attn_implementation`, `device_map`, `quantization_config`.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: The model (a [`~peft.PeftModel`] for an adapter), in evaluation mode,
        and its processor.

    Raises:
        UserError: if nothing can be loaded, the processor cannot be used (see [`add_vusr`]), or an adapter belongs to
            another base.

    Example:
    ```python
    >>> model, processor = load_policy("runs/demo/sft")
    ```
    """
    check_choice("dtype", dtype if isinstance(dtype, str) else None, DTYPES)
    name, named_revision = split_revision(model_name_or_path)
    revision = revision or named_revision
    processor, base, base_kwargs, adapter = load_processor(name, base_model_name_or_path, revision, trust_remote_code)
    set_vusr_role(processor, vusr_role)
    if load_in_4bit:
        model_kwargs["quantization_config"] = four_bit_config(base, dtype, **base_kwargs)
    model = _load_base(base, dtype, model_kwargs | base_kwargs)
    prepare_policy(model, processor)
    if adapter is not None:
        tokens = len(processor.tokenizer) - (add_vusr(processor) is not None)
        model = load_adapter(model, name, adapter, revision=revision, is_trainable=is_trainable, tokens=tokens)
    return model.eval(), processor


def load_processor(
    model_name_or_path: str, base_model_name_or_path: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[ProcessorMixin, str, dict[str, Any], PeftConfig | None]:
    """
    Do what [`load_policy`] does before it reads weights, with the same arguments.

    Returns:
        `tuple`: the processor without `<vusr>`, the name of the model (an adapter's base), the arguments of
        `from_pretrained` for it, and the adapter's configuration, if it is one.

    Raises:
        UserError: if the processor or its model cannot be used.
    """
    kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
    adapter = read_adapter_config(model_name_or_path, revision)
    if adapter is None:
        config = read_model_config(model_name_or_path, **kwargs)
        processor = _load_processor(model_name_or_path, kwargs)
        fit_processor(processor, config, model_name_or_path)
        return processor, model_name_or_path, kwargs, None
    base, base_revision = split_revision(base_model_name_or_path or adapter.base_model_name_or_path or "")
    if not base:
        raise UserError(f"The adapter {model_name_or_path!r} names no base model. Pass base_model_name_or_path.")
    base_kwargs = kwargs | {"revision": base_revision or (None if base_model_name_or_path else adapter.revision)}
    with located(f"The base of the adapter {model_name_or_path!r} (pass base_model_name_or_path if it has moved)"):
        check_reachable(base)
        config = read_model_config(base, **base_kwargs)
    files = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    tokenizer, *settings = (
        find_model_file(model_name_or_path, file, revision, local_files_only=False) for file in files
    )
    if tokenizer and any(settings):
        source, processor = model_name_or_path, _load_processor(model_name_or_path, kwargs)
    else:
        source, processor = base, _load_processor(base, base_kwargs)
        if tokenizer:  # other tools save an adapter with a tokenizer alone
            processor.tokenizer = _load_processor(model_name_or_path, kwargs, AutoTokenizer)
    fit_processor(processor, config, source)
    return processor, base, base_kwargs, adapter


def read_model_config(name_or_path: str, *, trust_remote_code: bool, **hub: Any) -> PreTrainedConfig:
    """
    Read the configuration of a model, and check that it can be trained as a policy.

    Args:
        name_or_path (`str`):
            Directory or Hub id.
        trust_remote_code (`bool`):
            Whether code from the model's repository may run.
        **hub:
            `revision` and `local_files_only` of `from_pretrained`.

    Raises:
        UserError: if it cannot be read, is in the original layout, or as [`check_family`].
    """
    try:
        content, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
        if any(content.get(key) for key in _ORIGINAL):
            raise UserError(
                f"{name_or_path!r} is in the layout of the original LLaVA code. Convert it first: medst convert "
                f"--source {name_or_path} --output_dir DIRECTORY, and use that directory."
            )
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub)
    except LOADING_ERRORS as error:
        raise _not_loaded("configuration", name_or_path, error) from error
    check_family(config, name_or_path, remote_code=trust_remote_code)
    return config


def _not_loaded(what: str, name_or_path: str, error: Exception) -> UserError:
    kind = "" if Path(name_or_path).is_dir() else ", which is not a directory here"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(f"No {what} could be loaded from {name_or_path!r}{kind}: {reason}")


def _load_processor(name_or_path: str, kwargs: dict[str, Any], auto_class: type = AutoProcessor) -> Any:
    try:
        return auto_class.from_pretrained(name_or_path, **kwargs)
    except (*LOADING_ERRORS, ImportError) as error:
        raise _not_loaded("processor", name_or_path, error) from error


def _load_base(base: str, dtype: str | torch.dtype, kwargs: dict[str, Any]) -> PreTrainedModel:
    """
    Load a model without an adapter, and check that no weight was missing: transformers initializes those at random and
    only logs it.
    """
    if (generation := _read_generation_config(base, kwargs["revision"])) is not None:
        kwargs = kwargs | {"generation_config": generation}
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            base, dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except (*LOADING_ERRORS, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loaded("vision-language model", base, error) from error
    if missing := sorted(report["missing_keys"]):
        lacking = f"{number_of(len(missing), 'weight')} such as {missing[0]}"
        raise UserError(f"{base!r} is incomplete: its files lack {lacking}. Download it again.")
    # transformers 5 no longer keeps it, and the base of an adapter has to be found again.
    model.hub_commit = hub_commit(base, "config.json", kwargs["revision"])
    return model


def four_bit_config(name_or_path: str, dtype: str | torch.dtype, **kwargs: Any) -> BitsAndBytesConfig:
    """
    Configure QLoRA (https://huggingface.co/papers/2305.14314): NF4 with double quantization for the linear layers of
    the language model only.

    The vision tower is small in comparison, and its errors affect everything said about an image. The projector is
    trained in full, which 4-bit weights cannot be, and the output layer counts in every softmax.

    Args:
        name_or_path (`str`): Directory or Hub id of a vision-language model.
        dtype (`str` or `torch.dtype`): Type to compute in; `"auto"` for bfloat16.
        **kwargs: `revision`, `trust_remote_code`, as for `from_pretrained`.
    """
    model = on_meta(AutoConfig.from_pretrained(name_or_path, **kwargs))
    language_model = f"{model_parts(model).language_model}."
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        llm_int8_skip_modules=[name for name in linear if not name.startswith(language_model)],
    )


def prepare_policy(model: PreTrainedModel, processor: ProcessorMixin) -> PreTrainedModel:
    """
    Add the `<vusr>` token to a loaded model and its processor, in place. [`load_policy`] and the trainers call it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.

    Returns:
        [`~transformers.PreTrainedModel`]: The same model.
    """
    vusr_token_id = add_vusr(processor)
    _prepare_generation_config(model, processor, vusr_token_id)
    if vusr_token_id is not None:  # the text role needs none
        add_embedding_row(model, vusr_token_id)
    return model


# --- Generation settings ---------------------------------------------------------------------------------------------

# Texts are written by our own settings, so that results depend on nothing else: of a model's `generation_config.json`,
# only `USED_SETTINGS` count. A loaded policy keeps those, and its sampling settings for tools that load a saved model.

# Which tokens or strings end a text, and which tokens never appear in one.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "bad_words_ids", "sequence_bias")
USED_SETTINGS = (*TOKENS, "stop_strings")
# Each stage has settings for the first four. transformers saves the others only beside `do_sample`.
_SAMPLING = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


def _read_generation_config(name_or_path: str, revision: str | None) -> GenerationConfig | None:
    """Read what is used of a model's generation settings; `None` without a file, a `UserError` for a damaged one."""
    path = find_model_file(name_or_path, "generation_config.json", revision, local_files_only=False)
    try:
        return None if path is None else _reduced(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"generation_config.json of {name_or_path!r} cannot be used ({error}). Correct or remove the file."
        ) from error


def _prepare_generation_config(model: PreTrainedModel, processor: ProcessorMixin, vusr_token_id: int | None) -> None:
    """Reduce a model's generation config to what is used or can always be saved, and add the tokens of its policy."""
    config = model.generation_config = _reduced(vars(model.generation_config))
    config.eos_token_id = list(dict.fromkeys([*(config.eos_token_id or ()), *stop_token_ids(processor)]))
    if config.pad_token_id is None:
        config.pad_token_id = processor.tokenizer.pad_token_id
    # `<vusr>` is read and never written.
    config.suppress_tokens = sorted({*(config.suppress_tokens or ()), vusr_token_id} - {None}) or None


def _reduced(settings: Mapping[str, Any]) -> GenerationConfig:
    """Return a config of the settings that are used or can always be saved."""
    names = (*USED_SETTINGS, *_SAMPLING, "repetition_penalty")
    kept = {name: value for name in names if (value := settings.get(name)) not in (None, [], "", [""])}
    for name in {"eos_token_id", "suppress_tokens", "stop_strings"} & kept.keys():
        if not isinstance(kept[name], list):
            kept[name] = [kept[name]]
    for name in {"eos_token_id", "suppress_tokens"} & kept.keys():
        kept[name] = [operator.index(token) for token in kept[name]]  # raises for anything but an integer
    if operator.index(kept.get("pad_token_id", 0)) < 0:  # the original Llama's is -1
        del kept["pad_token_id"]
    neutral = GenerationConfig._get_default_generation_params()
    effective = {name for name in _SAMPLING[1:] if kept.get(name, neutral.get(name)) != neutral.get(name)}
    if kept.get("do_sample") is False or kept.get("temperature") == 0:
        kept = {name: value for name, value in kept.items() if name not in effective}
    elif effective:
        kept["do_sample"] = True
    return GenerationConfig(**kept)

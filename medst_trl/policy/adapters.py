# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
One LoRA adapter for everything that stage 1 trains: language model, vision tower, projector and `<vusr>` embedding.

PEFT does the adapting. This file chooses the modules, loads an adapter without losing a tensor, and keeps trained
weights in full precision.

It also saves a fingerprint of the base's weights beside an adapter, and compares it when the adapter is loaded. An
adapter on another base of the same shapes runs, but generates nonsense. Its configuration knows the base only by name:
directories are rebuilt, Hub repositories get other weights, and a base that has moved is named by hand.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES  # PEFT's own name for an adapter without LoRA layers
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_object, write_json
from medst_trl.base.hub_ids import check_reachable

from .families import add_embedding_row, model_parts


WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base_model.json"
# Computed or shared tensors, which some versions of transformers store and others leave out.
_NOT_ALWAYS_STORED = ("inv_freq", "lm_head.weight")
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
    targets = _linear_layers(model, towers) if towers else DUMMY_TARGET_MODULES
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


def _linear_layers(model: PreTrainedModel, towers: list[str]) -> str:
    """
    Return a regular expression that matches the names of the linear layers in `towers`, for any layer number.

    Only layers in a numbered stack count: SigLIP's pooling head is outside it, and no language model reads its output.
    PEFT leaves out those of a projector, which is trained in full.
    """
    names = {
        re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and re.search(r"\.\d+\.", name)
        and any(name.startswith(f"{tower}.") for tower in towers)
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


def read_adapter_config(adapter: str, revision: str | None, local_files_only: bool = False) -> PeftConfig | None:
    """
    Read the configuration of an adapter; `None` for a model without one, or one that is not here with
    `local_files_only`.

    Raises:
        UserError: if the model is neither here nor on a Hub that answers, or if the configuration is damaged, not of
            LoRA, or a training output of the original code.
    """
    if not local_files_only:
        check_reachable(adapter)
    may_lack = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    hub = {"revision": revision, "local_files_only": local_files_only}
    try:
        found = cached_file(adapter, "adapter_config.json", **hub, **may_lack)
    except OSError as error:
        raise UserError(f"{adapter!r} is neither a directory nor a model on the Hub: {error}") from error
    if found is None:
        return None
    if Path(adapter, "non_lora_trainables.bin").is_file():
        raise UserError(
            f"{adapter!r} is a training output of the original LLaVA code. Convert it first: medst convert --source "
            f"{adapter} --base BASE --output_dir DIRECTORY, and use that directory."
        )
    try:
        config = PeftConfig.from_pretrained(adapter, **hub)
    except LOADING_ERRORS as error:
        raise UserError(
            f"adapter_config.json of the adapter {adapter!r} cannot be read ({type(error).__name__}: {error}). Copy "
            "or download it again."
        ) from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"The adapter {adapter!r} is not a LoRA adapter but of the type {kind}, which cannot be used.")
    config.base_model_name_or_path = base_of_adapter(adapter, config.base_model_name_or_path)
    return config


def load_adapter(
    model: PreTrainedModel, adapter: str, config: PeftConfig, *, revision: str | None, is_trainable: bool, tokens: int
) -> PeftModel:
    """
    Load an adapter on its base, and check that every tensor of it is used and that the base has the weights that the
    adapter was trained on, if its fingerprint is known.

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
        tokens (`int`):
            Number of tokens without `<vusr>`. An adapter that trains embedding or output layer must have their rows.

    Raises:
        UserError: naming both bases and the first tensors that do not fit, are missing or have no place, or if the
            fingerprints of the base's weights are known and differ.
    """
    stored, cause = _stored_shapes(adapter, revision), None
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in layers}
    rows = [max(shape) for key, shape in stored.items() if names.intersection(key.split("."))]
    add_embedding_row(model, max(rows, default=0) - 1)  # its vocabulary may be larger
    try:
        with warnings.catch_warnings(), _extend_rows(model, tokens):
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = PeftModel.from_pretrained(model, adapter, revision=revision, is_trainable=is_trainable)
        problems = [f"the model has no place for {key}" for key in _unused(loaded, stored)]
    except (RuntimeError, *LOADING_ERRORS, re.error, UserWarning) as error:
        cause, problems = error, _problems(error)
    if problems:
        shown = "".join(f"\n  {problem[:300]}" for problem in problems[:3])
        raise UserError(
            f"The adapter {adapter!r} does not fit {model.name_or_path!r} (it names "
            f"{config.base_model_name_or_path!r} as its base):{shown}\nPass the model it was trained on as "
            "base_model_name_or_path."
        ) from cause
    _check_base(adapter, revision, model, config.base_model_name_or_path)
    retie_lm_head(loaded)
    return loaded


def _extend_rows(model: PreTrainedModel, tokens: int) -> RemovableHandle:
    """
    Extend weights with fewer rows than the embedding when they are loaded into a model, if they have a row for each of
    the first `tokens` tokens. Adapters of other tools have none for `<vusr>` and for rows that pad the vocabulary. New
    rows are initialized with the mean row, as in [`add_embedding_row`].
    """
    rows = model.get_input_embeddings().num_embeddings

    def extend(module, state, prefix, *args):
        shapes = {prefix + name: tensor.shape for name, tensor in module.state_dict().items()}
        for key, tensor in list(state.items()):
            for dim, (size, needed) in enumerate(zip(tensor.shape, shapes.get(key, ()))):
                if needed == rows and tokens <= size < rows:
                    mean = tensor.float().mean(dim, keepdim=True).to(tensor.dtype)
                    state[key] = torch.cat([tensor, mean.repeat_interleave(rows - size, dim)], dim)

    return model.register_load_state_dict_pre_hook(extend)


def _stored_shapes(adapter: str, revision: str | None) -> dict[str, list[int]]:
    try:
        with safe_open(cached_file(adapter, WEIGHTS, revision=revision), framework="numpy") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no dictionary)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The adapter {adapter!r} has no readable {WEIGHTS} ({str(error).splitlines()[0]}). Weights are read from "
            "safetensors files only."
        ) from error


def _unused(model: PeftModel, stored: Collection[str]) -> list[str]:
    """Return the stored keys from which nothing was loaded. PEFT translates names of other versions."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if len(stored) <= len(expected):
        return []
    known = expected.keys() | model.state_dict().keys()
    return [key for key in stored if key not in known]


def _problems(error: Exception) -> list[str]:
    """What an error of PEFT says, in at least one line."""
    text = str(error) or type(error).__name__
    lacking = [f"it lacks {key}" for key in re.findall(r"'(base_model\.[^']+)'", text)]
    return lacking or re.findall("size mismatch for .*", text) or text.splitlines()[:1]


# --- Fingerprint of the base -----------------------------------------------------------------------------------------


def weights_fingerprint(name_or_path: str, revision: str | None = None) -> str | None:
    """
    Hash the middle row of every matrix of a checkpoint, and every vector, read from its safetensors files.

    Rows are hashed as bfloat16, so that the same weights in float32 or bfloat16, in one file or many, have one
    fingerprint. It takes 700 short reads for a model of 7B; nothing is downloaded.

    Args:
        name_or_path (`str`):
            Directory, or Hub id of a model in the local cache.
        revision (`str`, *optional*):
            Hub revision.

    Returns:
        `str` or `None`: SHA-256; `None` without safetensors files or for quantized weights.
    """
    config = find_model_file(name_or_path, "config.json", revision) if name_or_path else None  # "": built in memory
    if config is None or "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        return None
    names, index = {"model.safetensors"}, config.with_name("model.safetensors.index.json")
    if index.is_file() and not config.with_name("model.safetensors").is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [config.with_name(name) for name in names]
    if not all(file.is_file() for file in files):
        return None
    rows = {name: row for file in files for name, row in _middle_rows(file)}
    return hashlib.sha256(b"".join(f"{name}\0".encode() + rows[name] for name in sorted(rows))).hexdigest()


def base_of_adapter(adapter: str | os.PathLike, named: str | None) -> str | None:
    """
    Return the base model that an adapter's configuration names.

    A relative path is relative to the working directory of the training. If the current one has no such path, the
    directories above the adapter are searched. `named` may also be a Hub id, so a directory is accepted only if its
    weights have the fingerprint that the training stored beside the adapter.

    Args:
        adapter (`str` or `os.PathLike`):
            Directory or Hub id.
        named (`str`, *optional*):
            Name of the base in its configuration.

    Returns:
        `str` or `None`: The path of the directory that was found; `named` if none was.
    """
    if not named or os.path.exists(named) or not os.path.isdir(adapter):
        return named
    recorded = _recorded(str(adapter), None)
    for parent in Path(os.path.abspath(adapter)).parents if recorded else ():
        base = parent / named
        with suppress(*LOADING_ERRORS, SafetensorError):  # something else of that name
            if (base / "config.json").is_file() and weights_fingerprint(str(base)) == recorded:
                return str(base)
    return named


def hub_commit(name_or_path: str, name: str, revision: str | None) -> str | None:
    """Return the commit of a file in the local Hub cache; `None` for a directory."""
    path = None if Path(name_or_path).is_dir() else find_model_file(name_or_path, name, revision)
    return extract_commit_hash(str(path), None) if path else None


def write_base_file(model: PreTrainedModel | PeftModel, directory: str | Path) -> None:
    """Write the fingerprint of an adapter's base beside the adapter. A model without an adapter gets no file."""
    if not hasattr(model, "peft_config"):
        return
    base = model.get_base_model()
    # The path it was loaded from: the adapter's own configuration may name the one before the base moved.
    fingerprint = weights_fingerprint(base.name_or_path, getattr(base, "hub_commit", None))
    if fingerprint is not None:
        content = {"model_type": base.config.model_type, "weights_sha256": fingerprint}
        write_json(Path(directory, BASE_FILE), content)


def _check_base(adapter: str, revision: str | None, base: PreTrainedModel, named: str | None) -> None:
    recorded = _recorded(adapter, revision)
    found = weights_fingerprint(base.name_or_path, getattr(base, "hub_commit", None)) if recorded else None
    if found not in (None, recorded):
        raise UserError(
            f"The adapter {adapter!r} was trained on other weights than those of {base.name_or_path!r} (fingerprints "
            f"{recorded[:12]} and {found[:12]}), although their shapes agree. Its base is called {named!r}: pass "
            "exactly that model as base_model_name_or_path, or train the adapter again. To use the two together "
            f"anyway, delete {BASE_FILE} beside the adapter."
        )


def _recorded(adapter: str, revision: str | None) -> str | None:
    path = find_model_file(adapter, BASE_FILE, revision, local_files_only=False)  # nothing else has downloaded it
    fingerprint = read_object(path).get("weights_sha256") if path else None  # a damaged file counts as missing
    return fingerprint if isinstance(fingerprint, str) else None


def find_model_file(name_or_path: str, name: str, revision: str | None, local_files_only: bool = True) -> Path | None:
    """Find a file of a directory, of the local Hub cache, or of the Hub; `None` if there is none."""
    try:
        found = cached_file(name_or_path, name, revision=revision, local_files_only=local_files_only)
    except OSError:
        return None
    return Path(found) if found else None


def _middle_rows(file: Path):
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no dictionary)
            if name.endswith(_NOT_ALWAYS_STORED):
                continue
            stored = tensors.get_slice(name)
            shape = stored.get_shape()
            row = stored[shape[0] // 2 : shape[0] // 2 + 1] if len(shape) > 1 else tensors.get_tensor(name)
            if row.is_floating_point():  # only some versions store the indices of positions
                numbers = row.to(torch.bfloat16).contiguous().view(torch.int16)
                yield name, f"{shape}\0".encode() + numbers.numpy().tobytes()

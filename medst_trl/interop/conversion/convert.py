# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole of a conversion: what there is, whether it fits, the processor, the files."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.policy.families import family_of
from medst_trl.policy.merging import check_shard_size
from medst_trl.policy.vusr import VUSR_ROLES

from .assembling import EMBEDDING, HEAD, Parts, model_on_meta
from .model_config import llava_config, vision_config
from .names import VISION
from .processor import build_processor
from .reading import VISION_LORA, Checkpoint, open_checkpoint, original_config
from .sources import local_folder
from .tokenizer import IMAGE, read_tokenizer
from .writing import staging_folder, write_weights


if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

ROWS_MULTIPLE = 64  # of the embedding, for fast kernels and for tokens to come


@dataclass(frozen=True)
class Converted:
    """
    What a conversion wrote.

    Args:
        model_type (`str`): `"llava"` or `"prototype_llava"`.
        vusr_role (`str`): `"token"` or `"text"`.
        parameters (`int`): Parameters of the model.
        changed (`int`): Weights that LoRA layers were merged into.
        changed_in_vision (`int`): How many of them are the vision tower's.
        left_out (`list[str]`): Names of the tensors that nothing is lost without.
        dtype (`str`): Type of the weights.
    """

    model_type: str
    vusr_role: str
    parameters: int
    changed: int
    changed_in_vision: int
    left_out: list[str]
    dtype: str


def convert_checkpoint(
    source: str,
    output_dir: str | Path,
    *,
    base: str | None = None,
    projector: str | None = None,
    vision_tower: str | None = None,
    vision_lora: str | None = None,
    vusr_role: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
) -> Converted:
    """
    Writes a checkpoint of the original LLaVA code, or of one built on it, as a model that transformers loads.

    A training output is merged with its base (in float32, then back to the checkpoint's type). Nothing is written
    unless every tensor is accounted for. Cut short and called again with the same arguments, it goes on behind the
    last whole shard; with others it starts anew, and no file of another model stays.

    Args:
        source (`str`):
            Folder or Hub id of a full model (LLaVA-1.5, SQ-LLaVA, STLLaVA-Med) or of a training output
            (`adapter_config.json`, `adapter_model.bin`, `non_lora_trainables.bin`, `Vit-lora/`).
        output_dir (`str` or `Path`):
            Folder to write to. Its `config.json` comes last.
        base (`str`, *optional*):
            Folder or Hub id of the model that a training output was trained from, in the original layout or converted.
        projector (`str`, *optional*):
            File, or folder or Hub id with `mm_projector.bin`, where the projector is published on its own.
        vision_tower (`str`, *optional*):
            Folder or Hub id of the CLIP vision tower. By default what `mm_vision_tower` in config.json says. Its
            weights are read only where the checkpoint holds none.
        vision_lora (`str`, *optional*):
            Folder or Hub id of LoRA layers for the vision tower. By default `Vit-lora` inside a training output.
        vusr_role (`str`, *optional*):
            `"text"` for a chat template with the text role `VUSER:`, `"token"` for one that gets `<vusr>` when it is
            loaded. By default as the checkpoint was trained: text with a prototype extractor or a ViT LoRA.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the written weights; `"auto"` takes that of the language model.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Largest size of one file of weights, and about the memory that is needed.

    Returns:
        [`Converted`]

    Raises:
        UserError: if something is missing, damaged, of an unknown kind, holds code, or does not fit.
    """
    _check_choices(vusr_role, dtype)
    check_shard_size(max_shard_size)
    checkpoint = open_checkpoint(source, base, projector, vision_tower, vision_lora)
    config = _fitting_config(checkpoint)
    tokenizer = read_tokenizer(checkpoint.tokenizer_folder)
    _take_tokens(config, tokenizer)
    role = _role(vusr_role, config, checkpoint.has_vision_lora)
    processor = build_processor(
        tokenizer,
        config,
        vision_folder=checkpoint.vision_folder,
        pad_to_square=checkpoint.config.get("image_aspect_ratio") == "pad",
        text_role=role == "text",
    )
    model = model_on_meta(config)
    torch_dtype = _dtype(dtype, checkpoint.parts)
    sources = (source, base, projector, vision_tower, vision_lora)
    staging = staging_folder(Path(output_dir), sources, (role, dtype, max_shard_size))
    _write(staging, model, checkpoint.parts, processor, torch_dtype, max_shard_size)
    return Converted(
        model_type=config.model_type,
        vusr_role=role,
        parameters=model.num_parameters(),
        changed=len(checkpoint.parts.changes),
        changed_in_vision=sum(name.startswith(VISION) for name in checkpoint.parts.changes),
        left_out=sorted(checkpoint.parts.left_out),
        dtype=str(torch_dtype).removeprefix("torch."),
    )


def planned_config(
    settings: Mapping[str, Any], is_available: Callable[[str], bool]
) -> "tuple[LlavaConfig, bool] | None":
    """
    Read the configuration of a converted model from the small files of the original.

    Args:
        settings (`Mapping`): Arguments of [`convert_checkpoint`].
        is_available (`Callable`): Whether a directory or Hub id can be read now.

    Returns:
        The configuration and whether the model has the text role; None if the original's configuration is not
        available.

    Raises:
        UserError: for a checkpoint that [`convert_checkpoint`] would refuse.
    """
    source, base = settings["source"], settings.get("base") or settings["source"]
    if not (is_available(source) and is_available(base)):
        return None
    folder, base_folder = (local_folder(name, "The checkpoint", weights=False) for name in (source, base))
    original = original_config(folder, base_folder)
    tower = settings.get("vision_tower") or original.get("mm_vision_tower")
    if tower is None or not is_available(tower):
        return None
    vision = vision_config(local_folder(tower, "The vision tower", weights=False))
    config = llava_config(original, vision, original.get("vocab_size", 32000))
    has_vision_lora = bool(settings.get("vision_lora")) or (folder / VISION_LORA).is_dir()
    return config, _role(settings.get("vusr_role"), config, has_vision_lora) == "text"


def _role(given: str | None, config: "LlavaConfig", has_vision_lora: bool) -> str:
    """How the model asks: as it was trained, unless it is given."""
    return given or ("text" if family_of(config.model_type).text_role or has_vision_lora else "token")


def _check_choices(vusr_role: str | None, dtype: str) -> None:
    known = {"vusr_role": (vusr_role, VUSR_ROLES), "dtype": (dtype, ("auto", "float32", "bfloat16", "float16"))}
    for name, (value, choices) in known.items():
        if value is not None and value not in choices:
            raise UserError(f"There is no {value!r} for {name}; choose from {', '.join(choices)}.")


def _fitting_config(checkpoint: Checkpoint) -> "LlavaConfig":
    """The configuration whose model the tensors are, one for one."""
    embedding = checkpoint.parts.weights.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError("The checkpoint holds no embedding (model.embed_tokens.weight), so it is no language model.")
    rows = embedding.shape[0]  # whatever vocab_size says: embeddings get resized
    config = llava_config(checkpoint.config, checkpoint.vision, rows)
    checkpoint.parts.check(model_on_meta(config))
    return config


def _take_tokens(config: "LlavaConfig", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Tells a configuration of the tokenizer's tokens, in place; where they lack rows, with some to spare."""
    rows = config.text_config.vocab_size
    if len(tokenizer) - rows > ROWS_MULTIPLE:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens and the embedding {rows} rows: it is of another model. Put "
            "that of the language model into the checkpoint's folder."
        )
    if len(tokenizer) > rows:
        config.text_config.vocab_size = -(-(len(tokenizer) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE  # `<vusr>` fits, too
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for part in (config, config.text_config):
            setattr(part, name, getattr(tokenizer, name))


def _dtype(dtype: str, parts: Parts) -> "torch.dtype":
    import torch

    if dtype == "auto":
        return parts.weights["model.language_model.norm.weight"].read().dtype
    return getattr(torch, dtype)


def _write(
    staging: Path,
    model: "PreTrainedModel",
    parts: Parts,
    processor: "ProcessorMixin",
    dtype: "torch.dtype",
    max_shard_size: str,
) -> None:
    """Every file appears whole, config.json last: a folder that has it is complete."""
    from transformers import GenerationConfig

    config, output_dir = model.config, staging.parent
    for path in staging.iterdir():
        if path.suffix != ".safetensors":  # half a file of a run that was cut short
            path.unlink()
    try:
        write_weights(
            staging,
            model,
            lambda name: _with_rows(name, parts.read(name), config.text_config.vocab_size),
            dtype,
            max_shard_size,
            is_written=lambda file: (staging / file).exists() or (output_dir / file).exists(),
        )
    except UserError:  # going on would end the same way
        shutil.rmtree(staging)
        raise
    processor.save_pretrained(staging)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(staging)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output_dir / path.name)
    shutil.rmtree(staging)


def _with_rows(name: str, weight: "torch.Tensor", rows: int) -> "torch.Tensor":
    """An embedding or output layer with rows for new tokens: the mean of the others, as [`load_policy`] does it."""
    import torch

    if name not in (EMBEDDING, HEAD) or len(weight) == rows:
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])

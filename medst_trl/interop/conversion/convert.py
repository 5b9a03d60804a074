# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint: open it, check that it is complete, build the processor, write the files."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlavaConfig, LlavaProcessor, PreTrainedModel

from medst_trl.base.errors import UserError
from medst_trl.base.files import atomic_path, move_files, write_json
from medst_trl.base.hub_ids import cached_revision, hub_answers
from medst_trl.base.settings import check_choice
from medst_trl.policy.families import family_of
from medst_trl.policy.merging import check_shard_size, remove_model
from medst_trl.policy.parts import on_meta
from medst_trl.policy.vusr import VUSR_ROLES

from .assembling import EMBEDDING, HEAD, NORM, VISION, Parts, published_name
from .checkpoint import VISION_LORA, llava_config, open_checkpoint, original_config, vision_config
from .files import local_directory
from .processor import SPECIAL_IDS, build_processor


CONVERTED_DTYPES = ("auto", "float32", "bfloat16", "float16")


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
) -> dict[str, Any]:
    """
    Convert a checkpoint of the original LLaVA code, or of one built on it, to a model that transformers loads.

    A training output is merged with its base (in float32, then back to the checkpoint's type). Nothing is written
    unless every tensor is accounted for. An interrupted conversion resumes after the last complete shard when it is
    called with the same arguments; with others it starts again, and no file of another model stays.

    Args:
        source (`str`):
            Directory or Hub id of a full model (LLaVA-1.5, SQ-LLaVA, STLLaVA-Med) or of a training output
            (`adapter_config.json`, `adapter_model.bin`, `non_lora_trainables.bin`, `Vit-lora/`).
        output_dir (`str` or `Path`):
            Directory to write to. Its `config.json` comes last.
        base (`str`, *optional*):
            Directory or Hub id of the model that a training output was trained from, in the original layout or
            converted.
        projector (`str`, *optional*):
            File, or directory or Hub id with `mm_projector.bin`, if the projector is published separately.
        vision_tower (`str`, *optional*):
            Directory or Hub id of the CLIP vision tower. Defaults to `mm_vision_tower` in config.json. Its weights are
            read only if the checkpoint holds none.
        vision_lora (`str`, *optional*):
            Directory or Hub id of LoRA layers for the vision tower. Defaults to `Vit-lora` inside a training output.
        vusr_role (`str`, *optional*):
            `"text"` for a chat template with the text role `VUSER:`, `"token"` for one that gets `<vusr>` when it is
            loaded. Defaults to how the checkpoint was trained: text with a prototype extractor or a ViT LoRA.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the written weights; `"auto"` keeps that of the language model.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`):
            Largest size of a file of weights, and about the memory needed.

    Returns:
        `dict`: `model_type` (`"llava"` or `"prototype_llava"`), `vusr_role` (`"token"` or `"text"`), `parameters`, the
        number of weights that LoRA layers were merged into (`changed`) and of those in the vision tower
        (`changed_in_vision`), the names of the tensors that the model does not need (`left_out`), and `dtype`.

    Raises:
        UserError: if something is missing, damaged, of an unknown kind, holds code, or does not fit.
    """
    check_choice("vusr_role", vusr_role, VUSR_ROLES)
    check_choice("dtype", dtype, CONVERTED_DTYPES)
    check_shard_size(max_shard_size)
    checkpoint = open_checkpoint(source, base, projector, vision_tower, vision_lora)
    config, parts = checkpoint.config, checkpoint.parts
    role = _role(vusr_role, config, checkpoint.has_vision_lora)
    processor = build_processor(checkpoint, text_role=role == "text")
    model = on_meta(config)
    model.config.dtype = parts.weights[NORM].read().dtype if dtype == "auto" else getattr(torch, dtype)
    sources = (source, base, projector, vision_tower, vision_lora)
    staging = _staging_directory(Path(output_dir), sources, (role, dtype, max_shard_size))
    _write(staging, model, parts, processor, max_shard_size)
    return {
        "model_type": config.model_type,
        "vusr_role": role,
        "parameters": model.num_parameters(),
        "changed": len(parts.changes),
        "changed_in_vision": sum(name.startswith(VISION) for name in parts.changes),
        "left_out": sorted(parts.left_out),
        "dtype": str(model.config.dtype).removeprefix("torch."),
    }


def planned_config(settings: Mapping[str, Any]) -> tuple[LlavaConfig, bool] | None:
    """
    Read the configuration of a converted model from the small files of the original.

    Args:
        settings (`Mapping`): Arguments of [`convert_checkpoint`].

    Returns:
        The configuration and whether the model has the text role; None if the original's configuration is neither here
        nor on a Hub that responds.

    Raises:
        UserError: for a checkpoint that [`convert_checkpoint`] would refuse.
    """
    source, base = settings["source"], settings.get("base") or settings["source"]
    if not (_is_available(source) and _is_available(base)):
        return None
    directory, base_directory = (local_directory(name, "The checkpoint", weights=False) for name in (source, base))
    original = original_config(directory, base_directory)
    tower = settings.get("vision_tower") or original.get("mm_vision_tower")
    if tower is None or not _is_available(tower):
        return None
    vision = vision_config(local_directory(tower, "The vision tower", weights=False))
    config = llava_config(original, vision, original.get("vocab_size", 32000))
    has_vision_lora = bool(settings.get("vision_lora")) or (directory / VISION_LORA).is_dir()
    return config, _role(settings.get("vusr_role"), config, has_vision_lora) == "text"


def _is_available(source: str) -> bool:
    """Whether a directory or Hub id can be read now."""
    return Path(source).is_dir() or cached_revision(source) is not None or hub_answers()


def _role(given: str | None, config: LlavaConfig, has_vision_lora: bool) -> str:
    """Return how the model asks: as given, or else as it was trained."""
    return given or ("text" if family_of(config.model_type).text_role or has_vision_lora else "token")


def _staging_directory(output_dir: Path, sources: tuple[str | None, ...], settings: tuple[str, ...]) -> Path:
    """Make a directory for the files until all are complete. Only the same conversion resumes what it contains."""
    for source in filter(None, sources):
        if output_dir.is_dir() and Path(source).exists() and output_dir.samefile(source):
            raise UserError(f"output_dir {output_dir} is also the input. Choose another one.")
    digest = hashlib.sha256(json.dumps([*sources, *settings]).encode()).hexdigest()
    staging = output_dir / f".saving-{digest[:16]}"
    if not staging.is_dir():  # no file of another model may be taken for one of this model
        remove_model(output_dir)
        for other in output_dir.glob(".saving-*"):
            shutil.rmtree(other)
        staging.mkdir(parents=True)
    return staging


def _write(
    staging: Path, model: PreTrainedModel, parts: Parts, processor: LlavaProcessor, max_shard_size: str
) -> None:
    """Write model and processor so that `config.json` appears last: a directory that has it is complete."""
    for path in staging.iterdir():
        if path.suffix != ".safetensors":  # incomplete, of an interrupted run
            path.unlink()
    try:
        _write_weights(staging, model, parts, max_shard_size)
    except UserError:  # a resumed run would fail again
        shutil.rmtree(staging)
        raise
    processor.save_pretrained(staging)
    GenerationConfig(**{name: getattr(model.config, name) for name in SPECIAL_IDS}).save_pretrained(staging)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(staging)
    move_files(staging, staging.parent)


def _write_weights(staging: Path, model: PreTrainedModel, parts: Parts, max_shard_size: str) -> None:
    """Write safetensors shards and their index, with one shard in memory; shards of an interrupted run are kept."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(HEAD)
    # Names published for LLaVA are of no use where only transformers with medst_trl loads the model.
    is_own = family_of(model.config.model_type).is_own
    names = {name if is_own else published_name(name): name for name in state}
    split = split_torch_state_dict_into_shards(
        {written: state[name].to(model.config.dtype) for written, name in names.items()}, max_shard_size=max_shard_size
    )
    with tqdm(total=len(names), desc="Writing weights", unit="tensor", disable=None) as bar:
        for file, members in split.filename_to_tensors.items():
            if not (staging / file).exists() and not (staging.parent / file).exists():
                shard = {written: _weight(names[written], parts, model.config) for written in members}
                with atomic_path(staging / file) as temporary:
                    safetensors.torch.save_file(shard, temporary, metadata={"format": "pt"})
                del shard
            bar.update(len(members))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(staging / "model.safetensors.index.json", index)


def _weight(name: str, parts: Parts, config: LlavaConfig) -> torch.Tensor:
    """Return a weight to write. New rows of embedding and output layer are the mean of the others."""
    stored, rows, dtype = parts.read(name), config.text_config.vocab_size, config.dtype
    if name in (EMBEDDING, HEAD) and len(stored) < rows:
        mean = stored.float().mean(0, keepdim=True).to(stored.dtype)
        stored = torch.cat([stored, mean.expand(rows - len(stored), -1)])
    tensor = stored.to(dtype).contiguous()
    if not tensor.isfinite().all():
        reason = f"too large for {dtype}: choose another --dtype" if stored.isfinite().all() else "not finite"
        raise UserError(f"{name} has values that are {reason}. The checkpoint was not converted.")
    return tensor

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Convert a checkpoint of the original LLaVA code to Hugging Face's layout: read its configuration, find its pieces
wherever they are published, check that they are complete, build the processor, write the files.
"""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, StrictDataclassError
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaProcessor, PreTrainedModel

from medst_trl.base.errors import UserError
from medst_trl.base.hub_ids import check_reachable, split_revision
from medst_trl.base.settings import check_choice
from medst_trl.policy import DTYPES
from medst_trl.policy.families import family_of, on_meta
from medst_trl.policy.merging import check_shard_size, staged_model
from medst_trl.policy.prototype_llava import PrototypeLlavaConfig
from medst_trl.policy.vusr import VUSR_ROLES

from .processor import SPECIAL_IDS, build_processor, image_settings, read_tokenizer
from .weights import EMBEDDING, HEAD, NORM, PROJECTOR_FILES, VISION, Parts, open_weights, published_name, read_json


_SMALL_FILES = ("*.json", "*.model")
_NOT_READ = ("checkpoint-*/*", "global_step*/*", "runs/*", "*/optimizer.*", "optimizer.*")
VISION_LORA = "Vit-lora"  # the first implementation's name
LANGUAGE_MODELS = ("llava", "llava_llama", "llama")  # the last as the base of a training output
# Type of the projector in the original configuration, by type of the converted model.
_PROJECTOR_OF = {"llava": "mlp2x_gelu", "prototype_llava": "cluster"}
# Which positions of the vision tower give the features: all, or those without the class token.
_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def convert_checkpoint(args: Any) -> dict[str, Any]:
    """
    Convert a checkpoint of the original LLaVA code, or of one built on it, to a model that transformers loads.

    A training output is merged with its base (in float32, then back to the checkpoint's type). Nothing is written
    unless every tensor is accounted for, and no file of another model stays. It takes memory for the model.

    Args:
        args ([`~medst_trl.interop.convert_stage.ConvertArguments`]):
            Where the pieces are, and what to write. `overwrite` is for the stage.

    Returns:
        `dict`: `model_type` (`"llava"` or `"prototype_llava"`), `vusr_role` (`"token"` or `"text"`), `parameters`, the
        number of weights that LoRA layers were merged into (`changed`) and of those in the vision tower
        (`changed_in_vision`), the names of the tensors that the model does not need (`left_out`), and `dtype`.

    Raises:
        UserError: if something is missing, damaged, of an unknown kind, holds code, or does not fit.
    """
    check_choice("vusr_role", args.vusr_role, VUSR_ROLES)
    check_choice("dtype", args.dtype, DTYPES)
    check_shard_size(args.max_shard_size)
    config, parts, processor, role = open_checkpoint(args)
    model, output_dir = on_meta(config), Path(args.output_dir)
    model.config.dtype = parts.weights[NORM].tensor.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model.config.architectures = [type(model).__name__]
    sources = (args.source, args.base, args.projector, args.vision_tower, args.vision_lora)
    if any(output_dir.is_dir() and Path(name).exists() and output_dir.samefile(name) for name in sources if name):
        raise UserError(f"output_dir {output_dir} is also the input. Choose another one.")
    with staged_model(output_dir, ".saving") as staging:
        _write_weights(staging, model, parts, args.max_shard_size)
        processor.save_pretrained(staging)
        GenerationConfig(**{name: getattr(model.config, name) for name in SPECIAL_IDS}).save_pretrained(staging)
        model.config.save_pretrained(staging)
    return {
        "model_type": model.config.model_type,
        "vusr_role": role,
        "parameters": model.num_parameters(),
        "changed": len(parts.changes),
        "changed_in_vision": sum(name.startswith(VISION) for name in parts.changes),
        "left_out": sorted(parts.left_out),
        "dtype": str(model.config.dtype).removeprefix("torch."),
    }


def default_role(config: LlavaConfig, has_vision_lora: bool) -> str:
    """Return how a checkpoint was trained to ask: with the text role or with the token."""
    return "text" if family_of(config.model_type).is_own or has_vision_lora else "token"


def _write_weights(staging: Path, model: PreTrainedModel, parts: Parts, max_shard_size: str) -> None:
    # Names published for LLaVA are of no use where only transformers with medst_trl loads the model.
    is_own = family_of(model.config.model_type).is_own
    # The parts have no output layer if it is tied to the embedding.
    names = [name for name in model.state_dict() if name in parts.weights]
    state = {name if is_own else published_name(name): _weight(name, parts, model.config) for name in names}
    huggingface_hub.save_torch_state_dict(state, staging, max_shard_size=max_shard_size)


def _weight(name: str, parts: Parts, config: LlavaConfig) -> torch.Tensor:
    """Return a weight to write. New rows of embedding and output layer are the mean of the others."""
    stored, rows, dtype = parts.read(name), config.text_config.vocab_size, config.dtype
    if name in (EMBEDDING, HEAD) and len(stored) < rows:
        mean = stored.float().mean(0, keepdim=True).to(stored.dtype)
        stored = torch.cat([stored, mean.expand(rows - len(stored), -1)])
    tensor = stored.to(dtype, copy=True).contiguous()  # tensors that share memory would be written once
    if not tensor.isfinite().all():
        reason = f"too large for {dtype}: choose another --dtype" if stored.isfinite().all() else "not finite"
        raise UserError(f"{name} has values that are {reason}. The checkpoint was not converted.")
    return tensor


# --- The pieces of a checkpoint --------------------------------------------------------------------------------------


def open_checkpoint(args: Any) -> tuple[LlavaConfig, Parts, LlavaProcessor, str]:
    """
    Open everything that makes up a model.

    Returns:
        `tuple`: the model's configuration, its tensors (none of them read yet), its processor and how it asks:
        `"text"` or `"token"`.

    Raises:
        UserError: if a piece is missing, damaged, holds code, is of an unknown kind, or a tensor does not fit.
    """
    directory = local_directory(args.source, "The checkpoint")
    base_directory = _base_directory(directory, args.base)
    original, parts = original_config(directory, base_directory), Parts()
    parts.add(open_weights(base_directory))
    vision_directory, vision = _vision_tower(original, args.vision_tower, parts, base_directory)
    if directory != base_directory:
        parts.add_lora(directory)
        # Without its own projector that of the base would stay, and nothing would be missing.
        missing = f"lacks the projector, trained in full ({PROJECTOR_FILES[-1]}). Download it, or give --projector."
        parts.add(open_weights(directory, PROJECTOR_FILES, None if args.projector else missing))
    if args.projector:
        missing = f"holds no projector ({', '.join(PROJECTOR_FILES)}). Give the file itself."
        parts.add(open_weights(local_directory(args.projector, "The projector"), PROJECTOR_FILES, missing))
    lora = local_directory(args.vision_lora, "The vision LoRA") if args.vision_lora else directory / VISION_LORA
    has_lora = args.vision_lora is not None or lora.is_dir()
    if has_lora:
        parts.add_lora(lora)
    embedding = parts.weights.get(EMBEDDING)  # its rows count, because embeddings get resized
    rows = embedding.shape[0] if embedding and embedding.shape else original.get("vocab_size", 32000)
    config = llava_config(original, vision, rows)
    parts.check(on_meta(config))
    role = args.vusr_role or default_role(config, has_lora)
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = read_tokenizer(directory if has_tokenizer else base_directory)
    pad = original.get("image_aspect_ratio") == "pad"
    processor = build_processor(config, tokenizer, vision_directory, pad=pad, text_role=role == "text")
    return config, parts, processor, role


def local_directory(source: str, what: str, *, weights: bool = True) -> Path:
    """
    Return the directory of a model: as given, or downloaded from the Hub, only the files that are read. A file is
    returned as it is.

    Args:
        source (`str`):
            Directory, file, or Hub id (`org/name`, `org/name@revision`).
        what (`str`):
            What it is, for messages.
        weights (`bool`, *optional*, defaults to `True`):
            Whether its weights are read, too.

    Raises:
        UserError: if there is no such directory and the Hub has no such repository.
    """
    if Path(source).exists():
        return Path(source)
    name, revision = split_revision(source)
    check_reachable(name)
    try:
        patterns = [*_SMALL_FILES, *(_weight_patterns(name, revision) if weights else ())]
        wanted = {"allow_patterns": patterns, "ignore_patterns": _NOT_READ}
        return Path(huggingface_hub.snapshot_download(name, revision=revision, **wanted))
    except (HFValidationError, OSError) as error:  # the Hub's other errors are of the latter kind
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{what} {source!r} is neither a directory nor available on the Hub ({type(error).__name__}: {reason})."
        ) from error


def _weight_patterns(name: str, revision: str | None) -> list[str]:
    """Choose one format of a model that has both. A training output has parts in each."""
    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except (OfflineModeIsEnabled, httpx2.TransportError):  # the cache holds what was chosen when it was downloaded
        files = []
    has_safetensors = any(fnmatch(file, "model*.safetensors") for file in files)
    return ["*.safetensors"] if has_safetensors else ["*.safetensors", "*.bin"]


def _base_directory(directory: Path, base: str | None) -> Path:
    if base is not None:
        return local_directory(base, "The base")
    if (directory / "adapter_config.json").is_file():
        named = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{directory} is a training output. Give the model it was trained from as --base (it names {named!r})."
        )
    return directory


def original_config(directory: Path, base_directory: Path) -> dict[str, Any]:
    """
    Read the original configuration: the language model's from the base, the rest as the model was trained with it.

    Raises:
        UserError: if it is missing, damaged, or of an unknown kind.
    """
    config = read_json(base_directory / "config.json", "the model's configuration")
    if "text_config" in config:
        config = _as_original(config, base_directory, directory)
    elif config.get("model_type") not in LANGUAGE_MODELS:
        raise UserError(
            f"{base_directory} is a model of the type {config.get('model_type')!r}. Only models like LLaVA-1.5 on "
            f"Llama or Vicuna can be converted: {', '.join(LANGUAGE_MODELS)}."
        )
    if directory != base_directory and (directory / "config.json").is_file():
        own = read_json(directory / "config.json", "the model's configuration")
        config |= {key: own[key] for key in own if key.startswith("mm_") or key == "image_aspect_ratio"}
    return config


def _as_original(config: dict[str, Any], base_directory: Path, directory: Path) -> dict[str, Any]:
    """Return the configuration of a converted base in the original's keys."""
    projector = _PROJECTOR_OF.get(config.get("model_type"))
    if projector is None or directory == base_directory:
        raise UserError(
            f"{base_directory} is in a Hugging Face layout already ({config.get('model_type')}). Other commands read "
            "it directly; here it can only be the --base of a training output."
        )
    text = config.get("text_config") or {}
    return {
        "text_config": text | {"tie_word_embeddings": config.get("tie_word_embeddings", False)},
        "vision_config": config.get("vision_config"),
        "mm_projector_type": projector,
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if config.get("vision_feature_select_strategy") == "full" else "patch",
        "image_aspect_ratio": "pad" if image_settings(base_directory).get("do_pad") else "square",
    }


def _vision_tower(config: dict, vision_tower: str | None, parts: Parts, base: Path) -> tuple[Path, CLIPVisionConfig]:
    """Find the vision tower's directory and configuration. Add its weights if the checkpoint has none."""
    has_weights = any(name.startswith(VISION) for name in parts.weights)
    if has_weights and vision_tower is None and isinstance(config.get("vision_config"), dict):
        return base, CLIPVisionConfig(**config["vision_config"])
    source = vision_tower or config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(source, str) or not source:
        raise UserError("config.json names no mm_vision_tower. Give the CLIP directory or Hub id as --vision_tower.")
    directory = local_directory(source, "The vision tower (--vision_tower)", weights=not has_weights)
    if not has_weights:
        parts.add(open_weights(directory), in_clip=True)
    return directory, vision_config(directory)


# --- Configurations --------------------------------------------------------------------------------------------------


def llava_config(original: dict[str, Any], vision: CLIPVisionConfig, rows: int) -> LlavaConfig:
    """
    Build the configuration of a model.

    Args:
        original (`dict`):
            Original config.json; for a training output on a converted base, that of the base with the projector's keys
            of the training output.
        vision ([`~transformers.CLIPVisionConfig`]):
            Configuration of the vision tower.
        rows (`int`):
            Number of rows of the embedding.

    Returns:
        [`~transformers.LlavaConfig`] or [`PrototypeLlavaConfig`]

    Raises:
        UserError: if the projector or another setting is unknown.
    """
    _check(original, vision)
    text = original.get("text_config") or original
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling", "head_dim"}
    kept = {key: value for key, value in text.items() if key in known - {"architectures", "dtype", "model_type"}}
    config_class = PrototypeLlavaConfig if original["mm_projector_type"] == "cluster" else LlavaConfig
    side, layer = vision.image_size // vision.patch_size, original.get("mm_vision_select_layer", -2)
    strategy = _STRATEGIES[original.get("mm_vision_select_feature") or "patch"]
    return _build_config(
        config_class,
        "config.json",
        vision_config=vision.to_dict(),
        text_config={**kept, "model_type": "llama", "vocab_size": rows},
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=side**2 + (strategy == "full"),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )


def _build_config(config_class: type, file: str, **settings: Any) -> Any:
    """Make a configuration from the settings in a file, which may be such that no model can have them."""
    try:
        return config_class(**settings)
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file} describes an impossible model: {' '.join(str(error).split())}") from error


def _check(original: dict[str, Any], vision: CLIPVisionConfig) -> None:
    layers, count = original.get("mm_vision_select_layer", -2), vision.num_hidden_layers + 1
    layers = layers if isinstance(layers, list) else [layers]
    refused = {
        "mm_projector_type": original.get("mm_projector_type") not in _PROJECTOR_OF.values(),
        "mm_vision_select_feature": (original.get("mm_vision_select_feature") or "patch") not in _STRATEGIES,
        "mm_use_im_start_end": bool(original.get("mm_use_im_start_end")),
        "image_aspect_ratio": original.get("image_aspect_ratio") not in (None, "square", "pad"),
        # hidden states are those of the layers, and their input
        "mm_vision_select_layer": not all(isinstance(layer, int) and -count <= layer < count for layer in layers),
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise UserError(
                f"{key} is {original.get(key)!r} in config.json. Only models built like LLaVA-1.5, SQ-LLaVA or "
                "STLLaVA-Med can be converted."
            )


def vision_config(directory: Path) -> CLIPVisionConfig:
    """
    Read the configuration of the vision tower from a CLIP directory.

    Raises:
        UserError: if there is none, or it is of another family.
    """
    content = read_json(directory / "config.json", "the vision tower's configuration")
    content = content.get("vision_config", content) if content.get("model_type") == "clip" else content
    if content.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(
            f"{directory} holds a model of the type {content['model_type']!r}. The vision tower must be CLIP."
        )
    known = CLIPVisionConfig().to_dict().keys() - {"model_type", "dtype", "transformers_version"}
    settings = {key: value for key, value in content.items() if key in known}
    return _build_config(CLIPVisionConfig, str(directory / "config.json"), **settings)

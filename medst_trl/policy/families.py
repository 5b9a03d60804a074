# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Model families: what is known of each from tests, which models cannot work at all, and the parts of a model.

A family records what its configuration does not say. Whatever can be read from a model itself stays a function of the
model (`model_parts`, `cannot_share`, `turn_format`). A model whose type no family lists still works: it takes the path
that makes no assumptions. To add a family, register it here or in a plugin:

```python
FAMILIES.register(Family(name="my_vlm", title="My VLM", model_types=("my_vlm",), shares_prompts=True))
```

The parts of a model are its language model, vision tower, projector and token embedding, by module name. transformers
exposes them through `get_decoder()`, `get_encoder("image")` and `get_input_embeddings()`; only the projector has no
accessor. It is the module beside the two towers (`multi_modal_projector`, `connector`), or the merger at the end of
the vision tower (Qwen).
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.registry import Registry


if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """
    A family of vision-language models. The defaults make no assumptions.

    Args:
        name (`str`):
            Name in the registry.
        title (`str`):
            Name in messages and in docs/models.md.
        model_types (`tuple[str, ...]`):
            Values of `config.model_type`. If two families list one, the family that was registered last counts.
        packs_with (`frozenset[str]`, *optional*):
            Types of the language models with which packed SFT batches equal padded ones.
        shares_prompts (`bool`, *optional*, defaults to `False`):
            Whether several texts can be generated from one reading of a prompt, and image features can be reused,
            with the same result.
        causal (`bool`, *optional*, defaults to `True`):
            Whether a token attends only to earlier ones. `False` where image tokens attend to each other both ways,
            marked by `token_type_ids`.
        is_own (`bool`, *optional*, defaults to `False`):
            Whether only `medst_trl` (or the plugin) can load the family: transformers and servers do not know it.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    packs_with: frozenset[str] = frozenset()
    shares_prompts: bool = False
    causal: bool = True
    is_own: bool = False


EXTREME_ASPECT_RATIO = "extreme_aspect_ratio"  # the reason for which records are rejected
MAX_ASPECT_RATIO = 200  # Qwen-VL takes no more; LLaVA enlarges the shorter side, which makes gigabytes of a strip
FAMILIES: Registry[Family] = Registry("family", [__name__], ["title", "model_types"])

_LLAMA = frozenset({"llama", "mistral"})
_QWEN = frozenset({"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"})

# Each of these completes every stage in tests/test_any_vlm.py.
for _family in (
    # Its images attend both ways, under a mask that does not separate the documents of a row.
    Family("gemma3", "Gemma 3, MedGemma", ("gemma3",), shares_prompts=True, causal=False),
    Family("idefics3", "Idefics3", ("idefics3",), packs_with=_LLAMA, shares_prompts=True),
    # No packing: a batch does not say into how many tiles each image was cut, and tiles move with their conversation.
    Family("internvl", "InternVL 3 and 3.5 (`-hf`)", ("internvl",), shares_prompts=True),
    Family("llava", "LLaVA-1.5", ("llava",), packs_with=_LLAMA, shares_prompts=True),
    Family("llava_next", "LLaVA-NeXT", ("llava_next",), packs_with=_LLAMA, shares_prompts=True),
    Family("mllama", "Llama 3.2-Vision", ("mllama",)),
    Family(
        "prototype_llava", "SQ-LLaVA, STLLaVA-Med (converted)", ("prototype_llava",), packs_with=_LLAMA,
        shares_prompts=True, is_own=True,
    ),
    Family(
        "qwen_vl", "Qwen2-VL, Qwen2.5-VL, Qwen3-VL", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), packs_with=_QWEN,
        shares_prompts=True,
    ),
    Family("smolvlm", "SmolVLM", ("smolvlm",), packs_with=_LLAMA, shares_prompts=True),
):  # fmt: skip
    FAMILIES.register(_family)


def family_of(model_type: str) -> Family:
    """Return the family of a model type; for one that no family lists, a `Family` with the defaults."""
    listed = [family for family in FAMILIES.values() if model_type in family.model_types]
    return listed[-1] if listed else Family(model_type, model_type, (model_type,))


def tested_families() -> str:
    """Return a sentence that lists the families, for the end of a message."""
    return f"Tested families: {'; '.join(family.title for family in FAMILIES.values())}."


def check_family(config: "PreTrainedConfig", name: str, remote_code: bool = False) -> None:
    """
    Check that a configuration is that of a vision-language model, before its weights are read.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of a model.
        name (`str`):
            Name of the model in messages.
        remote_code (`bool`, *optional*, defaults to `False`):
            Whether the model's own code may run. It can load what transformers alone cannot.

    Raises:
        UserError: for a model without a vision tower, and as [`check_architecture`].
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not (remote_code and hasattr(config, "auto_map")):
        raise UserError(
            f"{name!r} is of the type `{config.model_type}`, which has no vision tower that transformers knows. Give "
            f"a vision-language model. {tested_families()}"
        )
    check_architecture(config, name)


def check_architecture(config: "PreTrainedConfig", name: str) -> None:
    """
    Check that a vision-language model consists of a vision tower, a projector and a decoder.

    Raises:
        UserError: for a model with a Q-Former or with an encoder for its text.
    """
    encodes_text = config.is_encoder_decoder or config.get_text_config().is_encoder_decoder
    if encodes_text or getattr(config, "qformer_config", None) is not None:
        raise UserError(
            f"{name!r} is of the type `{config.model_type}`, which has a Q-Former or an encoder for its text. "
            f"Such models are not supported. {tested_families()}"
        )


def aspect_ratio_error(sizes: Iterable[tuple[int, int]]) -> str | None:
    """Describe the first image, given by width and height, whose aspect ratio no family takes; `None` if all fit."""
    strip = next((size for size in sizes if max(size) > MAX_ASPECT_RATIO * min(size)), None)
    return strip and f"{strip[0]} x {strip[1]} pixels; the maximum is {MAX_ASPECT_RATIO}:1"


# --- The parts of a model --------------------------------------------------------------------------------------------


_MERGERS = ("merger", "deepstack_merger_list", "connector")
# What PEFT adds to the names of the parameters that it wraps.
_PEFT_NAMES = re.compile(
    r"^base_model\.model\.|\.(?:original_module|modules_to_save\.[^.]+|base_layer|token_adapter)(?=\.)"
)


@dataclass(frozen=True)
class ModelParts:
    """
    Qualified module names of the parts of a vision-language model.

    Args:
        language_model (`str`): The decoder, for example `"model.language_model"`.
        vision_tower (`str`): The image encoder, for example `"model.vision_tower"`.
        projectors (`tuple[str, ...]`): The modules that map image features into the decoder's space.
        embedding (`str`): The token embedding.
        unused_vision_layers (`tuple[int, ...]`):
            Indices of vision layers after the one whose features are read: they receive no gradient (trl#1936).
    """

    language_model: str
    vision_tower: str
    projectors: tuple[str, ...]
    embedding: str
    unused_vision_layers: tuple[int, ...]

    def part_of(self, parameter: str) -> str:
        """Return `"vision"`, `"projector"` or `"language"` (everything else) for a parameter; PEFT names work too."""
        name = _PEFT_NAMES.sub("", parameter)
        if any(name.startswith(f"{projector}.") for projector in self.projectors):
            return "projector"
        return "vision" if name.startswith(f"{self.vision_tower}.") else "language"


def trained_parameters(model: "PreTrainedModel | PeftModel") -> dict[tuple[str, str], int]:
    """
    Count the parameters of a model that are trained.

    Returns:
        `dict[tuple[str, str], int]`: Their number by part (`"language"`, `"vision"`, `"projector"`) and by how they
        train (`"LoRA r 128"`, `"in full"`, `"row of <vusr>"`), in the order of the parts, the largest number first.
    """
    parts, counts = model_parts(model), Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            how = f"LoRA r {min(parameter.shape)}" if ".lora_A." in name or ".lora_B." in name else "in full"
            counts[parts.part_of(name), "row of <vusr>" if "trainable_tokens" in name else how] += parameter.numel()
    order = ["language", "vision", "projector"]
    return dict(sorted(counts.items(), key=lambda item: (order.index(item[0][0]), -item[1])))


def base_of(model: "nn.Module") -> "PreTrainedModel":
    """Return the model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def on_meta(config: "PreTrainedConfig", **kwargs: Any) -> "PreTrainedModel":
    """Build the vision-language model of a configuration on the meta device, without memory for its weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, **kwargs)


def add_embedding_row(model: "PreTrainedModel", token_id: int) -> None:
    """
    Resize the embeddings so that they have a row for a token, in place.

    A new row is the mean of the others, so that it is the same wherever the model is loaded again: an adapter stores
    its own row, but the output row counts in every softmax. `mean_resizing` would draw it at random.
    """
    import torch
    from peft.utils.integrations import gather_params_ctx

    embedding = model.get_input_embeddings()
    # Under ZeRO-3 the weight itself has no rows; an adapter that trains the token or the layer has wrapped it.
    embedding = getattr(embedding, "original_module", getattr(embedding, "base_layer", embedding))
    rows = embedding.num_embeddings
    if token_id < rows:
        return
    model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                with gather_params_ctx(layer.weight):  # under ZeRO-3, the change reaches every rank
                    layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)


def model_parts(model: "PreTrainedModel | PeftModel") -> ModelParts:
    """
    Find the parts of a vision-language model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language model of any family. The names are those of the model without PEFT's wrapper.

    Returns:
        [`ModelParts`]

    Raises:
        UserError: if the model exposes no vision tower or no projector, or has a Q-Former instead.
    """
    model = base_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    vision, language = model.get_encoder("image"), model.get_decoder()
    if vision is model or id(vision) not in names:
        raise UserError(
            f"{type(model).__name__} exposes no vision tower (`get_encoder('image')`). Is it a vision-language model? "
            f"{tested_families()}"
        )
    check_architecture(model.config, type(model).__name__)
    vision_name = names[id(vision)]
    return ModelParts(
        language_model=names[id(language)],
        vision_tower=vision_name,
        projectors=_projectors(model, vision_name, names[id(language)]),
        embedding=names[id(model.get_input_embeddings())],
        unused_vision_layers=_unused_vision_layers(model, vision),
    )


def _projectors(model: "PreTrainedModel", vision: str, language: str) -> tuple[str, ...]:
    from torch import nn

    parent = vision.rpartition(".")[0]
    siblings = model.get_submodule(parent).named_children()
    named = [(f"{parent}.{name}" if parent else name, module) for name, module in siblings]
    output = model.get_output_embeddings()
    beside = [
        name
        for name, module in named
        if not (f"{language}.".startswith(f"{name}.") or name == vision or module is output)
        and any(True for _ in module.parameters())
    ]
    mergers = {name: module for name, module in model.get_submodule(vision).named_children() if name in _MERGERS}
    inside = []
    for name, module in mergers.items():  # PEFT wraps the members of a list, not the list (Qwen3-VL's deepstack)
        members = [f"{name}.{index}" for index in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
        inside += [f"{vision}.{member}" for member in members]
    if not (beside or inside):
        raise UserError(
            f"{type(model).__name__} has no projector beside or at the end of its vision tower `{vision}`. "
            f"This family is not supported. {tested_families()}"
        )
    return tuple(beside or inside)


def _unused_vision_layers(model: "PreTrainedModel", vision: "nn.Module") -> tuple[int, ...]:
    read = getattr(model.config, "vision_feature_layer", None)
    count = getattr(vision.config, "num_hidden_layers", None)
    if read is None or count is None:
        return ()
    # hidden_states[0] is the embedding, hidden_states[i] the output of layer i - 1
    outputs = [layer if layer >= 0 else count + 1 + layer for layer in ([read] if isinstance(read, int) else read)]
    return tuple(range(max(outputs), count))

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Model families: what is known of each from tests, and which models cannot work at all.

A family records what its configuration does not say. Whatever can be read from a model itself stays a function of the
model (`model_parts`, `cannot_share`, `turn_format`). A model whose type no family lists still works: it takes the path
that makes no assumptions. To add a family, register it here or in a plugin:

```python
FAMILIES.register(Family(name="my_vlm", title="My VLM", model_types=("my_vlm",), shares_prompts=True))
```
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError
from medst_trl.base.registry import Registry


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
        limits (`str`, *optional*, defaults to `"none known"`):
            Limits, for docs/models.md.
        packs_with (`frozenset[str]`, *optional*):
            Types of the language models with which packed SFT batches equal padded ones.
        shares_prompts (`bool`, *optional*, defaults to `False`):
            Whether several texts can be generated from one reading of a prompt, and image features can be reused,
            with the same result.
        shares_prefix (`bool`, *optional*):
            Whether DPO can read the prompt of a pair once. `None` leaves it to the model's structure.
        text_role (`bool`, *optional*, defaults to `False`):
            Whether published checkpoints were trained with the text role `VUSER:` instead of the token `<vusr>`.
        causal (`bool`, *optional*, defaults to `True`):
            Whether a token attends only to earlier ones. `False` where image tokens attend to each other both ways,
            marked by `token_type_ids`.
        is_own (`bool`, *optional*, defaults to `False`):
            Whether only `medst_trl` (or the plugin) can load the family: transformers and servers do not know it.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    limits: str = "none known"
    packs_with: frozenset[str] = frozenset()
    shares_prompts: bool = False
    shares_prefix: bool | None = None
    text_role: bool = False
    causal: bool = True
    is_own: bool = False


FAMILIES: Registry[Family] = Registry("family", [__name__], ["title", "model_types"])

_LLAMA = frozenset({"llama", "mistral"})

# Each of these completes every stage in tests/test_any_vlm.py.
for _family in (
    Family(
        "gemma3",
        "Gemma 3, MedGemma",
        ("gemma3",),
        # Its images attend both ways, under a mask that does not separate the documents of a row.
        limits="images attend both ways: no packing",
        shares_prompts=True,
        causal=False,
    ),
    Family("idefics3", "Idefics3", ("idefics3",), packs_with=_LLAMA, shares_prompts=True),
    # No packing: a batch does not say into how many tiles each image was cut, and tiles move with their conversation.
    Family("internvl", "InternVL 3 and 3.5 (`-hf`)", ("internvl",), limits="extra `video`", shares_prompts=True),
    Family("llava", "LLaVA-1.5", ("llava",), packs_with=_LLAMA, shares_prompts=True),
    Family("llava_next", "LLaVA-NeXT", ("llava_next",), packs_with=_LLAMA, shares_prompts=True),
    Family("mllama", "Llama 3.2-Vision", ("mllama",), limits="cross-attention", shares_prefix=False),
    Family(
        "prototype_llava",
        "SQ-LLaVA, STLLaVA-Med (converted)",
        ("prototype_llava",),
        limits="needs `import medst_trl` to load; no vLLM or SGLang",
        packs_with=_LLAMA,
        shares_prompts=True,
        text_role=True,
        is_own=True,
    ),
    Family(
        "qwen_vl",
        "Qwen2-VL, Qwen2.5-VL, Qwen3-VL",
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        limits="extra `video`",
        packs_with=frozenset({"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}),
        shares_prompts=True,
    ),
    Family("smolvlm", "SmolVLM", ("smolvlm",), limits="extra `video`", packs_with=_LLAMA, shares_prompts=True),
):
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
    if getattr(config, "qformer_config", None) is not None:
        problem = "whose images pass through a Q-Former, in which the place of an adapter is unknown"
    elif config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        problem = "an encoder with a decoder. Only decoders are trained on conversations"
    else:
        return
    raise UserError(
        f"{name!r} is of the type `{config.model_type}`, {problem}, so this family is not supported. "
        f"{tested_families()}"
    )

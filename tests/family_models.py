# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the tested families, for the processors of `families.py`.

Their weights make every logit depend on the image, on positions and on distant tokens, so that a wrong mask or a wrong
position changes the logits.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from families import FAMILIES
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.policy.loading import prepare_policy
from medst_trl.policy.vusr import add_vusr


TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
CLIP = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 3, "patch_size": 8, "projection_dim": 8}
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
WINDOW = 12  # tokens of sliding-window attention: far fewer than in a prompt, more than in an image


def _from_config(
    model_type: str,
    text: dict,
    vision: dict,
    tokens: dict[str, str],
    processor: ProcessorMixin,
    seed: int,
    *,
    settings: dict | None = None,
    **overrides,
) -> PreTrainedModel:
    """
    Build a random model. `tokens` maps keys of the configuration to the text of a token; `settings` updates the
    configuration and `overrides` its text configuration.
    """
    tokenizer = processor.tokenizer
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**TEXT, **text, "vocab_size": len(tokenizer), **special, **overrides}
    settings = {**(settings or {}), **{name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}}
    if "tie_word_embeddings" in text:
        settings["tie_word_embeddings"] = text["tie_word_embeddings"]
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=vision, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        _draw_weights(model)
    return model


def _draw_weights(model: PreTrainedModel) -> None:
    """Initialize weights so that activations stay near one in every layer. The usual std of 0.02 is too small here."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
            elif "norm" in name or name.endswith("bias"):  # perturb gains, which are one (zero in Gemma)
                parameter.add_(0.1 * torch.randn(parameter.shape))


def _vicuna(processor: ProcessorMixin, seed: int, **overrides) -> PreTrainedModel:
    """Build LLaVA-1.5 with `tiny_llava`; `overrides` are its arguments."""
    settings = {"image_size": 16, "patch_size": 8, "vision_size": 32, "text_size": 32, "head_size": 16} | overrides
    return tiny_llava(seed=seed, **settings)[0]


def _llava(model_type: str, text: dict, *args, **kwargs) -> PreTrainedModel:
    settings = {"image_seq_length": 4, "vision_feature_layer": -2}
    if model_type == "llava_next":
        settings["image_grid_pinpoints"] = [[16, 32], [32, 16], [32, 32]]
    return _from_config(model_type, text, CLIP, {"image_token_id": "<image>"}, *args, settings=settings, **kwargs)


def _qwen(model_type: str, text: dict, vision: dict, *args, **kwargs) -> PreTrainedModel:
    tokens = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    return _from_config(model_type, {**MROPE, **text}, vision, tokens, *args, **kwargs)


def _gemma3(*args, **kwargs) -> PreTrainedModel:
    text = {
        "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
    }  # fmt: skip
    tokens = {
        "image_token_id": "<image_soft_token>", "boi_token_id": "<start_of_image>", "eoi_token_id": "<end_of_image>",
    }  # fmt: skip
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    return _from_config("gemma3", text, vision, tokens, *args, settings={"mm_tokens_per_image": 4}, **kwargs)


def _idefics3(model_type: str, *args, **kwargs) -> PreTrainedModel:
    vision = {**VISION, "model_type": f"{model_type}_vision"}
    tokens = {"image_token_id": "<image>"}
    return _from_config(
        model_type, {"model_type": "llama"}, vision, tokens, *args, settings={"scale_factor": 2}, **kwargs
    )


def _internvl(*args, **kwargs) -> PreTrainedModel:
    vision = {**VISION, "model_type": "internvl_vision"}
    tokens = {"image_token_id": "<IMG_CONTEXT>"}
    return _from_config(
        "internvl", {"model_type": "qwen2"}, vision, tokens, *args, settings={"image_seq_length": 4}, **kwargs
    )


def _prototype_llava(*args, **kwargs) -> PreTrainedModel:
    text, tokens = {"model_type": "llama"}, {"image_token_id": "<image>"}
    settings = {"image_seq_length": 4, "num_centers": 3}
    return _from_config("prototype_llava", text, CLIP, tokens, *args, settings=settings, **kwargs)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {  # builder(processor, seed, **overrides)
    "vicuna": _vicuna,
    "llava-1.5-hf": partial(_llava, "llava", {"model_type": "llama"}),
    "llava-mistral": partial(_llava, "llava", {"model_type": "mistral", "sliding_window": WINDOW}),
    "llava-next": partial(_llava, "llava_next", {"model_type": "llama"}),
    "qwen2-vl": partial(
        _qwen, "qwen2_vl", {}, {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    ),
    "qwen2.5-vl": partial(_qwen, "qwen2_5_vl", {}, {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}),
    "qwen3-vl": partial(  # features of both vision layers are added after the first two layers of the language model
        _qwen, "qwen3_vl", {"num_hidden_layers": 3},
        {**QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    ),
    "gemma-3": _gemma3,
    "idefics3": partial(_idefics3, "idefics3"),
    "smolvlm": partial(_idefics3, "smolvlm"),
    "internvl": _internvl,
    "prototype-llava": _prototype_llava,
}  # fmt: skip


def _mllama(*args, **kwargs) -> PreTrainedModel:
    text = {
        "model_type": "mllama_text_model", "num_hidden_layers": 3, "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "model_type": "mllama_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_global_layers": 1, "attention_heads": 2, "image_size": 16, "patch_size": 4, "max_num_tiles": 2,
        "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    model = _from_config("mllama", text, vision, {"image_token_index": "<|image|>"}, *args, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):  # zero before training
                parameter.fill_(0.7)
    return model


# Images are not tokens of the prompt in these families, so they support neither prefix sharing nor packing.
CROSS_ATTENTION: dict[str, Callable[..., PreTrainedModel]] = {"llama-3.2-vision": _mllama}
# The published templates of Qwen2-VL and Qwen2.5-VL are identical
_PROCESSORS = {"qwen2-vl": "qwen2.5-vl", "llava-mistral": "llava-1.5-hf", "prototype-llava": "vicuna"}


def base_model(family: str, seed: int = 0, **overrides) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a model of a family and its processor as published, without `<vusr>`."""
    processor = FAMILIES[_PROCESSORS.get(family, family)]()
    return (MODELS | CROSS_ATTENTION)[family](processor, seed, **overrides), processor


def tiny_model(
    family: str, *, seed: int = 0, attn_implementation: str = "sdpa", **overrides
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Return a model of a family, in float32 and evaluation mode, and its processor, both with `<vusr>`.

    Args:
        family (`str`): A key of `MODELS` or `CROSS_ATTENTION`.
        seed (`int`, *optional*, defaults to `0`): Seed of the weights. The global random state does not change.
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`): Attention of both towers.
        **overrides: Settings of the text configuration (of `tiny_llava` for `"vicuna"`).
    """
    processor = FAMILIES[_PROCESSORS.get(family, family)]()
    add_vusr(processor)
    model = (MODELS | CROSS_ATTENTION)[family](processor, seed, **overrides)
    model.set_attn_implementation(attn_implementation)
    return prepare_policy(model, processor).eval(), processor

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints in the layout of the original LLaVA code, and a reference forward pass of that model.

Both use plain torch functions and no model class. Tests compare converted checkpoints with the reference.
"""

import json
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 136,
    "patch_size": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
TEXT = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "hidden_act": "silu",
    "max_position_embeddings": 512,
}  # fmt: skip
CENTERS, RANK, ALPHA = 256, 4, 8
TOWER = "model.vision_tower.vision_tower.vision_model."  # prefix of the names of its weights

_WORDS = ["US", "ER", "USER", "▁USER", "VUSER", "▁VUSER", "▁A", "SS", "ASS", "▁ASS", "is", "▁is", "th", "the", "▁the"]
PIECES = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)), *_WORDS,
]  # fmt: skip


def language_weights(rows: int = len(PIECES), seed: int = 0) -> dict[str, torch.Tensor]:
    random = _normal(seed)
    size, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    keys = size // TEXT["num_attention_heads"] * TEXT["num_key_value_heads"]
    weights = {"model.embed_tokens.weight": random(rows, size), "lm_head.weight": random(rows, size)}
    weights["model.norm.weight"] = 1 + random(size)
    for layer in range(TEXT["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (size, size), "self_attn.k_proj": (keys, size), "self_attn.v_proj": (keys, size),
            "self_attn.o_proj": (size, size), "mlp.gate_proj": (inner, size), "mlp.up_proj": (inner, size),
            "mlp.down_proj": (size, inner),
        }  # fmt: skip
        weights |= {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = 1 + random(size)
    return weights


def vision_weights(prefix: str, seed: int = 1) -> dict[str, torch.Tensor]:
    random = _normal(seed)
    size, inner, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    positions = (VISION["image_size"] // patch) ** 2 + 1
    weights = {
        "embeddings.class_embedding": random(size),
        "embeddings.patch_embedding.weight": random(size, 3, patch, patch),
        "embeddings.position_embedding.weight": random(positions, size),
    }
    norms, linears = ["pre_layrnorm", "post_layernorm"], {}
    for layer in range(VISION["num_hidden_layers"]):
        at = f"encoder.layers.{layer}"
        norms += [f"{at}.layer_norm1", f"{at}.layer_norm2"]
        linears |= {f"{at}.self_attn.{name}_proj": (size, size) for name in ("q", "k", "v", "out")}
        linears |= {f"{at}.mlp.fc1": (inner, size), f"{at}.mlp.fc2": (size, inner)}
    weights |= {f"{name}.weight": 1 + random(size) for name in norms} | {f"{n}.bias": random(size) for n in norms}
    weights |= {f"{name}.weight": random(*shape) for name, shape in linears.items()}
    weights |= {f"{name}.bias": random(shape[0]) for name, shape in linears.items()}
    return {prefix + name: tensor for name, tensor in weights.items()}


def projector_weights(kind: str, prefix: str = "model.mm_projector.", seed: int = 2) -> dict[str, torch.Tensor]:
    random = _normal(seed)
    size, out = VISION["hidden_size"], TEXT["hidden_size"]
    if kind == "mlp2x_gelu":
        weights = {
            "0.weight": random(out, size),
            "0.bias": random(out),
            "2.weight": random(out, out),
            "2.bias": random(out),
        }
    else:
        weights = {"sim_alpha": 1 + random(1, 1, 1), "sim_beta": random(1, 1, 1)}
        for name in ("c", "v", "f"):
            weights |= {f"{name}.weight": random(size, size), f"{name}.bias": random(size)}
        weights |= {"ln_1.weight": 1 + random(size), "ln_1.bias": random(size)}
        weights |= {"mlp.0.weight": random(out, size), "mlp.0.bias": random(out)}
        weights |= {"mlp.2.weight": random(out, out), "mlp.2.bias": random(out)}
    return {prefix + name: tensor for name, tensor in weights.items()}


def lora_weights(weights: dict[str, torch.Tensor], start: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return LoRA weights for every linear layer of `weights`, with PEFT's names and the prefix `start`."""
    random, made = _normal(seed), {}
    for name, weight in weights.items():
        if name.endswith(("_proj.weight", ".fc1.weight", ".fc2.weight")):
            layer = f"{start}{name.removesuffix('.weight')}"
            made[f"{layer}.lora_A.weight"] = random(RANK, weight.shape[1]) / 3
            made[f"{layer}.lora_B.weight"] = random(weight.shape[0], RANK)
    return made


def merged(weights: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    result = dict(weights)
    for name in weights:
        layer = f"{start}{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in lora:
            result[name] = (
                weights[name] + ALPHA / RANK * lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
            )
    return result


def write_checkpoint(
    directory: Path, weights: dict[str, torch.Tensor], kind: str = "mlp2x_gelu", form: str = "bin", **config
) -> Path:
    """Write a directory as the original code saves it: weights, config.json and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, weights, form)
    content = {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], **TEXT,
        "vocab_size": len(weights.get("model.embed_tokens.weight", PIECES)), "torch_dtype": "float16",
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "mm_projector_type": kind,
        "mm_hidden_size": VISION["hidden_size"], "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_vision_tower": str(directory.parent / "clip"), "image_aspect_ratio": "pad", "use_mm_proj": True,
    } | config  # fmt: skip
    (directory / "config.json").write_text(json.dumps(content))
    write_tokenizer(directory)
    return directory


def write_weights(directory: Path, weights: dict[str, torch.Tensor], form: str, stem: str = "") -> None:
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    suffix = form.removeprefix("sharded-")
    stem = stem or {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    save = {"bin": torch.save, "safetensors": save_file}[suffix]
    if form == suffix:
        return save(weights, directory / f"{stem}.{suffix}")
    names = sorted(weights)
    halves = {f"{stem}-0000{n + 1}-of-00002.{suffix}": names[n::2] for n in range(2)}
    for file, members in halves.items():
        save({name: weights[name] for name in members}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in halves.items() for name in members}}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_clip(directory: Path, weights: dict[str, torch.Tensor] | None = None, form: str = "bin") -> Path:
    """Write a directory in the layout of openai/clip-vit-large-patch14-336, with both towers of CLIP."""
    directory.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        text = {"text_model.final_layer_norm.weight": torch.ones(8), "text_projection.weight": torch.ones(8, 8)}
        both = weights | text | {"visual_projection.weight": torch.ones(8, 32), "logit_scale": torch.ones(())}
        write_weights(directory, both | {"vision_model.embeddings.position_ids": torch.arange(290)[None]}, form)
    config = {"model_type": "clip", "vision_config": VISION, "text_config": {}}
    (directory / "config.json").write_text(json.dumps(config))
    mean = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "crop_size": 136, "size": 136}
    (directory / "preprocessor_config.json").write_text(json.dumps(mean))
    return directory


def write_training_output(
    directory: Path, lora: dict, trainables: dict, vision_lora: dict | None = None, kind: str = "cluster"
) -> Path:
    """Write a directory as the original training code saves it."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "/home/author/base"}
    (directory / "Vit-lora").mkdir(parents=True)
    for where, weights in ((directory, lora), (directory / "Vit-lora", vision_lora)):
        if weights is None:
            where.rmdir()
        else:
            (where / "adapter_config.json").write_text(json.dumps(config))
            torch.save(weights, where / "adapter_model.bin")
    torch.save(trainables, directory / "non_lora_trainables.bin")
    own = {"model_type": "llava", "mm_projector_type": kind, "mm_hidden_size": 32, "image_aspect_ratio": "pad"}
    (directory / "config.json").write_text(json.dumps(own))
    return directory


def write_tokenizer(directory: Path, pieces: list[str] | None = None, legacy: bool = False) -> None:
    (directory / "tokenizer.model").write_bytes(sentencepiece(PIECES if pieces is None else pieces))
    config = {"legacy": legacy, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"pad_token": "<unk>", "model_max_length": 2048})
    )


def sentencepiece(pieces: list[str], model_type: int = 2) -> bytes:
    """Return a sentencepiece file: a message per piece with its text, score and type, then the trainer's settings."""

    def chunk(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    data = b""
    for index, piece in enumerate(pieces):
        data += chunk(
            1, chunk(1, piece.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", -index) + bytes([3 << 3, 1])
        )
    return data + chunk(2, bytes([3 << 3, model_type]))


def convert(*settings, **further_settings) -> dict:
    """Convert a checkpoint with the settings of [`ConvertArguments`]."""
    from medst_trl.interop.conversion.convert import convert_checkpoint
    from medst_trl.interop.convert_stage import ConvertArguments

    return convert_checkpoint(ConvertArguments(*settings, **further_settings))


def forward(weights: dict[str, torch.Tensor], kind: str, ids: torch.Tensor, pixels: torch.Tensor, image_id: int):
    """
    Compute the logits of the original model.

    `weights` have the original names and include the vision tower. `ids` have shape (length,) with one id per image
    patch. `pixels` have shape (1, 3, side, side).
    """
    features = _clip(weights, pixels)
    at = "model.mm_projector."
    if kind == "mlp2x_gelu":
        features = _linear(weights, f"{at}2", F.gelu(_linear(weights, f"{at}0", features)))
    else:
        features = _prototypes(weights, at, features)
    text = weights["model.embed_tokens.weight"]
    embedded = torch.stack([text[0] if token == image_id else text[token] for token in ids.tolist()])
    embedded[ids == image_id] = features[0]
    return _llama(weights, embedded) @ weights["lm_head.weight"].T


def _clip(weights, pixels):
    heads, width = VISION["num_attention_heads"], VISION["hidden_size"]

    def norm(name, x):
        return F.layer_norm(x, (width,), weights[f"{TOWER}{name}.weight"], weights[f"{TOWER}{name}.bias"], 1e-5)

    patches = F.conv2d(pixels, weights[f"{TOWER}embeddings.patch_embedding.weight"], stride=VISION["patch_size"])
    x = torch.cat([weights[f"{TOWER}embeddings.class_embedding"][None, None], patches.flatten(2).transpose(1, 2)], 1)
    x = norm("pre_layrnorm", x + weights[f"{TOWER}embeddings.position_embedding.weight"])
    for layer in range(VISION["num_hidden_layers"] - 1):  # features come from the layer before the last
        at = f"encoder.layers.{layer}"
        y = norm(f"{at}.layer_norm1", x)
        q, k, v = (
            _linear(weights, f"{TOWER}{at}.self_attn.{name}_proj", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        y = torch.softmax(q @ k.transpose(2, 3) / (width // heads) ** 0.5, -1) @ v
        x = x + _linear(weights, f"{TOWER}{at}.self_attn.out_proj", y.transpose(1, 2).flatten(2))
        y = _quick_gelu(_linear(weights, f"{TOWER}{at}.mlp.fc1", norm(f"{at}.layer_norm2", x)))
        x = x + _linear(weights, f"{TOWER}{at}.mlp.fc2", y)
    return x[:, 1:]


def _prototypes(weights, at, x):
    """Compute the prototype extractor as released, with a tensor of every center at every position."""
    value, feature = _linear(weights, f"{at}v", x), _linear(weights, f"{at}f", x)
    centers = F.adaptive_avg_pool1d(x.transpose(1, 2), CENTERS).transpose(1, 2)
    pooled = F.adaptive_avg_pool1d(feature.transpose(1, 2), CENTERS).transpose(1, 2)
    for _ in range(2):
        centers = _linear(weights, f"{at}c", centers)
        similar = F.normalize(centers, dim=-1) @ F.normalize(value.transpose(1, 2), dim=-1)
        centers = torch.softmax(similar, -2) @ feature
    cosine = F.normalize(centers, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)
    similarity = torch.sigmoid(weights[f"{at}sim_beta"] + weights[f"{at}sim_alpha"] * cosine)
    nearest = torch.zeros_like(similarity).scatter_(1, similarity.argmax(1, keepdim=True), 1.0)
    similarity = similarity * nearest
    summed = (feature[:, None] * similarity[..., None]).sum(2)
    out = (summed + pooled) / (nearest.sum(-1, keepdim=True) + 1)
    x = x + (out[:, :, None] * similarity[..., None]).sum(1)
    return _linear(weights, f"{at}mlp.2", _quick_gelu(_linear(weights, f"{at}mlp.0", x)))


def _llama(weights, x):
    heads, keys = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
    size = TEXT["hidden_size"] // heads
    # in float32 for weights of any dtype, as in all Llama implementations: large angles are off by 1e-5
    angles = torch.arange(len(x))[:, None].float() * (1 / TEXT["rope_theta"] ** (torch.arange(0, size, 2) / size))
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))

    def norm(name, y):
        exact = y.float()  # as in all Llama implementations
        exact = exact * (exact.pow(2).mean(-1, keepdim=True) + TEXT["rms_norm_eps"]).rsqrt()
        return exact.to(y.dtype) * weights[f"{name}.weight"]

    def rotated(y):
        return y * cos + torch.cat([-y[..., size // 2 :], y[..., : size // 2]], -1) * sin

    future = torch.full((len(x), len(x)), float("-inf")).triu(1)
    for layer in range(TEXT["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(f"{at}.input_layernorm", x)
        q, k, v = (
            (y @ weights[f"{at}.self_attn.{name}_proj.weight"].T).unflatten(-1, (number, size)).transpose(0, 1)
            for name, number in (("q", heads), ("k", keys), ("v", keys))
        )
        k, v = (part.repeat_interleave(heads // keys, 0) for part in (rotated(k), v))
        y = torch.softmax(rotated(q) @ k.transpose(1, 2) / size**0.5 + future, -1) @ v
        x = x + y.transpose(0, 1).flatten(1) @ weights[f"{at}.self_attn.o_proj.weight"].T
        y = norm(f"{at}.post_attention_layernorm", x)
        y = F.silu(y @ weights[f"{at}.mlp.gate_proj.weight"].T) * (y @ weights[f"{at}.mlp.up_proj.weight"].T)
        x = x + y @ weights[f"{at}.mlp.down_proj.weight"].T
    return norm("model.norm", x)


def _linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def _quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def _normal(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.3 * torch.randn(shape, generator=generator)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
GPU memory of a training step, by formula. An estimate: fragmentation adds 5 to 15%.

**Weights, gradients, optimizer.** With F frozen parameters of `w` bytes, T trained ones, `s` bytes of optimizer state
for each of these (AdamW: two float32, 8; in 8 bit: 2), `b` bytes of an element in computation, n processes:

                      weights          trained   gradients      optimizer        in addition
    one process       w F              4 T       4 T            s T
    DDP               w F              4 T       4 T            s T              4 T, the buckets of gradients
    ZeRO-2            b F              b T       b T / n        (4 + s) T / n    a bucket of 5e8 elements
    ZeRO-3            b F / n          b T / n   b T / n        (4 + s) T / n    the bucket, and weights gathered for
                                                                                 use, 1e9 elements at most
    FSDP2             w F / n          4 T / n   4 T / n        s T / n          also the gathered weights

Trainable weights are kept in float32 except under DeepSpeed, which casts the whole model to `b` bytes and keeps
float32 copies of them in its optimizer. If every weight trains, it is kept in its own `dtype`: with two bytes, the 4
and AdamW's `s` are halved. A 4-bit base takes half a byte for each weight of its linear layers and 4 bytes for every
64 of them, see `NF4`. The reference of DPO is a second adapter if one is trained further, nothing under a new adapter
or if its log-probabilities are precomputed, and otherwise a second model.

**Activations.** A rule for any transformer: a layer keeps for each token, in elements of `b` bytes (2 under bfloat16,
else 4), the output of each linear layer, that of the activation function, and the input of each linear layer that
trains or has LoRA; in float32, the inputs of its two norms; with dropout, a mask on each LoRA input. With gradient
checkpointing only the input of each layer is kept, and one layer after another is recomputed. A vision tower in which
nothing trains keeps nothing. After the last layer come the gradients of one MLP, and the tiles of TRL's fused output
layer, 4,096 tokens by 32,768 entries of the vocabulary, instead of all logits.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from medst_trl.pipeline.launch import Batch, Hardware
from medst_trl.policy.families import model_parts

from .policies import Policy, is_of_adapter


GIB = 2**30
BUCKET = 5e8  # elements; DeepSpeed's reduce_bucket_size, allocated whole
MAX_GATHERED = 1e9  # elements; its stage3_max_live_parameters, and more than FSDP2 gathers of a 7B model
CONTEXT = 0.6 * GIB  # CUDA's context, kernels and cuBLAS workspaces
NCCL = 0.4 * GIB  # buffers between GPUs
SECOND_ANSWER = 256  # tokens of a pair's other answer, if its prompt is shared
DEFAULT_LENGTH = 2048  # if no max_length is set
HEAD_TILE = (4096, 32768)  # trl.kernels.chunked_logprob: tokens, and entries of the vocabulary
NF4 = 1 / 2 + (1 + 4 / 256) / 64  # bytes: 4 bits, and for every 64 weights a scale of a little over 8 bits
HEAD_COPIES_ON_CPU = 6  # in float32; a Triton kernel needs none
MLP_GRADIENTS = 6  # hidden sizes
DYNAMIC_IMAGE = 448  # pixels per side that are assumed if a model takes images of any size


@dataclass(frozen=True)
class Precision:
    """
    Bytes of an element.

    Args:
        compute (`int`): In matrix products: 2 under bfloat16 or float16.
        stream (`int`): Between layers: that of the frozen weights.
        autocast (`bool`): Whether products cast their inputs; otherwise all weights have one type.
        on_gpu (`bool`): On a CPU a dropout mask has the size of its input, and TRL has no kernel for its tiles.
    """

    compute: int
    stream: int
    autocast: bool
    on_gpu: bool = True


def training_memory(
    policy: Policy, arguments: tuple[Any, ...], batch: Batch, hardware: Hardware, length: int
) -> dict[str, float]:
    """
    Return the bytes of a training step on each device, by purpose.

    Args:
        policy ([`~medst_trl.pipeline.plan.policies.Policy`]): What trains.
        arguments (`tuple`): The stage's dataclasses.
        batch ([`~medst_trl.pipeline.launch.Batch`]): Examples of a step.
        hardware ([`~medst_trl.pipeline.launch.Hardware`]): How they are divided.
        length (`int`): Tokens of an example.
    """
    args, training = arguments
    sequences, tokens = batch.per_device, length
    if getattr(training, "share_prefix", False):
        tokens += min(SECOND_ANSWER, tokens // 2)
    elif hasattr(training, "share_prefix"):
        sequences *= 2  # the two answers of each pair
    precision, checkpointing = precision_of(args, training, hardware), training.gradient_checkpointing
    trained = policy.model.num_parameters(only_trainable=True)
    frozen = frozen_bytes(policy, precision.stream, args.load_in_4bit)
    element = 4 if policy.is_adapter else precision.stream
    parts = state_bytes(trained, frozen, hardware, precision.compute, optimizer_bytes(training.optim), element)
    if hardware.shards_weights:
        parts["gathered weights"] = min(policy.model.num_parameters(), MAX_GATHERED) * precision.compute
    parts["reference"] = _reference(policy, training, frozen, hardware, precision.stream)
    parts["activations"] = activation_bytes(policy, sequences, tokens, precision, checkpointing)
    if precision.autocast and not checkpointing:
        parts["activations"] += precision.compute * trained  # autocast's copies of the weights
    if hardware.on_gpu:
        parts["CUDA"] = CONTEXT + (NCCL if hardware.processes > 1 else 0)
    return {name: size for name, size in parts.items() if size}


# Weights, gradients, optimizer


def state_bytes(
    trained: int, frozen: float, hardware: Hardware, compute: int = 4, optimizer: int = 8, element: int = 4
) -> dict[str, float]:
    """
    Bytes of weights, gradients and optimizer; see the table above.

    Args:
        trained (`int`): Parameters that train.
        frozen (`float`): Bytes of the others.
        hardware ([`~medst_trl.pipeline.launch.Hardware`]): How they are divided.
        compute (`int`, *optional*, defaults to `4`): Bytes of an element in computation.
        optimizer (`int`, *optional*, defaults to `8`): Bytes of optimizer state for each trained parameter.
        element (`int`, *optional*, defaults to `4`): Bytes of a trained parameter itself, without DeepSpeed.
    """
    n = hardware.processes
    shards = n if hardware.shards_weights else 1
    if hardware.is_deepspeed:
        return {
            "weights": frozen / shards,
            "trained": compute * trained / shards,
            "gradients": compute * trained / n,
            "optimizer": (4 + optimizer) * trained / n,
            "buckets": compute * BUCKET,
        }
    state = optimizer * trained * (element / 4 if optimizer == 8 else 1)  # AdamW's has the type of the parameter
    parts = {"weights": frozen, "trained": element * trained, "gradients": element * trained, "optimizer": state}
    parts = {name: size / shards for name, size in parts.items()}
    return parts | ({"buckets": element * trained} if hardware.kind == "DDP" else {})


def precision_of(args: Any, training: Any, hardware: Hardware) -> Precision:
    """Bytes of the elements of a training, with the types that its stage chooses."""
    half = training.bf16 or training.fp16
    stores_half = half if hardware.is_deepspeed else args.weights_dtype(training) != "float32"
    stream = 2 if stores_half else 4
    return Precision(2 if half else stream, stream, half and not hardware.is_deepspeed, hardware.on_gpu)


def optimizer_bytes(optim: str) -> int:
    """Bytes of state for each trained parameter; unknown optimizers count as AdamW."""
    name = str(getattr(optim, "value", optim))
    if "8bit" in name:
        return 2
    return 0 if name in ("sgd", "adafactor") else 8  # Adafactor keeps a row and a column of each matrix


def frozen_bytes(policy: Policy, element: int, in_4_bit: bool = False) -> float:
    """Bytes of the weights that do not train, in their own type."""
    total = sum(p.numel() for p in policy.model.parameters() if not p.requires_grad) * element
    if not in_4_bit:
        return total
    quantized = sum(module.weight.numel() for module in quantized_layers(policy))
    return total + quantized * (NF4 - element)


def quantized_layers(policy: Policy) -> list[nn.Module]:
    """The linear layers that `load_in_4bit` quantizes: those of the language model, without the output layer."""
    model = policy.base_model
    layers = model.get_submodule(model_parts(model).language_model).named_modules()
    return [module for name, module in layers if isinstance(module, nn.Linear) and "lora_" not in name]


def _reference(policy: Policy, training: Any, frozen: float, hardware: Hardware, element: int) -> float:
    """Bytes of DPO's reference, whose weights have `element` bytes each; 0 for other stages."""
    is_new_adapter = policy.is_adapter and not policy.continues_adapter  # the reference is the model without it
    if getattr(training, "precompute_ref_log_probs", True) or is_new_adapter:
        return 0.0
    if policy.is_adapter:
        adapter = sum(p.numel() for name, p in policy.model.named_parameters() if is_of_adapter(name))
        size = adapter * (element if hardware.is_deepspeed else 4)
    else:
        size = frozen + policy.model.num_parameters(only_trainable=True) * element
    return size / (hardware.processes if hardware.shards_weights else 1)


# Activations


def activation_bytes(policy: Policy, sequences: int, length: int, precision: Precision, checkpointing: bool) -> float:
    """
    Bytes that one forward pass keeps, and that its backward pass needs in addition.

    Args:
        policy ([`~medst_trl.pipeline.plan.policies.Policy`]): What trains.
        sequences (`int`): Sequences per batch, with an image each.
        length (`int`): Tokens of each, images included.
        precision ([`Precision`]): Bytes of an element.
        checkpointing (`bool`): Whether layers are recomputed.
    """
    model, parts, tokens = policy.base_model, model_parts(policy.base_model), sequences * length
    saved = tower_bytes(policy, parts.language_model, tokens, precision, checkpointing)
    if any(parts.part_of(name) == "vision" for name, p in policy.model.named_parameters() if p.requires_grad):
        saved += tower_bytes(policy, parts.vision_tower, sequences * patches_of(model), precision, checkpointing)
    text, (rows, columns) = model.config.get_text_config(), HEAD_TILE
    copies = 0 if precision.on_gpu else HEAD_COPIES_ON_CPU * 4 * min(text.vocab_size, columns)
    tile = min(tokens, rows) * (columns * precision.compute + copies)  # of a small vocabulary, too
    return saved + tile + tokens * text.hidden_size * ((1 + MLP_GRADIENTS) * precision.compute + 4)


def tower_bytes(policy: Policy, name: str, tokens: int, precision: Precision, checkpointing: bool) -> float:
    """Bytes that the layers of a tower keep of a number of tokens."""
    layers = defaultdict(list)
    for path, module in policy.base_model.get_submodule(name).named_modules():
        layer = re.match(r"(.*?\.\d+)\.", path)
        if layer and isinstance(module, nn.Linear) and "lora_" not in path:
            trains = path.endswith(".base_layer") or module.weight.requires_grad
            layers[layer[1]].append((module.in_features, module.out_features, module.in_features * trains))
    has_dropout = policy.is_adapter and any(config.lora_dropout for config in policy.model.peft_config.values())
    mask = (1 if precision.on_gpu else 4) if has_dropout else 0
    kept, inputs = [], 0
    for linear in layers.values():
        hidden, outputs, trained = linear[0][0], [out for _, out, _ in linear], sum(size for *_, size in linear)
        elements = sum(outputs) + max(outputs) - hidden + trained  # the last output is the input of the next norm
        kept.append(elements * precision.compute + 2 * hidden * 4 + trained * mask)
        inputs += hidden * precision.stream
    return tokens * (inputs + max(kept, default=0) if checkpointing else sum(kept))


def patches_of(model: PreTrainedModel) -> int:
    """Patches of one image in the vision tower, those of all its tiles."""
    vision = model.config.vision_config
    sizes = (getattr(vision, "image_size", None) or DYNAMIC_IMAGE, getattr(vision, "patch_size", 14))
    side, patch = (size[0] if isinstance(size, list | tuple) else size for size in sizes)
    tiles = 5 if getattr(model.config, "image_grid_pinpoints", None) else 1  # LLaVA-NeXT: four and the whole image
    return tiles * ((side // patch) ** 2 + 1)

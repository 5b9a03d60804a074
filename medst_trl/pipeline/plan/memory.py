# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
GPU memory of a training step, by formula. An estimate: what the allocator cannot use comes on top, 5 to 15%.

With F frozen parameters of `w` bytes, T trained ones, `s` bytes of optimizer state for each of these (AdamW: two
float32, 8; in 8 bit: 2), `b` bytes of an element in computation, n processes:

                      weights          trained   gradients      optimizer        beside
    one process       w F              4 T       4 T            s T
    DDP               w F              4 T       4 T            s T              4 T, the buckets gradients travel in
    ZeRO-2            b F              b T       b T / n        (4 + s) T / n    a bucket of 5e8 elements
    ZeRO-3            b F / n          b T / n   b T / n        (4 + s) T / n    the bucket, and weights gathered for
                                                                                 use, 1e9 elements at most
    FSDP2             w F / n          4 T / n   4 T / n        s T / n          two layers, and what is in no layer

What trains is kept in float32 but for DeepSpeed, which casts the whole model to `b` bytes and keeps float32 copies of
what trains in its optimizer. Where every weight trains, it is kept in its own `dtype`: of two bytes, it halves the 4
and AdamW's `s`. A 4-bit base takes half a byte for each weight of its linear layers and 4 bytes for each 64 of them,
see [`quantized_bytes`]. The reference of DPO is a second adapter where one is continued, nothing under a new adapter
or where its log-probabilities are computed before, and else a second model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .activations import Precision, activation_bytes
from .batches import Batch
from .hardware import Hardware
from .trainable import Policy


if TYPE_CHECKING:
    from torch import nn

GIB = 2**30
BUCKET = 5e8  # elements; DeepSpeed's reduce_bucket_size, allocated whole
LIVE = 1e9  # elements; its stage3_max_live_parameters
CONTEXT = 0.6 * GIB  # CUDA's context, kernels and cuBLAS workspaces
NCCL = 0.4 * GIB  # buffers between GPUs
SECOND_ANSWER = 256  # tokens of a pair's other answer, where its prompt is shared
DEFAULT_LENGTH = 2048  # where no max_length is set


@dataclass(frozen=True)
class Memory:
    """
    Bytes on each device, by what they are for.

    Args:
        parts (`dict[str, float]`): From largest to smallest as they are explained above.
        length (`int`): Tokens of the longest sequence, for which it is.
    """

    parts: dict[str, float]
    length: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def training_memory(
    policy: Policy, arguments: tuple[Any, ...], batch: Batch, hardware: Hardware, length: int | None = None
) -> Memory:
    """
    Memory of a training step on each device.

    Args:
        policy ([`~medst_trl.pipeline.plan.trainable.Policy`]): What trains.
        arguments (`tuple`): The stage's dataclasses.
        batch ([`~medst_trl.pipeline.plan.batches.Batch`]): Examples of a step.
        hardware ([`~medst_trl.pipeline.plan.hardware.Hardware`]): How they are divided.
        length (`int`, *optional*): Tokens of an example; `max_length` by default, the most.
    """
    args, training = arguments
    length = length or training.max_length or DEFAULT_LENGTH
    precision = precision_of(args, training, hardware)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    frozen_type = precision.compute if hardware.is_deepspeed else precision.stream
    frozen = frozen_bytes(policy, frozen_type, bool(getattr(args, "load_in_4bit", False)))
    parts = state_bytes(
        trained,
        frozen,
        hardware,
        compute=precision.compute,
        optimizer=optimizer_bytes(training.optim),
        held=4 if policy.is_adapter else precision.stream,
    )
    if hardware.kind.startswith("FSDP"):
        parts["gathered weights"] = _gathered_by_fsdp(policy) * precision.compute
    elif hardware.shards_weights:
        elements = sum(p.numel() for p in policy.model.parameters())
        parts["gathered weights"] = min(elements, LIVE) * precision.compute
    parts["reference"] = _reference(policy, training, trained, frozen, frozen_type, hardware)
    images = batch.per_device
    sequences, tokens = _sequences(training, batch, length)
    parts["activations"] = activation_bytes(
        policy,
        sequences=sequences,
        length=tokens,
        images=images * (1 if sequences == batch.per_device else 2),
        precision=precision,
        checkpointing=training.gradient_checkpointing,
    )
    if precision.autocast and not training.gradient_checkpointing:
        parts["activations"] += precision.compute * trained  # autocast's copies of the weights
    if hardware.on_gpu:
        parts["CUDA"] = CONTEXT + (NCCL if hardware.processes > 1 else 0)
    return Memory({name: size for name, size in parts.items() if size}, length)


def state_bytes(
    trained: int, frozen: float, hardware: Hardware, compute: int = 4, optimizer: int = 8, held: int = 4
) -> dict[str, float]:
    """
    Bytes of weights, gradients and optimizer, see the table above.

    Args:
        trained (`int`): Parameters that train.
        frozen (`float`): Bytes of those that do not.
        hardware ([`~medst_trl.pipeline.plan.hardware.Hardware`]): How they are divided.
        compute (`int`, *optional*, defaults to `4`): Bytes of an element in computation.
        optimizer (`int`, *optional*, defaults to `8`): Bytes of optimizer state for each trained parameter.
        held (`int`, *optional*, defaults to `4`): Bytes of a trained parameter itself, without DeepSpeed.
    """
    n = hardware.processes
    if not hardware.is_deepspeed:
        cut = n if hardware.shards_weights else 1
        state = optimizer * trained * (held / 4 if optimizer == 8 else 1)  # AdamW's is of the parameter's own type
        parts = {"weights": frozen, "trained": held * trained, "gradients": held * trained, "optimizer": state}
        parts = {name: size / cut for name, size in parts.items()}
        return parts | ({"buckets": held * trained} if hardware.kind == "DDP" else {})
    cut = n if hardware.shards_weights else 1
    return {
        "weights": frozen / cut,
        "trained": compute * trained / cut,
        "gradients": compute * trained / n,
        "optimizer": (4 + optimizer) * trained / n,
        "buckets": compute * BUCKET,
    }


def precision_of(args: Any, training: Any, hardware: Hardware) -> Precision:
    """Bytes of the elements of a training, as its stage decides on their types."""
    half = training.bf16 or training.fp16
    frozen = args.dtype or ("bfloat16" if half and args.use_lora else "float32")
    stream = 4 if frozen == "float32" else 2
    if hardware.is_deepspeed:
        stream = 2 if half else 4
    return Precision(
        compute=2 if half else stream,
        stream=stream,
        autocast=half and not hardware.is_deepspeed,
        on_gpu=hardware.on_gpu,
    )


def optimizer_bytes(optim: str) -> int:
    """Bytes of state for each trained parameter; what is not known counts as AdamW."""
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
    return total - quantized * element + quantized_bytes(quantized)


def quantized_bytes(weights: int) -> float:
    """Bytes of NF4 weights: 4 bits each and, for each 64, a scale that is itself kept in 8 bits and a little."""
    return weights / 2 + weights / 64 * (1 + 4 / 256)


def quantized_layers(policy: Policy) -> "list[nn.Module]":
    """The linear layers that `load_in_4bit` quantizes: those of the language model, the output layer excepted."""
    from torch import nn

    from medst_trl.policy.parts import model_parts

    model = policy.base_model
    language = model.get_submodule(model_parts(model).language_model)
    return [
        module for name, module in language.named_modules() if isinstance(module, nn.Linear) and "lora_" not in name
    ]


def _reference(policy: Policy, training: Any, trained: int, frozen: float, element: int, hardware: Hardware) -> float:
    """Bytes of what DPO compares the policy with; none in other stages."""
    if not hasattr(training, "precompute_ref_log_probs") or training.precompute_ref_log_probs:
        return 0.0
    cut = hardware.processes if hardware.shards_weights else 1
    if policy.continues_adapter:
        from .trainable import is_of_adapter

        adapter = sum(p.numel() for name, p in policy.model.named_parameters() if is_of_adapter(name))
        return adapter * (element if hardware.is_deepspeed else 4) / cut
    if policy.is_adapter:
        return 0.0
    return (frozen + trained * element) / cut


def _sequences(training: Any, batch: Batch, length: int) -> tuple[int, int]:
    """Sequences read at a time, and the tokens of each."""
    if not hasattr(training, "share_prefix"):
        return batch.per_device, length
    if training.share_prefix:
        return batch.per_device, length + min(SECOND_ANSWER, length // 2)
    return 2 * batch.per_device, length


def _gathered_by_fsdp(policy: Policy) -> int:
    """Elements of two decoder layers and of what stands outside of all layers, which FSDP2 keeps together."""
    import re

    layers, outside = {}, 0
    for name, parameter in policy.model.named_parameters():
        if match := re.search(r"^(.*?\.\d+)\.", name):
            layers[match[1]] = layers.get(match[1], 0) + parameter.numel()
        else:
            outside += parameter.numel()
    return 2 * max(layers.values(), default=0) + outside

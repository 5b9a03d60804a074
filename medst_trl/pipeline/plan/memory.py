# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a step trains, and the GPU memory that takes: both from the model's configuration alone.

**The model** is built on torch's meta device, where tensors have a shape and no content, and gets the adapter that the
stage would give it. A 7B model takes a second and no memory.

The formulas for the memory are an estimate: fragmentation adds 5 to 15%.

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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from medst_trl.base.errors import UserError, located
from medst_trl.base.hub_ids import hub_answers, is_hub_id, split_revision
from medst_trl.pipeline.launch import Batch, Hardware
from medst_trl.pipeline.recipe import Step
from medst_trl.pipeline.stage import MODEL, Output
from medst_trl.pipeline.stages._training import new_adapter
from medst_trl.policy.adapters import freeze_vision, read_adapter_config
from medst_trl.policy.chat_template import VUSR, saved_role
from medst_trl.policy.families import add_embedding_row, base_of, model_parts, on_meta
from medst_trl.policy.loading import read_model_config

from .steps import maker_of, stage_arguments


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


class NotKnownYet(UserError):
    """A configuration is not available: a step that makes it has not run, or the Hub cannot be reached."""


@dataclass(frozen=True)
class Policy:
    """
    A model on the meta device as a step trains it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. Its parameters with `requires_grad` are those that train.
        base (`str`):
            Name or directory of the model under the adapter, or of the model itself.
        continues_adapter (`bool`):
            Whether the adapter exists before the step.
        text_role (`bool`):
            Whether it asks with the text role `VUSER:`, so that no token is trained.
    """

    model: Any
    base: str
    continues_adapter: bool = False
    text_role: bool = False

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without PEFT's wrapper; LoRA layers stay inside."""
        return base_of(self.model)

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")


# What a step trains


def policy_of(step: Step, steps: Sequence[Step] = (), arguments: tuple[Any, ...] | None = None) -> Policy:
    """
    The model that a step trains, as its stage makes it.

    Args:
        step ([`~medst_trl.pipeline.recipe.Step`]):
            A step that trains.
        steps (sequence of [`~medst_trl.pipeline.recipe.Step`], *optional*):
            The recipe's steps, to find a model that one of them makes.
        arguments (`tuple`, *optional*):
            The dataclasses of its stage, if they exist already.

    Raises:
        NotKnownYet: as for [`model_at`].
    """
    args, training = arguments or stage_arguments(step)
    policy = model_at(args.model_name_or_path, steps, training.trust_remote_code, args.base_model_name_or_path)
    trains_token = args.train_vusr and not (policy.text_role or args.vusr_role == "text")
    with located(step.where):
        config = new_adapter(args, policy.model, 0 if trains_token else None)  # the row of any token has the same size
    if config is not None:
        return Policy(get_peft_model(policy.model, config, low_cpu_mem_usage=True), policy.base)
    if trains_token and not policy.is_adapter:
        with suppress(OSError, ValueError):  # no tokenizer, which alone can tell whether the vocabulary needs a row
            tokenizer = AutoTokenizer.from_pretrained(policy.base, local_files_only=not hub_answers())
            add_embedding_row(policy.model, tokenizer.get_vocab().get(VUSR, len(tokenizer)))
    if not args.train_vision:
        freeze_vision(policy.model)
    if getattr(training, "disable_dropout", False):  # DPO does
        disable_dropout_in_model(policy.model)
    return policy


def model_at(
    name_or_path: str, steps: Sequence[Step] = (), trust_remote_code: bool = False, base: str | None = None
) -> Policy:
    """
    The model or adapter in a directory or on the Hub, or the one that a step of the recipe will make.

    Raises:
        NotKnownYet: if it cannot be known before a step has run, or not without the Hub.
    """
    if not any(Path(name_or_path, name).is_file() for name in ("config.json", "adapter_config.json")):
        step, output = maker_of(name_or_path, steps)
        if output is not None and output.kind == MODEL:
            return _made_by(step, output, steps)
    name, hub = _find(name_or_path)
    if (config := read_adapter_config(name, **hub)) is not None:
        policy = model_at(base or config.base_model_name_or_path, steps, trust_remote_code)
        config.inference_mode = False  # it is trained further
        model = get_peft_model(policy.model, config, low_cpu_mem_usage=True)
        return Policy(model, policy.base, continues_adapter=True)
    template = Path(name_or_path, "chat_template.jinja")  # of a model with the text role, which trains no token
    text_role = template.is_file() and saved_role(template.read_text(encoding="utf-8")) == "text"
    return Policy(meta_model(name_or_path, trust_remote_code), name_or_path, text_role=text_role)


def _made_by(step: Step, output: Output, steps: Sequence[Step]) -> Policy:
    """The model that a step will make."""
    directory = str(Path(step.settings["output_dir"], output.directory))
    if step.stage.trains:
        policy = policy_of(step, steps)
        if policy.is_adapter:
            policy.model.train()
            for name, parameter in policy.model.named_parameters():  # loaded again, the whole adapter trains
                parameter.requires_grad_(is_of_adapter(name))
        return Policy(policy.model, policy.base, continues_adapter=policy.is_adapter)
    if output.merges:
        policy = model_at(step.settings[output.merges], steps)
        return Policy(policy.model.unload() if policy.is_adapter else policy.model, directory)
    if output.config and (known := output.config(step.settings)) is not None:
        return Policy(on_meta(known[0]), directory, text_role=known[1])
    raise NotKnownYet(f"not known before {step.label} has run: {directory}")


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of a PEFT model belongs to its adapter."""
    return any(kind in name for kind in (".lora_A.", ".lora_B.", ".modules_to_save.", ".trainable_tokens_delta."))


# Configurations


def meta_model(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    Build a vision-language model on the meta device from its configuration. No weights are read or downloaded.

    Args:
        name_or_path (`str`):
            Directory with a `config.json`, or Hub id (`org/name`, `org/name@revision`).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.

    Raises:
        UserError: if there is no configuration of a vision-language model, or it is not available offline.
    """
    name, hub = _find(name_or_path)
    try:
        config = read_model_config(name, trust_remote_code=trust_remote_code, **hub)
    except UserError as error:
        if hub["local_files_only"] and isinstance(error.__cause__, OSError):
            raise NotKnownYet(f"config not available offline: {name_or_path}") from None
        raise
    return on_meta(config, trust_remote_code=trust_remote_code)


def _find(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a model, and where to look for its files."""
    name, revision = split_revision(name_or_path)
    if not (Path(name).is_dir() or is_hub_id(name_or_path)):
        raise NotKnownYet(f"not on this machine: {name_or_path}")
    return name, {"revision": revision, "local_files_only": not Path(name).is_dir() and not hub_answers()}


# Memory


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
        policy ([`Policy`]): What trains.
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
        policy ([`Policy`]): What trains.
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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Brings base model, adapter, `<vusr>` token and chat template together, from folders or from the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import split_revision

from .base_loading import check_family_of, has_file, load_base, load_processor
from .base_weights import check_base
from .hub_reach import check_reachable
from .vusr import add_vusr, stop_token_ids
from .vusr_role import set_vusr_role


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_policy(
    model_name_or_path: str,
    *,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    dtype: "str | torch.dtype" = "auto",
    is_trainable: bool = False,
    vusr_role: str | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """
    Loads a policy and its processor, ready to be asked, to ask (`<vusr>`) and to be trained.

    The processor gets the `<vusr>` token and the template that leaves a bare `<vusr>` turn open; the model gets a row
    for the token where its vocabulary has none to spare, and stops at the template's turn terminators.

    Args:
        model_name_or_path (`str`):
            Folder or Hub id (`org/name`, `org/name@revision`) of a vision-language model, or of an adapter of one.
        base_model_name_or_path (`str`, *optional*):
            Base of an adapter, where it has moved from the place the adapter names.
        revision (`str`, *optional*):
            Hub revision of `model_name_or_path`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Weights' type; `"auto"` takes that of the checkpoint.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether an adapter is loaded for further training.
        vusr_role (`str`, *optional*):
            `"text"` to open the turns that the model writes by the text role `VUSER:` of SQ-LLaVA and STLLaVA-Med in
            the place of the token, for models with Vicuna's chat format; see [`set_vusr_role`]. What a policy was
            saved with is found in its chat template.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the frozen language model is held in 4 bits, see [`four_bit_config`].
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.
        **model_kwargs:
            Further arguments of `from_pretrained`, such as `attn_implementation`, `device_map`, `quantization_config`.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: The model (a [`~peft.PeftModel`] for an adapter), in evaluation mode,
        and its processor.

    Raises:
        UserError: if nothing can be loaded from there, the processor cannot be used (see [`add_vusr`]), or an adapter
            is of another base.

    Example:
    ```python
    >>> model, processor = load_policy("runs/demo/sft")
    ```
    """
    _check_dtype(dtype)
    model_name_or_path, named_revision = split_revision(model_name_or_path)
    revision = revision or named_revision
    common = {"trust_remote_code": trust_remote_code}
    if load_in_4bit:
        model_kwargs["load_in_4bit"] = True
    source = {"revision": revision, **common}
    check_reachable(model_name_or_path)
    if has_file(model_name_or_path, "adapter_config.json", revision):
        from .adapter_loading import put_adapter_on, read_adapter_config
        from .adapters import mend_tied_head

        config = read_adapter_config(model_name_or_path, revision)
        if not (base_model_name_or_path or config.base_model_name_or_path):
            raise UserError(f"The adapter {model_name_or_path!r} names no base: pass base_model_name_or_path.")
        base, base_revision = split_revision(base_model_name_or_path or config.base_model_name_or_path)
        common["revision"] = base_revision or (None if base_model_name_or_path else config.revision)
        try:
            check_reachable(base)
        except UserError as error:
            raise UserError(
                f"The base of the adapter {model_name_or_path!r} is not to be had (pass base_model_name_or_path if it "
                f"has moved): {error}"
            ) from error
        check_family_of(base, common)
        has_processor = has_file(model_name_or_path, "tokenizer_config.json", revision)
        processor = load_processor(model_name_or_path if has_processor else base, source if has_processor else common)
        set_vusr_role(processor, vusr_role)
        model = prepare_policy(load_base(base, dtype, model_kwargs | common, adapter=model_name_or_path), processor)
        model = put_adapter_on(model, model_name_or_path, config, revision=revision, is_trainable=is_trainable)
        check_base(model_name_or_path, revision, model.get_base_model(), config.base_model_name_or_path)
        mend_tied_head(model)
        return model.eval(), processor
    check_family_of(model_name_or_path, source)
    processor = load_processor(model_name_or_path, source)
    set_vusr_role(processor, vusr_role)
    model = load_base(model_name_or_path, dtype, model_kwargs | source)
    return prepare_policy(model, processor).eval(), processor


def _check_dtype(dtype: "str | torch.dtype") -> None:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"There is no dtype {dtype!r}; choose from {', '.join(DTYPES)}.")


def prepare_policy(model: "PreTrainedModel", processor: "ProcessorMixin") -> "PreTrainedModel":
    """
    Gives a loaded model and its processor the `<vusr>` token, in place; [`load_policy`] calls it, as do the trainers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.

    Returns:
        [`~transformers.PreTrainedModel`]: The same model.
    """
    vusr_token_id = add_vusr(processor)
    config = model.generation_config
    known = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    config.eos_token_id = list(dict.fromkeys([*known, *stop_token_ids(processor)]))
    config.pad_token_id = processor.tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    if vusr_token_id is not None:  # the text role needs none
        make_room_for(model, vusr_token_id)
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), vusr_token_id})  # read, never written
    return model


def make_room_for(model: "PreTrainedModel", token_id: int) -> None:
    import torch

    embedding = model.get_input_embeddings()
    # Under ZeRO-3 the weight itself has no rows; an adapter that trains the token has wrapped the layer.
    rows = getattr(embedding, "original_module", embedding).num_embeddings
    if token_id < rows:
        return
    model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    # The same row wherever the model is loaded again: an adapter stores its own row, but the output row counts in
    # every softmax. `mean_resizing` would draw it at random.
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                with _whole(layer.weight) as weight:
                    weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)


@contextmanager
def _whole(weight: "torch.nn.Parameter") -> "Iterator[torch.nn.Parameter]":
    """All rows of a weight, of which a rank holds a part under ZeRO-3: what is written there reaches every rank."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield weight
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
        yield weight

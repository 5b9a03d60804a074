# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""From conversations to what the model reads, and from what it writes to text. Evaluation and generation share it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medst_trl.policy.chat_template import VUSR
from medst_trl.policy.spans import in_form, typed_parts
from medst_trl.policy.vusr import neutralise_parts, turn_format

from .shared_prompts import read_once, write_on


if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, LogitsProcessor, PreTrainedModel, ProcessorMixin

# Whatever the model's own generation config says. What is left of that is which tokens end a text, and which never
# stand in one (`suppress_tokens`, `bad_words_ids`, `sequence_bias`).
GREEDY = {
    # transformers' default values: it warns of others that have no effect without sampling
    "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50,
    # another distribution, or another way of decoding
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": None,
    "guidance_scale": None, "watermarking_config": None, "penalty_alpha": None, "dola_layers": None,
    "force_words_ids": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
    "use_mtp": None,
    # what counts from where `generate` is called, and a text may be written in several calls (`write_on`)
    "min_length": None, "min_new_tokens": None, "max_time": None, "forced_eos_token_id": None,
    "begin_suppress_tokens": None, "exponential_decay_length_penalty": None, "encoder_repetition_penalty": None,
    "encoder_no_repeat_ngram_size": None, "token_healing": None,
}  # fmt: skip


def chat_inputs(
    processor: "ProcessorMixin",
    conversations: Sequence[list[dict[str, Any]]],
    images: "Sequence[list[Image.Image]]",
) -> "BatchFeature":
    """
    What the model reads: each conversation through the chat template, open for the model's turn, padded on the left.

    Whether the tokenizer adds a beginning-of-sequence token is left to transformers, as it is in a pipeline: templates
    such as LLaVA-1.5's do not write one.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The policy's processor.
        conversations (sequence of `list[dict]`):
            Messages whose content is a list of typed parts. A last message with `vusr: True` and no text is one that
            the model is to write. Text that spells a control token is neutralised.
        images (sequence of `list[PIL.Image.Image]`):
            The images of each, in the order of its image parts.

    Returns:
        [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` of shape (batch, length), and the pixel
        inputs.
    """
    form = turn_format(processor).content_form
    rendered = []
    for messages, own in zip(conversations, images, strict=True):
        left = iter(own)
        rendered.append([_message(processor, message, form, left) for message in messages])
    kwargs = {"padding": True, "padding_side": "left"}
    if form == "string" and any(images):
        kwargs["images"] = [[image.convert("RGB") for image in own] for own in images]
    return processor.apply_chat_template(
        rendered,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=kwargs,
    )


def _message(processor: "ProcessorMixin", message: dict[str, Any], form: str, images) -> dict[str, Any]:
    parts = typed_parts(message["content"])
    safe = iter(neutralise_parts([part["text"] for part in parts if part["type"] == "text"], processor)[0])
    parts = [{"type": "text", "text": next(safe)} if part["type"] == "text" else {"type": "image"} for part in parts]
    if message.get("vusr"):
        parts.append({"type": "text", "text": VUSR})
    if form != "string":
        parts = [
            {"type": "image", "image": next(images).convert("RGB")} if part["type"] == "image" else part
            for part in parts
        ]
    return {"role": message["role"], "content": in_form(parts, form, processor)}


def write_texts(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    inputs: "BatchFeature",
    max_new_tokens: int,
    sampler: "LogitsProcessor | None" = None,
    draws: Sequence[int] | None = None,
    **generates: Any,
) -> list[tuple[str, bool]]:
    """
    Let the model write behind each prompt of a batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy on its device; its generation config says which tokens end a text.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        inputs ([`~transformers.BatchFeature`]):
            From [`chat_inputs`].
        max_new_tokens (`int`):
            Where a text that does not end is cut off.
        sampler ([`~transformers.LogitsProcessor`], *optional*):
            Chooses the tokens, by leaving one with a finite score. The likeliest token by default.
        draws (sequence of `int`, *optional*):
            How many texts to write behind each prompt, which the model reads once for all of them; for models that
            [`shares_prompts`] accepts. One by default.
        **generates:
            Further arguments of `generate`, where `draws` is None.

    Returns:
        `list[tuple[str, bool]]`: each text, and whether it ended by itself. All texts behind the first prompt come
        first.
    """
    import torch

    inputs = inputs.to(model.device, model.dtype)
    tokenizer, config = processor.tokenizer, model.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends)
    vusr = tokenizer.get_vocab().get(VUSR)  # read, never written
    never = {*(config.suppress_tokens or []), *([] if vusr is None else [vusr])}
    settings = GREEDY | {
        "use_cache": True,  # configurations that were saved after gradient checkpointing may say no
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
        "suppress_tokens": sorted(never) or None,
    }
    with torch.inference_mode():
        if draws is None:
            output = model.generate(
                **inputs,
                **settings,
                max_new_tokens=max_new_tokens,
                logits_processor=None if sampler is None else [sampler],
                return_dict_in_generate=False,
                **generates,
            )
            tokens = output[:, inputs["input_ids"].shape[1] :]
        else:
            if max(draws) > 1:
                inputs = read_once(model, inputs, draws, **settings)
            tokens = write_on(model, inputs, max_new_tokens, sampler, **settings)
    ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).any(1).tolist()
    return [(text.strip(), end) for text, end in zip(processor.batch_decode(tokens, skip_special_tokens=True), ended)]

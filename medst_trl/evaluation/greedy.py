# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One batch of questions about images, answered greedily."""

from typing import TYPE_CHECKING

from medst_trl.errors import UserError


if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

# Greedy whatever the model's own generation config says; the sampling settings have transformers' default values.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def greedy_answers(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    questions: list[str],
    images: list["Image.Image"],
    max_new_tokens: int,
) -> list[tuple[str, bool]]:
    """
    Answer each question about its image.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy on its device; its generation config says which tokens end an answer.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        questions (`list[str]`):
            Questions.
        images (`list[PIL.Image.Image]`):
            The image of each.
        max_new_tokens (`int`):
            Where an answer that does not end is cut off.

    Returns:
        `list[tuple[str, bool]]`: each answer, and whether it ended by itself.

    Raises:
        UserError: if the batch does not fit into memory.
    """
    import torch

    from medst_trl.policy.chat_template import VUSR

    inputs = prompts(processor, questions, images).to(model.device, model.dtype)
    tokenizer, config = processor.tokenizer, model.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends)
    vusr = tokenizer.get_vocab().get(VUSR)  # read, never written
    never = {*(config.suppress_tokens or []), *([] if vusr is None else [vusr])}
    try:
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                **GREEDY,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                suppress_tokens=sorted(never) or None,
            )
    except torch.OutOfMemoryError:
        raise UserError(
            f"Not enough memory for {len(questions)} questions at a time. Run the same command with a smaller "
            "--batch_size; what is answered so far is kept."
        ) from None
    tokens = output[:, inputs["input_ids"].shape[1] :]
    ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).any(1).tolist()
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [(text.strip(), end) for text, end in zip(texts, ended)]


def prompts(processor: "ProcessorMixin", questions: list[str], images: list["Image.Image"]) -> "BatchFeature":
    """
    What the model reads: the chat template over one user turn of image and question, padded on the left.

    Whether the tokenizer adds a beginning-of-sequence token is left to transformers, as it is in a pipeline: templates
    such as LLaVA-1.5's do not write one.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The policy's processor.
        questions (`list[str]`):
            Questions; text that spells a control token is neutralised.
        images (`list[PIL.Image.Image]`):
            The image of each.

    Returns:
        [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` of shape (batch, length), and the pixel
        inputs.
    """
    from medst_trl.policy.vusr import neutralise, turn_format

    safe = [neutralise(question, processor)[0] for question in questions]
    kwargs = {"padding": True, "padding_side": "left"}
    if turn_format(processor).content_form == "string":
        contents = [f"{processor.image_token}\n{question}" for question in safe]
        kwargs["images"] = [[image.convert("RGB")] for image in images]
    else:
        contents = [
            [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": question}]
            for image, question in zip(images, safe)
        ]
    return processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in contents],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=kwargs,
    )

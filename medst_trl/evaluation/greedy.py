# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One batch of questions about images, answered greedily."""

from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError
from medst_trl.data.schema import image_part, message, text_part
from medst_trl.engines.decoding import chat_inputs, write_texts


if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


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

    try:
        return write_texts(model, processor, prompts(processor, questions, images), max_new_tokens)
    except torch.OutOfMemoryError:
        raise UserError(
            f"Not enough memory for {len(questions)} questions at a time. Run the same command with a smaller "
            "--batch_size; what is answered so far is kept."
        ) from None


def prompts(processor: "ProcessorMixin", questions: list[str], images: list["Image.Image"]) -> "BatchFeature":
    """
    What the model reads: the chat template over one user turn of image and question, see [`chat_inputs`].

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
    conversations = [[message("user", [image_part(), text_part(question)])] for question in questions]
    return chat_inputs(processor, conversations, [[image] for image in images])

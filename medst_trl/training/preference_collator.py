# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""TRL's vision preference collator over one tokenisation: a prompt reads as it did in stage 1 and when sampled."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from ..errors import UserError
from ..policy.vusr import add_vusr
from .encoding import TOKEN_INPUTS, Conversation, as_conversation, encode


@dataclass
class DataCollatorForMultimodalPreference(DataCollatorForVisionPreference):
    """
    Data collator for preference pairs about images.

    TRL's own collator tokenises prompt and completion apart and adds no beginning-of-sequence token; for LLaVA-1.5 the
    first log-probabilities would then be those of another text than the model was trained on and sampled from. Here
    prompt and answer are rendered and tokenised together, and what data says of control tokens is neutralised, as in
    [`DataCollatorForSelfQuestioning`].

    Each example has `prompt` (messages, the last one a user's), `chosen` and `rejected` (one assistant message each),
    `images` (a list, may be empty) and optionally `id`. An answer is cut at `max_length`.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor; it gets the `<vusr>` token if it has none yet, see [`add_vusr`].
        max_length (`int`, *optional*):
            Longest sequence in tokens, image tokens included. `None` for no limit.
        pad_to_multiple_of (`int`, *optional*):
            If set, sequences are padded to a multiple of it.

    Returns of a call:
        `dict`: `input_ids`, `attention_mask`, `completion_mask` (1 on the answer and its terminator) of shape
        (2 x batch, length), first all chosen, then all rejected; `pixel_values` and what else the processor gives.
        `neutralised` counts control tokens in data, where there are any.

    Raises:
        UserError: if a prompt leaves no room for its answer, or images and placeholders differ in number.
    """

    def __post_init__(self):
        add_vusr(self.processor)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        conversations = [pair_as_conversation(example, key) for key in ("chosen", "rejected") for example in examples]
        encoded = encode(self.processor, conversations, self.pad_to_multiple_of)
        batch = encoded.batch
        batch["completion_mask"] = torch.zeros_like(batch["input_ids"])
        for row, (conversation, spans) in enumerate(zip(conversations, encoded.spans, strict=True)):
            answer = spans[-1]  # those before it are the prompt's history
            batch["completion_mask"][row, answer.start : answer.end] = 1
            if self.max_length is not None and answer.start >= self.max_length:
                raise UserError(
                    f"Record {conversation.id!r}: its prompt and image take {answer.start} tokens, so no answer fits "
                    f"into max_length={self.max_length}. Raise max_length, or leave the record out."
                )
        for name in TOKEN_INPUTS if self.max_length is not None else ():
            if name in batch:
                batch[name] = batch[name][:, : self.max_length]
        if encoded.neutralised:
            batch["neutralised"] = encoded.neutralised
        return batch


def pair_as_conversation(example: dict[str, Any], key: str) -> Conversation:
    """The prompt of a preference pair followed by its answer `key`, `"chosen"` or `"rejected"`."""
    answer = example[key]
    if not answer or answer[-1]["role"] != "assistant" or not example["prompt"]:
        raise UserError(
            f"Record {example.get('id')!r}: `{key}` has to be one assistant message behind a `prompt` of messages."
        )
    return as_conversation(example, [*example["prompt"], *answer])

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""From preference pairs to batches, in which prompts read as in stage 1 and images are processed once."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import pad

from medst_trl.base.errors import UserError
from medst_trl.policy.spans import RenderedConversation, render_conversation
from medst_trl.policy.vusr import add_vusr, tokenizer_of

from .encoding import (
    TOKEN_INPUTS,
    Conversation,
    Encoded,
    TokenSpan,
    as_conversation,
    encode,
    tokens_without_images,
)
from .example_images import with_images
from .input_pipeline import TakesStoredImages, with_decoded_images


if TYPE_CHECKING:
    from transformers import BatchFeature


class PairOfRows(NamedTuple):
    """
    A pair as two rows of tokens that begin alike.

    Args:
        prefix_length (`int`): Tokens that both rows begin with: the prompt and its images.
        tails (`tuple[torch.Tensor, torch.Tensor]`): The tokens behind them, of the chosen and the rejected row.
        answers (`tuple[TokenSpan, TokenSpan]`): Where the answers stand in their rows.
    """

    prefix_length: int
    tails: tuple[torch.Tensor, torch.Tensor]
    answers: tuple[TokenSpan, TokenSpan]


@dataclass
class DataCollatorForMultimodalPreference(TakesStoredImages, DataCollatorForVisionPreference):
    """
    Data collator for preference pairs about images.

    TRL's own collator tokenises prompt and completion apart and adds no beginning-of-sequence token; for LLaVA-1.5 the
    first log-probabilities would then be those of another text than the model was trained on and sampled from. Here
    prompt and answer are rendered and tokenised together, and what data says of control tokens is neutralised, as in
    [`DataCollatorForSelfQuestioning`]. The images of a pair go through the processor once, not twice.

    Each example has `prompt` (messages, the last one a user's), `chosen` and `rejected` (one assistant message each),
    `images` (a list, may be empty, decoded or as `datasets` stores them) and optionally `id`. An answer is cut at
    `max_length`.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor; it gets the `<vusr>` token if it has none yet, see [`add_vusr`].
        max_length (`int`, *optional*):
            Longest sequence in tokens, image tokens included. `None` for no limit.
        pad_to_multiple_of (`int`, *optional*):
            If set, sequences are padded to a multiple of it.
        share_prefix (`bool`, *optional*, defaults to `False`):
            Gives the images of each pair once, for a model under [`PrefixSharing`], and what it needs to know.

    Returns of a call:
        `dict`: `input_ids`, `attention_mask`, `completion_mask` (1 on the answer and its terminator) of shape
        (2 x batch, length), first all chosen, then all rejected; `pixel_values` and what else the processor gives,
        for all rows, or with `share_prefix` for those of the chosen answers alone, and then `prefix_length` of shape
        (batch,), the tokens both rows of a pair begin with, and `shared_length`, those of the longest pair as one
        sequence. `neutralised` counts control tokens in data, where there are any.

    Raises:
        UserError: if a prompt leaves no room for its answer, or images and placeholders differ in number.
    """

    share_prefix: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        add_vusr(self.processor)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [with_decoded_images(example) for example in examples]
        chosen = [pair_as_conversation(example, "chosen") for example in examples]
        # The images are in mode RGB by now, and not converted a second time.
        rejected = [
            pair_as_conversation(with_images(example, conversation.images), "rejected")
            for example, conversation in zip(examples, chosen, strict=True)
        ]
        encoded = encode(self.processor, chosen)
        rendered = [render_conversation(self.processor, conversation.messages) for conversation in rejected]
        pairs = self._pairs(chosen, encoded, rendered)
        batch = self._rows(encoded.batch, pairs)
        if self.share_prefix:
            batch["prefix_length"] = torch.tensor([pair.prefix_length for pair in pairs])
            lengths = batch["attention_mask"].sum(1).view(2, -1).sum(0) - batch["prefix_length"]
            batch["shared_length"] = int(lengths.max()) + 1
        else:
            images = {name: value for name, value in batch.items() if name not in TOKEN_INPUTS}
            batch |= {name: torch.cat([value, value]) for name, value in images.items()}
        if neutralised := sum(conversation.neutralised for conversation in [*encoded.rendered, *rendered]):
            batch["neutralised"] = neutralised
        return batch

    def _pairs(
        self, chosen: list[Conversation], encoded: Encoded, rejected: list[RenderedConversation]
    ) -> list[PairOfRows]:
        """The rejected rows from their text alone: their images stand in the chosen rows already."""
        pairs = []
        lengths = encoded.batch["attention_mask"].sum(1).tolist()
        texts = tokens_without_images(self.processor, [*encoded.rendered, *rejected])
        texts = zip(texts[: len(chosen)], texts[len(chosen) :], strict=True)
        for row, (conversation, ((one, one_answer), (other, other_answer))) in enumerate(zip(chosen, texts)):
            images = lengths[row] - len(one)  # tokens they add in front of the answers
            shared = min(one_answer.start, other_answer.start)
            shared = next((place for place in range(shared) if one[place] != other[place]), shared)
            pair = PairOfRows(
                prefix_length=shared + images,
                tails=(torch.tensor(one[shared:]), torch.tensor(other[shared:])),
                answers=tuple(
                    TokenSpan(answer.start + images, answer.end + images, False)
                    for answer in (one_answer, other_answer)
                ),
            )
            if not torch.equal(encoded.batch["input_ids"][row, pair.prefix_length : lengths[row]], pair.tails[0]):
                raise UserError(
                    f"Record {conversation.id!r}: {type(self.processor).__name__} tokenises the text behind an image "
                    "otherwise than without the image, so the two answers cannot be put behind one prompt."
                )
            if self.max_length is not None and max(answer.start for answer in pair.answers) >= self.max_length:
                raise UserError(
                    f"Record {conversation.id!r}: its prompt and image take {pair.answers[0].start} tokens, so no "
                    f"answer fits into max_length={self.max_length}. Raise max_length, or leave the record out."
                )
            pairs.append(pair)
        return pairs

    def _rows(self, encoded: "BatchFeature", pairs: list[PairOfRows]) -> dict[str, Any]:
        """The batch with both rows of each pair and their `completion_mask`; images as they are in `encoded`."""
        batch = {name: value for name, value in encoded.items() if name not in TOKEN_INPUTS}
        rows = {name: [] for name in encoded if name in TOKEN_INPUTS} | {"completion_mask": []}
        for which in range(2):
            for row, pair in enumerate(pairs):
                prefix, tail, answer = pair.prefix_length, pair.tails[which], pair.answers[which]
                for name in rows.keys() - {"completion_mask"}:
                    own = encoded[name][row, :prefix]
                    # what is said of the last prompt token (text, not padding) holds for the answer
                    behind = tail if name == "input_ids" else own[-1:].expand(len(tail), *own.shape[1:])
                    rows[name].append(torch.cat([own, behind])[: self.max_length])
                completion_mask = torch.zeros(prefix + len(tail), dtype=torch.long)
                completion_mask[answer.start : answer.end] = 1
                rows["completion_mask"].append(completion_mask[: self.max_length])
        padding = {"input_ids": tokenizer_of(self.processor).pad_token_id}
        return batch | {
            name: pad(of_name, padding.get(name, 0), "right", self.pad_to_multiple_of)
            for name, of_name in rows.items()
        }


def pair_as_conversation(example: dict[str, Any], key: str) -> Conversation:
    """The prompt of a preference pair followed by its answer `key`, `"chosen"` or `"rejected"`."""
    answer = example[key]
    if not answer or answer[-1]["role"] != "assistant" or not example["prompt"]:
        raise UserError(
            f"Record {example.get('id')!r}: `{key}` has to be one assistant message behind a `prompt` of messages."
        )
    return as_conversation(example, [*example["prompt"], *answer])

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The `<vusr>` token of a processor, and how data is kept free of control tokens.

A user turn that starts with `<vusr>` is written by the model (STLLaVA-Med, https://huggingface.co/papers/2406.19973).
The token is a special token whose input embedding is trained; the model reads it and never predicts it. Data never
contains it: a message is marked with `vusr: true`, the span encoder (training) and the engines (asking) write the
token, and data text that spells a control token is neutralized. Where the template has the text role `VUSER:`
([`set_vusr_role`]) there is no token.
"""

import re
import weakref
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_choice

from .chat_template import (
    LEFT,
    RIGHT,
    VUSR,
    TurnFormat,
    has_text_role,
    is_wrapped,
    probe_turn_format,
    text_message,
    vicuna_template,
    wrap_chat_template,
)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

_T = TypeVar("_T")

VUSR_ROLES = ("token", "text")
# Inserted after the first character of a control token in data: invisible to a reader, and no longer a token.
ZERO_WIDTH_NON_JOINER = "\u200c"
_VICUNA_TURNS = re.compile(r"USER: q1\s+ASSISTANT: a1(?:</s>|\s)*USER: q2\s+ASSISTANT:$")


def tokenizer_of(processor: "ProcessorMixin | PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def add_vusr(processor: "ProcessorMixin") -> int | None:
    """
    Add the `<vusr>` token to a processor's tokenizer and wrap its chat template, in place. A second call changes
    nothing.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of a vision-language model, with a fast tokenizer, a pad token and a chat template.

    Returns:
        `int` or `None`: Token id of `<vusr>`, for which the model may need another embedding row ([`load_policy`] does
        both). `None` where the chat template has the text role `VUSER:`, to which nothing is added.

    Raises:
        UserError: if the tokenizer is slow, or the pad token, end-of-sequence token or chat template is missing.
    """
    tokenizer = tokenizer_of(processor)
    _check_processor(processor, tokenizer)
    template = processor.chat_template or tokenizer.chat_template
    if has_text_role(template):
        processor.chat_template = template
        return None
    if VUSR not in tokenizer.get_vocab():
        from tokenizers import AddedToken

        token = AddedToken(VUSR, special=True, normalized=False)
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    if not is_wrapped(template):
        processor.chat_template = template
        turns = turn_format(processor)
        template = wrap_chat_template(
            template,
            content_form=turns.content_form,
            image_token=getattr(processor, "image_token", None) or "",
            answer_end="" if turns.answer_end else tokenizer.eos_token,
        )
    _set_template(processor, template)
    return tokenizer.convert_tokens_to_ids(VUSR)


def _set_template(processor: "ProcessorMixin", template: str | dict[str, str]) -> None:
    processor.chat_template = template
    if tokenizer_of(processor).chat_template is not None:
        tokenizer_of(processor).chat_template = template


def _check_processor(processor: "ProcessorMixin", tokenizer: "PreTrainedTokenizerBase") -> None:
    name = type(processor).__name__
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} has a slow tokenizer ({type(tokenizer).__name__}), which does not report the position of a token "
            "in the text, so questions and answers cannot be located. Load the fast one (`use_fast=True`)."
        )
    if not tokenizer.pad_token:
        raise UserError(
            f"The tokenizer of {name} has no pad token, so batches cannot be padded. Set one and save the processor, "
            "for example `processor.tokenizer.pad_token = processor.tokenizer.eos_token`."
        )
    if not tokenizer.eos_token:
        raise UserError(
            f"The tokenizer of {name} has no end-of-sequence token, so a turn could not end. Set "
            "`processor.tokenizer.eos_token` and save the processor."
        )
    if not (processor.chat_template or tokenizer.chat_template):
        raise UserError(
            f"{name} has no chat template. Set `processor.chat_template` to that of an instruction-tuned model of the "
            "same family and save the processor."
        )


def set_vusr_role(processor: "ProcessorMixin", role: str | None) -> None:
    """
    Choose how the turns that the model writes are opened, in place: by the token `<vusr>` or by the words `VUSER:`.

    The choice is made once, before training. It is saved as the chat template, which decides from then on.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of a vision-language model, before [`add_vusr`].
        role (`str`, *optional*):
            `"text"` sets the template of SQ-LLaVA and STLLaVA-Med with the role `VUSER:` and its system prompt.
            `"token"` and `None` change nothing: [`add_vusr`] then adds the token, unless the template has the role.

    Raises:
        UserError: if the role is unknown, the template is not in Vicuna's format, or the processor was saved with the
            other role.
    """
    check_choice("vusr_role", role, VUSR_ROLES)
    if role is None:
        return
    tokenizer = tokenizer_of(processor)
    template = processor.chat_template or tokenizer.chat_template
    if has_text_role(template) == (role == "text"):
        return
    if role == "token" or is_wrapped(template) or VUSR in tokenizer.get_vocab():
        saved = "text" if role == "token" else "token"
        raise UserError(
            f"vusr_role is {role!r}, but this model was saved with the role {saved!r}, which its chat template "
            "decides. Leave vusr_role out, or start from the model it was trained from."
        )
    rendered = _render_two_turns(processor, template) if template else ""
    if not _VICUNA_TURNS.search(rendered):
        raise UserError(
            "vusr_role: text is for models with Vicuna's chat format (USER: ... ASSISTANT: ...), such as LLaVA-1.5, "
            "SQ-LLaVA and STLLaVA-Med. Leave it out: the token <vusr> works with any family."
        )
    writes_bos = bool(tokenizer.bos_token) and rendered.startswith(tokenizer.bos_token)
    _set_template(processor, vicuna_template(text_role=True, write_bos=writes_bos))


def _render_two_turns(processor: "ProcessorMixin", template: str | dict[str, str]) -> str:
    processor.chat_template = template
    form = turn_format(processor).content_form
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2")]
    messages = [text_message(role, text, form) for role, text in turns]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


# Kept outside the processor because `save_pretrained` writes a processor's attributes.
_FACTS: "weakref.WeakKeyDictionary[ProcessorMixin, dict]" = weakref.WeakKeyDictionary()


def _once_per_template(compute: "Callable[[ProcessorMixin], _T]") -> "Callable[[ProcessorMixin], _T]":
    """Cache something about a processor until its chat template or vocabulary changes."""

    @wraps(compute)
    def known(processor: "ProcessorMixin") -> _T:
        facts = _FACTS.setdefault(processor, {})
        key = (compute.__name__, str(processor.chat_template), len(tokenizer_of(processor)))
        if key not in facts:
            facts[key] = compute(processor)
        return facts[key]

    return known


@_once_per_template
def turn_format(processor: "ProcessorMixin") -> TurnFormat:
    """Return how the processor's chat template writes turns. Determined once per template."""
    tokens = tokenizer_of(processor).added_tokens_decoder.values()
    special = [token.content for token in tokens if token.special and token.content != VUSR]
    return probe_turn_format(processor.apply_chat_template, special)


def stop_token_ids(processor: "ProcessorMixin") -> list[int]:
    """Return the ids of the tokens that end a turn: the template's terminators and the end-of-sequence token."""
    turns, tokenizer = turn_format(processor), tokenizer_of(processor)
    stops = {turns.question_end, turns.answer_end, tokenizer.eos_token} - {"", None}
    return sorted(tokenizer.convert_tokens_to_ids(stop) for stop in stops)


def adds_special_tokens(processor: "ProcessorMixin", rendered: str) -> bool:
    """
    Return whether the tokenizer must add its special tokens to a rendered conversation, as transformers decides at
    inference.

    LLaVA-1.5's template writes no beginning-of-sequence token, so `apply_chat_template(tokenize=True)` lets the
    tokenizer add it. Training without it, as TRL's collator does, would show the model prompts that it never meets at
    inference.
    """
    bos = tokenizer_of(processor).bos_token
    return bos is None or not rendered.startswith(bos)


def neutralise(text: str, processor: "ProcessorMixin") -> tuple[str, int]:
    """
    Break each control token that a text spells by a zero-width non-joiner after its first character.

    Args:
        text (`str`):
            Text from data: a question, an answer, a system prompt.
        processor ([`~transformers.ProcessorMixin`]):
            Processor whose special tokens, image placeholders and template markers must not appear.

    Returns:
        `tuple[str, int]`: The text and the number of places changed.
    """
    bare = text.replace(LEFT, "").replace(RIGHT, "")
    safe, changed = _control_pattern(processor).subn(
        lambda match: match[0][0] + ZERO_WIDTH_NON_JOINER + match[0][1:], bare
    )
    return safe, changed + len(text) - len(bare)


def neutralise_parts(texts: list[str], processor: "ProcessorMixin") -> tuple[list[str], int]:
    """Neutralize the text parts of one message, which a template may join, so that no token spans two of them."""
    safe, total = [], 0
    for text in texts:
        text, changed = neutralise(text, processor)
        if safe and neutralise("".join(safe) + text, processor)[1]:
            text, changed = ZERO_WIDTH_NON_JOINER + text, changed + 1
        safe.append(text)
        total += changed
    return safe, total


@_once_per_template
def _control_pattern(processor: "ProcessorMixin") -> re.Pattern:
    tokenizer = tokenizer_of(processor)
    template = processor.chat_template or ""
    template = "".join(template.values()) if isinstance(template, dict) else template
    tokens = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or token.content in template  # Qwen's `</think>` is no special token, but its template acts on it
    }
    placeholders = (value for name, value in vars(processor).items() if name.endswith("_token"))
    tokens |= {value for value in map(str, placeholders) if value != "None"}
    spellings = sorted((token for token in tokens | {VUSR} if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spellings)))

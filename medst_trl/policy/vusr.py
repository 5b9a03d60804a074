# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The `<vusr>` token of a processor, where questions and answers are in rendered text, and control tokens in data.

A user turn that starts with `<vusr>` is written by the model (STLLaVA-Med, https://huggingface.co/papers/2406.19973).
The token is a special token whose input embedding is trained; the model reads it and never predicts it. Data never
contains it: a message is marked with `vusr: true`, the span encoder (training) and the engines (asking) write the
token, and data text that spells a control token is neutralized. Where the template has the text role `VUSER:`
([`set_vusr_role`]) there is no token.

Splitting the rendered text and tokenizing the pieces again would move the loss onto the user's words if an answer
contains ` ASSISTANT: `. So each question and answer is rendered between two private-use characters, which are then
removed: the template alone decides what surrounds them, and the text is tokenized once.
"""

import re
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_choice
from medst_trl.data.schema import text_of, text_part

from .chat_template import LEFT, RIGHT, VUSR, TurnFormat, probe_turns, saved_role, vicuna_template, wrap_chat_template


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

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
    tokenizer, template = tokenizer_of(processor), _template_of(processor)
    _check_processor(processor)
    if saved_role(template) == "text":
        processor.chat_template = template
        return None
    if VUSR not in tokenizer.get_vocab():
        add_special_token(tokenizer, VUSR)
    if saved_role(template) is None:
        processor.chat_template = template
        turns = turn_format(processor)
        template = wrap_chat_template(
            template,
            image_token=getattr(processor, "image_token", None) or "",
            answer_end="" if turns.answer_end else tokenizer.eos_token,
        )
    _set_template(processor, template)
    return tokenizer.convert_tokens_to_ids(VUSR)


def add_special_token(tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
    """Add a special token to a tokenizer, in place. Its text is never normalized."""
    from tokenizers import AddedToken

    token = AddedToken(text, special=True, normalized=False)
    tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)


def _template_of(processor: "ProcessorMixin") -> str | None:
    """Return the chat template of a processor or of its tokenizer, the default one if they have several."""
    template = processor.chat_template or tokenizer_of(processor).chat_template
    return template.get("default") if isinstance(template, dict) else template


def _set_template(processor: "ProcessorMixin", template: str) -> None:
    processor.chat_template = template
    if tokenizer_of(processor).chat_template is not None:
        tokenizer_of(processor).chat_template = template


def _check_processor(processor: "ProcessorMixin") -> None:
    tokenizer = tokenizer_of(processor)
    needed = {
        "a fast tokenizer, which reports the position of a token in the text (use_fast=True)": tokenizer.is_fast,
        "a pad token (for example tokenizer.pad_token = tokenizer.eos_token)": tokenizer.pad_token,
        "an end-of-sequence token (tokenizer.eos_token)": tokenizer.eos_token,
        "a chat template (that of an instruction-tuned model of its family)": _template_of(processor),
    }
    if missing := [what for what, value in needed.items() if not value]:
        raise UserError(f"{type(processor).__name__} lacks {'; '.join(missing)}. Set it and save the processor.")


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
    tokenizer, template = tokenizer_of(processor), _template_of(processor)
    saved = saved_role(template) or ("token" if VUSR in tokenizer.get_vocab() else None)
    if role in (None, saved) or (role == "token" and saved is None):
        return
    if saved is not None:
        raise UserError(
            f"vusr_role is {role!r}, but this model was saved with the role {saved!r}, which its chat template "
            "decides. Leave vusr_role out, or start from the model it was trained from."
        )
    _check_processor(processor)
    processor.chat_template = template
    turn_format(processor)  # refuses a template that cannot be rendered
    turns = (("user", "q1"), ("assistant", "a1"), ("user", "q2"))
    messages = [{"role": name, "content": [text_part(text)]} for name, text in turns]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    if not _VICUNA_TURNS.search(rendered):
        raise UserError(
            "vusr_role: text is for models with Vicuna's chat format (USER: ... ASSISTANT: ...), such as LLaVA-1.5, "
            "SQ-LLaVA and STLLaVA-Med. Leave it out: the token <vusr> works with any family."
        )
    writes_bos = bool(tokenizer.bos_token) and rendered.startswith(tokenizer.bos_token)
    _set_template(processor, vicuna_template(text_role=True, write_bos=writes_bos))


def turn_format(processor: "ProcessorMixin") -> TurnFormat:
    """Return how the processor's chat template writes turns. Determined once per template and vocabulary."""
    return _turn_format(*_state_of(processor))


def _state_of(processor: "ProcessorMixin") -> tuple["ProcessorMixin", str, int]:
    """Return what decides on turns and control tokens: the processor, its template, its number of tokens."""
    return processor, processor.chat_template or "", len(tokenizer_of(processor))


@lru_cache(maxsize=16)
def _turn_format(processor: "ProcessorMixin", template: str, vocabulary_size: int) -> TurnFormat:
    tokens = tokenizer_of(processor).added_tokens_decoder.values()
    special = [token.content for token in tokens if token.special and token.content != VUSR]
    return probe_turns(processor.apply_chat_template, special)


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


def neutralise(text: str, processor: "ProcessorMixin") -> str:
    """
    Break each control token that a text spells by a zero-width non-joiner after its first character.

    Args:
        text (`str`):
            Text from data: a question, an answer, a system prompt.
        processor ([`~transformers.ProcessorMixin`]):
            Processor whose special tokens, image placeholders and template markers must not appear.
    """
    bare = text.replace(LEFT, "").replace(RIGHT, "")
    pattern = _control_pattern(*_state_of(processor))
    return pattern.sub(lambda match: match[0][0] + ZERO_WIDTH_NON_JOINER + match[0][1:], bare)


def neutralise_parts(texts: list[str], processor: "ProcessorMixin") -> list[str]:
    """Neutralize the text parts of one message, which a template may join, so that no token spans two of them."""
    safe = []
    for text in texts:
        text = neutralise(text, processor)
        joined = "".join(safe) + text
        if safe and neutralise(joined, processor) != joined:
            text = ZERO_WIDTH_NON_JOINER + text
        safe.append(text)
    return safe


@lru_cache(maxsize=16)
def _control_pattern(processor: "ProcessorMixin", template: str, vocabulary_size: int) -> re.Pattern:
    tokenizer = tokenizer_of(processor)
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


# --- Where questions and answers are in the rendered text ------------------------------------------------------------


class Span(NamedTuple):
    """A question or an answer with its terminator: `start` to `end` (exclusive), in characters or in tokens."""

    start: int
    end: int
    is_question: bool


class RenderedConversation(NamedTuple):
    """
    A conversation as the model reads it, before image placeholders are expanded.

    Args:
        text (`str`):
            The rendered text.
        spans (`list[Span]`):
            Its training targets in the order of their messages.
    """

    text: str
    spans: list[Span]


def typed_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return message content as typed parts without empty keys (Arrow fills missing keys with `None`)."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def can_be_asked(message: dict[str, Any]) -> bool:
    """Return whether a message can be a `<vusr>` turn: a user message with text and no image in the middle of it."""
    if message["role"] != "user" or not text_of(message["content"]).strip():
        return False
    kinds = [part["type"] for part in typed_parts(message["content"])]
    return "image" not in kinds[kinds.index("text") : len(kinds) - kinds[::-1].index("text")]


def render_conversation(
    processor: "ProcessorMixin", messages: list[dict[str, Any]], asked: Collection[int] = ()
) -> RenderedConversation:
    """
    Render a conversation and locate its training targets.

    Targets are every assistant answer with its terminator, and the question with its terminator in a `<vusr>` turn.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor prepared by [`add_vusr`].
        messages (`list[dict[str, Any]]`):
            Messages with `role` (`system`, `user`, `assistant`) and `content` (text or typed parts).
        asked (`Collection[int]`, *optional*):
            Indices of the user messages to render as `<vusr>` turns.

    Returns:
        [`RenderedConversation`]

    Raises:
        UserError: if the chat template drops or repeats a turn.
    """
    marked, targets = [], []
    for index, message in enumerate(messages):
        parts = typed_parts(message["content"])
        if index in asked or message["role"] == "assistant":
            targets.append(index in asked)
            parts = _marked(parts, processor, is_question=index in asked)
        else:
            texts = iter(neutralise_parts([part["text"] for part in parts if part["type"] == "text"], processor))
            parts = [{**part, "text": next(texts)} if part["type"] == "text" else part for part in parts]
        marked.append({"role": message["role"], "content": parts})

    pieces = re.split(f"[{LEFT}{RIGHT}]", processor.apply_chat_template(marked, tokenize=False))
    if len(pieces) != 2 * len(targets) + 1:
        raise UserError(
            "The chat template drops or repeats a turn of a conversation with roles "
            f"{[message['role'] for message in messages]}, so its questions and answers cannot be located."
        )
    return _locate(pieces, targets, processor)


def _marked(parts: list[dict[str, Any]], processor: "ProcessorMixin", is_question: bool) -> list[dict[str, Any]]:
    """Return a training target with its text between the two marks."""
    body = neutralise(text_of(parts), processor)
    images = [part for part in parts if part["type"] != "text"]
    # Templates that close a user turn with nothing get the end-of-sequence token; the wrapper does it for answers.
    end = tokenizer_of(processor).eos_token if is_question and not turn_format(processor).question_end else ""
    opening = VUSR if is_question else ""
    return [*images, {"type": "text", "text": opening + LEFT + body.strip() + RIGHT + end}]


def _locate(pieces: list[str], targets: list[bool], processor: "ProcessorMixin") -> RenderedConversation:
    """Join the text that was split at the marks. `targets` tells for each target whether it is a question."""
    turns, eos = turn_format(processor), tokenizer_of(processor).eos_token
    ends = {True: turns.question_end or eos, False: turns.answer_end or eos}
    leads = {True: turns.question_lead, False: turns.answer_lead}
    text, spans = pieces[0], []
    for is_question, body, rest in zip(targets, pieces[1::2], pieces[2::2], strict=True):
        start = len(text)
        if text.endswith(leads[is_question]):
            start -= len(leads[is_question])  # the model writes the space of `ASSISTANT: yes`
        end = ends[is_question] if rest.startswith(ends[is_question]) else ""
        spans.append(Span(start, len(text) + len(body) + len(end), is_question))
        text += body + rest
    return RenderedConversation(text, spans)

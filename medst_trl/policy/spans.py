# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Spans: where the questions and answers of a conversation are in its rendered text.

Splitting the rendered text and tokenizing the pieces again would move the loss onto the user's words if an answer
contains ` ASSISTANT: `. So each question and answer is rendered between two private-use characters, which are then
removed: the template alone decides what surrounds them, and the text is tokenized once.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from medst_trl.base.errors import UserError
from medst_trl.data.schema import text_of

from .chat_template import LEFT, RIGHT, VUSR
from .vusr import neutralise, neutralise_parts, tokenizer_of, turn_format


if TYPE_CHECKING:
    from transformers import ProcessorMixin


class Span(NamedTuple):
    """A question or an answer with its terminator: `start` to `end` (exclusive), in characters or in tokens."""

    start: int
    end: int
    is_question: bool


@dataclass(frozen=True)
class RenderedConversation:
    """
    A conversation as the model reads it, before image placeholders are expanded.

    Args:
        text (`str`):
            The rendered text.
        spans (`list[Span]`):
            Its training targets in the order of their messages.
        neutralised (`int`):
            Number of places where data text spelled a control token.
    """

    text: str
    spans: list[Span]
    neutralised: int


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
    content_form = turn_format(processor).content_form
    neutralised, marked, targets = 0, [], []
    for index, message in enumerate(messages):
        parts = typed_parts(message["content"])
        if index in asked or message["role"] == "assistant":
            targets.append(index in asked)
            parts, changed = _marked(parts, processor, is_question=index in asked)
        else:
            safe, changed = neutralise_parts([part["text"] for part in parts if part["type"] == "text"], processor)
            texts = iter(safe)
            parts = [{**part, "text": next(texts)} if part["type"] == "text" else part for part in parts]
        neutralised += changed
        marked.append({"role": message["role"], "content": in_form(parts, content_form, processor)})

    pieces = re.split(f"[{LEFT}{RIGHT}]", processor.apply_chat_template(marked, tokenize=False))
    if len(pieces) != 2 * len(targets) + 1:
        raise UserError(
            "The chat template drops or repeats a turn of a conversation with roles "
            f"{[message['role'] for message in messages]}, so its questions and answers cannot be located."
        )
    return RenderedConversation(*_locate(pieces, targets, processor), neutralised)


def _marked(
    parts: list[dict[str, Any]], processor: "ProcessorMixin", is_question: bool
) -> tuple[list[dict[str, Any]], int]:
    """Return a training target with its text between the two marks, and the number of places neutralized in it."""
    body, changed = neutralise(text_of(parts), processor)
    images = [part for part in parts if part["type"] != "text"]
    # Templates that close a user turn with nothing get the end-of-sequence token; the wrapper does it for answers.
    end = tokenizer_of(processor).eos_token if is_question and not turn_format(processor).question_end else ""
    opening = VUSR if is_question else ""
    return [*images, {"type": "text", "text": opening + LEFT + body.strip() + RIGHT + end}], changed


def _locate(pieces: list[str], targets: list[bool], processor: "ProcessorMixin") -> tuple[str, list[Span]]:
    """Return the text and its spans from the text split at the marks, and whether each target is a question."""
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
    return text, spans


def in_form(parts: list[dict[str, Any]], content_form: str, processor: "ProcessorMixin") -> str | list[dict[str, Any]]:
    """Convert typed parts to the content form of a template, see [`TurnFormat`]."""
    if content_form != "string":
        return parts
    image = f"{getattr(processor, 'image_token', '')}\n"
    return "".join(part["text"] if part["type"] == "text" else image for part in parts)

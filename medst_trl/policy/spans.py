# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the questions and answers of a conversation stand in its rendered text.

The first implementation split the rendered text and tokenised the pieces again, so text such as ` ASSISTANT: ` inside
an answer moved the loss onto the user's words. Here each question and answer is rendered between two private-use
characters, which are then taken out: the template alone decides what stands around them, and the text is tokenised
once.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from medst_trl.base.errors import UserError

from .chat_template import VUSR
from .turn_format import LEFT, RIGHT
from .vusr import neutralise, neutralise_parts, tokenizer_of, turn_format


if TYPE_CHECKING:
    from transformers import ProcessorMixin


class Span(NamedTuple):
    """
    Characters `start` to `end` (exclusive) of a rendered text that are a question or an answer with its terminator.
    """

    start: int
    end: int
    is_question: bool


@dataclass(frozen=True)
class RenderedConversation:
    """
    A conversation as the model reads it, image placeholders not yet expanded.

    Args:
        text (`str`):
            The rendered text.
        spans (`list[Span]`):
            Its training targets in order of the messages they come from.
        neutralised (`int`):
            Places where data text spelled a control token.
    """

    text: str
    spans: list[Span]
    neutralised: int


def typed_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Message content as typed parts without empty keys (Arrow fills missing keys with `None`)."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The text parts of message content, joined."""
    return "".join(part["text"] for part in typed_parts(content) if part["type"] == "text")


def can_be_asked(message: dict[str, Any]) -> bool:
    """
    Whether a message is a user turn with a question the model can write: some text, no image in the middle of it.
    """
    if message["role"] != "user" or not text_of(message["content"]).strip():
        return False
    kinds = [part["type"] for part in typed_parts(message["content"])]
    return "image" not in kinds[kinds.index("text") : len(kinds) - kinds[::-1].index("text")]


def render_conversation(
    processor: "ProcessorMixin", messages: list[dict[str, Any]], asked: Collection[int] = ()
) -> RenderedConversation:
    """
    Renders a conversation and locates its training targets.

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
    turns, tokenizer = turn_format(processor), tokenizer_of(processor)
    ends = {True: turns.question_end or tokenizer.eos_token, False: turns.answer_end or tokenizer.eos_token}
    leads = {True: turns.question_lead, False: turns.answer_lead}
    neutralised, marked, targets = 0, [], []
    for index, message in enumerate(messages):
        parts = typed_parts(message["content"])
        if index in asked or message["role"] == "assistant":
            is_question = index in asked
            body, changed = neutralise(text_of(parts), processor)
            images = [part for part in parts if part["type"] != "text"]
            # Templates that close a user turn with nothing get the end-of-sequence token; for answers ours writes it.
            end = tokenizer.eos_token if is_question and not turns.question_end else ""
            opening = VUSR if is_question else ""
            parts = [*images, {"type": "text", "text": opening + LEFT + body.strip() + RIGHT + end}]
            targets.append(is_question)
        else:
            safe, changed = neutralise_parts([part["text"] for part in parts if part["type"] == "text"], processor)
            texts = iter(safe)
            parts = [{**part, "text": next(texts)} if part["type"] == "text" else part for part in parts]
        neutralised += changed
        marked.append({"role": message["role"], "content": in_form(parts, turns.content_form, processor)})

    pieces = re.split(f"[{LEFT}{RIGHT}]", processor.apply_chat_template(marked, tokenize=False))
    if len(pieces) != 2 * len(targets) + 1:
        raise UserError(
            "The chat template drops or repeats a turn of a conversation with roles "
            f"{[message['role'] for message in messages]}, so its questions and answers cannot be located."
        )
    text, spans = pieces[0], []
    for is_question, body, rest in zip(targets, pieces[1::2], pieces[2::2], strict=True):
        start = len(text)
        if text.endswith(leads[is_question]):
            start -= len(leads[is_question])  # the blank of `ASSISTANT: yes` is the model's to write
        end = ends[is_question] if rest.startswith(ends[is_question]) else ""
        spans.append(Span(start, len(text) + len(body) + len(end), is_question))
        text += body + rest
    return RenderedConversation(text, spans, neutralised)


def in_form(parts: list[dict[str, Any]], content_form: str, processor: "ProcessorMixin") -> str | list[dict[str, Any]]:
    """Typed parts as a template of this [`TurnFormat.content_form`] takes them."""
    if content_form != "string":
        return parts
    image = f"{getattr(processor, 'image_token', '')}\n"
    return "".join(part["text"] if part["type"] == "text" else image for part in parts)

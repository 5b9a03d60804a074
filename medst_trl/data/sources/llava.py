# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversations in LLaVA's JSON format (`id`, `image`, `conversations` of `from` and `value`)."""

import re

from medst_trl.data.cells import BadRecord, answer_text, is_missing, text_value
from medst_trl.data.reading import read_json_rows
from medst_trl.data.schema import image_part, message, text_part
from medst_trl.data.source import SOURCES, Conversation, Records, Source, SourceCard, SourceRequest


PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# LLaVA puts its placeholder on a separate line; the line break is not part of the text.
_PLACEHOLDER_AND_BREAKS = re.compile(r"[\r\n]*(<image>)[\r\n]*")  # the group keeps it among the pieces


def read_llava(request: SourceRequest) -> Records:
    """
    Read a `.json` or `.jsonl` file of conversations.

    `image` is a file name, a list of them or missing. Each `<image>` in a human text becomes an image part at its
    position; without any, the images open the first turn. In an answer `<image>` is plain text. Turns may also be
    `role` and `content`. A record without `id` is named after its position. Different records with the same id, as in
    merged files, get other ones (`<id>-2`); a copy is rejected. Names of keys may differ in case and blanks, and
    `images` is `image`.

    Rejected, by reason: `malformed_json`, `not_an_object`, `repeated_column`, `no_conversation`, `bad_image_field`,
    `unknown_role`, `starts_with_answer`, `same_role_twice`, `ends_with_question`, `empty_turn`,
    `placeholder_mismatch`, `not_text`, `bad_unicode`, `duplicate_id`.

    Raises:
        UserError: if the file holds no records at all.
    """

    def conversation(name: str, record: dict) -> Conversation:
        images = image_names(record.get("image"))
        # LLaVA-Med's own files misspell the key.
        turns = record.get("conversations", record.get("conversatons"))
        return Conversation(name, images, llava_messages(turns, len(images)))

    records = Records("llava", request.image_folder, group_column=request.group_column)
    rows = read_json_rows(request.data_path, "conversations", records.counts)
    used = ("id", "image", "conversations", "conversatons")
    records.collect(rows, conversation, prefix="record-", used=used)
    return records


def split_at_images(text: str) -> list[dict]:
    """
    Return the typed parts of a human text: an image part for each `<image>`, and text parts for the text between.

    Line breaks around a placeholder and whitespace around the whole text are dropped, as are parts of only whitespace.

    Example:

    ```python
    >>> split_at_images("<image>\\nWhat is shown?")
    [{'type': 'image', 'text': None}, {'type': 'text', 'text': 'What is shown?'}]
    ```
    """
    pieces = _PLACEHOLDER_AND_BREAKS.split(text.strip())
    return [image_part() if piece == PLACEHOLDER else text_part(piece) for piece in pieces if piece.strip()]


def image_names(value) -> tuple[str, ...]:
    """Return the file names in a record's field `image`: one, a list of them, or none."""
    names = value if isinstance(value, list) else [] if is_missing(value) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecord("bad_image_field", value)
    return tuple(names)


def llava_messages(turns, num_images: int) -> list[dict]:
    """Convert the turns of one conversation to messages, see [`read_llava`]. Raises [`BadRecord`] with its reasons."""
    if not isinstance(turns, list) or not turns:
        raise BadRecord("no_conversation", turns)
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    if messages[-1]["role"] == "user":
        raise BadRecord("ends_with_question", messages[-1]["content"][-1]["text"])
    placeholders = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if placeholders == 0:
        messages[0]["content"] = [image_part() for _ in range(num_images)] + messages[0]["content"]
    elif placeholders != num_images:
        raise BadRecord("placeholder_mismatch", f"{placeholders} {PLACEHOLDER}, {num_images} images")
    return messages


def _message(turn, number: int) -> dict:
    """Read a turn. The user has the first one, then both alternate."""
    if not isinstance(turn, dict):
        raise BadRecord("no_conversation", turn)
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = ROLES.get(str(speaker).strip().lower())
    if role is None:
        raise BadRecord("unknown_role", speaker)
    if role != ("user", "assistant")[number % 2]:
        raise BadRecord("same_role_twice" if number else "starts_with_answer", speaker)
    if role == "assistant":
        return message(role, [text_part(answer_text(text, missing="empty_turn"))])
    content = split_at_images(text_value(text, missing="empty_turn"))
    if all(part["type"] == "image" for part in content):
        raise BadRecord("empty_turn", text)
    return message(role, content)


SOURCES.register(
    Source(
        name="llava",
        summary="a JSON or JSONL file of conversations (`id`, `image`, `conversations`)",
        read=read_llava,
        card=SourceCard("the publisher's own collection of conversations in LLaVA's format"),
    )
)

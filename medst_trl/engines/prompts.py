# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a generation engine is asked and what it gives back, whether it runs the model itself or calls a server."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from medst_trl.data.schema import image_part, message, text_part


if TYPE_CHECKING:
    from PIL import Image

# The first implementation's request for a description.
DESCRIBE = "Can you describe the image in detail?"


@dataclass(frozen=True)
class Sampling:
    """
    How texts are drawn. The defaults are the paper's.

    Args:
        temperature (`float`, *optional*, defaults to `1.2`):
            0 always takes the likeliest token.
        top_k (`int`, *optional*, defaults to `100`):
            Draw from the so many likeliest tokens; 0 for all.
        top_p (`float`, *optional*, defaults to `0.95`):
            Draw from the likeliest tokens that together have this probability; 1 for all.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Tokens after which a text is cut off.
    """

    temperature: float = 1.2
    top_k: int = 100
    top_p: float = 0.95
    max_new_tokens: int = 256


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """
    An image of a record. Each is equal to itself alone, and what an engine remembers of it lives as long as it does.

    Args:
        bytes (`bytes`): The file as the dataset holds it.
        image (`PIL.Image.Image`): The same, decoded, upright.
    """

    bytes: bytes
    image: "Image.Image"


@dataclass(frozen=True)
class Prompt:
    """
    A conversation that is open for the model.

    Args:
        messages (`list[dict]`):
            In the form of `schema.message`. A last one with `vusr` is a question that the model is to write.
        images (`list[OpenedImage]`):
            The images in the order of the image parts.
        stream (`str`):
            Names the random stream the text is drawn by.
    """

    messages: list[dict[str, Any]]
    images: list[OpenedImage] = field(repr=False)
    stream: str = ""


@dataclass(frozen=True)
class Reply:
    """
    What came back for a prompt.

    Args:
        text (`str`): Without blanks around it.
        ended (`bool`): Whether it ended by itself; otherwise it was cut off.
        problem (`str`, *optional*): One word for counting, where nothing came back; then `text` says more.
    """

    text: str
    ended: bool = True
    problem: str | None = None


class Engine(Protocol):
    """Writes a text for each prompt. [`TransformersEngine`] and [`ChatServer`] are the two there are."""

    name: str
    batch_size: int

    def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]: ...


def random_stream(seed: int, record_id: str, purpose: str, *numbers: int) -> str:
    """The name of one text's random stream, different for any two texts."""
    return repr((seed, record_id, purpose, *numbers))


def to_describe(images: int) -> list[dict[str, Any]]:
    """The messages that ask for a description of so many images."""
    return [message("user", [image_part()] * images + [text_part(DESCRIBE)])]


def to_ask(history: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """The messages that make the model ask: a `<vusr>` turn without words, behind the images or the history."""
    return [*history, message("user", [] if history else [image_part()] * images, vusr=True)]


def to_answer(history: list[dict[str, Any]], images: int, question: str) -> list[dict[str, Any]]:
    """The messages that put a question, once asked, as an ordinary user turn."""
    return [*history, message("user", ([] if history else [image_part()] * images) + [text_part(question)])]


def open_images(stored: Sequence[dict[str, Any]]) -> list[OpenedImage]:
    """
    The images of a record, from `{"bytes", "path"}` as an undecoded column holds them.

    Raises:
        ValueError: if one cannot be read, saying why.
    """
    from datasets import Image

    opened = []
    for item in stored:
        try:
            content = bytes_of(item)
            # Decoded the way training and evaluation read the dataset.
            opened.append(OpenedImage(content, Image().decode_example({"bytes": content, "path": None})))
        except Exception as error:  # PIL's parsers raise almost anything on a damaged file
            said = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))  # an address in memory is another in each run
            raise ValueError(f"{type(error).__name__}: {said}") from None
    return opened


def bytes_of(stored: dict[str, Any]) -> bytes:
    """The file of an image that is not decoded: inside the dataset, or where its path says."""
    if stored["bytes"] is not None:
        return stored["bytes"]
    with open(stored["path"], "rb") as file:
        return file.read()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The engine interface: an engine writes replies to prompts, with a model in this process or on a server.

Generation and evaluation use engines only through [`Engine`]. A new one is a class and an [`EngineKind`], which
registers it, in a file of its own in `kinds/`; CONTRIBUTING.md has an example.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from medst_trl.base.registry import Registry
from medst_trl.data.schema import bytes_of, image_part, message, text_part
from medst_trl.policy.chat_template import VUSR
from medst_trl.policy.vusr import typed_parts


if TYPE_CHECKING:
    from PIL import Image

    from .images import RequestImage

# The prompt with which the original STLLaVA-Med code asks for a description.
DESCRIBE = "Can you describe the image in detail?"


@dataclass(frozen=True)
class Sampling:
    """
    How texts are sampled. The defaults are the paper's.

    Args:
        temperature (`float`, *optional*, defaults to `1.2`):
            0 decodes greedily.
        top_k (`int`, *optional*, defaults to `100`):
            Sample from the k most likely tokens; 0 for all.
        top_p (`float`, *optional*, defaults to `0.95`):
            Sample from the most likely tokens that together have this probability; 1 for all.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Number of tokens after which a text is cut off.
    """

    temperature: float = 1.2
    top_k: int = 100
    top_p: float = 0.95
    max_new_tokens: int = 256


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """
    An image of a prompt. Compared by identity. An engine keeps its features for as long as the object exists.

    Args:
        bytes (`bytes`): The file as the dataset holds it; empty for an image that is only in memory.
        image (`PIL.Image.Image`): The decoded, upright image.
    """

    bytes: bytes
    image: "Image.Image"

    @cached_property
    def as_sent(self) -> "RequestImage":
        """The image in requests to a server, encoded once for all of them."""
        from .images import RequestImage

        return RequestImage.read(self.bytes or self.image)


@dataclass(frozen=True)
class Prompt:
    """
    A conversation that the model continues.

    Args:
        messages (`list[dict]`):
            Messages as [`~medst_trl.data.schema.message`] makes them. A last message with `vusr` is a question that
            the model writes.
        images (`list[OpenedImage]`):
            The images in the order of the image parts.
        stream (`str`):
            Name of the random stream the text is sampled with.
    """

    messages: list[dict[str, Any]]
    images: list[OpenedImage] = field(repr=False)
    stream: str = ""


@dataclass(frozen=True)
class Reply:
    """
    The reply to a prompt.

    Args:
        text (`str`): The text without surrounding whitespace.
        ended (`bool`): Whether the model ended the text; otherwise it was cut off.
        problem (`str`, *optional*): Why there is no text, as a reason code; `text` then has the details.
    """

    text: str
    ended: bool = True
    problem: str | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """
    A prompt with its sampling.

    Args:
        prompt ([`Prompt`]): The conversation.
        sampling ([`Sampling`]): How to sample the text.
        tag (*optional*): Any value; the caller identifies the request by it.
    """

    prompt: Prompt
    sampling: Sampling
    tag: Any = None


class Engine(ABC):
    """
    Generates texts. Callers use only these methods and attributes.

    Attributes:
        name (`str`):
            Name of its [`EngineKind`].
        model_name (`str`, *optional*):
            Name of its model, for the column `generation`. The commands set it to `model_name_or_path`.
        batch_size (`int`, *optional*):
            Number of requests per batch: callers make groups of a few batches, see [`Engine.run`]. None for an engine
            that starts each request when it has room.
    """

    name: str
    model_name: str | None = None
    batch_size: int | None = None

    @abstractmethod
    def run(
        self,
        first: Iterable[Iterable[Request]],
        then: Callable[[Request, Reply], Iterable[Request]] = lambda request, reply: (),
    ) -> Iterator[tuple[Request, Reply]]:
        """
        Answer requests, and those that follow from their replies.

        Args:
            first (iterable of iterables of [`Request`]):
                The first requests, in groups. Consumed lazily. An engine with batches answers a group and what follows
                from it before it takes the next. Others start each request as soon as they have room.
            then (`Callable`, *optional*):
                Maps a request and its reply to follow-up requests. It is called in the caller's thread, before the
                reply is yielded.

        Yields:
            `tuple[Request, Reply]`: each request with its reply, in any order. A request that the model refuses has a
            reply with a `problem`.

        Raises:
            UserError: if no request can succeed, for example because the server cannot be reached.
        """

    def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        """Write one text for each prompt and return the replies in the order of the prompts."""
        requests = [Request(prompt, sampling, number) for number, prompt in enumerate(prompts)]
        replies = {request.tag: reply for request, reply in self.run([requests])}
        return [replies[number] for number in range(len(requests))]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the text of one prompt piece by piece, as it is written. The pieces make up the reply's text."""
        with closing(self.pieces(prompt, sampling)) as pieces:
            yield from strip_pieces(pieces)

    def pieces(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield what [`Engine.stream`] yields, perhaps with whitespace around the text. By default the whole text."""
        yield self.write([prompt], sampling)[0].text

    def check(self) -> None:  # noqa: B027 (optional to override)
        """
        Check early that the engine works.

        Raises:
            UserError: if it does not, with the reason.
        """

    def describe(self) -> dict[str, Any]:
        """Return the engine's entries of the column `generation`: `model`, `engine` and perhaps others."""
        return {"model": self.model_name, "engine": self.name}

    def batches(self, number: int, prompt_of: Callable[[int], Prompt]) -> list[list[int]]:
        """
        Divide a fixed list of prompts into batches, if possible of similar length.

        Args:
            number (`int`):
                Number of prompts.
            prompt_of (`Callable`):
                Takes an index and returns that prompt. Each call opens the images, so an engine should not keep the
                prompts.

        Returns:
            `list[list[int]]`: the indices of the prompts in each batch, in the order in which to run the batches.
        """
        size = self.batch_size or 1
        return [list(range(start, min(start + size, number))) for start in range(0, number, size)]


class BatchEngine(Engine):
    """
    An engine that writes whole batches. It needs only `write`, which receives more than `batch_size` prompts and
    divides them itself.
    """

    batch_size: int = 16

    @abstractmethod
    def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]: ...

    def run(self, first, then=lambda request, reply: ()):
        """Write all requests of a group, then all follow-up requests, and so on. See [`Engine.run`]."""
        for group in first:
            yield from self._run_group(list(group), then)

    def _run_group(self, wave: list[Request], then: Callable) -> Iterator[tuple[Request, Reply]]:
        while wave:
            following = []
            for sampling in dict.fromkeys(request.sampling for request in wave):
                requests = [request for request in wave if request.sampling == sampling]
                replies = self.write([request.prompt for request in requests], sampling)
                for request, reply in zip(requests, replies, strict=True):
                    following += then(request, reply)
                    yield request, reply
            wave = following


@dataclass(frozen=True)
class EngineKind:
    """
    A registered engine: a value of `--engine`.

    Args:
        name (`str`):
            Its name.
        summary (`str`):
            What it is, for `--help`.
        settings (`type`):
            Dataclass of its settings, whose names no other engine has.
        open (`Callable`):
            Takes `model_name_or_path` and the settings, returns the [`Engine`].
        check (`Callable`, *optional*):
            Takes the settings and `model_name_or_path`, and raises a `UserError` if they cannot work, before anything
            is written or loaded.
        loads_model (`bool`, *optional*, defaults to `False`):
            Whether `model_name_or_path` is loaded in this process; otherwise it is only a name.
        address (`Callable`, *optional*):
            Takes the settings, returns the address to which prompts are sent, for the plan of a run.
        operational (`frozenset[str]`, *optional*):
            Settings that do not change a text and may differ when a run is resumed.
    """

    name: str
    summary: str
    settings: type
    open: Callable[[str, Any], Engine]
    check: Callable[[Any, str], None] = lambda settings, model_name_or_path: None
    loads_model: bool = False
    address: Callable[[Any], str | None] = lambda settings: None
    operational: frozenset[str] = frozenset()


DEFAULT_ENGINE = "transformers"
ENGINES: Registry[EngineKind] = Registry(
    "engine",
    ("medst_trl.engines.kinds",),
    ("summary", "settings", "open"),
    order=lambda kinds: sorted(kinds, key=lambda kind: kind.name != DEFAULT_ENGINE),  # the default first
)


def loads_model(settings: Mapping[str, Any]) -> bool:
    """Return whether the engine that a stage's settings name loads its model in this process."""
    name = settings.get("engine") or DEFAULT_ENGINE
    return name not in ENGINES or ENGINES.get(name).loads_model


def strip_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text without leading and trailing whitespace."""
    text, shown = "", 0
    for piece in pieces:
        text = (text + piece).lstrip()
        end = len(text.rstrip())  # whitespace behind it may turn out to be the end
        if end > shown:
            yield text[shown:end]
            shown = end


def random_stream_name(seed: int, record_id: str, purpose: str, *numbers: int) -> str:
    """Return the name of one text's random stream, different for any two texts."""
    return repr((seed, record_id, purpose, *numbers))


def to_ask(history: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """Return the messages that make the model ask: an empty `<vusr>` turn after the images or the history."""
    return [*history, message("user", [] if history else [image_part()] * images, vusr=True)]


def to_answer(history: list[dict[str, Any]], images: int, question: str) -> list[dict[str, Any]]:
    """Return the messages that ask a question in an ordinary user turn."""
    return [*history, message("user", ([] if history else [image_part()] * images) + [text_part(question)])]


def sent_parts(
    turn: dict[str, Any], neutralise: Callable[[list[str]], Iterable[str]], image: Callable[[], dict[str, Any]]
) -> list[dict[str, Any]]:
    """
    Return the typed parts of a message as an engine sends them to the model. `<vusr>` is the last part of a turn that
    the model writes.

    Args:
        turn (`dict`): A message of a [`Prompt`].
        neutralise (`Callable`): Takes the texts of the message, returns them without control tokens.
        image (`Callable`): Returns the part for the next image.
    """
    parts = typed_parts(turn["content"])
    safe = iter(neutralise([part["text"] for part in parts if part["type"] == "text"]))
    parts = [{"type": "text", "text": next(safe)} if part["type"] == "text" else image() for part in parts]
    return [*parts, {"type": "text", "text": VUSR}] if turn.get("vusr") else parts


def open_images(stored: Sequence[dict[str, Any]]) -> list[OpenedImage]:
    """
    Open the images of a record, `{"bytes", "path"}` as an undecoded column holds them.

    Raises:
        ValueError: if one cannot be read, saying why.
    """
    from datasets import Image

    from medst_trl.data.image_formats import to_8_bit

    opened = []
    for item in stored:
        try:
            content = bytes_of(item)
            # Decoded the way training and evaluation read the dataset.
            image = to_8_bit(Image().decode_example({"bytes": content, "path": None}))
            opened.append(OpenedImage(content, image))
        except Exception as error:  # PIL's parsers raise almost anything on a damaged file
            said = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))  # a memory address differs in each run
            raise ValueError(f"{type(error).__name__}: {said}") from None
    return opened

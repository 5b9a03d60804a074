# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
A judge prompt: how a judge is asked to compare two answers, and how its reply is read.

A prompt registers itself from one file (`prompts/` has the built-in ones). It is then a value of `--prompt_version` on
the command line and in recipes:

```python
def messages(question, answers, image_urls, history, captions):
    question, first, second = map(fit, (question, *answers))
    return [user_message(image_urls, f"{question}\n\nA: {first}\n\nB: {second}\n\nWhich is better, A or B?")]


def read(reply):
    return {"A": Reading((10, 0), 0), "B": Reading((0, 10), 1)}.get(reply.strip())


JUDGE_PROMPTS.register(
    JudgePrompt(
        name="letter",
        summary="one letter",
        messages=messages,
        read=read,
        reminder="Reply with A or B.",
        reply_tokens=1,
    )
)
```
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medst_trl.base.registry import Registry
from medst_trl.data.cells import printable


MAX_CHARS = 12_000  # about 3,000 tokens; a longer text is cut, and the prompt says so


@dataclass(frozen=True)
class Reading:
    """
    What a judge's reply says. First and second are positions in the prompt, not answers.

    Attributes:
        scores (`tuple[float, float]`): Of the answer shown first and of the one shown second, 0 to 10.
        verdict (`0`, `1` or `"tie"`): Position of the better answer.
        criteria (`dict` or `None`): A pair of scores for each criterion.
    """

    scores: tuple[float, float]
    verdict: Literal[0, 1, "tie"]
    criteria: dict[str, tuple[float, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """
    How a judge is asked to compare two answers, and how its reply is read.

    Args:
        name (`str`):
            Value of `--prompt_version`. Judgements carry it.
        summary (`str`):
            A few words for `medst judge --help`.
        messages (`Callable`):
            `messages(question, answers, image_urls, history, captions)` returns the messages of a request. `answers`
            are two texts in the order in which they are shown, `image_urls` data URLs, `history` pairs of role and
            text of the turns before the question, `captions` reference captions of the images. The prompt passes
            each text through [`fit`]. The messages decide the key of a cached reply.
        read (`Callable`):
            Takes a reply, returns a [`Reading`], or `None` if the reply is ambiguous.
        reminder (`str`):
            User message after a reply that cannot be read.
        reply_tokens (`int`):
            Typical length of a reply, for cost estimates.
        uses (`frozenset[str]`, *optional*):
            Which of `"history"` and `"captions"` the messages show. The others arrive empty.
        response_format (`dict`, *optional*):
            The field of that name in the request.
        defaults (`dict`, *optional*):
            More fields of the request, such as `{"reasoning_effort": "low"}`. The judge's settings win over them.
    """

    name: str
    summary: str
    messages: Callable[..., list[dict[str, Any]]]
    read: Callable[[str], Reading | None]
    reminder: str
    reply_tokens: int
    uses: frozenset[str] = frozenset()
    response_format: Mapping[str, Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


JUDGE_PROMPTS: Registry[JudgePrompt] = Registry(
    "judge prompt", ("medst_trl.selftrain.judge.prompts",), ("summary", "messages", "read", "reminder", "reply_tokens")
)


def fit(text: str) -> str:
    """Return a text that any server accepts: no lone surrogates, and not longer than `MAX_CHARS`."""
    text = printable(text)
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[:MAX_CHARS]}\n(cut here: {len(text) - MAX_CHARS:,} more characters are not shown)"


def user_message(image_urls: Sequence[str], text: str) -> dict[str, Any]:
    """Return a message that shows images, then a text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in image_urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def winner(scores: Sequence[float]) -> Literal[0, 1, "tie"]:
    """Return the position of the higher score."""
    return "tie" if scores[0] == scores[1] else int(scores[1] > scores[0])

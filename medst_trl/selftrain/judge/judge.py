# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
What makes a judge: its settings and its prompt, or a local judge, which `medst judge` runs itself.

A [`JudgePrompt`] registers itself from one file (`prompts/` has the built-in ones). It is then a value of
`--prompt_version` on the command line and in recipes:

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

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from medst_trl.base.errors import UserError
from medst_trl.base.registry import Registry
from medst_trl.base.settings import check_bounds, check_choice, check_url, documented
from medst_trl.data.cells import printable
from medst_trl.engines.calls import CallSettings


if TYPE_CHECKING:
    from datasets import Dataset

MAX_CHARS = 12_000  # about 3,000 tokens; a longer text is cut, and the prompt says so
ORDERS = {"both": ((0, 1), (1, 0)), "single": ((0, 1),)}
_AT_LEAST = {"image_size": 16, "max_tokens": 8, "min_margin": 0, "temperature": 0}


# Settings


@documented
@dataclass(eq=False)
class JudgeSettings(CallSettings):
    """
    Which judge compares the answers, how it is asked, and what that may cost.

    Args:
        model (`str`, *optional*):
            Name of the judge on its server, such as gpt-4o.
        base_url (`str`, *optional*):
            URL of an OpenAI-compatible API, such as http://localhost:8000/v1. Default: OpenAI's.
        prompt_version (`str`, *optional*, defaults to `"rubric"`):
            Prompt for the judge.
        order (`str`, *optional*, defaults to `"both"`):
            both: show each pair in both orders, and drop it if the verdicts differ. single: show it in one order, as
            in the paper.
        min_margin (`float`, *optional*, defaults to `1.0`):
            Drop pairs whose mean scores differ by less than this.
        image_size (`int`, *optional*, defaults to `768`):
            Maximum side length in pixels of the images that are sent.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature of the judge.
        max_tokens (`int`, *optional*, defaults to `600`):
            Maximum number of tokens of a reply.
        cache_dir (`str`, *optional*):
            Directory of judge_cache.jsonl. The key of a reply is made of model name, prompt, images and settings, not
            of base_url: give different models different names. By default replies are kept in memory.
        max_cost (`float`, *optional*):
            Budget in US dollars for these judgements, including earlier runs. It is a hard limit.
    """

    model: str | None = None
    base_url: str | None = None
    prompt_version: str = "rubric"
    order: str = "both"
    min_margin: float = 1.0
    _: KW_ONLY
    image_size: int = 768
    temperature: float = 0.0
    max_tokens: int = 600
    cache_dir: str | None = None
    max_cost: float | None = None

    def check_judge(self, is_local: bool = False) -> None:
        """Raise a `UserError` for settings that cannot work. A local judge needs no server."""
        if not is_local:
            if not self.model:
                raise UserError("No judge model is set. Set --model to its name on the server (such as gpt-4o).")
            check_url("base_url", self.base_url)
            self.check_calls(self.model)
        check_choice("order", self.order, ORDERS)
        check_bounds(self, at_least=_AT_LEAST)


# Prompts


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


# Local judges


class LocalJudge(ABC):
    """
    A judge that runs inside the stage. Its calls are free.

    Subclass it as a dataclass whose fields are options of `medst judge`, and register the class in `LOCAL_JUDGES`.
    Setting names must be unique across all local judges, and every default must be `None`: a judge is chosen by
    setting one of its options.

    Attributes:
        name (`str`):
            Its name in the registry.
        summary (`str`):
            What it is, for the plan of a run.

    Example:

    ```python
    @documented
    @dataclass
    class Coin(LocalJudge):
        '''
        Settings of the judge `coin`.

        Args:
            coin_seed (`int`, *optional*):
                Use a judge that tosses a coin, with this seed.
        '''

        name, summary = "coin", "a coin"

        coin_seed: int | None = None

        def model_name(self, args):
            return f"coin-{self.coin_seed}"

        def open(self, args, candidates):
            def judge(pair):
                coin = random.Random(f"{self.coin_seed} {pair['question']} {pair['answers']}")
                return coin.choice((1, 10)), 5

            return judge


    LOCAL_JUDGES.register(Coin)
    ```
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def is_chosen(self) -> bool:
        """Whether these settings ask for this judge: one of them is set."""
        return any(value is not None for value in vars(self).values())

    @abstractmethod
    def model_name(self, args: Any) -> str:
        """Return the name of the judge, for its judgements."""

    @abstractmethod
    def open(self, args: Any, candidates: "Dataset") -> Callable[[Mapping[str, Any]], Sequence[float]]:
        """
        Return the judge: a function that takes a pair with the first keys of a judgement (`id`, `candidate`,
        `image_ids`, `question` and two `answers` in the order in which they are shown), and returns two scores.

        Args:
            args (dataclass): Arguments of the stage.
            candidates ([`~datasets.Dataset`]): What it will judge.
        """

    def check(self, args: Any) -> None:  # noqa: B027 (optional to override)
        """Raise a `UserError` for settings that cannot work with the stage's arguments."""


LOCAL_JUDGES: Registry[type[LocalJudge]] = Registry("local judge", ("medst_trl.demo.oracle",), ("summary",))


def chosen_judge(arguments: Iterable[Any]) -> LocalJudge | None:
    """Return the local judge among these dataclasses of settings that is chosen."""
    return next((item for item in arguments if isinstance(item, LocalJudge) and item.is_chosen), None)

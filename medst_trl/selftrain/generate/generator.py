# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Candidates for preference pairs: the policy asks about images and answers its own questions more than once."""

import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.processes import process_state
from medst_trl.data.schema import check_columns, message, text_part
from medst_trl.engines.prompts import (
    Engine,
    Prompt,
    Reply,
    Sampling,
    open_images,
    random_stream,
    to_answer,
    to_ask,
    to_describe,
)

from .files import candidate_row, undecoded
from .filters import QuestionFilter, normalised, pair_answers
from .work import Work


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

BATCHES_A_WINDOW = 2  # a window is what is written down at once: what a killed run has to do again


class CandidateGenerator:
    """
    Makes questions with several answers each out of images (STLLaVA-Med, https://huggingface.co/papers/2406.19973).

    For each image the policy asks by a bare `<vusr>` turn; each question is then put to it as an ordinary user turn
    and answered several times, independently. Questions that are none, and answers that say the same, are set aside
    with their reason. With a model in this process every text has a random stream of its own, named by seed, record id
    and number: the candidates are the same whatever the number of processes or the point a run goes on from, and up to
    floating-point ties whatever the batch size.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`ChatServer`]):
            Policy, as [`load_policy`] gives it, on the device it shall run on; or a server that runs one.
        processor ([`~transformers.ProcessorMixin`], *optional*):
            The policy's processor; none for a server.
        num_questions (`int`, *optional*, defaults to `1`):
            Questions for each image, drawn independently.
        num_answers (`int`, *optional*, defaults to `2`):
            Answers to each question, at least 2. The first and second, third and fourth, ... make a pair.
        question_sampling ([`Sampling`], *optional*):
            How questions are drawn: the paper's temperature 1.2, top-k 100, top-p 0.95, at most 128 tokens.
        answer_sampling ([`Sampling`], *optional*):
            How answers are drawn: the same, at most 256 tokens.
        describe_first (`bool`, *optional*, defaults to `False`):
            Whether the policy describes the image first, greedily, and asks and answers with that as history.
        question_filter ([`QuestionFilter`], *optional*):
            Which questions are kept.
        max_answer_similarity (`float`, *optional*, defaults to `0.95`):
            Answers that share more of their words are nearly identical, see [`same_answer`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of all draws. A server makes no promise about it.
        batch_size (`int`, *optional*):
            Texts written at a time; halved where they do not fit into memory. By default 16 on a CPU, and on an
            accelerator as many as fit.
        model_name (`str`, *optional*):
            How to name the model in `generation`.

    Attributes:
        rejected (`list[dict]`):
            `id`, `reason` and `value` of what the last call set aside.

    Raises:
        UserError: for numbers that cannot give pairs.

    Example:

    ```python
    >>> model, processor = load_policy("runs/demo/sft")
    >>> images = load_dataset("runs/demo/prepare/images", split="train")
    >>> generate = CandidateGenerator(model, processor, num_questions=2, seed=7)
    >>> candidates = Dataset.from_list(list(generate(images)), features=candidate_features())
    ```
    """

    def __init__(
        self,
        model: "PreTrainedModel | Engine",
        processor: "ProcessorMixin | None" = None,
        num_questions: int = 1,
        num_answers: int = 2,
        *,
        question_sampling: Sampling | None = None,
        answer_sampling: Sampling | None = None,
        describe_first: bool = False,
        question_filter: QuestionFilter | None = None,
        max_answer_similarity: float = 0.95,
        seed: int = 0,
        batch_size: int | None = None,
        model_name: str | None = None,
    ):
        if num_questions < 1 or num_answers < 2:
            raise UserError(
                f"num_questions is {num_questions} and num_answers is {num_answers}; at least one question with two "
                "answers is needed to compare them."
            )
        self.num_questions = num_questions
        self.num_answers = num_answers
        self.question_sampling = question_sampling or Sampling(max_new_tokens=128)
        self.answer_sampling = answer_sampling or Sampling()
        if self.answer_sampling.temperature == 0:
            raise UserError("At temperature 0 all answers to a question are the same. Give a temperature above 0.")
        self.describe_first = describe_first
        self.question_filter = question_filter or QuestionFilter()
        self.max_answer_similarity = max_answer_similarity
        self.seed = seed
        self.model_name = model_name or getattr(getattr(model, "config", None), "name_or_path", None) or None
        self.engine: Engine = model
        if processor is not None:
            from medst_trl.engines.transformers import TransformersEngine

            self.engine = TransformersEngine(model, processor, batch_size)
        self.rejected: list[dict[str, Any]] = []

    def __call__(self, dataset: "Dataset") -> Iterator[dict[str, Any]]:
        """
        Ask about every record and answer. Under a distributed launch each process yields the candidates of its share.

        Args:
            dataset ([`~datasets.Dataset`]):
                Columns `id`, `images`, `image_ids`, `messages` (not looked at; may be empty).

        Yields:
            `dict`: a row of candidates: `id` (`<record>#<n>`), `images`, `image_ids`, `prompt` (messages, the question
            last), `answers`, `generation` (JSON: model, engine, seed, sampling).

        Raises:
            UserError: for other columns, or ids that repeat.
        """
        self.rejected = []
        rows = {record_id: row for row, record_id in enumerate(dataset["id"])}
        for outcome in self.outcomes(dataset):
            self.rejected += outcome["rejected"]
            for candidate in outcome["candidates"]:
                (record,) = undecoded(dataset, [rows[outcome["id"]]])
                yield candidate_row(candidate, record, self.generation())

    def outcomes(self, dataset: "Dataset", done: Collection[str] = frozenset()) -> Iterator[dict[str, Any]]:
        """
        What became of every record, as JSON can hold it: [`CandidateGenerator.__call__`] without the images.

        Args:
            dataset ([`~datasets.Dataset`]):
                As in [`CandidateGenerator.__call__`].
            done (collection of `str`, *optional*):
                Record ids that need not be looked at again. Batches are made as if they did, so that a continued run
                computes the same numbers as one that was never cut.

        Yields:
            `dict`: `id` of the record, `drawn` (number of questions), `candidates` (id, prompt, answers) and
            `rejected` (id, reason, value).
        """
        from tqdm.auto import tqdm

        check_columns(dataset, "instruct")
        ids = dataset["id"][:]
        record_id, times = next(iter(Counter(ids).most_common(1)), (None, 0))
        if times > 1:
            raise UserError(f"{times} records have the id {record_id!r}. Give each its own, or they would draw alike.")
        state = process_state()
        # Equal on all processes, and no process without a window where there are records for all.
        size = max(1, min(BATCHES_A_WINDOW * self.engine.batch_size, -(-len(ids) // state.num_processes)))
        windows = [range(start, min(start + size, len(ids))) for start in range(0, len(ids), size)]
        windows = windows[state.process_index :: state.num_processes]
        left = [window for window in windows if any(ids[row] not in done for row in window)]
        total, still = (sum(map(len, some)) for some in (windows, left))
        with tqdm(
            total=total, initial=total - still, desc="candidates", unit="image", disable=not state.is_main_process
        ) as bar:
            for works in _one_ahead(lambda window: list(map(_opened, undecoded(dataset, window))), left):
                for outcome in self._window(works):
                    if outcome["id"] not in done:
                        yield outcome
                bar.update(len(works))

    def generation(self) -> str:
        """How the candidates are made, as the column `generation` has it."""
        return json.dumps(
            {
                "model": self.model_name,
                "engine": self.engine.name,
                "seed": self.seed,
                "question_sampling": asdict(self.question_sampling),
                "answer_sampling": asdict(self.answer_sampling),
                "describe_first": self.describe_first,
            }
        )

    def _window(self, works: Sequence[Work]) -> list[dict[str, Any]]:
        """Everything for some records, each step in batches over all of them."""
        works_left = [work for work in works if work.images]
        if self.describe_first:
            self._describe(works_left)
            works_left = [work for work in works_left if work.history]
        self._ask(works_left)
        self._answer(works_left)
        return [work.outcome() for work in works]

    def _describe(self, works: list[Work]) -> None:
        greedy = Sampling(temperature=0.0, max_new_tokens=self.answer_sampling.max_new_tokens)
        requests = [to_describe(len(work.images)) for work in works]
        replies = self.engine.write([Prompt(r, work.images) for work, r in zip(works, requests)], greedy)
        for work, request, reply in zip(works, requests, replies, strict=True):
            if problem := reply.problem or (not reply.text and "empty_description"):
                work.reject(problem, reply.text)
            else:
                work.history = [*request, message("assistant", [text_part(reply.text)])]

    def _ask(self, works: list[Work]) -> None:
        draws = [(work, number) for work in works for number in range(self.num_questions)]
        prompts = [
            Prompt(
                to_ask(work.history, len(work.images)),
                work.images,
                random_stream(self.seed, work.id, "question", number),
            )
            for work, number in draws
        ]
        for (work, number), reply in zip(draws, self.engine.write(prompts, self.question_sampling), strict=True):
            work.drawn += 1
            if problem := self.question_filter.problem(reply, {normalised(text) for text in work.questions.values()}):
                work.reject(problem, reply.text, number)
            else:
                work.questions[number] = reply.text

    def _answer(self, works: list[Work]) -> None:
        asked = [(work, number, question) for work in works for number, question in work.questions.items()]
        prompts = [
            Prompt(
                to_answer(work.history, len(work.images), question),
                work.images,
                random_stream(self.seed, work.id, "answer", number, answer),
            )
            for work, number, question in asked
            for answer in range(self.num_answers)
        ]
        replies = iter(self.engine.write(prompts, self.answer_sampling))
        for work, number, question in asked:
            drawn: list[Reply] = [next(replies) for _ in range(self.num_answers)]
            answers, problem = pair_answers(drawn, self.max_answer_similarity)
            if problem:
                work.reject(problem, "\n".join([question, *(reply.text for reply in drawn)]), number)
            else:
                prompt = to_answer(work.history, len(work.images), question)
                work.candidates.append({"id": f"{work.id}#{number}", "prompt": prompt, "answers": answers})


def _opened(record: dict[str, Any]) -> Work:
    """A record with its images, or set aside."""
    work = Work(record["id"])
    try:
        work.images = open_images(record["images"])
    except ValueError as error:
        work.reject("unreadable_image", str(error))
    else:
        if not work.images:
            work.reject("no_image", "")
    return work


def _one_ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map`, in a thread that is one item ahead of what is asked for."""
    pending = deque()
    with ThreadPoolExecutor(1) as executor:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Candidates for preference pairs: the policy asks about images and answers its own questions several times."""

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.hub_ids import public_name
from medst_trl.base.processes import ordered_map, process_state
from medst_trl.base.settings import check_bounds
from medst_trl.data.cells import printable
from medst_trl.data.conform import check_missing, conform
from medst_trl.data.overlap import with_image_ids
from medst_trl.data.schema import message, text_part, with_stored_images
from medst_trl.engines.engine import (
    DESCRIBE,
    Engine,
    OpenedImage,
    Prompt,
    Reply,
    Request,
    Sampling,
    open_images,
    random_stream_name,
    to_answer,
    to_ask,
)
from medst_trl.engines.kinds.transformers import TransformersEngine

from .filters import QuestionFilter, normalized, pair_answers


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

BATCHES_PER_WINDOW = 2  # batches are made within a window of records; an interrupted run repeats at most one
OPENING_THREADS = 2
_SHOWN = 500  # characters of a rejected text that are kept


# What makes the candidates of one record: yields requests, receives their replies in order, and returns the outcome.
_Steps = Generator[list[Request], list[Reply], dict[str, Any]]


@dataclass(eq=False, repr=False)
class CandidateGenerator:
    """
    Generate questions about images, with several answers to each (STLLaVA-Med, https://huggingface.co/papers/2406.19973).

    For each image the policy asks in an empty `<vusr>` turn. Each question is then asked in an ordinary user turn and
    answered several times, independently. Texts that are not questions, and equal answers, are rejected with their
    reason. With a model in this process each text has its own random stream, named by seed, record id and
    number: the candidates do not depend on the number of processes, on interruptions, or (up to floating-point ties)
    on the batch size.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`Engine`]):
            Policy, as [`load_policy`] returns it, on its device; or any engine, such as a server that runs the policy.
        processor ([`~transformers.ProcessorMixin`], *optional*):
            The policy's processor; None for an engine.
        num_questions (`int`, *optional*, defaults to `1`):
            Questions about each image, sampled independently.
        num_answers (`int`, *optional*, defaults to `2`):
            Answers to each question, at least 2. The first and second, third and fourth, ... make a pair.
        question_sampling ([`Sampling`], *optional*):
            Sampling of questions. Defaults to the paper's temperature 1.2, top-k 100, top-p 0.95, and 128 tokens.
        answer_sampling ([`Sampling`], *optional*):
            Sampling of answers. Defaults to the same with 256 tokens.
        describe_first (`bool`, *optional*, defaults to `False`):
            Whether the policy describes the image first, greedily, and asks and answers with that as history.
        question_filter ([`QuestionFilter`], *optional*):
            Which questions are kept.
        max_answer_similarity (`float`, *optional*, defaults to `0.95`):
            Answers that share more of their words are nearly identical; see [`same_answer`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of all sampling. A server may ignore it.
        batch_size (`int`, *optional*):
            Texts per batch, for a model; halved when they do not fit into memory. Defaults to 16 on a CPU and to as
            many as fit on an accelerator.

    Attributes:
        rejected (`list[dict]`):
            `id`, `reason` and `value` of what the last call rejected.

    Raises:
        UserError: for settings that cannot produce pairs.

    Example:

    ```python
    >>> model, processor = load_policy("runs/demo/sft")
    >>> images = load_dataset("runs/demo/prepare/images", split="train")
    >>> generate = CandidateGenerator(model, processor, num_questions=2, seed=7)
    >>> candidates = Dataset.from_list(list(generate(images)), features=candidate_features())
    ```
    """

    model: "PreTrainedModel | Engine"
    processor: "ProcessorMixin | None" = None
    num_questions: int = 1
    num_answers: int = 2
    _: KW_ONLY
    question_sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=128))
    answer_sampling: Sampling = field(default_factory=Sampling)
    describe_first: bool = False
    question_filter: QuestionFilter = field(default_factory=QuestionFilter)
    max_answer_similarity: float = 0.95
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self):
        check_bounds(self, at_least={"num_questions": 1, "num_answers": 2})
        if self.answer_sampling.temperature == 0:
            raise UserError("At temperature 0 all answers to a question are the same. Set a temperature above 0.")
        self.engine: Engine = self.model
        if self.processor is not None:
            self.engine = TransformersEngine(self.model, self.processor, self.batch_size)
        self.rejected: list[dict[str, Any]] = []

    def __call__(self, dataset: "Dataset") -> Iterator[dict[str, Any]]:
        """
        Ask about every record and answer. Under a distributed launch each process yields the candidates of its share.

        Args:
            dataset ([`~datasets.Dataset`]):
                Columns `images` (or `image`) and optionally `id` and `image_ids`.

        Yields:
            `dict`: a row of candidates: `id` (`<record>#<n>`), `images`, `image_ids`, `prompt` (messages, the question
            last), `answers`, `generation` (JSON: model, engine, seed, sampling), `group_id` (that of the record).

        Raises:
            UserError: for other columns, or repeated ids.
        """
        self.rejected = []
        dataset = with_image_ids(conform(dataset, "images"))
        make_row = self.row_maker(dataset)
        for outcome in self.outcomes(dataset):
            self.rejected += outcome["rejected"]
            yield from map(make_row, outcome["candidates"])

    def outcomes(self, dataset: "Dataset", done: Collection[str] = frozenset()) -> Iterator[dict[str, Any]]:
        """
        Yield the outcome of each record in JSON types: [`CandidateGenerator.__call__`] without the images.

        Args:
            dataset ([`~datasets.Dataset`]):
                As in [`CandidateGenerator.__call__`].
            done (collection of `str`, *optional*):
                Ids of finished records. They still take part in batching, so that a resumed run computes the same
                numbers as an uninterrupted one.

        Yields:
            `dict`: `id` of the record, `drawn` (number of questions), `candidates` (id, prompt, answers) and
            `rejected` (id, reason, value), as soon as the record is complete.
        """
        from tqdm.auto import tqdm

        check_missing(dataset.features, "images", required=("id", "images", "image_ids"))
        ids = dataset["id"][:]
        record_id, times = next(iter(Counter(ids).most_common(1)), (None, 0))
        if times > 1:
            raise UserError(f"{times} records have the id {record_id!r}. Give each its own id.")
        state = process_state()
        # Windows are of equal size on all processes, and each process has one if there are enough records.
        batch_size = self.engine.batch_size
        share = math.ceil(len(ids) / state.num_processes)
        size = 1 if batch_size is None else max(1, min(BATCHES_PER_WINDOW * batch_size, share))
        windows = [range(start, min(start + size, len(ids))) for start in range(0, len(ids), size)]
        own = windows[state.process_index :: state.num_processes]
        left = [window for window in own if any(ids[row] not in done for row in window)]
        rows = with_stored_images(dataset)
        ahead = None if batch_size is None else 1  # windows that are opened in advance
        opened = ordered_map(lambda window: [_open(rows[row]) for row in window], left, OPENING_THREADS, ahead)
        bar = {"total": sum(map(len, left)), "unit": "image", "disable": not state.is_main_process}
        finished = tqdm(self._finished(opened), "candidates", **bar)
        yield from (outcome for outcome in finished if outcome["id"] not in done)

    def row_maker(self, dataset: "Dataset") -> Callable[[dict[str, Any]], dict[str, Any]]:
        """
        Return a function from one of the `candidates` of an outcome to its row, with the images of the record in
        `dataset`, see [`publishable`].
        """
        from medst_trl.data.images import publishable  # loads NumPy and Pillow

        generation = self.generation()
        rows = {record_id: row for row, record_id in enumerate(dataset["id"])}
        records = with_stored_images(dataset)

        def make_row(candidate: dict[str, Any]) -> dict[str, Any]:
            record_id, _, _ = candidate["id"].rpartition("#")
            record = records[rows[record_id]]
            return {
                "id": candidate["id"],
                "images": [publishable(image) for image in record["images"]],
                "image_ids": record["image_ids"],
                "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in candidate["prompt"]],
                "answers": candidate["answers"],
                "generation": generation,
                "group_id": record.get("group_id"),
            }

        return make_row

    def generation(self) -> str:
        """Return how the candidates are made, as the column `generation` has it."""
        described = self.engine.describe()
        settings = {
            "model": described.get("model") and public_name(described["model"]),  # candidates are shared, paths not
            "seed": self.seed,
            "question_sampling": asdict(self.question_sampling),
            "answer_sampling": asdict(self.answer_sampling),
            "describe_first": self.describe_first,
        }
        return json.dumps(described | settings)

    def _finished(self, windows: Iterable[list[tuple]]) -> Iterator[dict[str, Any]]:
        """Take the steps of records from [`_open`], and yield the outcome of each record when it is complete."""
        complete: deque[dict[str, Any]] = deque()

        def requests_after(steps: _Steps, replies: list[Reply] | None) -> list[Request]:
            try:
                requests = steps.send(replies)
            except StopIteration as end:
                complete.append(end.value)
                return []
            replies = [None] * len(requests)
            requests = [replace(request, tag=(steps, replies, place)) for place, request in enumerate(requests)]
            return requests or requests_after(steps, [])  # a step without requests continues at once

        def then(request: Request, reply: Reply) -> list[Request]:
            steps, replies, place = request.tag
            replies[place] = reply
            return [] if None in replies else requests_after(steps, replies)

        def first_requests(records: list[tuple]) -> Iterator[Request]:
            return chain.from_iterable(requests_after(self._steps(*record), None) for record in records)

        run = self.engine.run(map(first_requests, windows), then)
        while next(run, None):  # a loop variable would keep the last images of a window
            while complete:
                yield complete.popleft()
        yield from complete

    def _steps(self, record_id: str, images: list[OpenedImage], problem: tuple[str, str] | None) -> _Steps:
        """Make the candidates of a record: describe the images (with `describe_first`), ask, and answer."""
        outcome = {"id": record_id, "drawn": 0, "candidates": [], "rejected": []}

        def reject(reason: str, value: str, row_id: str = record_id) -> None:
            outcome["rejected"].append({"id": row_id, "reason": reason, "value": printable(value[:_SHOWN])})

        if problem:
            reject(*problem)
            return outcome

        history: list[dict[str, Any]] = []
        if self.describe_first:
            messages = to_answer([], len(images), DESCRIBE)
            greedy = Sampling(temperature=0.0, max_new_tokens=self.answer_sampling.max_new_tokens)
            (reply,) = yield [Request(Prompt(messages, images), greedy)]
            if reason := reply.problem or (not reply.text and "empty_description"):
                reject(reason, reply.text)
                return outcome
            history = [*messages, message("assistant", [text_part(reply.text)])]

        asking = Prompt(to_ask(history, len(images)), images)
        replies = yield self._samples(asking, self.question_sampling, self.num_questions, record_id, "question")
        outcome["drawn"] = len(replies)
        questions: dict[int, str] = {}
        for number, reply in enumerate(replies):
            if reason := self.question_filter.problem(reply, {normalized(text) for text in questions.values()}):
                reject(reason, reply.text, f"{record_id}#{number}")
            else:
                questions[number] = reply.text

        prompts = {number: Prompt(to_answer(history, len(images), text), images) for number, text in questions.items()}
        sampling = self.answer_sampling, self.num_answers, record_id, "answer"
        answering = [self._samples(prompt, *sampling, number) for number, prompt in prompts.items()]
        replies = iter((yield list(chain.from_iterable(answering))))
        for number, prompt in prompts.items():
            own = list(islice(replies, self.num_answers))
            answers, reason = pair_answers(own, self.max_answer_similarity)
            if reason:
                texts = [questions[number], *(reply.text for reply in own)]
                reject(reason, "\n".join(texts), f"{record_id}#{number}")
            else:
                candidate = {"id": f"{record_id}#{number}", "prompt": prompt.messages, "answers": answers}
                outcome["candidates"].append(candidate)
        return outcome

    def _samples(self, prompt: Prompt, sampling: Sampling, count: int, *stream: Any) -> list[Request]:
        """Return requests for independent texts, each with its own random stream."""
        streams = [random_stream_name(self.seed, *stream, number) for number in range(count)]
        return [Request(replace(prompt, stream=stream), sampling) for stream in streams]


def _open(row: dict[str, Any]) -> tuple[str, list[OpenedImage], tuple[str, str] | None]:
    """Open a row's images. Returns its id, the images, and the reason and details if there are none."""
    try:
        images = open_images(row["images"])
    except ValueError as error:
        return row["id"], [], ("unreadable_image", str(error))
    return row["id"], images, None if images else ("no_image", "")

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Candidates for preference pairs: the policy asks about images and answers its own questions several times."""

import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.processes import ordered_map, process_state
from medst_trl.base.settings import check_bounds
from medst_trl.data.cells import printable
from medst_trl.data.conform import check_missing, conform
from medst_trl.data.identify import with_image_ids
from medst_trl.data.schema import message, text_part, with_stored_images
from medst_trl.engines.engine import (
    Engine,
    OpenedImage,
    Prompt,
    Reply,
    Request,
    Sampling,
    open_images,
    random_stream,
    to_answer,
    to_ask,
    to_describe,
)
from medst_trl.engines.kinds.transformers import TransformersEngine

from .filters import QuestionFilter, normalized, pair_answers


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

BATCHES_PER_WINDOW = 2  # batches are made within a window of records; an interrupted run repeats at most one
OPENING_THREADS = 2  # for engines without windows
_SHOWN = 500  # characters of a rejected text that are kept


@dataclass
class _Record:
    """
    A record while candidates are made from it.

    Args:
        id (`str`): Its id.
        images (`list[OpenedImage]`): Its images.
        history (`list[dict]`): The messages that describe them, with `describe_first`.
        open_requests (`int`): Number of requests without a reply.
        drawn (`int`): Number of questions sampled.
        questions (`dict[int, str]`): The questions that are kept, by their numbers.
        answers (`dict[tuple[int, int], Reply]`): The answers to them so far, by the numbers of question and answer.
        rejected (`list[dict]`): `id`, `reason`, `value` of what cannot be used.
    """

    id: str
    images: list[OpenedImage] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    open_requests: int = 0
    drawn: int = 0
    questions: dict[int, str] = field(default_factory=dict)
    answers: dict[tuple[int, int], Reply] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, row: dict[str, Any]) -> "_Record":
        """Open a row's images, or reject it."""
        record = cls(row["id"])
        try:
            record.images = open_images(row["images"])
            if not record.images:
                record.reject("no_image", "")
        except ValueError as error:
            record.reject("unreadable_image", str(error))
        return record

    def reject(self, reason: str, value: str, number: int | None = None) -> None:
        """Reject the record, or its question of that number."""
        row_id = self.id if number is None else f"{self.id}#{number}"
        self.rejected.append({"id": row_id, "reason": reason, "value": printable(value[:_SHOWN])})


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
        model_name (`str`, *optional*):
            Name of the model in `generation`. Defaults to the engine's.

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
    question_sampling: Sampling | None = None
    answer_sampling: Sampling | None = None
    describe_first: bool = False
    question_filter: QuestionFilter | None = None
    max_answer_similarity: float = 0.95
    seed: int = 0
    batch_size: int | None = None
    model_name: str | None = None

    def __post_init__(self):
        check_bounds(self, at_least={"num_questions": 1, "num_answers": 2})
        self.question_sampling = self.question_sampling or Sampling(max_new_tokens=128)
        self.answer_sampling = self.answer_sampling or Sampling()
        self.question_filter = self.question_filter or QuestionFilter()
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
            `rejected` (id, reason, value).
        """
        from tqdm.auto import tqdm

        check_missing(dataset.features, "images", required=("id", "images", "image_ids"))
        ids = dataset["id"][:]
        record_id, times = next(iter(Counter(ids).most_common(1)), (None, 0))
        if times > 1:
            raise UserError(f"{times} records have the id {record_id!r}. Give each its own id.")
        state = process_state()
        windows = self._windows(len(ids), state.num_processes)[state.process_index :: state.num_processes]
        left = [window for window in windows if any(ids[row] not in done for row in window)]
        total, remaining = (sum(map(len, some)) for some in (windows, left))
        finished = self._outcomes(dataset, left)
        bar = {"total": total, "initial": total - remaining, "unit": "image", "disable": not state.is_main_process}
        yield from (outcome for outcome in tqdm(finished, "candidates", **bar) if outcome["id"] not in done)

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
            "model": self.model_name or described.get("model"),
            "seed": self.seed,
            "question_sampling": asdict(self.question_sampling),
            "answer_sampling": asdict(self.answer_sampling),
            "describe_first": self.describe_first,
        }
        return json.dumps(described | settings)

    def _windows(self, records: int, processes: int) -> list[range]:
        """Divide the records, equally on all processes, and so that each process has a window if there are enough."""
        batch_size = self.engine.batch_size
        size = 1 if batch_size is None else max(1, min(BATCHES_PER_WINDOW * batch_size, -(-records // processes)))
        return [range(start, min(start + size, records)) for start in range(0, records, size)]

    def _outcomes(self, dataset: "Dataset", windows: Sequence[range]) -> Iterator[dict[str, Any]]:
        rows = with_stored_images(dataset)

        def opened(window: Iterable[int]) -> list[_Record]:
            return [_Record.open(rows[row]) for row in window]

        if self.engine.batch_size is None:
            records = chain.from_iterable(ordered_map(opened, windows, OPENING_THREADS))
            yield from map(self._outcome, self._finished(records))
            return
        for records in ordered_map(opened, windows, num_workers=1, ahead=1):
            deque(self._finished(records), maxlen=0)  # each step in batches over all records
            yield from map(self._outcome, records)

    def _finished(self, records: Iterable[_Record]) -> Iterator[_Record]:
        """Run the requests of the records, and yield each record when it is complete."""
        complete: deque[_Record] = deque()

        def opened(record: _Record, requests: list[Request]) -> list[Request]:
            record.open_requests += len(requests)
            if not record.open_requests:
                complete.append(record)
            return requests

        def then(request: Request, reply: Reply) -> list[Request]:
            record, *numbers = request.tag
            record.open_requests -= 1
            return opened(record, self._next_requests(request, reply, record, *numbers))

        first = chain.from_iterable(opened(record, self._first_requests(record)) for record in records)
        for _ in self.engine.run(first, then):
            while complete:
                yield complete.popleft()
        yield from complete

    def _first_requests(self, record: _Record) -> list[Request]:
        if not record.images:
            return []
        if not self.describe_first:
            return self._questions(record)
        greedy = Sampling(temperature=0.0, max_new_tokens=self.answer_sampling.max_new_tokens)
        return [Request(Prompt(to_describe(len(record.images)), record.images), greedy, (record,))]

    def _next_requests(
        self, request: Request, reply: Reply, record: _Record, question: int | None = None, answer: int | None = None
    ) -> list[Request]:
        """Return the requests after a reply: questions after a description, answers after a question."""
        if question is None:
            if problem := reply.problem or (not reply.text and "empty_description"):
                record.reject(problem, reply.text)
                return []
            record.history = [*request.prompt.messages, message("assistant", [text_part(reply.text)])]
            return self._questions(record)
        if answer is None:
            record.drawn += 1
            earlier = {normalized(text) for text in record.questions.values()}
            if problem := self.question_filter.problem(reply, earlier):
                record.reject(problem, reply.text, question)
                return []
            record.questions[question] = reply.text
            messages = to_answer(record.history, len(record.images), reply.text)
            return self._samples(record, messages, self.answer_sampling, self.num_answers, "answer", question)
        record.answers[question, answer] = reply
        return []

    def _questions(self, record: _Record) -> list[Request]:
        messages = to_ask(record.history, len(record.images))
        return self._samples(record, messages, self.question_sampling, self.num_questions, "question")

    def _samples(
        self, record: _Record, messages: list[dict], sampling: Sampling, count: int, purpose: str, *numbers: int
    ) -> list[Request]:
        """Return requests for independent texts, each with its own random stream and its numbers in the tag."""
        streams = [random_stream(self.seed, record.id, purpose, *numbers, number) for number in range(count)]
        prompts = [Prompt(messages, record.images, stream) for stream in streams]
        return [Request(prompt, sampling, (record, *numbers, number)) for number, prompt in enumerate(prompts)]

    def _outcome(self, record: _Record) -> dict[str, Any]:
        """Pair the answers to each question of a complete record, and return all results in JSON types."""
        candidates = []
        for number, question in sorted(record.questions.items()):
            replies = [record.answers[number, answer] for answer in range(self.num_answers)]
            answers, problem = pair_answers(replies, self.max_answer_similarity)
            if problem:
                record.reject(problem, "\n".join([question, *(reply.text for reply in replies)]), number)
            else:
                prompt = to_answer(record.history, len(record.images), question)
                candidates.append({"id": f"{record.id}#{number}", "prompt": prompt, "answers": answers})
        return {"id": record.id, "drawn": record.drawn, "candidates": candidates, "rejected": record.rejected}

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Greedy answers to a benchmark by any engine: resumable, on one or several processes."""

from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import fill_rows
from medst_trl.base.processes import process_state
from medst_trl.data.schema import with_stored_images
from medst_trl.engines.engine import Engine, OpenedImage, Prompt, Reply, Request, Sampling, open_images, to_answer

from .controls import blank_image, shown_rows


if TYPE_CHECKING:
    from datasets import Dataset

OPENED = 64  # images in memory, since questions about one image follow each other or share a batch


def answer_benchmark(
    engine: Engine,
    benchmark: "Dataset",
    *,
    max_new_tokens: int = 64,
    control: str | None = None,
    seed: int = 0,
    max_records: int | None = None,
    done: Collection[str] = frozenset(),
    model_name: str | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Ask every question of a benchmark, each on its own, and decode the answer greedily.

    Rows come in the order of the answers. A model in this process answers questions of similar length in one batch,
    the longest first. Under a distributed launch each process yields the answers to its share of the batches.

    Args:
        engine ([`~medst_trl.engines.engine.Engine`]):
            Answers the questions: a model in this process, or one on a server.
        benchmark ([`~datasets.Dataset`]):
            One row per image: `image_id`, `image`, `questions` (id, question, answer, answer_type, question_type).
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Maximum length of an answer.
        control (`str`, *optional*):
            `"blank"` or `"shuffled"`: ask about another image, see [`medst_trl.evaluation.controls`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the control `"shuffled"`.
        max_records (`int`, *optional*):
            Ask only the first N questions.
        done (collection of `str`, *optional*):
            Ids that are already answered. They still take part in batching, so that a resumed run computes the same
            numbers as an uninterrupted one.
        model_name (`str`, *optional*):
            Name of the model in `generation`. Defaults to the engine's.

    Yields:
        `dict`: a row of the predictions file: id, image_id, question, answer, answer_type, question_type,
        `prediction`, `generation` (what the engine says about itself, max_new_tokens, control, the image shown, and
        whether the answer ended before `max_new_tokens`). If the engine refuses a question, the prediction is empty
        and `generation` has the reason as `problem`.

    Raises:
        UserError: for an unknown control, repeated ids, a benchmark whose images cannot be shuffled, or an engine that
            cannot answer.

    Example:

    ```python
    >>> engine = TransformersEngine(*load_policy("runs/demo/sft"))
    >>> rows = list(answer_benchmark(engine, load_dataset("runs/demo/prepare/benchmark", split="test")))
    >>> score_vqa(rows)["exact_match"]
    ```
    """
    from tqdm import tqdm

    state = process_state()
    questions = questions_of(benchmark, max_records)
    image_ids = benchmark["image_id"][:]
    shown = shown_rows(image_ids, control, seed)
    prompt = _prompts(benchmark, shown, control)
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    settings = engine.describe() | ({"model": model_name} if model_name else {})
    settings |= {"decoding": "greedy", "max_new_tokens": max_new_tokens, "control": control}
    batches = engine.batches(len(questions), lambda number: prompt(questions[number]))
    own = batches[state.process_index :: state.num_processes]
    batches = [[questions[number] for number in batch] for batch in own]
    total = sum(map(len, batches))
    # A batch with any question left is computed as a whole, so that its numbers stay the same.
    batches = [batch for batch in batches if any(question["id"] not in done for question in batch)]
    left = sum(map(len, batches))
    calls = batches if engine.batch_size else [list(chain.from_iterable(batches))]
    title, is_hidden = control or "answers", not state.is_main_process
    with tqdm(total=total, initial=total - left, desc=title, unit="question", disable=is_hidden) as bar:
        for call in calls:
            for request, reply in engine.run(Request(prompt(question), sampling, question) for question in call):
                bar.update()
                if request.tag["id"] not in done:
                    image_shown = None if control == "blank" else image_ids[shown[request.tag["row"]]]
                    yield _prediction(request.tag, reply, settings | {"image_shown": image_shown})


def _prediction(question: dict[str, Any], reply: Reply, generation: dict[str, Any]) -> dict[str, Any]:
    """Make a row of the predictions file."""
    row = {key: value for key, value in question.items() if key not in ("row", "link")}
    generation["ended"] = reply.ended
    if reply.problem:
        generation["problem"] = f"{reply.problem}: {reply.text}"
    return row | {"prediction": "" if reply.problem else reply.text, "generation": generation}


def _prompts(benchmark: "Dataset", shown: list[int], control: str | None) -> Callable[[dict[str, Any]], Prompt]:
    """Return a function that makes a question's prompt: its text and the image that is shown for it."""
    stored = with_stored_images(benchmark)

    @lru_cache(OPENED)
    def opened(row: int) -> OpenedImage:
        try:
            (image,) = open_images([stored[row]["image"]])
        except ValueError as error:
            raise UserError(f"Image {stored[row]['image_id']} of the benchmark cannot be read: {error}.") from None
        return OpenedImage(b"", blank_image(image.image)) if control == "blank" else image

    return lambda question: Prompt(to_answer([], 1, question["question"]), [opened(shown[question["row"]])])


def write_predictions(path: str | Path, engine: Engine, benchmark: "Dataset", **kwargs: Any) -> None:
    """
    Write the answers of [`answer_benchmark`] to `path` in the benchmark's order; an interrupted run resumes.

    Args:
        path (`str` or `pathlib.Path`):
            Predictions file. It appears once it is complete; until then rows are in `<path>.incomplete`. If it exists,
            nothing is done.
        engine, benchmark, **kwargs:
            As in [`answer_benchmark`].
    """
    ids = [question["id"] for question in questions_of(benchmark, kwargs.get("max_records"))]
    fill_rows(Path(path), ids, lambda done: answer_benchmark(engine, benchmark, done=done, **kwargs))


def questions_of(benchmark: "Dataset", max_records: int | None = None) -> list[dict[str, Any]]:
    """
    Return all questions in the benchmark's order, each with its `image_id` and the `row` of its image.

    Raises:
        UserError: if two have one id, or there are none.
    """
    questions = {}
    for row, record in enumerate(benchmark.remove_columns("image")):
        for question in record["questions"]:
            if question["id"] in questions:
                raise UserError(
                    f"Two questions of the benchmark have the id {question['id']!r}. Give each its own id and prepare "
                    "the benchmark again."
                )
            about = {"id": question["id"], "image_id": record["image_id"]}
            questions[question["id"]] = about | question | {"row": row}
    if not questions:
        raise UserError("The benchmark holds no questions. See its rejected.jsonl, or choose another split.")
    return list(questions.values())[:max_records]

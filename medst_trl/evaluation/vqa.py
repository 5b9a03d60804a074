# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Greedy answers to a benchmark by any engine: resumable, on one or several processes.

Controls are the same evaluation with images that do not help, to show how much of a score needs the image:

- `blank`: every image is replaced by a mid-gray one of the same size.
- `shuffled`: every question is asked about another image of the benchmark, all questions of one image about the same.

Both are built in; there is no registry for others. If a control reaches the same score, the model does not need the
image for it. LLaVA-Med's issue 130 reports answers that do not change with the image:
https://github.com/microsoft/LLaVA-Med/issues/130.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import fill_rows
from medst_trl.base.processes import process_state
from medst_trl.base.settings import check_choice
from medst_trl.data.schema import with_stored_images
from medst_trl.engines.engine import Engine, OpenedImage, Prompt, Reply, Request, Sampling, open_images, to_answer


if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

CONTROLS = ("blank", "shuffled")
OPENED = 64  # images in memory, since questions about one image follow each other or share a batch


def blank_image(image: "Image.Image") -> "Image.Image":
    """Make a mid-gray image of the same size."""
    from PIL import Image

    return Image.new("RGB", image.size, (128, 128, 128))


def shuffled_rows(image_ids: Sequence[str], seed: int = 0) -> list[int]:
    """
    Give every row of a benchmark a different image, taken from another row.

    Args:
        image_ids (sequence of `str`):
            Image id of each row; rows with the same id show the same image.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffle.

    Returns:
        `list[int]`: for each row the row whose image it gets. A permutation: each image is used as often as before.

    Raises:
        UserError: if one image is in more than half of the rows, since some question would then keep it.
    """
    counts = Counter(image_ids)
    image_id, most = counts.most_common(1)[0] if counts else ("", 0)
    if 2 * most > len(image_ids):
        raise UserError(
            f"The images cannot be shuffled: {most} of the {len(image_ids)} images of the benchmark are the same one "
            f"({image_id[:12]}). Remove 'shuffled' from controls, or evaluate on more images."
        )
    rng = random.Random(seed)
    order = sorted(counts)
    rng.shuffle(order)
    position = {image_id: number for number, image_id in enumerate(order)}
    rows = sorted(range(len(image_ids)), key=lambda row: (position[image_ids[row]], row))
    # Rows with the same image are now adjacent, at most `most` of them: that many rows further the image differs.
    donors = dict(zip(rows, rows[most:] + rows[:most]))
    return [donors[row] for row in range(len(rows))]


def shown_rows(image_ids: Sequence[str], control: str | None = None, seed: int = 0) -> list[int]:
    """
    Return for each row of a benchmark the row whose image a control shows.

    Raises:
        UserError: for an unknown control, or images that cannot be shuffled.
    """
    check_choice("control", control, CONTROLS)
    return shuffled_rows(image_ids, seed) if control == "shuffled" else list(range(len(image_ids)))


def answer_benchmark(
    engine: Engine,
    benchmark: "Dataset",
    *,
    max_new_tokens: int = 64,
    control: str | None = None,
    seed: int = 0,
    max_records: int | None = None,
    done: Collection[str] = frozenset(),
) -> Iterator[dict[str, Any]]:
    """
    Ask every question of a benchmark, each on its own, and decode the answer greedily.

    Rows come in the order of the answers. A model in this process answers questions of similar length in one batch,
    the longest first. Under a distributed launch each process yields the answers to its share of the batches.

    Args:
        engine ([`~medst_trl.engines.engine.Engine`]):
            Answers the questions: a model in this process, or one on a server.
        benchmark ([`~datasets.Dataset`]):
            One row per image: `image_id`, `image`, `questions` (id, question, answer, answer_type, question_type),
            optionally `group_id`.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Maximum length of an answer.
        control (`str`, *optional*):
            `"blank"` or `"shuffled"`: ask about another image, see [`medst_trl.evaluation.vqa`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the control `"shuffled"`.
        max_records (`int`, *optional*):
            Ask only the first N questions.
        done (collection of `str`, *optional*):
            Ids that are already answered. They still take part in batching, so that a resumed run computes the same
            numbers as an uninterrupted one.

    Yields:
        `dict`: a row of the predictions file: id, image_id, group_id, question, answer, answer_type,
        question_type, `prediction`, `generation` (what the engine says about itself, max_new_tokens, control, the
        image shown, and whether the answer ended before `max_new_tokens`). If the engine refuses a question, the
        prediction is empty and `generation` has the reason as `problem`.

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
    settings = engine.describe() | {"decoding": "greedy", "max_new_tokens": max_new_tokens, "control": control}
    batches = engine.batches(len(questions), lambda number: prompt(questions[number]))
    own = batches[state.process_index :: state.num_processes]
    batches = [[questions[number] for number in batch] for batch in own]
    # A batch with any question left is computed as a whole, so that its numbers stay the same.
    batches = [batch for batch in batches if any(question["id"] not in done for question in batch)]
    requests = ([Request(prompt(question), sampling, question) for question in batch] for batch in batches)
    bar = {"total": sum(map(len, batches)), "unit": "question", "disable": not state.is_main_process}
    for request, reply in tqdm(engine.run(requests), control or "answers", **bar):
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
    Return all questions in the benchmark's order, each with `image_id`, `group_id` and the `row` of its image.

    Raises:
        UserError: if two have one id, or there are none.
    """
    questions = {}
    for row, record in enumerate(benchmark.remove_columns("image")):
        for question in record["questions"]:
            if question["id"] in questions:
                raise UserError(f"Two questions of the benchmark have the id {question['id']!r}. Give each its own.")
            about = {"id": question["id"], "image_id": record["image_id"], "group_id": record.get("group_id")}
            questions[question["id"]] = about | question | {"row": row}
    if not questions:
        raise UserError("The benchmark holds no questions. See its rejected.jsonl, or choose another split.")
    return list(questions.values())[:max_records]

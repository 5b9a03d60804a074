# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A policy's greedy answers to a benchmark: in batches of similar length, resumable, on one or several processes."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.processes import process_state
from medst_trl.base.row_log import RowLog
from medst_trl.data.schema import image_part, message, text_part
from medst_trl.engines.decoding import chat_inputs, write_texts

from .controls import blank_image, shown_rows


if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


def answer_benchmark(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    benchmark: "Dataset",
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    control: str | None = None,
    seed: int = 0,
    max_records: int | None = None,
    done: Collection[str] = frozenset(),
    model_name: str | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Ask every question of a benchmark, each on its own, and decode the answer greedily.

    Questions of similar length (image tokens included) share a batch, the longest first, so rows are not in the
    benchmark's order. Under a distributed launch each process yields the answers to its share of the batches.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy, as [`load_policy`] returns it, on its device.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        benchmark ([`~datasets.Dataset`]):
            One row per image: `image_id`, `image`, `questions` (id, question, answer, answer_type, question_type).
        batch_size (`int`, *optional*, defaults to `16`):
            Questions per batch.
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
            Name of the model in `generation`.

    Yields:
        `dict`: a row of the predictions file: id, image_id, question, answer, answer_type, question_type,
        `prediction`, `generation` (model, max_new_tokens, control, the image shown, and whether the answer ended
        before `max_new_tokens`).

    Raises:
        UserError: for an unknown control, repeated ids, a benchmark whose images cannot be shuffled, or too little
            memory for the batch size.

    Example:

    ```python
    >>> model, processor = load_policy("runs/demo/sft")
    >>> rows = list(answer_benchmark(model, processor, load_dataset("runs/demo/prepare/benchmark", split="test")))
    >>> score_vqa(rows)["exact_match"]
    ```
    """
    from tqdm import tqdm

    state = process_state()
    questions = questions_of(benchmark, max_records)
    image_ids = list(benchmark["image_id"])
    shown = shown_rows(image_ids, control, seed)

    def image(question: dict[str, Any]) -> "Image.Image":
        found = benchmark[shown[question["row"]]]["image"]
        return blank_image(found) if control == "blank" else found

    batches = _batches(processor, questions, image, batch_size)[state.process_index :: state.num_processes]
    name = model_name or getattr(model.config, "name_or_path", None) or None
    settings = {"model": name, "decoding": "greedy", "max_new_tokens": max_new_tokens, "control": control}
    total, title = sum(map(len, batches)), control or "answers"
    with tqdm(total=total, desc=title, unit="question", disable=not state.is_main_process) as bar:
        for batch in batches:
            if any(question["id"] not in done for question in batch):
                texts = [question["question"] for question in batch]
                answers = greedy_answers(model, processor, texts, list(map(image, batch)), max_new_tokens)
                for question, (prediction, ended) in zip(batch, answers):
                    if question["id"] in done:
                        continue
                    row = {key: value for key, value in question.items() if key not in ("row", "link")}
                    shown_id = image_ids[shown[question["row"]]] if control != "blank" else None
                    yield row | {
                        "prediction": prediction,
                        "generation": settings | {"image_shown": shown_id, "ended": ended},
                    }
            bar.update(len(batch))


def write_predictions(
    path: str | Path, model: "PreTrainedModel", processor: "ProcessorMixin", benchmark: "Dataset", **kwargs: Any
) -> None:
    """
    Write the answers of [`answer_benchmark`] to `path` in the benchmark's order; an interrupted run resumes.

    Args:
        path (`str` or `pathlib.Path`):
            Predictions file. It appears once it is complete; until then rows are in `<path>.incomplete`. If it exists,
            nothing is done.
        model, processor, benchmark, **kwargs:
            As in [`answer_benchmark`].
    """
    ids = [question["id"] for question in questions_of(benchmark, kwargs.get("max_records"))]
    RowLog.fill(Path(path), ids, lambda done: answer_benchmark(model, processor, benchmark, done=done, **kwargs))


def questions_of(benchmark: "Dataset", max_records: int | None = None) -> list[dict[str, Any]]:
    """
    All questions in the benchmark's order, each with its `image_id` and the `row` of its image.

    Raises:
        UserError: if two have one id, or there are none.
    """
    questions, seen = [], set()
    for row, record in enumerate(benchmark.remove_columns("image")):
        for question in record["questions"]:
            if question["id"] in seen:
                raise UserError(
                    f"Two questions of the benchmark have the id {question['id']!r}. Give each its own id and prepare "
                    "the benchmark again."
                )
            seen.add(question["id"])
            questions.append({"id": question["id"], "image_id": record["image_id"], **question, "row": row})
    if not questions:
        raise UserError("The benchmark holds no questions. See its rejected.jsonl, or choose another split.")
    return questions[:max_records]


def _batches(
    processor: "ProcessorMixin", questions: list[dict], image: Callable[[dict], "Image.Image"], batch_size: int
) -> list[list[dict]]:
    """Questions of similar length together, the longest first: a batch that is too large fails at once."""
    asked = [question["question"] for question in questions]
    texts = processor.tokenizer(asked, add_special_tokens=False)["input_ids"]
    # The tokens that an image (and the template) add depend on its size alone: one question per size tells it.
    sizes, added, lengths = {}, {}, []
    for question, text in zip(questions, texts):
        if question["row"] not in sizes:
            sizes[question["row"]] = image(question).size
        size = sizes[question["row"]]
        if size not in added:
            prompt = prompts(processor, [question["question"]], [image(question)])["input_ids"]
            added[size] = prompt.shape[1] - len(text)
        lengths.append(added[size] + len(text))
    order = sorted(range(len(questions)), key=lambda place: (-lengths[place], place))
    return [[questions[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]


def greedy_answers(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    questions: list[str],
    images: list["Image.Image"],
    max_new_tokens: int,
) -> list[tuple[str, bool]]:
    """
    Answer each question about its image, in one batch.

    Returns:
        `list[tuple[str, bool]]`: each answer, and whether it ended before `max_new_tokens`.

    Raises:
        UserError: if the batch does not fit into memory.
    """
    import torch

    try:
        return write_texts(model, processor, prompts(processor, questions, images), max_new_tokens)
    except torch.OutOfMemoryError:
        raise UserError(
            f"Not enough memory for {len(questions)} questions per batch. Run the same command with a smaller "
            "--batch_size: it resumes."
        ) from None


def prompts(processor: "ProcessorMixin", questions: list[str], images: list["Image.Image"]) -> "BatchFeature":
    """
    What the model reads: the chat template over one user turn of image and question, see [`chat_inputs`].

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The policy's processor.
        questions (`list[str]`):
            Questions; text that spells a control token is neutralised.
        images (`list[PIL.Image.Image]`):
            The image of each.

    Returns:
        [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` of shape (batch, length), and the pixel
        inputs.
    """
    conversations = [[message("user", [image_part(), text_part(question)])] for question in questions]
    return chat_inputs(processor, conversations, [[image] for image in images])

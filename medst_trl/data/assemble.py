# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""From what a reader found and what the images are to the rows of every dataset. Touches no file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .conversations import conversations_about_image
from .records import Conversation, Question, Rejected, Source, published_id
from .splits import by_image, hold_out, split_off_validation


@dataclass(frozen=True)
class Datasets:
    """
    Rows in the columns of `schema.py`, with names of images where the images will be.

    Attributes:
        train, validation (`list[dict]`): Instruct rows.
        unlabelled (`list[dict]`): Instruct rows without messages, each picture once.
        benchmark (`list[dict]`): Benchmark rows of the test split.
        rejected (`list[Rejected]`): What was set aside, by the readers and here.
        notes (`dict[str, int]`): Overlap between splits and what was removed for it, and what the reader counted.
    """

    train: list[dict]
    validation: list[dict]
    unlabelled: list[dict]
    benchmark: list[dict]
    rejected: list[Rejected]
    notes: dict[str, int]

    def is_empty(self) -> bool:
        return not (self.train or self.validation or self.unlabelled or self.benchmark)

    def counts(self) -> dict[str, dict]:
        """Numbers by dataset, the notes, and how many were set aside for which reason, most frequent first."""
        named = {
            "benchmark/test": self.benchmark,
            "instruct/train": self.train,
            "instruct/validation": self.validation,
            "images/train": self.unlabelled,
        }
        return {
            "datasets": {name: _count(rows) for name, rows in named.items() if rows},
            "notes": self.notes,
            "rejected": dict(Counter(rejected.reason for rejected in self.rejected).most_common()),
        }


def assemble(
    source: Source,
    image_ids: Mapping[str, str],
    problems: Mapping[str, Rejected],
    *,
    validation_fraction: float = 0.0,
    image_disjoint: bool = False,
    seed: int = 0,
) -> Datasets:
    """
    Place every record.

    Args:
        source ([`Source`]): From a reader.
        image_ids, problems: From `index_images`. A record with an image that is a problem is set aside for its reason.
        validation_fraction, seed: See [`split_off_validation`].
        image_disjoint: See [`hold_out`].
    """
    rejected, talks, unlabelled = list(source.rejected), [], {}
    for conversation in source.conversations:
        problem = next((problems[name] for name in conversation.images if name in problems), None)
        if problem is not None:
            rejected.append(replace(problem, id=conversation.id))
        elif conversation.messages:
            talks.append(conversation)
        elif (image := image_ids[conversation.images[0]]) in unlabelled:
            rejected.append(Rejected(conversation.id, "duplicate_image", unlabelled[image].images[0]))
        else:
            unlabelled[image] = replace(conversation, id=f"image-{image[:16]}")

    usable = []
    for question in source.questions:
        if question.image in problems:
            rejected.append(replace(problems[question.image], id=question.id))
        else:
            usable.append(question)
    splits = hold_out(usable, image_ids, image_disjoint)
    for split in ("validation", "train"):
        for image, questions in by_image(splits.questions[split], image_ids).items():
            talks += conversations_about_image(f"{source.name}-{split}-{image[:16]}", questions)

    talks = split_off_validation(talks, image_ids, validation_fraction, seed)

    def row_id(name: str, images: tuple[str, ...]) -> str:
        return published_id(name, images) if source.image_folder else name  # drawn pictures have no file names

    def instruct_row(talk: Conversation) -> dict:
        return {
            "id": row_id(talk.id, talk.images),
            "images": list(talk.images),
            "image_ids": [image_ids[name] for name in talk.images],
            "messages": talk.messages,
        }

    def benchmark_row(image: str, questions: list[Question]) -> dict:
        columns = ("question", "answer", "answer_type", "question_type")
        return {
            "image_id": image,
            "image": questions[0].image,
            "questions": [
                {"id": row_id(question.id, (question.image,))}
                | {name: getattr(question, name) for name in columns}
                | {"link": row_id(question.link, (question.image,)) if question.link else None}
                for question in questions
            ],
        }

    benchmark = by_image(splits.questions["test"], image_ids)
    return Datasets(
        train=[instruct_row(talk) for talk in talks if talk.split == "train"],
        validation=[instruct_row(talk) for talk in talks if talk.split == "validation"],
        unlabelled=[instruct_row(picture) for picture in unlabelled.values()],
        benchmark=[benchmark_row(image, questions) for image, questions in benchmark.items()],
        rejected=rejected,
        notes=source.counts | (splits.counts if source.questions else {}),
    )


def _count(rows: list[dict]) -> dict[str, int]:
    if "questions" in rows[0]:
        kinds = Counter(question["answer_type"] for row in rows for question in row["questions"])
        return {"images": len(rows), "questions": sum(kinds.values()), **kinds}
    images = len({image for row in rows for image in row["image_ids"]})
    answers = sum(message["role"] == "assistant" for row in rows for message in row["messages"])
    return {"images": images} | ({"conversations": len(rows), "answers": answers} if answers else {})

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Turn the records of a source into the rows of every dataset: splits, conversations, benchmark. Touches no file.

Splits are drawn by image, never by row. The questions of a benchmark become conversations of several turns, which
gives self-questioning its later turns.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .groups import representatives
from .schema import dialogue
from .source import Conversation, Question, Records, Rejected


class Datasets(NamedTuple):
    """
    The content of all datasets of a source.

    Attributes:
        rows (`dict`):
            Rows by kind of dataset and split, in the order in which they are written. They have the columns of
            `schema.py`, with names of images in place of the images.
        rejected (`list[Rejected]`):
            Records that cannot be used, those of the reader first.
        counts (`dict`):
            Numbers by dataset (`datasets`), the counts of the reader and the overlap between splits (`notes`), and the
            number of rejected records by reason, most frequent first (`rejected`).
    """

    rows: dict[tuple[str, str], list[dict]]
    rejected: list[Rejected]
    counts: dict[str, dict[str, Any]]


def assemble(
    records: Records,
    image_ids: Mapping[str, str],
    problems: Mapping[str, Rejected],
    *,
    validation_fraction: float = 0.0,
    image_disjoint: bool = False,
    seed: int = 0,
) -> Datasets:
    """
    Place every record in a dataset, or reject it.

    Args:
        records ([`Records`]):
            From a source.
        image_ids, problems (`dict`):
            From `index_images`. A record with an image that cannot be used is rejected for the image's reason.
        validation_fraction, seed:
            See [`split_off_validation`].
        image_disjoint:
            See [`hold_out`].
    """
    conversations, unlabelled, questions, rejected = [], {}, [], list(records.rejected)
    for record in records:
        problem = next((problems[name] for name in record.images if name in problems), None)
        if problem is not None:
            rejected.append(replace(problem, id=record.id))
        elif isinstance(record, Question):
            questions.append(record)
        elif record.messages:
            conversations.append(record)
        elif (image := image_ids[record.images[0]]) in unlabelled:  # each unlabelled image once
            rejected.append(Rejected(record.id, "duplicate_image", unlabelled[image].images[0]))
        else:
            unlabelled[image] = replace(record, id=f"image-{image[:16]}")
    splits, overlap = hold_out(questions, image_ids, image_disjoint)
    for split in ("validation", "train"):
        for images, about in by_image(splits[split], image_ids).items():
            name = "-".join(image[:16] for image in images)
            conversations += conversations_about_image(f"{records.name}-{split}-{name}", about)
    conversations = split_off_validation(conversations, image_ids, validation_fraction, seed)
    rows = {("benchmark", "test"): _benchmark_rows(records, splits["test"], image_ids)}
    for split in ("train", "validation"):
        of_split = [conversation for conversation in conversations if conversation.split == split]
        rows["instruct", split] = _instruct_rows(records, of_split, image_ids)
    rows["images", "train"] = _instruct_rows(records, unlabelled.values(), image_ids)
    counts = {
        "datasets": {f"{kind}/{split}": _count(made) for (kind, split), made in rows.items() if made},
        "notes": records.counts | (overlap if records.questions else {}),
        "rejected": dict(Counter(item.reason for item in rejected).most_common()),
    }
    return Datasets(rows, rejected, counts)


def _count(rows: list[dict]) -> dict[str, int]:
    if "questions" in rows[0]:
        types = Counter(question["answer_type"] for row in rows for question in row["questions"])
        return {"images": len(rows), "questions": sum(types.values()), **types}
    images = len({image for row in rows for image in row["image_ids"]})
    answers = sum(message["role"] == "assistant" for row in rows for message in row["messages"])
    return {"images": images} | ({"conversations": len(rows), "answers": answers} if answers else {})


def _instruct_rows(records: Records, kept: Iterable[Conversation], image_ids: Mapping[str, str]) -> list[dict]:
    return [
        {
            "id": records.published_id(conversation.id, conversation.images),
            "images": list(conversation.images),
            "image_ids": [image_ids[name] for name in conversation.images],
            "messages": conversation.messages,
        }
        for conversation in kept
    ]


def _benchmark_rows(records: Records, questions: Iterable[Question], image_ids: Mapping[str, str]) -> list[dict]:
    def question_row(question: Question) -> dict:
        row = {name: getattr(question, name) for name in ("question", "answer", "answer_type", "question_type")}
        for name in ("id", "link"):
            value = getattr(question, name)
            row[name] = records.published_id(value, question.images) if value else None
        return row

    return [
        {"image_id": image, "image": about[0].image, "questions": list(map(question_row, about))}
        for (image,), about in by_image(questions, image_ids).items()
    ]


# --- Splits ----------------------------------------------------------------------------------------------------------


def hold_out(
    questions: Iterable[Question], image_ids: Mapping[str, str], image_disjoint: bool = False
) -> tuple[dict[str, list[Question]], dict[str, int]]:
    """
    Remove from train what is also in test or validation, and from validation what is also in test.

    A question about an image that is in both is always removed (VQA-RAD's MEVF split has 14 such pairs). With
    `image_disjoint`, every question about an image of the later split is removed as well.

    Args:
        questions (iterable of [`Question`]):
            All that can be used.
        image_ids (`dict`):
            Name of an image to its `image_id`; equal images under two names are one.
        image_disjoint (`bool`, *optional*, defaults to `False`):
            See above.

    Returns:
        The questions by split, and for each two splits that share something the counts `images_in_train_and_test`
        (before removal; always reported), `pairs_in_...`, `questions_removed_for_pairs_in_...` and
        `questions_removed_for_images_in_...`.
    """
    by_split: dict[str, list[Question]] = {"test": [], "validation": [], "train": []}
    for question in questions:
        by_split[question.split].append(question)
    counts = {}
    for held, taken_from in (("test", "validation"), ("test", "train"), ("validation", "train")):
        held_pairs = {_pair(question, image_ids) for question in by_split[held]}
        held_images = {image for images, _ in held_pairs for image in images}
        before, where = by_split[taken_from], f"in_{taken_from}_and_{held}"
        pairs = {_pair(question, image_ids) for question in before}
        kept = [question for question in before if _pair(question, image_ids) not in held_pairs]
        apart = [question for question in kept if held_images.isdisjoint(_pair(question, image_ids)[0])]
        by_split[taken_from] = apart if image_disjoint else kept
        counts |= {
            f"images_{where}": len({image for images, _ in pairs for image in images} & held_images),
            f"pairs_{where}": len(pairs & held_pairs),
            f"questions_removed_for_pairs_{where}": len(before) - len(kept),
            f"questions_removed_for_images_{where}": len(kept) - len(by_split[taken_from]),
        }
    return by_split, {name: n for name, n in counts.items() if n or name == "images_in_train_and_test"}


def split_off_validation(
    conversations: Collection[Conversation], image_ids: Mapping[str, str], fraction: float, seed: int
) -> list[Conversation]:
    """
    Move about a `fraction` of the images, with all their conversations, from train to validation.

    Which images depends only on the images and the seed, not on their order or on other records of the source. Images
    of one conversation stay together. A conversation without an image is drawn by its id.
    """
    together = representatives([image_ids[name] for name in conversation.images] for conversation in conversations)

    def key(conversation: Conversation) -> str:
        return together[image_ids[conversation.images[0]]] if conversation.images else conversation.id

    return [
        replace(conversation, split="validation") if draw(key(conversation), seed) < fraction else conversation
        for conversation in conversations
    ]


def by_image(questions: Iterable[Question], image_ids: Mapping[str, str]) -> dict[tuple[str, ...], list[Question]]:
    """Group questions by the `image_id`s of their images, in their original order."""
    groups = defaultdict(list)
    for question in questions:
        groups[_pair(question, image_ids)[0]].append(question)
    return dict(groups)


def plain_question(text: str) -> str:
    """Normalize a question for comparison: lower case, single spaces."""
    return " ".join(text.lower().split())


def _pair(question: Question, image_ids: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    return tuple(image_ids[name] for name in question.images), plain_question(question.question)


def draw(key: str, seed: int) -> float:
    """Return a number in [0, 1) that depends only on the key and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


# --- Conversations ---------------------------------------------------------------------------------------------------


def conversations_about_image(name: str, questions: Collection[Question]) -> list[Conversation]:
    """
    Make conversations of all questions about one image, or about the same images, in their order.

    Of the paraphrases of one question only one is in a conversation, so that no answer is given away earlier: the
    second conversation takes the second wording of every question that has one, and so on. All data is used, once.

    Args:
        name (`str`):
            Prefix of the ids: `<name>-0`, `<name>-1`, ...
        questions (collection of [`Question`]):
            Questions with the same images and one split.
    """
    groups = linked_groups(questions)
    conversations = []
    for number in range(max(map(len, groups), default=0)):
        turns = [(group[number].question, group[number].answer) for group in groups if number < len(group)]
        first = groups[0][0]
        messages = dialogue(turns, len(first.images))
        conversations.append(Conversation(f"{name}-{number}", first.images, messages, first.split))
    return conversations


def linked_groups(questions: Collection[Question]) -> list[list[Question]]:
    """
    Group the questions about one image by what they ask: those that share a link, and those with the same words,
    whatever their links are. Groups and their members keep their order.
    """
    names = []
    for question in questions:
        words = ("words", plain_question(question.question))
        names.append([words] if question.link is None else [words, ("link", question.link)])
    same = representatives(names)
    groups = defaultdict(list)
    for (words, *_), question in zip(names, questions):
        groups[same[words]].append(question)
    return list(groups.values())

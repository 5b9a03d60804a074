# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which conversations are for training and validation, and which questions are held out. By image, never by row."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .disjoint_sets import DisjointSets
from .records import Conversation, Question


@dataclass
class Splits:
    """Questions by split, and what was found and removed on the way."""

    questions: dict[str, list[Question]]
    counts: dict[str, int] = field(default_factory=dict)


def hold_out(questions: Iterable[Question], image_ids: Mapping[str, str], image_disjoint: bool = False) -> Splits:
    """
    Take from train what also stands in test or validation, and from validation what also stands in test.

    A question about an image that stands in both goes always (VQA-RAD's MEVF split has 14 such pairs). With
    `image_disjoint`, every question about an image of the later split goes too.

    Args:
        questions: All that can be used.
        image_ids: Name of an image to its `image_id`; equal pictures under two names are one.
        image_disjoint (`bool`): See above.

    Returns:
        [`Splits`]; its counts are, for each two splits that share something, `images_in_train_and_test` (before
        removal; always told), `pairs_in_...`, `questions_removed_for_pairs_in_...` and
        `questions_removed_for_images_in_...`.
    """
    by_split: dict[str, list[Question]] = {"test": [], "validation": [], "train": []}
    for question in questions:
        by_split[question.split].append(question)
    counts = {}
    for held, taken_from in (("test", "validation"), ("test", "train"), ("validation", "train")):
        held_pairs = {_pair(question, image_ids) for question in by_split[held]}
        held_images = {image for image, _ in held_pairs}
        before = by_split[taken_from]
        pairs = {_pair(question, image_ids) for question in before}
        kept = [question for question in before if _pair(question, image_ids) not in held_pairs]
        where = f"in_{taken_from}_and_{held}"
        counts[f"images_{where}"] = len({image for image, _ in pairs} & held_images)
        counts[f"pairs_{where}"] = len(pairs & held_pairs)
        counts[f"questions_removed_for_pairs_{where}"] = len(before) - len(kept)
        if image_disjoint:
            rest = [question for question in kept if image_ids[question.image] not in held_images]
            counts[f"questions_removed_for_images_{where}"] = len(kept) - len(rest)
            kept = rest
        by_split[taken_from] = kept
    return Splits(by_split, {name: n for name, n in counts.items() if n or name == "images_in_train_and_test"})


def split_off_validation(
    conversations: Iterable[Conversation], image_ids: Mapping[str, str], fraction: float, seed: int
) -> list[Conversation]:
    """
    Move about a `fraction` of the images, with all their conversations, from train to validation.

    Which ones depends on the pictures and the seed alone, not on order or on what else is in the source. Images that
    one conversation shows together stay together. A conversation without an image goes by its id.
    """
    conversations = list(conversations)
    together = DisjointSets()
    for conversation in conversations:
        ids = [image_ids[name] for name in conversation.images]
        for other in ids[1:]:
            together.join(ids[0], other)

    def key(conversation: Conversation) -> str:
        return together.find(image_ids[conversation.images[0]]) if conversation.images else conversation.id

    return [
        replace(conversation, split="validation") if draw(key(conversation), seed) < fraction else conversation
        for conversation in conversations
    ]


def by_image(questions: Iterable[Question], image_ids: Mapping[str, str]) -> dict[str, list[Question]]:
    """Questions by `image_id`, in the order in which images and questions come."""
    groups = defaultdict(list)
    for question in questions:
        groups[image_ids[question.image]].append(question)
    return dict(groups)


def plain_question(text: str) -> str:
    """A question for comparing: lower case, single blanks."""
    return " ".join(text.lower().split())


def _pair(question: Question, image_ids: Mapping[str, str]) -> tuple[str, str]:
    return image_ids[question.image], plain_question(question.question)


def draw(key: str, seed: int) -> float:
    """A number in [0, 1) that follows from the key and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64

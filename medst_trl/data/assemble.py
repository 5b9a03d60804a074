# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Turn the records of a source into the rows of every dataset: splits, conversations, benchmark. Touches no file.

Splits are drawn by image or group, never by row. The questions of a benchmark become conversations of several turns,
which gives self-questioning its later turns.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .cells import published_id
from .groups import NEAR_COPY_BITS, GroupIds, Grouping, representatives
from .overlap import Inventory, plain_question
from .schema import dialogue
from .source import Conversation, Question, Records, Rejected


if TYPE_CHECKING:
    from .image_index import ImageIndex


# What the counts of the overlap call the relations of `Inventory.relation`, and those for which `disjoint` removes.
_SHARED = {"question": "pairs", "image": "images", "near_copy": "near_copies", "group": "groups"}
_REMOVED_FOR = {"none": ("question",), "image": ("question", "image", "near_copy"), "group": tuple(_SHARED)}


class Datasets(NamedTuple):
    """
    The content of all datasets of a source.

    Attributes:
        rows (`dict`):
            Rows by kind of dataset and split, in the order in which they are written. They have the columns of
            `schema.py`, with names of images in place of the images.
        rejected (`list[Rejected]`):
            Records that are in no dataset: first those of the reader, last those that another split excludes.
        counts (`dict`):
            Numbers by dataset (`datasets`), the counts of the reader and the overlap between splits (`notes`), and the
            number of rejected records by reason, most frequent first (`rejected`).
    """

    rows: dict[tuple[str, str], list[dict]]
    rejected: list[Rejected]
    counts: dict[str, dict[str, Any]]


def assemble(
    records: Records,
    index: "ImageIndex",
    *,
    groups: GroupIds | None = None,
    near_copy_bits: int = NEAR_COPY_BITS,
    disjoint: str = "none",
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Datasets:
    """
    Place every record in a dataset, or reject it.

    Args:
        records ([`Records`]):
            From a source.
        index ([`~medst_trl.data.image_index.ImageIndex`]):
            Of their images. A record with an image that cannot be used is rejected for the image's reason.
        groups ([`GroupIds`], *optional*):
            Makes the group ids of records that name a group.
        near_copy_bits (`int`, *optional*, defaults to `NEAR_COPY_BITS`):
            See [`~medst_trl.data.near_copies.near_copies`].
        disjoint:
            See [`hold_out`].
        validation_fraction, seed:
            See [`split_off_validation`].
    """
    from .near_copies import near_copies  # loads NumPy and Pillow

    image_ids, groups = index.image_ids, groups or GroupIds()
    if not validation_fraction and all(record.split == "train" for record in records):
        near_copy_bits = 0  # there is nothing to keep apart
    usable, members, rejected = _usable(records, index, groups)
    near = near_copies(index.hashes, index.hashes, near_copy_bits)
    plain = {image_id for image_id, code in index.hashes.items() if code is None}
    grouping = Grouping(members, near, plain)
    usable = [replace(record, group=grouping.group(*own)) for record, own in zip(usable, members)]
    # The index of an interrupted run of version 0.1.0 has no hashes.
    is_compared = near_copy_bits and {*image_ids.values()} <= index.hashes.keys()
    splits, overlap, removed = hold_out(usable, image_ids, disjoint, near if is_compared else None)
    for split in ("test", "validation"):  # they have kept others out of train
        found = [(item, _why_in_no_dataset(item)) for item in splits[split]]
        rejected += [Rejected(item.id, reason, "|".join(item.images)) for item, reason in found if reason]
        splits[split] = [item for item, reason in found if not reason]
    rows, drawn = _rows(records.name, splits, image_ids, grouping, validation_fraction, seed)
    rejected += removed + drawn
    together = {image_ids[name]: _joined(record, image_ids, grouping) for record in usable for name in record.images}
    notes = overlap if records.questions else {}
    notes |= _notes(usable, rows, Counter(together.values()), validation_fraction)
    if is_compared and plain and splits["test"]:
        notes["images_too_plain_to_find_near_copies"] = len(plain)
    if (disjoint == "group" or groups.level == "directory") and not any(record.group for record in usable):
        notes["groups"] = "none. Set --group_column or --group_by."
    counts = {
        "datasets": {f"{kind}/{split}": _count(made) for (kind, split), made in rows.items() if made},
        "notes": {**records.counts, **index.notes, **notes},
        "rejected": dict(Counter(item.reason for item in rejected).most_common()),
    }
    return Datasets(rows, rejected, counts)


def _usable(
    records: Records, index: "ImageIndex", groups: GroupIds
) -> tuple[list[Conversation | Question], list[tuple[list[str], list[str]]], list[Rejected]]:
    """Return the usable records, the images and groups of each, and the rejected records."""
    usable, members, rejected, unlabelled = [], [], list(records.rejected), {}
    for record in records:
        problem = next((index.problems[name] for name in record.images if name in index.problems), None)
        if problem is not None:
            rejected.append(replace(problem, id=record.id))
            continue
        ids, own = [index.image_ids[name] for name in record.images], groups.of_key(record.group)
        found = [index.group_ids.get(name) for name in record.images]
        if isinstance(record, Conversation) and not record.messages:
            if (known := unlabelled.setdefault((ids[0], record.split), record)) is not record:  # each once
                rejected.append(Rejected(record.id, "duplicate_image", known.images[0]))
                continue
            record = replace(record, id=f"image-{ids[0][:16]}")
        else:
            files = record.images if records.image_folder else ()
            names = {name: value for name in ("id", "link") if (value := getattr(record, name, None))}
            names = {key: published_id(name, files, record.group, found, groups.of_key) for key, name in names.items()}
            record = replace(record, **names)
        usable.append(record)
        members.append((ids, [own] if own else found))
    return usable, members, rejected


def _why_in_no_dataset(record: Conversation | Question) -> str | None:
    """Return the reason for a record of test or validation. A benchmark has questions, and one image per row."""
    if isinstance(record, Conversation) and not record.messages:
        return f"unlabeled_{record.split}_image"
    if record.split == "test" and (isinstance(record, Conversation) or record.more_images):
        return "test_caption" if isinstance(record, Conversation) else "several_test_images"
    return None


def _rows(
    name: str, splits: Mapping[str, list], image_ids: Mapping[str, str], grouping: Grouping, fraction: float, seed: int
) -> tuple[dict[tuple[str, str], list[dict]], list[Rejected]]:
    """Return the rows of all datasets, and the unlabeled images that belong to what was drawn for validation."""
    talks = [record for record in splits["validation"] + splits["train"] if not isinstance(record, Question)]
    conversations = [record for record in talks if record.messages]
    for split in ("validation", "train"):
        questions = [record for record in splits[split] if isinstance(record, Question)]
        for images, about in by_image(questions, image_ids).items():
            prefix = "-".join([name, split, *(image[:16] for image in images)])
            conversations += conversations_about_image(prefix, about)
    divided = split_off_validation(conversations, image_ids, fraction, seed, grouping)
    drawn = {_joined(new, image_ids, grouping) for old, new in zip(conversations, divided) if new.split != old.split}
    unlabelled = [record for record in talks if not record.messages]
    left_out = [record for record in unlabelled if _joined(record, image_ids, grouping) in drawn]
    unlabelled = [record for record in unlabelled if _joined(record, image_ids, grouping) not in drawn]
    by_split = {name: [item for item in divided if item.split == name] for name in ("train", "validation")}
    rows = {("benchmark", "test"): _benchmark_rows(splits["test"], image_ids)}
    rows |= {("instruct", name): _instruct_rows(items, image_ids) for name, items in by_split.items()}
    rows["images", "train"] = _instruct_rows(unlabelled, image_ids)
    return rows, [Rejected(record.id, "drawn_for_validation", record.images[0]) for record in left_out]


def _notes(
    usable: Iterable[Conversation | Question], rows: Mapping, together: Counter, validation_fraction: float
) -> dict[str, Any]:
    """Return what to report about groups and an empty split. `together` counts the images that belong together."""
    largest, without = max(together.values(), default=0), [not record.group for record in usable if record.images]
    is_empty = validation_fraction and rows["instruct", "train"] and not rows["instruct", "validation"]
    notes = {
        "records_without_group": not all(without) and sum(without),
        "images_kept_together": 2 * largest > together.total() >= 10 and f"{largest:,} of {together.total():,}",
        "validation_split": is_empty and "empty: set a larger validation_fraction or another seed",
    }
    return {name: note for name, note in notes.items() if note}


def _count(rows: list[dict]) -> dict[str, int]:
    groups = {row["group_id"] for row in rows} - {None}
    counts = {"groups": len(groups)} if groups else {}
    if "questions" in rows[0]:
        types = Counter(question["answer_type"] for row in rows for question in row["questions"])
        return {"images": len(rows)} | counts | {"questions": sum(types.values()), **types}
    images = len({image for row in rows for image in row["image_ids"]})
    answers = sum(message["role"] == "assistant" for row in rows for message in row["messages"])
    return {"images": images} | counts | ({"conversations": len(rows), "answers": answers} if answers else {})


def _instruct_rows(conversations: Iterable[Conversation], image_ids: Mapping[str, str]) -> list[dict]:
    return [
        {
            "id": conversation.id,
            "images": list(conversation.images),
            "image_ids": _ids(conversation, image_ids),
            "messages": conversation.messages,
            "group_id": conversation.group,
        }
        for conversation in conversations
    ]


def _benchmark_rows(questions: Iterable[Question], image_ids: Mapping[str, str]) -> list[dict]:
    columns = ("id", "question", "answer", "answer_type", "question_type", "link")
    return [
        {
            "image_id": image,
            "image": about[0].image,
            "questions": [{name: getattr(question, name) for name in columns} for question in about],
            "group_id": _group_of(about),
        }
        for (image,), about in by_image(questions, image_ids).items()
    ]


def _group_of(questions: Iterable[Question]) -> str | None:
    return next((question.group for question in questions if question.group), None)


# --- Splits ----------------------------------------------------------------------------------------------------------


def hold_out(
    records: Collection[Conversation | Question],
    image_ids: Mapping[str, str],
    disjoint: str = "none",
    near: Mapping[str, Set[str]] | None = None,
) -> tuple[dict[str, list[Conversation | Question]], dict[str, int], list[Rejected]]:
    """
    Remove from train what is also in test or validation, and from validation what is also in test.

    A question about an image that is in both is always removed (VQA-RAD's MEVF split has 14 such pairs). Near copies
    count as the same image.

    Args:
        records (collection of [`Conversation`] or [`Question`]):
            All that can be used, with group ids.
        image_ids (`dict`):
            Name of an image to its `image_id`; equal images under two names are one.
        disjoint (`str`, *optional*, defaults to `"none"`):
            What else is removed: with `"image"`, everything about an image of the later split or a near copy of it;
            with `"group"`, also everything about a group of the later split.
        near (`dict`, *optional*):
            `image_id` to the `image_id`s of its near copies. None if they were not looked for.

    Returns:
        - The records by split.
        - For each two splits that share something the counts `images_in_train_and_test`, `near_copies_in_...` (images
          without an equal one in the other split), `groups_in_...` and `pairs_in_...`, all before removal. For train
          and test, zeros are reported, too.
        - The removed records, with a reason such as `question_in_test`, `image_in_test`, `near_copy_in_test` or
          `group_in_test`, and as value its images, followed by the question, image or group that the later split has.
    """
    by_split = {split: [item for item in records if item.split == split] for split in ("test", "validation", "train")}
    names = {image_id: name for name, image_id in image_ids.items()}
    counts, removed = {"images_in_train_and_test": 0}, []
    if by_split["test"]:
        counts |= {"near_copies_in_train_and_test": 0} if near is not None else {}
        counts |= {"groups_in_train_and_test": 0} if any(record.group for record in records) else {}
    for held, other in (("test", "validation"), ("test", "train"), ("validation", "train")):
        inventory, shared, kept = Inventory(near=near or {}), defaultdict(set), []
        for record in by_split[held]:
            inventory.add_record(_ids(record, image_ids), record.group, _asked(record))
        for record in by_split[other]:
            ids = _ids(record, image_ids)
            relation, value = inventory.relation(ids, record.group, next(iter(_asked(record)), None))
            shared[inventory.relation([], record.group)[0]].add(record.group)
            for image in ids:
                shared[inventory.relation([image])[0]].add(image)
            if relation == "question":
                shared[relation].add((*ids, value))
            if relation in _REMOVED_FOR[disjoint]:
                involved = (*record.images, names.get(value, value))
                removed.append(Rejected(record.id, f"{relation}_in_{held}", ", ".join(involved)))
            else:
                kept.append(record)
        by_split[other] = kept
        counts |= {f"{_SHARED[name]}_in_{other}_and_{held}": len(shared[name]) for name in _SHARED if shared[name]}
    return by_split, counts, removed


def _asked(record: Conversation | Question) -> list[str]:
    return [plain_question(record.question)] if isinstance(record, Question) else []


def split_off_validation(
    conversations: Iterable[Conversation], image_ids: Mapping[str, str], fraction: float, seed: int, grouping: Grouping
) -> list[Conversation]:
    """
    Move about a `fraction` of the images, with all their conversations, from train to validation.

    Which images depends only on the images and the seed, not on their order or on other records of the source. What
    belongs together stays together. A conversation without an image or a group is drawn by its id.
    """
    return [
        replace(record, split="validation") if draw(_joined(record, image_ids, grouping), seed) < fraction else record
        for record in conversations
    ]


def _joined(record: Conversation | Question, image_ids: Mapping[str, str], grouping: Grouping) -> str:
    return grouping.of(_ids(record, image_ids), record.group, record.id)


def _ids(record: Conversation | Question, image_ids: Mapping[str, str]) -> list[str]:
    return [image_ids[name] for name in record.images]


def by_image(questions: Iterable[Question], image_ids: Mapping[str, str]) -> dict[tuple[str, ...], list[Question]]:
    """Group questions by the `image_id`s of their images, in their original order."""
    groups = defaultdict(list)
    for question in questions:
        groups[tuple(_ids(question, image_ids))].append(question)
    return dict(groups)


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
        group = _group_of(questions)
        conversations.append(Conversation(f"{name}-{number}", first.images, messages, first.split, group))
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

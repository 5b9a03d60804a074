# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Turn the records of a source into the rows of every dataset: splits, conversations, benchmark. Touches no file.

Splits are drawn by image or group, never by row. The questions of a benchmark become conversations of several turns,
which gives self-questioning its later turns.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from .cells import published_id
from .groups import NEAR_COPY_BITS, GroupIds, Grouping, representatives
from .overlap import plain_question
from .schema import dialogue
from .source import Conversation, Question, Records, Rejected


if TYPE_CHECKING:
    from .image_index import ImageIndex


# With `disjoint`, a record is removed if one of these parts occurs in the later split, see `_parts`.
_REMOVED_FOR = {"none": {}, "image": {"images": ["copies"]}, "group": {"groups": ["joined", "copies"]}}


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
    image_ids = index.image_ids
    if not validation_fraction and all(record.split == "train" for record in records):
        near_copy_bits = 0  # there is nothing to keep apart
    usable, grouping, rejected = _usable(records, index, groups or GroupIds(), near_copy_bits)
    splits, overlap = hold_out(usable, image_ids, disjoint, grouping)
    notes = _notes(usable, overlap if records.questions else {}, index.hashes if near_copy_bits else {}, disjoint)
    conversations = [record for record in chain(*splits.values()) if not isinstance(record, Question)]
    unlabelled = [record for record in conversations if not record.messages]
    conversations = [record for record in conversations if record.messages]
    for split in ("validation", "train"):
        questions = [record for record in splits[split] if isinstance(record, Question)]
        for images, about in by_image(questions, image_ids).items():
            name = "-".join(image[:16] for image in images)
            conversations += conversations_about_image(f"{records.name}-{split}-{name}", about)
    conversations = split_off_validation(conversations, image_ids, validation_fraction, seed, grouping)
    rows = {("benchmark", "test"): _benchmark_rows(splits["test"], image_ids)}
    for split in ("train", "validation"):
        of_split = [conversation for conversation in conversations if conversation.split == split]
        rows["instruct", split] = _instruct_rows(of_split, image_ids)
    rows["images", "train"] = _instruct_rows(unlabelled, image_ids)
    counts = {
        "datasets": {f"{kind}/{split}": _count(made) for (kind, split), made in rows.items() if made},
        "notes": {**records.counts, **index.notes, **notes},
        "rejected": dict(Counter(item.reason for item in rejected).most_common()),
    }
    return Datasets(rows, rejected, counts)


def _notes(usable: Collection, overlap: Mapping[str, int], hashes: Mapping[str, str | None], disjoint: str) -> dict:
    """Return what to report about splits: their overlap, 0 where it was looked for, and groups that may be wrong."""
    groups = Counter(record.group for record in usable if record.group)
    has_test = any(record.split == "test" for record in usable)
    looked_for = (["near_copies"] if hashes and has_test else []) + (["groups"] if groups and has_test else [])
    notes = dict(overlap) | {f"{name}_in_train_and_test": 0 for name in looked_for} | overlap
    if has_test and (plain := sum(code is None for code in hashes.values())):
        notes["images_too_plain_to_find_near_copies"] = plain
    if disjoint == "group" and not groups:
        notes["groups"] = "none; --group_column and --group_by name them"
    elif groups and 2 * max(groups.values()) > len(usable) >= 10:
        notes["groups"] = f"{max(groups.values()):,} of {len(usable):,} records are in one; check what names them"
    return notes


def _usable(
    records: Records, index: "ImageIndex", groups: GroupIds, near_copy_bits: int
) -> tuple[list[Conversation | Question], Grouping, list[Rejected]]:
    """Return the usable records with group ids in place of groups, what belongs together, and the rejected records."""
    from .near_copies import near_copies  # loads NumPy and Pillow

    usable, keys, rejected, unlabelled = [], [], list(records.rejected), {}
    for record in records:
        problem = next((index.problems[name] for name in record.images if name in index.problems), None)
        if problem is not None:
            rejected.append(replace(problem, id=record.id))
            continue
        ids = [index.image_ids[name] for name in record.images]
        if isinstance(record, Conversation) and not record.messages:
            if ids[0] in unlabelled:  # each unlabelled image once
                rejected.append(Rejected(record.id, "duplicate_image", unlabelled[ids[0]].images[0]))
                continue
            unlabelled[ids[0]] = record = replace(record, id=f"image-{ids[0][:16]}")
        else:
            files = record.images if records.image_folder else ()
            own = {name: value for name in ("id", "link") if (value := getattr(record, name, None))}
            found = [index.group_ids.get(name) for name in record.images]
            own = {key: published_id(name, files, record.group, found, groups.of_key) for key, name in own.items()}
            record = replace(record, **own)
        own = groups.of_key(record.group)
        found = [own] if own else sorted({index.group_ids[name] for name in record.images if name in index.group_ids})
        usable.append(replace(record, group=next(iter(found), None)))
        keys.append((ids, found))
    plain = {image_id for image_id, code in index.hashes.items() if code is None}
    return usable, Grouping(keys, near_copies(index.hashes, index.hashes, near_copy_bits), plain), rejected


def _count(rows: list[dict]) -> dict[str, int]:
    groups = {row["group_id"] for row in rows} - {None}
    counts = {"groups": len(groups)} if groups else {}
    if "questions" in rows[0]:
        types = Counter(question["answer_type"] for row in rows for question in row["questions"])
        return {"images": len(rows)} | counts | {"questions": sum(types.values()), **types}
    images = len({image for row in rows for image in row["image_ids"]})
    answers = sum(message["role"] == "assistant" for row in rows for message in row["messages"])
    return {"images": images} | counts | ({"conversations": len(rows), "answers": answers} if answers else {})


def _instruct_rows(kept: Iterable[Conversation], image_ids: Mapping[str, str]) -> list[dict]:
    return [
        {
            "id": conversation.id,
            "images": list(conversation.images),
            "image_ids": [image_ids[name] for name in conversation.images],
            "messages": conversation.messages,
            "group_id": conversation.group,
        }
        for conversation in kept
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
    grouping: Grouping | None = None,
) -> tuple[dict[str, list[Conversation | Question]], dict[str, int]]:
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
            What else is removed: with `"image"`, everything about an image of the later split; with `"group"`, also
            everything that belongs together with a record of the later split.
        grouping ([`Grouping`], *optional*):
            What belongs together. Defaults to records that share an image or a group.

    Returns:
        The records by split, and for each two splits that share something the counts `images_in_train_and_test`
        (before removal; always reported), `near_copies_in_...` (images without an equal one in the other split),
        `groups_in_...`, `pairs_in_...`, and what was removed, such as `questions_removed_for_pairs_in_...`.
    """
    grouping = grouping or Grouping((_ids(record, image_ids), [record.group]) for record in records)
    by_split = {"test": [], "validation": [], "train": []}
    for record in records:
        by_split[record.split].append(record)
    removed_for = {"pairs": ["pairs"]} | _REMOVED_FOR[disjoint]
    counts = Counter(images_in_train_and_test=0)
    for held, taken_from in (("test", "validation"), ("test", "train"), ("validation", "train")):
        if not by_split[held]:
            continue
        there, here = (_parts(by_split[split], image_ids, grouping) for split in (held, taken_from))
        where = f"in_{taken_from}_and_{held}"
        alone = here["images"] - there["images"]
        counts[f"near_copies_{where}"] = sum(grouping.image(image) in there["copies"] for image in alone)
        counts.update({f"{part}_{where}": len(here[part] & there[part]) for part in ("images", "groups", "pairs")})
        kept = []
        for record in by_split[taken_from]:
            own = _parts([record], image_ids, grouping)
            what = next((w for w, parts in removed_for.items() if any(own[p] & there[p] for p in parts)), None)
            if what is None:
                kept.append(record)
            else:
                is_question, messages = isinstance(record, Question), getattr(record, "messages", None)
                name = "questions" if is_question else "conversations" if messages else "unlabeled_images"
                counts[f"{name}_removed_for_{what}_{where}"] += 1
        by_split[taken_from] = kept
    return by_split, {name: n for name, n in counts.items() if n or name == "images_in_train_and_test"}


def _parts(
    records: Iterable[Conversation | Question], image_ids: Mapping[str, str], grouping: Grouping
) -> dict[str, set]:
    """Return the images of records, the same without near copies, their groups, what belongs together, and pairs."""
    parts = {name: set() for name in ("images", "copies", "groups", "joined", "pairs")}
    for record in records:
        ids = _ids(record, image_ids)
        copies = tuple(map(grouping.image, ids))
        parts["images"].update(ids)
        parts["copies"].update(copies)
        parts["joined"].add(grouping.of(ids, record.group, record.id))
        parts["groups"].update([record.group] if record.group else ())
        if isinstance(record, Question):
            parts["pairs"].add((copies, plain_question(record.question)))
    return parts


def split_off_validation(
    conversations: Collection[Conversation],
    image_ids: Mapping[str, str],
    fraction: float,
    seed: int,
    grouping: Grouping | None = None,
) -> list[Conversation]:
    """
    Move about a `fraction` of the images, with all their conversations, from train to validation.

    Which images depends only on the images and the seed, not on their order or on other records of the source. What
    belongs together stays together (`grouping`, by default the images of a conversation and its group). A conversation
    without an image or a group is drawn by its id.
    """
    grouping = grouping or Grouping((_ids(record, image_ids), [record.group]) for record in conversations)

    def key(conversation: Conversation) -> str:
        return grouping.of(_ids(conversation, image_ids), conversation.group, conversation.id)

    return [
        replace(conversation, split="validation") if draw(key(conversation), seed) < fraction else conversation
        for conversation in conversations
    ]


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

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
from typing import Any, NamedTuple

from .cells import published_id
from .groups import NEAR_COPY_BITS, GroupIds, Grouping, representatives
from .overlap import Inventory, plain_question
from .schema import QUESTION_FIELDS, dialogue
from .source import Conversation, Question, Records, Rejected


# Names of the relations of `Inventory.relation` in the counts, and those for which `disjoint` removes records.
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
    index: Mapping[str, Mapping[str, Any]],
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
        index (`dict`):
            Their images, see [`~medst_trl.data.image_index.index_images`]. A record with an image that cannot be used
            is rejected for the image's reason.
        groups ([`GroupIds`], *optional*):
            Makes the group ids of records that name a group.
        near_copy_bits (`int`, *optional*, defaults to `NEAR_COPY_BITS`):
            See [`~medst_trl.data.near_copies.near_copies`].
        disjoint:
            See [`hold_out`].
        validation_fraction, seed:
            About this fraction of the images is moved, with all their conversations, from train to validation. Which
            depends only on the images and the seed, not on their order or on other records of the source. What
            belongs together stays together. A conversation without an image or a group is drawn by its id.
    """
    groups = groups or GroupIds()
    if not validation_fraction and all(record.split == "train" for record in records):
        near_copy_bits = 0  # there is nothing to keep apart
    found, rejected = _usable(records, index, groups)
    near, plain, is_compared = _near_copies(index, near_copy_bits)
    grouping = Grouping([(record.image_ids, own) for record, own in found], near, plain)
    usable = _grouped(found, grouping, groups, has_files=records.image_folder is not None)
    splits, overlap, removed = hold_out(usable, disjoint, near if is_compared else None)
    for split in ("test", "validation"):  # they have kept others out of train
        reasons = [(item, _why_in_no_dataset(item)) for item in splits[split]]
        rejected += [Rejected(item.id, reason, "|".join(item.images)) for item, reason in reasons if reason]
        splits[split] = [item for item, reason in reasons if not reason]
    rows, drawn = _rows(records.name, splits, validation_fraction, seed)
    rejected += removed + drawn
    noted = {entry["image_id"]: entry["note"] for entry in index.values() if entry.get("note")}
    notes = {**records.counts, **Counter(noted.values()), **(overlap if records.questions else {})}
    notes |= _notes(usable, rows, validation_fraction)
    if is_compared and plain and splits["test"]:
        notes["images_too_plain_to_find_near_copies"] = len(plain)
    if (disjoint == "group" or groups.level == "directory") and not any(record.group for record in usable):
        notes["groups"] = "none. Set --group_column or --group_by."
    counts = {
        "datasets": {f"{kind}/{split}": _count(made) for (kind, split), made in rows.items() if made},
        "notes": notes,
        "rejected": dict(Counter(item.reason for item in rejected).most_common()),
    }
    return Datasets(rows, rejected, counts)


def _usable(
    records: Records, index: Mapping[str, Mapping[str, Any]], groups: GroupIds
) -> tuple[list[tuple[Conversation | Question, list[str | None]]], list[Rejected]]:
    """Return the usable records with the ids of their images, each with its group ids, and the rejected records."""
    usable, rejected, unlabeled = [], list(records.rejected), {}
    for record in records:
        entries = [index[name] for name in record.images]
        if problem := next((entry for entry in entries if "reason" in entry), None):
            rejected.append(Rejected(record.id, problem["reason"], problem["detail"]))
            continue
        record = replace(record, image_ids=tuple(entry["image_id"] for entry in entries))
        if isinstance(record, Conversation) and not record.messages:
            known = unlabeled.setdefault((record.image_ids[0], record.split), record)
            if known is not record:  # each once
                rejected.append(Rejected(record.id, "duplicate_image", known.images[0]))
                continue
        own = groups.of_key(record.group)
        usable.append((record, [own] if own else [entry.get("group_id") for entry in entries]))
    return usable, rejected


def _near_copies(index: Mapping[str, Mapping[str, Any]], bits: int) -> tuple[dict[str, set[str]], set[str], bool]:
    """Return the near copies among all images, the plain images, and whether near copies were looked for."""
    from .near_copies import near_copies  # loads NumPy and Pillow

    good = [entry for entry in index.values() if "image_id" in entry]
    hashes = {entry["image_id"]: entry["near_hash"] for entry in good if "near_hash" in entry}
    plain = {image_id for image_id, code in hashes.items() if code is None}
    has_all = len(hashes) == len({entry["image_id"] for entry in good})  # not so in a run begun by version 0.1.0
    return near_copies(hashes, hashes, bits), plain, bool(bits) and has_all


def _grouped(found: Iterable, grouping: Grouping, groups: GroupIds, has_files: bool) -> list[Conversation | Question]:
    """Return the records with what they share with others, and with ids and links that may be published."""
    grouped = []
    for record, own in found:
        group = grouping.group(record.image_ids, own)
        if isinstance(record, Conversation) and not record.messages:
            names = {"id": f"image-{record.image_ids[0][:16]}"}
        else:
            files, keyed = record.images if has_files else (), groups.of_key if group else None
            given = {name: getattr(record, name, None) for name in ("id", "link")}
            names = {name: published_id(value, files, keyed) for name, value in given.items() if value}
        record = replace(record, group=group, **names)
        grouped.append(replace(record, split_key=grouping.of(record.image_ids, group, record.id)))
    return grouped


def _why_in_no_dataset(record: Conversation | Question) -> str | None:
    """Return the reason for a record of test or validation. A benchmark has questions, and one image per row."""
    if isinstance(record, Conversation) and not record.messages:
        return f"unlabeled_{record.split}_image"
    if record.split == "test" and (isinstance(record, Conversation) or len(record.images) > 1):
        return "test_caption" if isinstance(record, Conversation) else "several_test_images"
    return None


def _rows(
    name: str, splits: Mapping[str, list], fraction: float, seed: int
) -> tuple[dict[tuple[str, str], list[dict]], list[Rejected]]:
    """Return the rows of all datasets, and the unlabeled images that belong to what was drawn for validation."""
    others = [record for record in splits["validation"] + splits["train"] if isinstance(record, Conversation)]
    conversations = [record for record in others if record.messages]
    for split in ("validation", "train"):
        questions = [record for record in splits[split] if isinstance(record, Question)]
        for images, about in by_image(questions).items():
            prefix = "-".join([name, split, *(image[:16] for image in images)])
            conversations += conversations_about_image(prefix, about)
    drawn = {one.split_key for one in conversations if one.split == "train" and draw(one.split_key, seed) < fraction}
    sides = {"train": [], "validation": []}
    for one in conversations:
        sides["validation" if one.split_key in drawn else one.split].append(one)
    unlabeled = [record for record in others if not record.messages]
    rows = {("benchmark", "test"): _benchmark_rows(splits["test"])}
    rows |= {("instruct", split): _instruct_rows(side) for split, side in sides.items()}
    rows["images", "train"] = _instruct_rows(record for record in unlabeled if record.split_key not in drawn)
    left_out = [record for record in unlabeled if record.split_key in drawn]
    return rows, [Rejected(record.id, "drawn_for_validation", record.images[0]) for record in left_out]


def _notes(usable: Collection[Conversation | Question], rows: Mapping, validation_fraction: float) -> dict[str, Any]:
    """Return what to report about groups and an empty split."""
    together = Counter({image: record.split_key for record in usable for image in record.image_ids}.values())
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


def _instruct_rows(conversations: Iterable[Conversation]) -> list[dict]:
    return [
        {"id": one.id, "images": list(one.images), "image_ids": list(one.image_ids)}
        | {"messages": one.messages, "group_id": one.group}
        for one in conversations
    ]


def _benchmark_rows(questions: Iterable[Question]) -> list[dict]:
    return [
        {"image_id": image, "image": about[0].images[0], "group_id": _with_group(about).group}
        | {"questions": [{name: getattr(question, name) for name in QUESTION_FIELDS} for question in about]}
        for (image,), about in by_image(questions).items()
    ]


def _with_group(questions: Collection[Question]) -> Question:
    """Return the first question that has a group, if any has. About a plain image, some may have none."""
    return next((question for question in questions if question.group), next(iter(questions)))


# --- Splits ----------------------------------------------------------------------------------------------------------


def hold_out(
    records: Collection[Conversation | Question], disjoint: str = "none", near: Mapping[str, Set[str]] | None = None
) -> tuple[dict[str, list[Conversation | Question]], dict[str, int], list[Rejected]]:
    """
    Remove from train what is also in test or validation, and from validation what is also in test.

    A question about an image that is in both is always removed (VQA-RAD's MEVF split has 14 such pairs). Near copies
    count as the same image.

    Args:
        records (collection of [`Conversation`] or [`Question`]):
            All that can be used, with `image_ids` and group ids. Equal images under two names are one.
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
    names = {image_id: name for record in records for image_id, name in zip(record.image_ids, record.images)}
    counts, removed = {"images_in_train_and_test": 0}, []
    if by_split["test"]:
        counts |= {"near_copies_in_train_and_test": 0} if near is not None else {}
        counts |= {"groups_in_train_and_test": 0} if any(record.group for record in records) else {}
    for held, other in (("test", "validation"), ("test", "train"), ("validation", "train")):
        inventory, shared, kept = Inventory(near=near or {}), defaultdict(set), []
        for record in by_split[held]:
            inventory.add_record(record.image_ids, record.group, _asked(record))
        for record in by_split[other]:
            relation, value = inventory.relation(record.image_ids, record.group, next(iter(_asked(record)), None))
            shared[inventory.relation([], record.group)[0]].add(record.group)
            for image in record.image_ids:
                shared[inventory.relation([image])[0]].add(image)
            if relation == "question":
                shared[relation].add((*record.image_ids, value))
            if relation in _REMOVED_FOR[disjoint]:
                involved = (*record.images, names.get(value, value))
                removed.append(Rejected(record.id, f"{relation}_in_{held}", ", ".join(involved)))
            else:
                kept.append(record)
        by_split[other] = kept
        counts |= {f"{_SHARED[name]}_in_{other}_and_{held}": len(shared[name]) for name in _SHARED if shared[name]}
    return by_split, counts, removed


def _asked(record: Conversation | Question) -> list[str]:
    """Return the normalized question that a record asks, in a list, or an empty list for conversations."""
    return [plain_question(record.question)] if isinstance(record, Question) else []


def by_image(questions: Iterable[Question]) -> dict[tuple[str, ...], list[Question]]:
    """Group questions by the `image_id`s of their images, in their original order."""
    groups = defaultdict(list)
    for question in questions:
        groups[question.image_ids].append(question)
    return groups


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
    groups, conversations = linked_groups(questions), []
    first, own = groups[0][0], _with_group(questions)
    for number in range(max(map(len, groups))):
        turns = [(group[number].question, group[number].answer) for group in groups if number < len(group)]
        messages, ids = dialogue(turns, len(first.images)), own.image_ids
        talk = Conversation(f"{name}-{number}", first.images, messages, first.split, own.group, ids, own.split_key)
        conversations.append(talk)
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

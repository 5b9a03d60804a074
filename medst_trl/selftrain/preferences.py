# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Build preference pairs from judged answers: which pairs are kept, and in which split."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from medst_trl.base.hub_ids import public_name
from medst_trl.data.assemble import draw
from medst_trl.data.groups import NEAR_COPY_BITS, Grouping
from medst_trl.data.overlap import Inventory, hash_images, normalized, why_groups_not_compared
from medst_trl.data.schema import text_of, text_part
from medst_trl.data.source import Rejected


if TYPE_CHECKING:
    from datasets import Dataset

_DETERMINERS = frozenset({"a", "an", "the", "this", "that", "these", "those"})


@dataclass
class Preferences:
    """
    Preference pairs, and the reasons why others were dropped.

    Attributes:
        train, validation (`list[dict]`):
            Rows with the columns of [`~medst_trl.data.schema.preference_features`] without `images`. Instead, `row` is
            the row of the candidates (or of the file) that holds the images.
        rejected (`list[dict]`):
            `id`, `reason` and `value` of each dropped pair.
        counts (`dict`):
            `pairs` (all input pairs), `train` and `validation` (pairs, images), `rejected` (number by reason, most
            frequent first), `shared_with_benchmarks` (pairs by what they share; without `near_copy` or `group` if the
            benchmarks have no hashes or groups, and with None for groups that cannot be compared),
            `groups_not_compared` (why; only if some cannot) and `lengths` (see [`length_statistics`], by split).
    """

    train: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


def build_preferences(candidates: "Dataset", judgements: Iterable[Mapping[str, Any]], **selection: Any) -> Preferences:
    """
    Build preference pairs from a judge's verdicts.

    Drops, by reason: what the judge dropped (`flip`, `tie` and so on, in its own words), `no_verdict`,
    `unknown_candidate`, `other_answers` (the verdict is about answers that the candidate does not have), and the
    reasons of [`select_preferences`].

    Args:
        candidates (`datasets.Dataset`):
            Columns `id`, `image_ids`, `prompt`, `answers`, as `medst generate` writes them; optionally `group_id`, and
            `images` to find near copies.
        judgements (iterable of `dict`):
            Lines of `judgements.jsonl`: `id`, `candidate`, `answers`, `scores`, `verdict`, `dropped`, `orders`,
            `model`, `prompt_version`.
        **selection:
            `benchmarks`, `keep_benchmark_images`, `near_hashes` (by default, those of the candidates are made),
            `near_copy_bits`, `duplicate_similarity`, `validation_share`, `length_balanced`, `seed`: see
            [`select_preferences`].

    Returns:
        [`Preferences`]. They may be empty; the counts say why.

    Example:

    ```python
    preferences = build_preferences(candidates, judgements, benchmarks=[benchmark], validation_share=0.05)
    print(preferences.counts)
    ```
    """
    by_id, used = {}, ("id", "image_ids", "prompt", "answers", "group_id")
    columns = [name for name in candidates.column_names if name in used]
    for row, candidate in enumerate(candidates.select_columns(columns)):
        by_id.setdefault(candidate["id"], (row, candidate))
    pairs, rejected = [], []
    for judgement in judgements:
        row, candidate = by_id.get(judgement["candidate"], (None, None))
        if reason := _why_unusable(judgement, candidate):
            rejected.append(Rejected(judgement["id"], reason, judgement.get("question")))
        else:
            pairs.append(_preference_row(row, candidate, judgement))
    is_hashed = "images" in candidates.column_names and selection.get("near_copy_bits", NEAR_COPY_BITS)
    if is_hashed and "near_hashes" not in selection:
        selection["near_hashes"] = hash_images(candidates)
    return select_preferences(pairs, rejected, **selection)


def _why_unusable(judgement: Mapping, candidate: Mapping | None) -> str | None:
    if judgement.get("dropped") is not None:
        return judgement["dropped"]
    if judgement["verdict"] not in (0, 1):
        return "no_verdict"
    if candidate is None:
        return "unknown_candidate"
    return None if set(judgement["answers"]) <= set(candidate["answers"]) else "other_answers"


def _preference_row(row: int, candidate: Mapping, judgement: Mapping) -> dict:
    winner = judgement["verdict"]
    scores = judgement.get("scores") or (None, None)
    answers = [[{"role": "assistant", "content": [text_part(text)]}] for text in judgement["answers"]]
    kept = ("shown", "scores", "verdict", "criteria")  # the replies stay in judgements.jsonl
    judge = {
        "model": public_name(judgement.get("model") or "") or None,  # pairs are shared, local paths not
        "prompt_version": judgement.get("prompt_version"),
        "orders": [{key: order[key] for key in kept if key in order} for order in judgement.get("orders") or ()],
    }
    return {
        "id": judgement["id"],
        "row": row,
        "image_ids": list(candidate["image_ids"]),
        "group_id": candidate.get("group_id"),
        "prompt": candidate["prompt"],
        "chosen": answers[winner],
        "rejected": answers[1 - winner],
        "score_chosen": scores[winner],
        "score_rejected": scores[1 - winner],
        "judge": json.dumps(judge, ensure_ascii=False),
    }


def select_preferences(
    pairs: Sequence[dict],
    rejected: Iterable[Rejected] = (),
    *,
    benchmarks: Iterable["Dataset"] | Inventory = (),
    keep_benchmark_images: bool = False,
    near_hashes: Mapping[str, str | None] | None = None,
    near_copy_bits: int = NEAR_COPY_BITS,
    duplicate_similarity: float | None = 0.9,
    validation_share: float = 0.0,
    length_balanced: bool = False,
    seed: int = 0,
) -> Preferences:
    """
    Select preference pairs from any source of pairs, and split them by image and group.

    Drops, by reason: `duplicate_id`, `image_in_benchmark`, `image_and_question_in_benchmark`,
    `near_copy_in_benchmark`, `group_in_benchmark`, `near_duplicate_question` (see [`near_duplicates`]),
    `length_balance`.

    Args:
        pairs (`list[dict]`):
            Rows as in [`Preferences`]; `group_id` may be missing.
        rejected (iterable of [`Rejected`], *optional*):
            Records dropped earlier; reported and counted with the rest.
        benchmarks (iterable of `datasets.Dataset` or what [`read_benchmarks`] returns, *optional*):
            Evaluation benchmarks (columns `image_id`, `questions`, optionally `group_id` and `image`). Pairs about
            their images, near copies of these, or other images of their groups are dropped; pairs that only share a
            question with them are counted.
        keep_benchmark_images (`bool`, *optional*, defaults to `False`):
            Keep pairs about images, near copies and groups of a benchmark. They are counted all the same.
        near_hashes (`dict`, *optional*):
            `image_id` to [`~medst_trl.data.near_copies.perceptual_hash`] for the images of the pairs. Without it, near
            copies are not found.
        near_copy_bits (`int`, *optional*, defaults to `NEAR_COPY_BITS`):
            See [`~medst_trl.data.near_copies.near_copies`].
        duplicate_similarity (`float`, *optional*, defaults to 0.9):
            Of two questions about one image or group that share this part of their words, keep the pair with the
            larger margin between its scores. `None` keeps all.
        validation_share (`float`, *optional*, defaults to 0.0):
            Approximate share of the images or groups that become validation data, with all their pairs.
        length_balanced (`bool`, *optional*, defaults to `False`):
            Drop pairs until, in each split, the longer answer is chosen as often as it is rejected.
        seed (`int`, *optional*, defaults to 0):
            Seed for the selection of validation images and of pairs dropped for the balance.
    """
    rejected, images = list(rejected), Inventory(hashes=near_hashes or {})
    total = len(pairs) + len(rejected)
    for pair in pairs:
        images.add_record(pair["image_ids"], pair.get("group_id"))
    if not isinstance(benchmarks, Inventory):
        benchmarks = read_benchmarks(benchmarks, images.hashes, near_copy_bits)
    overlaps = [_overlap(benchmarks, pair) for pair in pairs]
    not_judged = [item.reason.removesuffix("_in_benchmark") for item in rejected]
    counts_shared = _count_shared(overlaps + not_judged, images, benchmarks)
    grouping = _grouping(pairs, images.hashes, near_copy_bits)
    usable = _usable_pairs(pairs, overlaps, keep_benchmark_images, rejected)
    if duplicate_similarity is not None:
        repeated = near_duplicates(usable, duplicate_similarity, grouping)
        usable = _without(usable, repeated, "near_duplicate_question", rejected)
    splits = dict(zip(("train", "validation"), _split(usable, validation_share, seed, grouping), strict=True))
    if length_balanced:
        for name, rows in splits.items():
            splits[name] = _without(rows, length_imbalance(rows, seed), "length_balance", rejected)
    counts = {
        "pairs": total,
        **{name: _count(rows) for name, rows in splits.items()},
        "rejected": dict(Counter(item.reason for item in rejected).most_common()),
        **counts_shared,
        "lengths": {name: length_statistics(rows) for name, rows in splits.items() if rows},
    }
    return Preferences(**splits, rejected=[item.as_row() for item in rejected], counts=counts)


def _grouping(pairs: Sequence[dict], hashes: Mapping[str, str | None], near_copy_bits: int) -> Grouping:
    from medst_trl.data.near_copies import near_copies

    plain = {image_id for image_id, code in hashes.items() if code is None}
    records = ((pair["image_ids"], [pair.get("group_id")]) for pair in pairs)
    return Grouping(records, near_copies(hashes, hashes, near_copy_bits), plain)


def read_benchmarks(benchmarks: Iterable["Dataset"], near_hashes: Mapping, near_copy_bits: int) -> Inventory:
    """Collect the images of all benchmarks, and find their near copies in `near_hashes`."""
    from medst_trl.data.near_copies import near_copies

    inventory = Inventory()
    for benchmark in benchmarks:
        inventory.add(benchmark, {} if near_hashes and near_copy_bits and "image" in benchmark.column_names else None)
    inventory.near = near_copies(near_hashes, inventory.hashes, near_copy_bits)
    return inventory


def benchmark_reason(benchmarks: Inventory, pair: Mapping[str, Any]) -> str | None:
    """Return the reason to drop a pair or candidate about an image, a near copy or a group of a benchmark, or None."""
    what = _overlap(benchmarks, pair)
    return None if what in ("question", "nothing") else f"{what}_in_benchmark"


def _overlap(benchmarks: Inventory, pair: Mapping[str, Any]) -> str:
    """
    Return what a pair shares with benchmarks: `"image_and_question"`, `"image"`, `"near_copy"`, `"group"`,
    `"question"` or `"nothing"`.
    """
    question = normalized(_text(pair, "prompt"))
    relation, _ = benchmarks.relation(pair["image_ids"], pair.get("group_id"))
    if relation == "image" and benchmarks.relation(pair["image_ids"], None, question)[0] == "question":
        return "image_and_question"
    return "question" if relation == "nothing" and question in benchmarks.texts else relation


def _count_shared(found: Sequence[str], images: Inventory, benchmarks: Inventory) -> dict[str, Any]:
    """Return the counts of [`Preferences`] about benchmarks. `found` is what each pair shares with them."""
    near_copy = ["near_copy"] if images.hashes and benchmarks.hashes else []
    compared = ["image_and_question", "image", *near_copy, "question"]
    counts = {"shared_with_benchmarks": {what: found.count(what) for what in compared}}
    if benchmarks.salts and images.questions:
        reason = why_groups_not_compared(benchmarks, images)
        counts["shared_with_benchmarks"]["group"] = found.count("group") or (None if reason else 0)
        counts |= {"groups_not_compared": reason} if reason else {}
    return counts


def _usable_pairs(pairs: Sequence[dict], overlaps: Sequence[str], keep: bool, rejected: list[Rejected]) -> list[dict]:
    """Return pairs without repeated ids, and without benchmark images unless `keep`."""
    usable, ids = [], set()
    for pair, what in zip(pairs, overlaps, strict=True):
        if pair["id"] in ids:
            rejected.append(Rejected(pair["id"], "duplicate_id", pair["id"]))
        elif what not in ("question", "nothing") and not keep:
            rejected.append(Rejected(pair["id"], f"{what}_in_benchmark", _text(pair, "prompt")))
        else:
            usable.append(pair)
        ids.add(pair["id"])
    return usable


def near_duplicates(pairs: Sequence[dict], similarity: float, grouping: Grouping) -> dict[int, str]:
    """
    Find pairs that ask nearly the same as another pair about the same images, near copies of these, or the same group.

    The pair with the larger margin between its scores stays, of equal ones the first. Pairs of one candidate (a
    question with four answers makes two pairs) do not count as duplicates of each other. A near copy of a near copy
    does not count: only neighboring slices of a volume would be duplicates.

    Args:
        pairs (`list[dict]`): Rows as in [`Preferences`].
        similarity (`float`): Minimum share of common words among all words of two questions.
        grouping ([`Grouping`]): What belongs together.

    Returns:
        `dict[int, str]`: position of each near duplicate, with the question of the pair that stays.
    """
    kept, duplicates = defaultdict(list), {}
    for place, pair in sorted(enumerate(pairs), key=lambda item: _margin(item[1]), reverse=True):
        words = set(normalized(_text(pair, "prompt")).split()) - _DETERMINERS
        same = grouping.of(pair["image_ids"], pair.get("group_id"), "", near=False)
        copies = {("image", copy) for image in pair["image_ids"] for copy in grouping.near[image]}
        for others, other in chain.from_iterable(kept[name] for name in (same, *sorted(copies))):
            if _similarity(words, others) >= similarity and other["row"] != pair["row"]:
                duplicates[place] = _text(other, "prompt")
                break
        else:
            for name in (same, *(("image", image) for image in pair["image_ids"])):
                kept[name].append((words, pair))
    return duplicates


def _margin(pair: dict) -> float:
    """Return the margin between the scores of a pair, 0 without scores."""
    chosen, rejected = pair["score_chosen"], pair["score_rejected"]
    return chosen - rejected if chosen is not None and rejected is not None else 0.0


def _similarity(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second) if first or second else 1.0


def _without(pairs: list[dict], dropped: Mapping[int, Any], reason: str, rejected: list[Rejected]) -> list[dict]:
    """Return the pairs without those at the positions `dropped`, which are rejected with its values."""
    rejected += [Rejected(pairs[place]["id"], reason, dropped[place]) for place in sorted(dropped)]
    return [pair for place, pair in enumerate(pairs) if place not in dropped]


def _split(pairs: list[dict], share: float, seed: int, grouping: Grouping) -> tuple[list[dict], list[dict]]:
    """Return train and validation pairs. What belongs together is not divided."""
    # Not the draw of `medst prepare`, which would never draw an image that prepare gave to training.
    keys = [grouping.of(pair["image_ids"], pair.get("group_id"), pair["id"]) for pair in pairs]
    draws = {key: draw(f"preferences:{key}", seed) for key in keys}
    if share > 0 and len(draws) > 1:  # at least one image, even of a few
        share = max(share, math.nextafter(min(draws.values()), 1.0))
    train, validation = [], []
    for pair, key in zip(pairs, keys, strict=True):
        (validation if draws[key] < share else train).append(pair)
    return train, validation


def length_imbalance(pairs: Sequence[dict], seed: int) -> dict[int, str]:
    """
    Draw pairs to drop, so that the longer answer is chosen as often as it is rejected.

    The draw depends on ids and seed, not on the order of the pairs.

    Returns:
        `dict[int, str]`: position of each pair to drop, with which answer is longer.
    """
    lengths = [_words(pair) for pair in pairs]
    longer = [place for place, (chosen, rejected) in enumerate(lengths) if chosen > rejected]
    shorter = [place for place, (chosen, rejected) in enumerate(lengths) if chosen < rejected]
    more, fewer = (longer, shorter) if len(longer) > len(shorter) else (shorter, longer)
    drawn = sorted(more, key=lambda place: draw(f"length:{pairs[place]['id']}", seed))
    which = "longer answer chosen" if more is longer else "longer answer rejected"
    return dict.fromkeys(drawn[len(fewer) :], which)


def length_statistics(pairs: Sequence[dict]) -> dict[str, float]:
    """
    Measure the lengths of answers, in words. Judges prefer long answers, and a policy learns that first.

    Args:
        pairs (`list[dict]`): Rows with `chosen` and `rejected` messages; at least one.

    Returns:
        `dict`: `chosen_words` and `rejected_words` (means), `words_gap` (mean of chosen minus rejected),
        `longer_chosen`, `longer_rejected`, `same_length` (numbers of pairs), and `longer_chosen_share` among the pairs
        whose answers differ in length (None if there is none).
    """
    lengths = [_words(pair) for pair in pairs]
    longer = sum(chosen > rejected for chosen, rejected in lengths)
    shorter = sum(chosen < rejected for chosen, rejected in lengths)
    chosen_mean, rejected_mean = (sum(column) / len(pairs) for column in zip(*lengths, strict=True))
    return {
        "chosen_words": round(chosen_mean, 2),
        "rejected_words": round(rejected_mean, 2),
        "words_gap": round(chosen_mean - rejected_mean, 2),
        "longer_chosen": longer,
        "longer_rejected": shorter,
        "same_length": len(pairs) - longer - shorter,
        "longer_chosen_share": round(longer / (longer + shorter), 4) if longer + shorter else None,
    }


def _words(pair: dict) -> tuple[int, int]:
    return tuple(len(_text(pair, key).split()) for key in ("chosen", "rejected"))


def _text(pair: Mapping, key: str) -> str:
    """Return the text of the last message of `prompt`, `chosen` or `rejected`."""
    return text_of(pair[key][-1]["content"])


def _count(pairs: list[dict]) -> dict[str, int]:
    return {"pairs": len(pairs), "images": len({image for pair in pairs for image in pair["image_ids"]})}

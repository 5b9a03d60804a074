# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Selection of records for candidates, and the files of candidates. Image bytes pass through undecoded."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_jsonl
from medst_trl.data.schema import candidate_features, with_stored_images, write_split
from medst_trl.data.source import list_reasons
from medst_trl.engines.engine import bytes_of


if TYPE_CHECKING:
    from datasets import Dataset

# Advice for the most frequent reason when everything is rejected.
_ADVICE = {
    "not_a_question": (
        "Train stage 1 longer, or lower --question_temperature. For languages other than English set "
        "--english_questions false. A server has to use the policy's own chat template."
    ),
    "unfinished": "Raise --max_question_tokens.",
    "unfinished_answer": "Raise --max_new_tokens.",
    "identical_answers": "Raise --temperature or --num_answers.",
    "nearly_identical_answers": "Raise --temperature, --num_answers or --max_answer_similarity.",
    "too_short": "Lower --min_question_words.",
    "too_long": "Raise --max_question_words.",
    "request_failed": "The server refused every request; its reason is in rejected.jsonl.",
}


def select_records(
    dataset: "Dataset", skip: int = 0, most: int | None = None
) -> tuple["Dataset", list[dict[str, str]]]:
    """
    Drop records that repeat the images of an earlier one, skip the first `skip`, and return at most `most`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Columns `id`, `image_ids`.
        skip (`int`, *optional*, defaults to `0`):
            Number of records that earlier rounds have used.
        most (`int`, *optional*):
            Maximum number of records; all by default.

    Returns:
        `tuple[Dataset, list[dict]]`: the records, and `id`, `reason`, `value` of those with the images of an earlier
        record.

    Raises:
        UserError: if none is left.
    """
    seen, rows, rejected = set(), [], []
    for row, (record_id, image_ids) in enumerate(zip(dataset["id"], dataset["image_ids"])):
        images = frozenset(image_ids)
        if images and images in seen:
            rejected.append({"id": record_id, "reason": "repeated_images", "value": ", ".join(image_ids)})
        else:
            seen.add(images)
            rows.append(row)
    chosen = rows[skip:] if most is None else rows[skip : skip + most]
    if not chosen:
        raise UserError(
            f"No images are left to ask about: {len(dataset)} records have {len(rows)} different sets of images, and "
            f"skip_records is {skip}. Prepare more images, or lower skip_records; in a run of several rounds, which "
            "skip the images of earlier rounds, lower max_records so that every round has images."
        )
    return dataset.select(chosen), rejected


def write_candidates(
    output_dir: Path,
    dataset: "Dataset",
    log: Path,
    rejected: Sequence[dict[str, str]],
    generation: str,
    rows_per_shard: int,
) -> dict[str, Any]:
    """
    Write `candidates/` and `rejected.jsonl`.

    Args:
        output_dir (`pathlib.Path`):
            Output directory of the stage.
        dataset ([`~datasets.Dataset`]):
            The records.
        log (`pathlib.Path`):
            JSON lines: the outcome of each record, see [`CandidateGenerator.outcomes`].
        rejected (sequence of `dict`):
            Records that were rejected before.
        generation (`str`):
            See [`CandidateGenerator.generation`].
        rows_per_shard (`int`):
            Number of candidates per Parquet file.

    Returns:
        `dict`: counts for `stage.json`.

    Raises:
        UserError: if there is no candidate, with the reasons.
    """
    outcomes = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    candidates = [candidate for outcome in outcomes for candidate in outcome["candidates"]]
    rejected = [*rejected, *(row for outcome in outcomes for row in outcome["rejected"])]
    counts = {
        "images": len({image for image_ids in dataset["image_ids"] for image in image_ids}),
        "records": len(outcomes),
        "questions": sum(outcome["drawn"] for outcome in outcomes),
        "candidates": len(candidates),
        "answers": sum(len(candidate["answers"]) for candidate in candidates),
        "rejected": dict(Counter(row["reason"] for row in rejected).most_common()),
    }
    write_jsonl(output_dir / "rejected.jsonl", rejected)
    if not candidates:
        advice = _ADVICE.get(next(iter(counts["rejected"]), ""), "Read the rejected texts there.")
        raise UserError(
            f"All of {counts['questions']} questions about {counts['images']} images were rejected: "
            f"{list_reasons(counts['rejected'])}. See {output_dir / 'rejected.jsonl'}. {advice} To ask again, add "
            "--overwrite true."
        )
    make_row = row_maker(dataset, generation)
    write_split(output_dir / "candidates", "train", candidates, make_row, candidate_features(), rows_per_shard)
    return counts


def row_maker(dataset: "Dataset", generation: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """
    Return a function from one of the `candidates` of an outcome to its row, with the images as the record stores them.

    Args:
        dataset ([`~datasets.Dataset`]): The records.
        generation (`str`): See [`CandidateGenerator.generation`].
    """
    rows = {record_id: row for row, record_id in enumerate(dataset["id"])}
    records = with_stored_images(dataset)

    def make_row(candidate: dict[str, Any]) -> dict[str, Any]:
        record_id, _, _ = candidate["id"].rpartition("#")
        record = records[rows[record_id]]
        return {
            "id": candidate["id"],
            "images": [{"bytes": bytes_of(image), "path": None} for image in record["images"]],
            "image_ids": record["image_ids"],
            "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in candidate["prompt"]],
            "answers": candidate["answers"],
            "generation": generation,
        }

    return make_row

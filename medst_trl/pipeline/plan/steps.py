# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How many examples a step reads and writes, and how many optimizer steps that makes, as far as it can be known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .batches import Batch


if TYPE_CHECKING:
    from medst_trl.pipeline.recipe import Step


@dataclass(frozen=True)
class Count:
    """
    A number of examples.

    Args:
        number (`int`, *optional*): The number; None where nothing is known.
        at_most (`bool`): Whether there may be fewer: some are set aside on the way, or only a limit is known.
        depends_on (`str`): What the number hangs on, where it is not known.
    """

    number: int | None
    at_most: bool = False
    depends_on: str = ""

    def times(self, factor: int) -> "Count":
        return self if self.number is None else replace(self, number=self.number * factor)

    def capped(self, limit: int | None, skipped: int = 0) -> "Count":
        """The same behind `skipped` examples and with `limit` of them at most, as `max_records` sets it."""
        if self.number is None:
            return self if limit is None else Count(limit, at_most=True)
        left = max(0, self.number - skipped)
        return replace(self, number=left if limit is None else min(left, limit))


@dataclass(frozen=True)
class Schedule:
    """
    The optimizer steps of a training.

    Args:
        steps (`int`, *optional*): In all; None where the number of examples is not known.
        per_epoch (`int`, *optional*): Steps of one epoch.
        epochs (`float`, *optional*): Epochs, not whole where `max_steps` decides.
        at_most (`bool`): Whether there may be fewer.
    """

    steps: int | None
    per_epoch: int | None
    epochs: float | None
    at_most: bool = False


def schedule(examples: Count, batch: Batch, num_train_epochs: float, max_steps: int) -> Schedule:
    """
    Steps and epochs as [`~transformers.Trainer`] counts them: the last batches of an epoch may be smaller.

    Args:
        examples ([`Count`]): Examples of an epoch.
        batch ([`~medst_trl.pipeline.plan.batches.Batch`]): Those of a step.
        num_train_epochs (`float`): Epochs to train.
        max_steps (`int`): Steps to train instead, where it is above 0.
    """
    if examples.number is None:
        return Schedule(max_steps if max_steps > 0 else None, None, None if max_steps > 0 else num_train_epochs)
    loads = math.ceil(examples.number / (batch.per_device * batch.processes))
    per_epoch = max(1, math.ceil(loads / batch.accumulation))
    if max_steps > 0:
        return Schedule(max_steps, per_epoch, max_steps / per_epoch)
    return Schedule(math.ceil(num_train_epochs * per_epoch), per_epoch, num_train_epochs, examples.at_most)


def training_examples(args: Any, steps: Sequence["Step"]) -> Count:
    """Conversations of `sft` or pairs of `dpo`, by their stage's arguments."""
    names = [args.dataset] if isinstance(args.dataset, str) else args.dataset
    counts = [rows_at(name, args.train_split, steps) for name in names]
    if unknown := [count.depends_on for count in counts if count.number is None]:
        return Count(None, depends_on=" and ".join(unknown)).capped(args.max_records)
    total = Count(sum(count.number for count in counts), any(count.at_most for count in counts))
    return total.capped(args.max_records)


def rows_at(folder: str, split: str, steps: Sequence["Step"] = ()) -> Count:
    """
    Rows of a split in a folder of Parquet files; of one that a step of the recipe will make, what its settings say.
    """
    if (rows := _parquet_rows(Path(folder), split)) is not None:
        return Count(rows)
    for step in steps:
        made = Path(step.settings["output_dir"])
        if step.stage.name in _MAKERS and Path(folder).parent == made:
            known = _MAKERS[step.stage.name](step, Path(folder).name, split, steps)
            return replace(known, depends_on=step.label) if known.number is None else known
    return Count(None, depends_on=folder)


def records_to_ask_about(step: "Step", steps: Sequence["Step"]) -> Count:
    """Images that `generate` asks about."""
    settings = step.settings
    if "images" not in settings:
        return Count(None, depends_on="images")
    images = rows_at(settings["images"], settings.get("split", "train"), steps)
    if images.number is None and Path(settings["images"]).name == "images":  # as the stage does without images/
        images = rows_at(str(Path(settings["images"]).with_name("instruct")), "train", steps)
    return images.capped(settings.get("max_records"), settings.get("skip_records", 0))


def candidates_of(step: "Step", steps: Sequence["Step"]) -> Count:
    """Questions with answers that `generate` writes at most: some are filtered."""
    return replace(records_to_ask_about(step, steps).times(step.settings.get("num_questions", 1)), at_most=True)


def pairs_to_judge(step: "Step", steps: Sequence["Step"]) -> Count:
    """Pairs of answers that `judge` compares: the first and second answer to a question, the third and fourth ..."""
    candidates = rows_at(step.settings["candidates"], step.settings.get("split", "train"), steps)
    maker = [
        step_ for step_ in steps if Path(step_.settings["output_dir"]) == Path(step.settings["candidates"]).parent
    ]
    answers = maker[0].settings.get("num_answers", 2) if maker else 2
    return candidates.times(answers // 2)


def benchmark_questions(folder: str, split: str) -> Count:
    """Questions of a benchmark that is here."""
    from pyarrow import parquet

    files = _shards(Path(folder), split)
    if files is None:
        return Count(None, depends_on=folder)
    columns = [parquet.read_table(path, columns=["questions"])["questions"] for path in files]
    return Count(sum(len(questions) for column in columns for questions in column.to_pylist()))


def _parquet_rows(folder: Path, split: str) -> int | None:
    from pyarrow import parquet

    files = _shards(folder, split)
    return None if files is None else sum(parquet.read_metadata(path).num_rows for path in files)


def _shards(folder: Path, split: str) -> list[Path] | None:
    from medst_trl.data.schema import complete_shards

    try:
        return complete_shards(folder, split) if folder.is_dir() else None
    except UserError:
        return None


def _of_prepare(step: "Step", kind: str, split: str, steps: Sequence["Step"]) -> Count:
    settings = step.settings
    limit = settings.get("max_records")
    if settings.get("source") != "phantoms":
        return Count(limit, at_most=limit is not None)
    held_out = round(settings.get("num_phantoms", 1000) * settings.get("validation_fraction", 0.0))
    numbers = {
        ("instruct", "train"): settings.get("num_phantoms", 1000) - held_out,
        ("instruct", "validation"): held_out,
        ("images", "train"): settings.get("num_unlabelled_phantoms", 0),
        ("benchmark", "test"): settings.get("num_test_phantoms", 300),
    }
    return Count(numbers.get((kind, split))).capped(limit)


def _of_generate(step: "Step", kind: str, split: str, steps: Sequence["Step"]) -> Count:
    return candidates_of(step, steps)


def _of_judge(step: "Step", kind: str, split: str, steps: Sequence["Step"]) -> Count:
    if "candidates" not in step.settings:
        return Count(None)
    return replace(pairs_to_judge(step, steps), at_most=True)  # ties and disagreements are dropped


# What the datasets of a stage hold that has not run yet.
_MAKERS: dict[str, Callable[["Step", str, str, Sequence["Step"]], Count]] = {
    "prepare": _of_prepare,
    "generate": _of_generate,
    "judge": _of_judge,
}

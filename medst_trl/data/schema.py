# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The columns of our datasets, and reading and writing them. The one place that knows their names.

- instruct: `id`, `images`, `image_ids`, `messages` (`role`, `content`, `vusr`). Content is a list of typed parts, so
  that several images keep their places; the n-th image part stands for the n-th of `images`.
- benchmark, a row an image: `image_id`, `image`, `questions` (`id`, `question`, `answer`, `answer_type`,
  `question_type`, `link`: the same for all wordings of one question).
- candidates: `id` (`<record>#<n>`), `images`, `image_ids`, `prompt` (messages as sampled, the question last),
  `answers`, `generation` (JSON: model, seed, sampling).
- preferences, as TRL reads them: `id`, `images`, `image_ids`, `prompt`, `chosen`, `rejected` (messages),
  `score_chosen`, `score_rejected`, `judge` (JSON: model, prompt version, both orders).
- predictions, JSON lines: see `PREDICTION_COLUMNS`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import split_revision


if TYPE_CHECKING:
    from datasets import Dataset, Features

ANSWER_TYPES = ("open", "closed")
PREDICTION_COLUMNS = (
    "id", "image_id", "question", "answer", "answer_type", "question_type", "prediction", "generation",
)  # fmt: skip

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet")


def instruct_features() -> "Features":
    """Columns of conversations (and of unlabelled images, whose `messages` are empty)."""
    from datasets import Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part), "vusr": Value("bool")}
    return Features(
        {
            "id": Value("string"),
            "images": List(Image()),
            "image_ids": List(Value("string")),
            "messages": List(message),
        }
    )


def benchmark_features() -> "Features":
    """Columns of a benchmark, a row an image."""
    from datasets import Features, Image, List, Value

    names = ("id", "question", "answer", "answer_type", "question_type", "link")
    question = {name: Value("string") for name in names}
    return Features({"image_id": Value("string"), "image": Image(), "questions": List(question)})


def candidate_features() -> "Features":
    """Columns of questions with their sampled answers."""
    from datasets import Features, Image, List, Value

    return Features(
        {
            "id": Value("string"),
            "images": List(Image()),
            "image_ids": List(Value("string")),
            "prompt": _messages_without_vusr(),
            "answers": List(Value("string")),
            "generation": Value("string"),
        }
    )


def preference_features() -> "Features":
    """Columns of preference pairs, as TRL's DPOTrainer reads them."""
    from datasets import Features, Image, List, Value

    return Features(
        {
            "id": Value("string"),
            "images": List(Image()),
            "image_ids": List(Value("string")),
            "prompt": _messages_without_vusr(),
            "chosen": _messages_without_vusr(),
            "rejected": _messages_without_vusr(),
            "score_chosen": Value("float64"),
            "score_rejected": Value("float64"),
            "judge": Value("string"),
        }
    )


def _messages_without_vusr():
    from datasets import List, Value

    return List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})


def image_part() -> dict:
    """The place of an image in a message's content."""
    return {"type": "image", "text": None}


def text_part(text: str) -> dict:
    """Text in a message's content."""
    return {"type": "text", "text": text}


def message(role: str, content: list[dict], vusr: bool = False) -> dict:
    """One message: `role` is `"user"` or `"assistant"`, `vusr` says that the model is to write this user turn."""
    return {"role": role, "content": content, "vusr": vusr}


def text_of(content: str | list[dict]) -> str:
    """The text of a message's content, its image parts left out."""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def features_of(kind: str) -> "Features":
    """The columns of `"instruct"`, `"benchmark"`, `"candidates"` or `"preferences"` data."""
    return _KINDS[kind][0]()


def check_columns(dataset: "Dataset", kind: str) -> None:
    """
    Refuse a dataset that has not the columns of its kind. Further columns are no harm.

    Args:
        dataset (`datasets.Dataset`): As [`load_records`] gives it.
        kind (`str`): `"instruct"`, `"benchmark"`, `"candidates"` or `"preferences"`.

    Raises:
        UserError: naming the columns that are missing or of another type.
    """
    features, maker = _KINDS[kind]
    expected = features()
    missing = [name for name in expected if name not in dataset.features]
    if missing:
        raise UserError(
            f"The dataset lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {kind} data; it "
            f"has {', '.join(dataset.features)}. `medst {maker}` makes such datasets."
        )
    for name, feature in expected.items():
        if _shape(dataset.features[name]) != _shape(feature):
            raise UserError(
                f"The column {name} of {kind} data has another type than expected.\n  is:        "
                f"{dataset.features[name]}\n  should be: {feature}\n`medst {maker}` makes such datasets."
            )


def load_records(path_or_hub_id: str | os.PathLike, split: str) -> "Dataset":
    """
    Open one split of a dataset that a stage wrote or that lies on the Hub, images decoded when read.

    Args:
        path_or_hub_id (`str` or `os.PathLike`): A folder of `<split>-*.parquet` files, or a Hub id.
        split (`str`): For example `"train"`.

    Raises:
        UserError: if there is no such dataset or split, or the stage that writes it was cut short.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(path_or_hub_id)
    if folder.is_dir():
        shards = [str(path) for path in complete_shards(folder, split)]
        return load_dataset("parquet", data_files={split: shards}, split=split)
    try:
        hub_id, revision = split_revision(str(path_or_hub_id))
        return load_dataset(hub_id, split=split, revision=revision)
    except (DatasetNotFoundError, FileNotFoundError):
        raise UserError(
            f"{path_or_hub_id} is neither a folder nor a dataset on the Hub (or not one you may read). "
            "Run the stage that makes it first, or correct the path."
        ) from None
    except (ConnectionError, HfHubHTTPError) as error:
        raise UserError(
            f"{path_or_hub_id} is no folder, and the Hub cannot be asked for it ({str(error).splitlines()[0]}). Check "
            "the network, the token (`hf auth login`) and HF_HUB_OFFLINE, or correct the path."
        ) from None
    except ValueError as error:  # an unknown split
        raise UserError(f"{path_or_hub_id}: {error}") from None


# What each kind of dataset has to have, and the stage that makes it.
_KINDS = {
    "instruct": (instruct_features, "prepare"),
    "benchmark": (benchmark_features, "prepare"),
    "candidates": (candidate_features, "generate"),
    "preferences": (preference_features, "judge"),
}


def splits_in(folder: str | os.PathLike) -> list[str]:
    """Names of the splits in a folder of `<split>-*.parquet` files, training first."""
    splits = {match["split"] for path in Path(folder).iterdir() if (match := _SHARD.fullmatch(path.name))}
    return sorted(splits, key=lambda split: (split != "train", split))


def complete_shards(folder: Path, split: str) -> list[Path]:
    """
    The files of a split.

    Raises:
        UserError: if there is none, or not all of them.
    """
    shards = [(path, match) for path in sorted(folder.iterdir()) if (match := _SHARD.fullmatch(path.name))]
    wanted = [(path, int(match["total"])) for path, match in shards if match["split"] == split]
    if not wanted:
        there = sorted({match["split"] for _, match in shards})
        raise UserError(
            f"{folder} has no split {split!r} ({split}-*.parquet); "
            + (
                f"it has {', '.join(there)}."
                if there
                else "it has no split at all. `medst prepare`, `generate` and `judge` make such folders."
            )
        )
    if any(total != len(wanted) for _, total in wanted):
        raise UserError(
            f"{folder} has {len(wanted)} of {wanted[0][1]} files of split {split!r}. Run the stage that writes it "
            "again: it continues where it stopped."
        )
    return [path for path, _ in wanted]


def _shape(feature) -> object:
    """A feature as nested names and kinds: list, struct, image or the kind of value (`large_string` is a string)."""
    if isinstance(feature, Mapping):
        return {name: _shape(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):
        return [_shape(feature.feature)]
    return getattr(feature, "dtype", "").removeprefix("large_")

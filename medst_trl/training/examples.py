# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Training examples: their images, stored and decoded, and which examples are rejected before the first step."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from datasets import Image as ImageFeature
from PIL import ExifTags, Image
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers.trainer_utils import has_length

from medst_trl.base.errors import UserError
from medst_trl.base.processes import rank
from medst_trl.data.schema import bytes_of, with_stored_images
from medst_trl.data.source import BadRecord
from medst_trl.policy.families import EXTREME_ASPECT_RATIO, MAX_ASPECT_RATIO, aspect_ratio_error


logger = logging.getLogger(__name__)

WARN_ABOVE = 0.2  # fraction of rejected examples

REJECTION_REASONS = {
    "unreadable_image": "an image is missing, truncated or of an unknown format",
    EXTREME_ASPECT_RATIO: f"an image has an aspect ratio above {MAX_ASPECT_RATIO}:1",
    "malformed": "messages and images do not make a conversation",
    "nothing_to_train": "no answer, and no question that can be asked",
    "chosen_equals_rejected": "both answers say the same",
    "too_long": "too little of the answers fits into max_length={max_length} tokens, with prompt and image",
}


class UnreadableImage(UserError):
    """An image that is missing, truncated, of an unknown format, or too narrow; `reason` is that of its rejection."""

    def __init__(self, message: str, reason: str = "unreadable_image"):
        super().__init__(message)
        self.reason = reason


class DecodesImages:
    """
    Marker for data collators that take images as a dataset stores them and call [`with_decoded_images`] themselves.
    Left to `datasets`, the first image of every list is decoded twice (its `decode_nested_example` tries one to find
    out whether the list has to be decoded).
    """


def images_of(example: Mapping[str, Any]) -> list[Any]:
    """The images of an example, from its column `images` or `image`."""
    return [example["image"]] if "image" in example else list(example.get("images") or [])


def with_images(example: Mapping[str, Any], images: list[Any]) -> dict[str, Any]:
    """The same example with its images replaced."""
    return {**{name: value for name, value in example.items() if name != "image"}, "images": images}


def with_decoded_images(example: dict[str, Any]) -> dict[str, Any]:
    """
    The same example with a list of decoded `images`.

    Raises:
        UnreadableImage: if one of them cannot be decoded.
    """
    return with_images(example, [_decode(image) for image in images_of(example)])


def _decode(image: Image.Image | dict[str, Any]) -> Image.Image:
    try:
        decoded = ImageFeature().decode_example(image) if isinstance(image, dict) else image
        if not isinstance(decoded, Image.Image):
            raise TypeError(f"it is of type {type(decoded).__name__}")
    except Exception as error:  # Pillow's parsers raise almost anything on a damaged file
        raise UnreadableImage(f"The image cannot be read ({type(error).__name__}: {error}).") from error
    return decoded


def check_has_images(dataset: Any) -> None:
    """Raise a [`UserError`] for data without a column of images, which TRL would tokenize as text."""
    example = next(iter(with_stored_images(dataset) or ()), None)
    if isinstance(example, Mapping) and not {"image", "images"} & example.keys():
        raise UserError(
            f"The training data has columns {', '.join(example)}, but no `images`. Text without images needs it too: "
            'add `images: []` to every row, for instance by dataset.add_column("images", [[]] * len(dataset)).'
        )


def check_image(image: Image.Image | dict[str, Any]) -> tuple[int, int]:
    """
    Check that an image can be trained on, and return its width and height after decoding. A JPEG or PNG that ends
    correctly is not decoded.

    Args:
        image (`PIL.Image.Image` or `dict`): An image, or its `bytes` and `path` as a dataset stores them.

    Raises:
        UnreadableImage: if it is missing, truncated, of an unknown format, or too narrow.
    """
    size = _size_of_whole_file(image) if isinstance(image, dict) else None
    size = size or _decode(image).size
    if why := aspect_ratio_error([size]):
        raise UnreadableImage(f"The image cannot be used ({why}).", EXTREME_ASPECT_RATIO)
    return size


def _size_of_whole_file(image: dict[str, Any]) -> tuple[int, int] | None:
    """The size of a JPEG with its end marker or of a PNG with all its chunks; `None` if it has to be decoded."""
    try:
        data = bytes_of(image)
        with Image.open(BytesIO(data)) as opened:
            if opened.format == "PNG" and not re.search(b"eXIf|tEXt|zTXt|iTXt", data):  # which may rotate it
                opened.verify()
                return opened.size
            if opened.format in ("JPEG", "MPO") and data[-4096:].rstrip(b"\0").endswith(b"\xff\xd9"):
                width, height = opened.size
                is_rotated = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # `datasets` applies it
                return (height, width) if is_rotated else (width, height)
    except Exception:  # Pillow may still be able to decode it
        return None


@contextmanager
def reject_malformed() -> Iterator[None]:
    """Turn an error inside the block into a [`BadRecord`] with the reason `malformed`."""
    try:
        yield
    except (UserError, KeyError, TypeError) as error:
        raise BadRecord("malformed", str(error)) from error


@dataclass(frozen=True)
class UsableExamples:
    """
    Examples that can be trained on, and why the others cannot.

    Args:
        dataset ([`~datasets.Dataset`]): Examples that can be trained on.
        rejected_records (`dict[str, str]`): The reason of each other example, by id (or index).
        rejected (`Counter`): How many examples are rejected, by reason; repeated ones count each time.
        truncated (`int`): Number of examples in the dataset that are truncated at `max_length`.
        lengths (`list[int]`): Tokens of each example of the dataset, a pair's prompt counted once.
    """

    dataset: Any
    rejected_records: dict[str, str]
    rejected: Counter[str]
    truncated: int
    lengths: list[int]

    def counts(self) -> dict[str, Any]:
        """How many examples are rejected, by reason, and how many truncated, for `stage.json`."""
        return {"set_aside": dict(self.rejected), "truncated": self.truncated}


def usable_examples(
    dataset: Any, check: Callable[[dict[str, Any]], tuple[int, bool]], max_length: int | None, name: str = "train"
) -> UsableExamples:
    """
    Reject the examples that cannot be trained on, with a warning if they are more than a fifth.

    A stream is read up to the first usable example and returned whole. The collator must reject its other examples.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Examples, see the collators.
        check (`Callable`):
            Takes an example whose images are replaced by their sizes. Returns its number of tokens, and whether it is
            truncated. Raises [`BadRecord`] if it cannot be trained on, see [`reject_malformed`].
        max_length (`int` or `None`):
            Longest sequence in tokens, image tokens included.
        name (`str`, *optional*, defaults to `"train"`):
            What the dataset is called in messages.

    Raises:
        UserError: if none is left.
    """
    lengths = {}
    rejected_at = {}  # index: (id, reason)
    problem, truncated = None, 0
    is_stream = not has_length(dataset)
    rows = tqdm(with_stored_images(dataset), f"checking {name}", disable=True if is_stream or rank() else None)
    for place, example in enumerate(rows):
        try:
            sizes = [check_image(image) for image in images_of(example)]
            length, is_truncated = check(with_images(example, sizes))
        except (BadRecord, UnreadableImage) as error:
            rejected_at[place] = str(example.get("id") or place), error.reason
            problem = problem or getattr(error, "value", str(error))  # names a missing file
            continue
        except ValueError as error:  # a training stage would report a ValueError as an invalid setting
            raise RuntimeError(
                f"Record {example.get('id') or place!r} of {name} cannot be checked: {error}"
            ) from error
        lengths[place] = length
        truncated += is_truncated
        if is_stream:
            return UsableExamples(dataset, {}, Counter(), 0, [])
    rejected = Counter(reason for _, reason in rejected_at.values())
    _report(name, len(lengths), rejected, max_length, problem)
    if rejected_at:
        dataset = dataset.select(lengths) if hasattr(dataset, "select") else Subset(dataset, list(lengths))
    return UsableExamples(dataset, dict(rejected_at.values()), rejected, truncated, list(lengths.values()))


def _report(name: str, kept: int, counts: Counter[str], max_length: int | None, problem: str | None) -> None:
    """Refuse a dataset without a usable example, and warn if many are rejected."""
    total = kept + counts.total()
    found = [f"{counts[key]} {key} ({text})" for key, text in REJECTION_REASONS.items() if counts[key]]
    why = f"{', '.join(found) or 'it is empty'}.".format(max_length=max_length)
    why += (f" {problem}" if problem else "") + (" Raise max_length." if counts["too_long"] else "")
    if not kept:
        raise UserError(f"No example of the {name} dataset can be used: {why}")
    if counts.total() > WARN_ABOVE * total and rank() == 0:
        logger.warning(f"{counts.total()} of the {total} examples in the {name} dataset are rejected: {why}")

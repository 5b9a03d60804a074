# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Controls: the same evaluation with images that do not help, to show how much of a score needs the image.

- `blank`: every image is replaced by a mid-grey one of the same size.
- `shuffled`: every question is asked about another image of the benchmark, all questions of one image about the same.

Both are built in; there is no registry for others.

If a control reaches the same score, the model does not need the image for it. LLaVA-Med's issue 130 reports answers
that do not change with the image: https://github.com/microsoft/LLaVA-Med/issues/130.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError
from medst_trl.base.settings import check_choice

from .scoring import clusters_of, figures, interval, resample, score_records, summarize, with_types


if TYPE_CHECKING:
    from PIL import Image


CONTROLS = ("blank", "shuffled")
GREY = 128


def blank_image(image: "Image.Image") -> "Image.Image":
    """Make a mid-grey image of the same size."""
    from PIL import Image

    return Image.new("RGB", image.size, (GREY, GREY, GREY))


def shuffled_rows(image_ids: Sequence[str], seed: int = 0) -> list[int]:
    """
    Give every row of a benchmark a different image, taken from another row.

    Args:
        image_ids (sequence of `str`):
            Image id of each row; rows with the same id show the same image.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffle.

    Returns:
        `list[int]`: for each row the row whose image it gets. A permutation: each image is used as often as before.

    Raises:
        UserError: if one image is in more than half of the rows, since some question would then keep it.
    """
    counts = Counter(image_ids)
    if not counts:
        return []
    image_id, most = counts.most_common(1)[0]
    if 2 * most > len(image_ids):
        raise UserError(
            f"The images cannot be shuffled: {most} of the {len(image_ids)} images of the benchmark are the same one "
            f"({image_id[:12]}). Remove 'shuffled' from controls, or evaluate on more images."
        )
    rng = random.Random(seed)
    order = sorted(counts)
    rng.shuffle(order)
    position = {image_id: number for number, image_id in enumerate(order)}
    rows = sorted(range(len(image_ids)), key=lambda row: (position[image_ids[row]], row))
    # Rows with the same image are now adjacent, at most `most` of them: that many rows further the image differs.
    donors = dict(zip(rows, rows[most:] + rows[:most]))
    return [donors[row] for row in range(len(rows))]


def shown_rows(image_ids: Sequence[str], control: str | None = None, seed: int = 0) -> list[int]:
    """
    Return for each row of a benchmark the row whose image a control shows.

    Raises:
        UserError: for an unknown control, or images that cannot be shuffled.
    """
    check_choice("control", control, CONTROLS)
    return shuffled_rows(image_ids, seed) if control == "shuffled" else list(range(len(image_ids)))


def compare_vqa(
    records: Iterable[Mapping[str, Any]],
    control_records: Iterable[Mapping[str, Any]],
    variant: str = "strict",
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """
    Score a control and how much better the real predictions are.

    Args:
        records (iterable of `dict`):
            The real predictions, see [`~medst_trl.evaluation.scoring.score_vqa`], each with a unique `id`.
        control_records (iterable of `dict`):
            Predictions of the control, for the same ids.
        variant, bootstrap_samples, seed, **settings:
            As in `score_vqa`.

    Returns:
        `dict`: the scores of the control, in which every figure carries `difference` (real minus control, in
        percentage points) and `difference_interval`, a paired 95% bootstrap interval: the same images are drawn for
        both sides.

    Raises:
        UserError: if ids are missing or repeated, or the two sides do not answer the same ids.
    """
    real, control = _by_id(records, "predictions"), _by_id(control_records, "control predictions")
    if odd := real.keys() ^ control.keys():
        raise UserError(
            f"Predictions and control do not answer the same questions: {len(odd)} ids are on one side only, for "
            f"example {min(map(str, odd))!r}. Run the control again with the settings of the predictions."
        )
    sides = {"real": real.values(), "control": [control[key] for key in real]}
    scored = {name: score_records(rows, variant, **settings) for name, rows in sides.items()}
    pairs = [
        {(name, *path): value for name, scores in zip(sides, both) for path, value in scores.items()}
        for both in zip(*(with_types(rows) for rows in scored.values()))
    ]
    means = resample(zip(clusters_of(scored["real"]), pairs), bootstrap_samples, seed)

    bootstrap = {"samples": bootstrap_samples, "seed": seed}
    real_result, result = (summarize(rows, variant, settings, {}, bootstrap) for rows in scored.values())
    real_figures = dict(figures(real_result))
    for path, leaf in figures(result):
        value = real_figures.get(path, {}).get("value")
        both = means.get(("real", *path), []), means.get(("control", *path), [])
        differences = [None if None in pair else pair[0] - pair[1] for pair in zip(*both)]
        leaf["interval"] = interval(both[1])
        leaf["difference"] = None if None in (value, leaf["value"]) else value - leaf["value"]
        leaf["difference_interval"] = interval(differences)
    return result


def _by_id(records: Iterable[Mapping[str, Any]], what: str) -> dict[Any, Mapping[str, Any]]:
    found = {}
    for position, record in enumerate(records):
        key = record.get("id")
        if key is None or key in found:
            problem = f"record number {position + 1} has no id" if key is None else f"the id {key!r} is repeated"
            raise UserError(f"In the {what}, {problem}. Predictions and control are paired by unique ids.")
        found[key] = record
    return found

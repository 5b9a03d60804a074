# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Two controls that show how much of a score needs the image (LLaVA-Med's issue 130: answers that do not change with it,
https://github.com/microsoft/LLaVA-Med/issues/130).

- `blank`: every image is replaced by a mid-grey one of the same size.
- `shuffled`: every question is asked about another image of the benchmark, those of one image about the same one.

Both run like the real evaluation. A score that they reach too was not earned by looking.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError

from .bootstrap import interval, resample
from .metrics import clusters_of, figures, score_records, score_vqa, with_types


if TYPE_CHECKING:
    from PIL import Image


CONTROLS = ("blank", "shuffled")
GREY = 128


def blank_image(image: "Image.Image") -> "Image.Image":
    """A mid-grey image of the same size."""
    from PIL import Image

    return Image.new("RGB", image.size, (GREY, GREY, GREY))


def shuffled_rows(image_ids: Sequence[str], seed: int = 0) -> list[int]:
    """
    Give every row of a benchmark the image of another row that shows a different picture.

    Args:
        image_ids (sequence of `str`):
            Image id of each row; rows of one id show the same picture.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffle.

    Returns:
        `list[int]`: for each row the row whose image it gets; a permutation, so each image is used as often as before.

    Raises:
        UserError: if one picture stands in more than half of the rows, since then some question would keep it.
    """
    counts = Counter(image_ids)
    if not counts:
        return []
    picture, most = counts.most_common(1)[0]
    if 2 * most > len(image_ids):
        raise UserError(
            f"Images cannot be shuffled: {most} of the {len(image_ids)} images of the benchmark are one and the same "
            f"({picture[:12]}). Leave the control 'shuffled' out, or evaluate on more images."
        )
    rng = random.Random(seed)
    order = sorted(counts)
    rng.shuffle(order)
    place = {image_id: number for number, image_id in enumerate(order)}
    rows = sorted(range(len(image_ids)), key=lambda row: (place[image_ids[row]], row))
    # Equal pictures stand side by side, none more than `most` in a row: that many places further there is another one.
    donors = rows[most:] + rows[:most]
    shuffled = [0] * len(rows)
    for row, donor in zip(rows, donors):
        shuffled[row] = donor
    return shuffled


def compare_vqa(
    records: Iterable[Mapping[str, Any]],
    control_records: Iterable[Mapping[str, Any]],
    variant: str = "strict",
    *,
    closed_rule: str | None = None,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Score a control and how much better the real predictions are.

    Args:
        records (iterable of `dict`):
            The real predictions, see [`~medst_trl.evaluation.metrics.score_vqa`], each with a unique `id`.
        control_records (iterable of `dict`):
            Predictions of the control, for the same ids.
        variant, closed_rule, bootstrap_samples, seed:
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
            f"Predictions and control do not answer the same questions: {len(odd)} ids stand on one side only, for "
            f"example {min(map(str, odd))!r}. Run the control again with the settings of the predictions."
        )
    sides = {"real": list(real.values()), "control": [control[key] for key in real]}
    values = {
        name: score_vqa(rows, variant, closed_rule=closed_rule, bootstrap_samples=0) for name, rows in sides.items()
    }
    scored = {name: score_records(rows, variant, closed_rule) for name, rows in sides.items()}
    pairs = [
        {(name, *figure): value for name, scores in zip(sides, both) for figure, value in scores.items()}
        for both in zip(*(with_types(rows) for rows in scored.values()))
    ]
    means = resample(zip(clusters_of([answered for answered, _ in scored["real"]]), pairs), bootstrap_samples, seed)

    result, real_figures = values["control"], dict(figures(values["real"]))
    result["bootstrap"] |= {"samples": bootstrap_samples, "seed": seed}
    for figure, leaf in figures(result):
        value = real_figures.get(figure, {}).get("value")
        both = means.get(("real", *figure), []), means.get(("control", *figure), [])
        differences = [None if None in pair else pair[0] - pair[1] for pair in zip(*both)]
        leaf["interval"] = interval(both[1])
        leaf["difference"] = None if None in (value, leaf["value"]) else value - leaf["value"]
        leaf["difference_interval"] = interval(differences)
    return result


def _by_id(records: Iterable[Mapping[str, Any]], what: str) -> dict[Any, Mapping[str, Any]]:
    found = {}
    for place, record in enumerate(records):
        key = record.get("id")
        if key is None or key in found:
            wrong = f"record number {place + 1} has no id" if key is None else f"the id {key!r} stands there twice"
            raise UserError(f"In the {what}, {wrong}; pairs with the control go by unique ids.")
        found[key] = record
    return found

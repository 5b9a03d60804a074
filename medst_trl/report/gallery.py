# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Single cases with their images: judged pairs, and benchmark questions answered before and after training."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from medst_trl.data.image_formats import ImageProblem
from medst_trl.engines.images import RequestImage
from medst_trl.evaluation.metrics.strict import is_right
from medst_trl.evaluation.scoring import read_answer
from medst_trl.pipeline.lineage import possible_places

from .flow import Judging
from .run_directory import Run, StageRun
from .scores import Comparison, read_answers
from .text import relative_path


IMAGE_SIZE = 320  # longest side of an image on the page, in pixels

OUTCOMES = {
    (False, True): "wrong before, right after",
    (True, False): "right before, wrong after",
    (False, False): "wrong both times",
    (True, True): "right both times",
}


def judged_cases(run: Run, judge: StageRun, judging: Judging, limit: int) -> list[dict[str, Any]]:
    """
    Return at most `limit` judgements: half of them kept, the others dropped, with all reasons in turn.

    Returns:
        `list[dict]`: lines of `judgements.jsonl`, each with the data URLs of its `images`.
    """
    outcomes: dict[str | None, list[dict[str, Any]]] = defaultdict(list)
    for row in judging.rows:
        outcomes[row["dropped"]].append(row)
    kept = outcomes.pop(None, [])
    by_reason = [_spread(rows, limit) for rows in outcomes.values()]
    dropped = [row for row in chain(*zip_longest(*by_reason)) if row is not None]
    shown = _spread(kept, max((limit + 1) // 2, limit - len(dropped)))
    shown += dropped[: limit - len(shown)]
    places = _places(run, judge.settings.get("candidates"))
    images = find_images(run, places, "id", "images", [str(row.get("candidate")) for row in shown])
    return [row | {"images": images.get(str(row.get("candidate")), [])} for row in shown]


def changed_answers(run: Run, comparison: Comparison, limit: int) -> dict[str, Any] | None:
    """
    Compare the policy of the headline with the one before training, on the questions of a benchmark.

    Returns:
        `dict` or `None`: the evaluations `before` and `after`; `counts`, the number of questions by outcome (see
        `OUTCOMES`); and `cases`, by outcome some predictions of the newer policy, each with `images`, `before` and
        `after`. None if the policies cannot be compared.
    """
    before, after = comparison.before, comparison.headline
    if after not in comparison.compared:
        return None
    old, new = read_answers(run, before), read_answers(run, after)
    by_outcome: dict[str, list[str]] = {name: [] for name in OUTCOMES.values()}
    for key in new:
        before_right, after_right = is_right(read_answer(old[key])), is_right(read_answer(new[key]))
        by_outcome[OUTCOMES[before_right, after_right]].append(key)
    shown = {name: _spread(keys, limit // 3) for name, keys in list(by_outcome.items())[:3]}
    places = _places(run, after.file.content.get("benchmark"))
    wanted = {str(new[key].get("image_id")) for keys in shown.values() for key in keys}
    images = find_images(run, places, "image_id", "image", wanted)

    def case(key: str) -> dict[str, Any]:
        pictures = images.get(str(new[key].get("image_id")), [])
        return new[key] | {"images": pictures, "before": old[key]["prediction"], "after": new[key]["prediction"]}

    cases = {name: [case(key) for key in keys] for name, keys in shown.items()}
    counts = {name: len(keys) for name, keys in by_outcome.items()}
    return {"before": before, "after": after, "counts": counts, "cases": cases}


def _places(run: Run, setting: Any) -> list[Path]:
    """Return where datasets are that a stage has read, first in the run: it may have been moved or copied since."""
    names = [name for name in (setting if isinstance(setting, list) else [setting]) if isinstance(name, str)]
    places = [place for name in names for place in possible_places(name, run.directory)]
    return sorted(places, key=lambda place: not place.is_relative_to(run.directory))


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` of the items, evenly from first to last."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def find_images(
    run: Run, directories: Iterable[Path], key: str, column: str, wanted: Collection[str]
) -> dict[str, list[str]]:
    """
    Read the images of a few rows of datasets.

    Args:
        run ([`Run`]): Receives notes about files that cannot be read.
        directories (iterable of `pathlib.Path`): Directories of `*.parquet` files. Missing ones are skipped.
        key (`str`): Column that names a row, such as `"id"`.
        column (`str`): Column of an image or of a list of images.
        wanted (collection of `str`): Names of rows.

    Returns:
        `dict`: name to the data URLs of its images; an empty string for an image that cannot be read.
    """
    from pyarrow import parquet

    missing, found = set(wanted), {}
    for path in (path for place in directories if place.is_dir() for path in sorted(place.glob("*.parquet"))):
        if not missing:
            break
        try:
            filters = [(key, "in", missing)]
            rows = parquet.read_table(path, columns=[key, column], filters=filters, partitioning=None).to_pylist()
        except Exception as error:  # pyarrow has an exception for each way in which a file can be damaged
            name = relative_path(path, run.directory)
            run.notes.append(f"The images in {name} cannot be read ({type(error).__name__}).")
            continue
        for row in rows:
            images = row[column] if isinstance(row[column], list) else [row[column]]
            found[row[key]] = [data_url((image or {}).get("bytes")) for image in images]
        missing -= found.keys()
    return found


def data_url(image: bytes | None) -> str:
    """Return an image as a data URL, scaled down and without metadata; empty if it cannot be read."""
    try:
        return RequestImage(image, IMAGE_SIZE).data_url if image else ""
    except ImageProblem:
        return ""

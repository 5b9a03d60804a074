# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Single cases with their images: judged pairs, and benchmark questions answered before and after training."""

import base64
import io
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from medst_trl.data.cells import BadRecord
from medst_trl.data.image_settings import ImageSettings
from medst_trl.evaluation.metrics.strict import is_right
from medst_trl.evaluation.scoring import read_answer

from .flow import KEPT, Judging, is_judgement
from .run_directory import Run, StageRun, parse_object
from .scores import Comparison, read_answers


JPEG_QUALITY = 85

OUTCOMES = {
    (False, True): "wrong before, right after",
    (True, False): "right before, wrong after",
    (False, False): "wrong both times",
    (True, True): "right both times",
}


def judged_cases(run: Run, judge: StageRun, judging: Judging, limit: int, size: int) -> list[dict[str, Any]]:
    """
    Return at most `limit` pairs of a judge: half of them kept, the others dropped, with all reasons in turn.

    Returns:
        `list[dict]`: lines of `judgements.jsonl`, each with the data URLs of its `images`.
    """
    dropped = [_spread(offsets, limit) for outcome, offsets in judging.offsets.items() if outcome != KEPT]
    in_turn = [offset for offset in chain(*zip_longest(*dropped)) if offset is not None]
    kept = _spread(judging.offsets.get(KEPT, []), max((limit + 1) // 2, limit - len(in_turn)))
    rows = []
    with open(judge.directory / "judgements.jsonl", "rb") as file:
        for offset in [*kept, *in_turn[: limit - len(kept)]]:
            file.seek(offset)
            rows.append(parse_object(file.readline()) or {})
    rows = [row for row in rows if is_judgement(row)]
    # What the stages of the same round made comes first: the run directory may have moved.
    places = [*run.datasets("candidates", judge.round), *_paths(judge.settings.get("candidates"))]
    images = find_images(run, places, "id", "images", [str(row.get("candidate")) for row in rows], size)
    return [row | {"images": images.get(str(row.get("candidate")), [])} for row in rows]


def changed_answers(run: Run, comparison: Comparison, limit: int, size: int) -> dict[str, Any] | None:
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
    try:
        for key in (key for key in new if key in old):
            by_outcome[OUTCOMES[tuple(is_right(read_answer(side[key])) for side in (old, new))]].append(key)
    except BadRecord:
        return None
    shown = {name: _spread(keys, limit // 3) for name, keys in list(by_outcome.items())[:3]}
    places = [*run.datasets("benchmark"), *_paths(after.file.content.get("benchmark"))]
    wanted = {str(new[key].get("image_id")) for keys in shown.values() for key in keys}
    images = find_images(run, places, "image_id", "image", wanted, size)

    def case(key: str) -> dict[str, Any]:
        pictures = images.get(str(new[key].get("image_id")), [])
        return new[key] | {"images": pictures, "before": old[key]["prediction"], "after": new[key]["prediction"]}

    cases = {name: [case(key) for key in keys] for name, keys in shown.items()}
    counts = {name: len(keys) for name, keys in by_outcome.items()}
    return {"before": before, "after": after, "counts": counts, "cases": cases}


def _paths(setting: Any) -> list[Path]:
    names = setting if isinstance(setting, list) else [setting]
    return [Path(name) for name in names if isinstance(name, str) and name]


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` of the items, evenly from first to last."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def find_images(
    run: Run, directories: Iterable[Path], key: str, column: str, wanted: Collection[str], size: int
) -> dict[str, list[str]]:
    """
    Read the images of a few rows of datasets, without reading the others.

    Args:
        run ([`Run`]): Receives notes about files that cannot be read.
        directories (iterable of `pathlib.Path`): Directories of `*.parquet` files. Missing ones are skipped.
        key (`str`): Column that names a row, such as `"id"`.
        column (`str`): Column of an image or of a list of images.
        wanted (collection of `str`): Names of rows.
        size (`int`): Longest side in pixels. Larger images are scaled down.

    Returns:
        `dict`: name to the data URLs of its images; an empty string for an image that cannot be read.
    """
    missing, found = set(wanted), {}
    for path in (path for place in directories if place.is_dir() for path in sorted(place.glob("*.parquet"))):
        if not missing:
            break
        try:
            rows = _read_rows(path, key, column, missing)
        except Exception as error:  # pyarrow has an exception for each way in which a file can be damaged
            name = run.name(path) if path.is_relative_to(run.directory) else path.name
            run.notes.append(f"The images in {name} cannot be read ({type(error).__name__}).")
            continue
        for name, images in rows.items():
            images = images if isinstance(images, list) else [images]
            found[name] = [data_url((image or {}).get("bytes"), size) for image in images]
        missing -= rows.keys()
    return found


def data_url(image: bytes | None, size: int) -> str:
    """Return an image as a data URL, its longest side at most `size` pixels; empty if it cannot be read."""
    from PIL import Image, ImageOps

    from medst_trl.data.image_formats import to_8_bit

    if not image:
        return ""
    try:
        with Image.open(io.BytesIO(image), formats=["PNG", "JPEG"]) as picture:
            if picture.width * picture.height > ImageSettings.max_pixels:
                return ""
            picture.draft("RGB", (size, size))  # decodes a JPEG at a fraction of its size
            small = to_8_bit(ImageOps.exif_transpose(picture))
            small.thumbnail((size, size))
            pixels = Image.new(small.mode, small.size)  # without EXIF, comments and profiles
            pixels.paste(small)
            file = io.BytesIO()
            pixels.save(file, "JPEG", quality=JPEG_QUALITY)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _read_rows(path: Path, key: str, column: str, wanted: Collection[str]) -> dict[str, list[dict] | dict]:
    import pyarrow.parquet as pq

    rows = {}
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):  # names first: images are large
            names = file.read_row_group(group, columns=[key]).column(key).to_pylist()
            found = [index for index, name in enumerate(names) if name in wanted]
            if found:
                table = file.read_row_group(group, columns=[column]).take(found)
                rows |= zip((names[index] for index in found), table.column(column).to_pylist())
    return rows

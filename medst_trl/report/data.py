# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The data of a run: what each stage made and left out, how the judge decided, and single cases with their images."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

from medst_trl.base.files import read_jsonl
from medst_trl.data.image_formats import ImageProblem
from medst_trl.data.schema import KINDS
from medst_trl.engines.images import RequestImage
from medst_trl.evaluation.metrics.strict import is_right
from medst_trl.evaluation.scoring import read_answer
from medst_trl.pipeline.lineage import possible_places
from medst_trl.pipeline.stage import STAGES, Stage
from medst_trl.selftrain.judge.statistics import judge_statistics, warnings_of

from .charts import Bar, bar_chart
from .run_directory import Run, StageRun
from .scores import Comparison, read_answers
from .text import is_number, relative_path, sentence, words


LEFT_OUT = ("rejected", "set_aside", "dropped")  # keys in `counts` that map reasons to numbers
UNNAMED = ("datasets", "notes")  # keys in `counts` that only group others
IMAGE_SIZE = 320  # longest side of an image on the page, in pixels

OUTCOMES = {
    (False, True): "wrong before, right after",
    (True, False): "right before, wrong after",
    (False, False): "wrong both times",
    (True, True): "right both times",
}


class Judging:
    """
    What a judge did.

    Args:
        run ([`Run`]): Receives a note about judgements that cannot be read.
        stage ([`StageRun`]): The judge.

    Attributes:
        statistics (`dict`): See [`~medst_trl.selftrain.judge.statistics.judge_statistics`], from its record.
        preferences (`dict`): What its record counts about the pairs to train on.
        kept (`int`): Their number: those that were judged, without what the stage left out then.
        rows (`list[dict]`): Its judgements.
        models (`Counter`): Judging model and prompt version.
        warnings (`list[str]`): What the statistics warn of.
    """

    def __init__(self, run: Run, stage: StageRun):
        path = stage.directory / "judgements.jsonl"
        self.statistics, self.preferences = stage.counts["judge"], stage.counts["preferences"]
        splits = (self.preferences.get(name, {}) for name in ("train", "validation"))
        self.kept = sum(split.get("pairs", 0) for split in splits)
        self.rows = [row for row in read_jsonl(path) if is_judgement(row)]
        self.models = Counter((str(row.get("model")), str(row.get("prompt_version"))) for row in self.rows)
        self.warnings = [sentence(warning) for warning in warnings_of(self.statistics)]
        if missing := self.statistics["pairs"] - len(self.rows):
            run.notes.append(f"{run.name(path)}: {missing:,} judgements are missing or damaged, and are left out.")


def read_judgings(run: Run) -> dict[str, Judging]:
    """Return what each judge did that has finished, by the name of its stage."""
    judges = [stage for stage in run.stages if stage.counts.keys() >= {"judge", "preferences"}]
    return {stage.name: Judging(run, stage) for stage in judges}


def is_judgement(row: Any) -> bool:
    """Whether a line has what the statistics and the page read."""
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        return bool(judge_statistics([row]))
    return False


def data_flow(run: Run, judgings: Mapping[str, Judging]) -> list[tuple[int, list[tuple[Stage, list[dict[str, Any]]]]]]:
    """
    Group the stages in pipeline order by round, and within a round by stage: there may be several evaluations.

    Args:
        run ([`Run`]): The run.
        judgings (`dict`): Judge statistics by the names of stages.

    Returns:
        `list`: each stage as a dict of its `run`, of names and numbers of what it `made`, and of a `chart` of what was
        kept and left out.
    """
    found = [_step(run, stage, judgings.get(stage.name)) for stage in run.stages]
    return [
        (round, [(stage, list(steps)) for stage, steps in groupby(steps, lambda step: step["run"].stage)])
        for round, steps in groupby(found, lambda step: step["run"].round)
    ]


def missing_stages(run: Run) -> list[str]:
    """Return the names of the stages that read or make datasets and are not in the run (yet)."""
    present = [stage_run.stage for stage_run in run.stages]
    missing = [stage for stage in STAGES.values() if stage not in present]
    return [one.name for one in missing if any(item.kind in KINDS for item in (*one.inputs, *one.outputs))]


def settings(run: Run, stage: StageRun) -> Iterator[tuple[str, str]]:
    """Yield a stage's inputs and the settings to show with their values, without those that are empty or off."""
    inputs = {item.key: stage.settings.get(item.key) for item in stage.stage.inputs}
    for key, value in (inputs | stage.stage.shown_settings(stage.settings)).items():
        if not (value in (None, "", [], -1) or value is False or isinstance(value, dict)):
            items = value if isinstance(value, list) else [value]
            yield key, ", ".join(relative_path(item, run.directory) for item in items)


def _step(run: Run, stage: StageRun, judging: Judging | None) -> dict[str, Any]:
    counts, made, left_out = stage.counts, [], Counter()
    kept = counts.get("candidates")
    if judging:  # its statistics have a section of their own
        made.append(("pairs of answers", judging.statistics["pairs"]))
        counts = {key: judging.preferences.get(key) for key in ("train", "validation", *LEFT_OUT)}
    _add(run, made, left_out, "", counts)
    if judging:
        kept = judging.statistics["pairs"] - left_out.total()
    bars = [Bar("kept", kept)] if is_number(kept) else []
    title = "Kept, and left out by reason" if bars else "Left out, by reason"
    bars += [Bar(words(reason), n, muted=True) for reason, n in left_out.most_common()]
    return {"run": stage, "made": made, "chart": bar_chart(title, bars, digits=None, axis=False)}


def _add(run: Run, made: list[tuple[str, float]], left_out: Counter, name: str, value: Any) -> None:
    """Sort what a stage counted, at any depth, into what it made and what it left out."""
    if is_number(value):
        made.append((name, value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in LEFT_OUT and isinstance(inner, dict):
                left_out.update({reason: n for reason, n in inner.items() if is_number(n) and n})
            else:
                inner_name = (f"{name}: " if name else "") + words(relative_path(key, run.directory))
                _add(run, made, left_out, name if key in UNNAMED else inner_name, inner)


# --- Single cases ----------------------------------------------------------------------------------------------------


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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The cards (README.md) of what is published: what it is, how to use it, how it was made and what it scores."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_text
from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.base.hub_ids import is_hub_id
from medst_trl.data.schema import KINDS, complete_shards, splits_in
from medst_trl.evaluation.metric import recorded_figures
from medst_trl.policy.chat_template import has_text_role, is_wrapped
from medst_trl.policy.families import family_of

from .contents import Contents, base_model_of, find_contents
from .provenance import hub_id_text, read_merged, steps_to


KIND = "medst_trl_kind"  # in a card's metadata: shows that a repository is ours, and what it holds

_URL = re.compile(r"https?://[\w./?&=#%~+:-]+")


def dataset_card(contents: Contents, repo_id: str, *, license: str | None = None, run: Path | None = None) -> str:
    """
    The README.md of a dataset.

    Args:
        contents ([`Contents`]): The dataset.
        repo_id (`str`): Its repository.
        license (`str`, *optional*): Identifier of its licence on the Hub. Synthetic images have the source's.
        run (`Path`, *optional*): The run directory, in which inputs that have moved are searched.
    """
    sources = _sources(contents, run)
    licences = {source.get("licence") if source.get("synthetic") else None for source in sources}
    if license is None and len(licences) == 1 and (name := licences.pop()):
        license = name.lower().replace(" ", "-")  # as the Hub spells it: cc-by-4.0
    splits = [_split(contents.directory, name) for name in splits_in(contents.directory)]
    files = [{"split": split["name"], "path": f"{split['name']}-*.parquet"} for split in splits]
    columns = pq.read_schema(contents.directory / contents.files[0]).names
    data = DatasetCardData(
        license=license,
        pretty_name=_title(repo_id),
        size_categories=[_size(sum(split["rows"] for split in splits))],
        task_categories=["visual-question-answering"] if contents.kind != "images" else None,
        tags=["medst_trl", "medical", "trl", *(["preference", "dpo"] if "chosen" in columns else [])],
        configs=[{"config_name": "default", "data_files": files}],
        **{KIND: contents.kind},
    )
    return _render(
        "dataset.md",
        data,
        kind=KINDS.get(contents.kind),
        repo_id=repo_id,
        has_references=any(name.startswith(REFERENCE_FOLDER) for name in contents.files),
        splits=splits,
        columns=columns,
        sources=sources,
        steps=steps_to(contents.directory, run),
    )


def model_card(
    contents: Contents,
    repo_id: str,
    *,
    base_model: str | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
    license: str | None = None,
    run: Path | None = None,
) -> str:
    """
    The README.md of an adapter or a model.

    Args:
        contents ([`Contents`]): The adapter or model.
        repo_id (`str`): Its repository.
        base_model (`str`, *optional*): Hub id of the base of an adapter or of a merged model.
        evaluations (sequence of `str` or `os.PathLike`): Directories with `scores.json`.
        license, run: As in [`dataset_card`].
    """
    results = [result for place in evaluations for result in read_results(Path(place), contents.directory)]
    steps, merged = steps_to(contents.directory, run), read_merged(contents.directory)
    base_model = base_model or (merged["base"] if merged else None)
    data = ModelCardData(
        license=license,
        library_name="peft" if contents.kind == "adapter" else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model.partition("@")[0] if is_hub_id(base_model) else None,
        tags=["medst_trl", "medical", "trl", "self-questioning", *(step.stage for step in steps[-1:])],
        model_name=repo_id.rpartition("/")[2],
        eval_results=[score for result in results for score in result.for_hub] or None,
        **{KIND: contents.kind},
    )
    return _render(
        "model.md",
        data,
        kind=contents.kind,
        repo_id=repo_id,
        base_model=base_model,
        merged=merged,
        is_plain=is_plain(contents),
        results=results,
        sources=_sources(contents, run),
        steps=steps,
    )


def write_card(directory: str | Path) -> None:
    """Write the model card of a stage's output. It replaces those of PEFT and TRL, which are for text models."""
    card = model_card(find_contents(Path(directory)), str(directory), base_model=base_model_of(Path(directory)))
    write_text(Path(directory) / "README.md", card)


def is_plain(contents: Contents) -> bool:
    """Whether a model loads and asks questions without medst_trl: its template opens the turn that it writes."""
    template = contents.directory / "chat_template.jinja"
    if contents.kind != "model" or not template.is_file():
        return False
    model_type = json.loads((contents.directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    text = template.read_text(encoding="utf-8")
    return (is_wrapped(text) or has_text_role(text)) and not family_of(model_type).is_own


def _render(template: str, data: CardData, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("medst_trl.hub", "cards"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # it is Markdown
    )
    environment.filters |= {"cell": _cell, "flat": _flat, "hub_id": hub_id_text, "link": _link}
    values |= {"title": _title(values["repo_id"]), "license": data.license}
    return environment.get_template(template).render(card_data=data.to_yaml(), **values)


def _sources(contents: Contents, run: Path | None) -> list[dict[str, Any]]:
    """What the sources of the data say about themselves, each once."""
    cards = (step.source for step in steps_to(contents.directory, run) if step.source)
    return list({card["title"]: card for card in cards}.values())


def _split(directory: Path, split: str) -> dict[str, Any]:
    shards = complete_shards(directory, split)
    column = next(name for name in ("image_ids", "image_id") if name in pq.read_schema(shards[0]).names)
    ids = pq.read_table(shards, columns=[column], partitioning=None)[column]
    images = pc.count_distinct(pc.list_flatten(ids) if column == "image_ids" else ids).as_py()
    return {"name": split, "rows": len(ids), "images": images}


def _size(rows: int) -> str:
    limits = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))
    return next((name for name, limit in limits if rows < limit), "10M<n<100M")


def _title(repo_id: str) -> str:
    return repo_id.rpartition("/")[2].replace("_", " ").replace("-", " ")


def _flat(counts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested counts as rows of a table. Floats are rounded to four digits."""
    rows = []
    for name, value in counts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name} / ")
        elif isinstance(value, int | float | str):
            rows.append((f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else value))
    return rows


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table. What data says can neither break the table nor become markup."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return text.replace("[", "&#91;").replace("`", "&#96;")


def _link(text: str, url: str | None) -> str:
    return f"[{_cell(text)}]({url})" if url and _URL.fullmatch(url) else _cell(text)


@dataclass(frozen=True)
class Results:
    """
    One `scores.json`, as a model card shows it.

    Attributes:
        name (`str`): Hub id of the benchmark, or its source; never a path.
        model (`str`): Name or directory of the model that was evaluated; empty if it is not recorded.
        questions (`int`), images (`int`): Size of the benchmark.
        controls (`list[str]`): Names of the controls.
        rows (`list[list[str]]`):
            Rows of the card's table: metric, figure, value with its interval, n, majority, one column per control.
        for_hub (`list[EvalResult]`): The scores in the form that the Hub shows beside a model card.
    """

    name: str
    model: str
    questions: int
    images: int
    controls: list[str]
    rows: list[list[str]]
    for_hub: list[EvalResult]


def read_results(directory: Path, model: Path) -> list[Results]:
    """
    Read the scores in an output directory of `medst evaluate`, which has subdirectories for several benchmarks.

    Args:
        directory (`Path`): Where the scores are.
        model (`Path`): Directory of the model that must have been evaluated, if the scores name one that exists.

    Raises:
        UserError: if there are no scores, they cannot be read, or another model was evaluated.
    """
    paths = sorted(directory.glob("scores.json")) or sorted(directory.glob("*/scores.json"))
    if not paths:
        raise UserError(f"{directory} has no scores.json. Give an output directory of `medst evaluate`.")
    results = []
    for path in paths:
        try:
            result = _results(json.loads(path.read_text(encoding="utf-8")), path)
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise UserError(f"{path} was not written by `medst evaluate`. Evaluate again, or leave it out.") from None
        evaluated = Path(result.model)
        if result.model and evaluated.exists() and not _is_model(evaluated, model):
            raise UserError(f"{path} has the scores of {evaluated}, not of {model}. Leave it out, or push that model.")
        results.append(result)
    return results


def _results(content: Mapping[str, Any], path: Path) -> Results:
    first, controls = next(iter(content["scores"].values())), content.get("controls") or {}
    name, split = _benchmark_name(content.get("benchmark") or "", path), content.get("split") or "test"
    rows, for_hub = [], []
    for figure in recorded_figures(content):
        leaf = _leaf(content["scores"], figure)
        if not figure["in_card"] or leaf.get("value") is None:
            continue
        metric, label, interval = figure["metric"], figure["label"].replace(": ", " "), leaf.get("interval")
        value = _number(leaf["value"]) + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")
        others = (leaf.get("majority"), *(_leaf(scores, figure).get("value") for scores in controls.values()))
        rows.append([metric, label, value, str(leaf.get("n", "")), *map(_number, others)])
        for_hub.append(
            EvalResult(
                task_type="visual-question-answering",
                dataset_type=name,
                dataset_name=name,
                dataset_split=split,
                metric_type=figure["path"][-1],
                metric_name=f"{metric} {label}",
                metric_value=round(leaf["value"], 2),
            )
        )
    model = content.get("model") or ""
    return Results(name, model, first["n"], first["n_images"], list(controls), rows, for_hub)


def _is_model(evaluated: Path, model: Path) -> bool:
    """Whether the evaluated model is this one, or the adapter that was merged into it: their answers are the same."""
    adapter = Path((read_merged(model) or {}).get("adapter_path") or model)
    return evaluated.samefile(model) or (adapter.exists() and evaluated.samefile(adapter))


def _benchmark_name(benchmark: str, path: Path) -> str:
    """The Hub id, the source that the benchmark's record names, or else the directory of the scores."""
    if is_hub_id(benchmark):
        return benchmark.partition("@")[0]
    sources = [step.settings.get("source") for step in (steps_to(Path(benchmark)) if benchmark else [])]
    if sources and sources[-1]:
        return sources[-1]
    return "benchmark" if path.parent.name == "evaluate" else path.parent.name


def _leaf(scores: Mapping[str, Any], figure: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a figure; empty if the scores do not have it."""
    found = scores.get(figure["metric"])
    for key in figure["path"]:
        found = (found or {}).get(key)
    return found or {}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

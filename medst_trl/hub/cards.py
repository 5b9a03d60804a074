# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The cards (README.md) of what is published: what it is, how to use it, how it was made and what it scores."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from medst_trl.base.errors import UserError, number_of
from medst_trl.base.files import write_text
from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.base.hub_ids import is_hub_id, looks_local
from medst_trl.base.redaction import hide_secrets, is_private_key
from medst_trl.data.loading import split_files, splits_in
from medst_trl.data.schema import KINDS
from medst_trl.data.source import SOURCES
from medst_trl.evaluation.contamination import CONTAMINATION_FILE, EXPLANATION, Contamination
from medst_trl.evaluation.scores_file import ScoresFile, score_files, tenths
from medst_trl.pipeline.lineage import TRAINING_IMAGES_FILE, nearest_record, records_of
from medst_trl.pipeline.stage import STAGES
from medst_trl.policy.chat_template import saved_role
from medst_trl.policy.families import family_of

from .contents import Contents, base_model_of, find_contents, with_revision


KIND = "medst_trl_kind"  # in a card's metadata: shows that a repository is ours, and what it holds

_URL = re.compile(r"https?://[\w./?&=#%~+:-]+")


def dataset_card(contents: Contents, repo_id: str, *, license: str | None = None) -> str:
    """
    Write the README.md of a dataset.

    Args:
        contents ([`Contents`]): The dataset.
        repo_id (`str`): Its repository.
        license (`str`, *optional*): Identifier of its license on the Hub. Synthetic images have the source's.
    """
    steps = steps_to(contents.directory)
    sources = _sources(steps)
    licenses = {source.get("licence") if source.get("synthetic") else None for source in sources}
    if license is None and len(licenses) == 1 and (name := licenses.pop()):
        license = name.lower().replace(" ", "-")  # as the Hub spells it: cc-by-4.0
    splits = [_split(contents.directory, name) for name in splits_in(contents.directory)]
    files = [{"split": split["name"], "path": split["path"]} for split in splits]
    columns = pq.read_schema(contents.directory / contents.files[0]).names
    data = DatasetCardData(
        license=license,
        pretty_name=_title(repo_id),
        task_categories=["visual-question-answering"] if contents.kind != "images" else None,
        tags=["medst_trl", "medical", "trl", *(["preference", "dpo"] if "chosen" in columns else [])],
        configs=[{"config_name": "default", "data_files": files}],
        **{KIND: contents.kind},
    )
    references = any(name.startswith(REFERENCE_FOLDER) for name in contents.files)
    values = {"kind": KINDS.get(contents.kind), "splits": splits, "columns": columns, "has_references": references}
    return _render("dataset.md", data, repo_id, steps, values)


def model_card(
    contents: Contents,
    repo_id: str,
    *,
    base_model: str | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
    license: str | None = None,
) -> str:
    """
    Write the README.md of an adapter or a model.

    Args:
        contents ([`Contents`]): The adapter or model.
        repo_id (`str`): Its repository.
        base_model (`str`, *optional*): Hub id of the base of an adapter or of a merged model.
        evaluations (sequence of `str` or `os.PathLike`): Directories with `scores.json`.
        license (`str`, *optional*): As in [`dataset_card`].
    """
    results = [result for place in evaluations for result in read_results(Path(place), contents.directory)]
    steps, merged = steps_to(contents.directory), read_merged(contents.directory)
    base_model = base_model or (merged["base"] if merged else None)
    # Of a contaminated benchmark, scores are shown with a warning, which the metadata cannot hold.
    clean = [(name, file) for name, file, contamination in results if not contamination.is_contaminated]
    data = ModelCardData(
        license=license,
        library_name="peft" if contents.kind == "adapter" else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model.partition("@")[0] if is_hub_id(base_model) else None,
        tags=["medst_trl", "medical", "trl", "self-questioning", *(step["stage"] for step in steps[-1:])],
        model_name=repo_id.rpartition("/")[2],
        eval_results=[score for name, file in clean for score in _for_hub(name, file)] or None,
        **{KIND: contents.kind},
    )
    values = {
        "kind": contents.kind,
        "base_model": base_model,
        "merged": merged,
        "results": results,
        "is_plain": is_plain(contents),
        "has_training_images": TRAINING_IMAGES_FILE in contents.files,
    }
    return _render("model.md", data, repo_id, steps, values)


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
    return saved_role(text) is not None and not family_of(model_type).is_own


def _render(template: str, data: CardData, repo_id: str, steps: list[dict[str, Any]], values: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("medst_trl.hub", "cards"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # it is Markdown
    )
    environment.globals |= {"describe": _describe, "explanation": EXPLANATION, "number_of": number_of}
    environment.filters |= {"cell": _cell, "flat": _flat, "hub_id": hub_id_text, "link": _link, "tenths": tenths}
    values |= {"repo_id": repo_id, "title": _title(repo_id), "license": data.license, "card_data": data.to_yaml()}
    return environment.get_template(template).render(steps=steps, sources=_sources(steps), **values)


def _sources(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the sources of the data say about themselves, each once."""
    return list({step["source"]["title"]: step["source"] for step in steps if step["source"]}.values())


def _split(directory: Path, split: str) -> dict[str, Any]:
    shards = split_files(directory, split)
    rows = sum(pq.read_metadata(shard).num_rows for shard in shards)
    column = next((name for name in ("image_ids", "image_id") if name in pq.read_schema(shards[0]).names), None)
    patterns = sorted({re.sub(r"-\d{5}-of-\d{5}\.", "-*.", shard.name) for shard in shards})
    images = None
    if column is not None:  # a dataset in TRL's own format has none
        ids = pq.read_table(shards, columns=[column], partitioning=None)[column]
        images = pc.count_distinct(pc.list_flatten(ids) if column == "image_ids" else ids).as_py()
    return {"name": split, "rows": rows, "path": patterns[0] if len(patterns) == 1 else patterns, "images": images}


def _title(repo_id: str) -> str:
    return repo_id.rpartition("/")[2].replace("_", " ").replace("-", " ")


def _flat(counts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested counts as rows of a table. Floats are rounded to four digits."""
    for name, value in counts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        elif isinstance(value, int | float | str):
            yield f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else value


def _cell(value: Any) -> str:
    """Return the text for a cell of a Markdown table. Data can neither break the table nor become markup."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return text.replace("[", "&#91;").replace("`", "&#96;")


def _link(text: str, url: str | None) -> str:
    return f"[{_cell(text)}]({url})" if url and _URL.fullmatch(url) else _cell(text)


def read_results(directory: Path, model: Path) -> Iterator[tuple[str, ScoresFile, Contamination]]:
    """
    Read the scores in an output directory of `medst evaluate`, which has subdirectories for several benchmarks.

    Args:
        directory (`Path`): Where the scores are.
        model (`Path`): Directory of the model that must have been evaluated, if the scores name one that exists.

    Yields:
        `tuple`: for each `scores.json`, the name of the benchmark (its Hub id or source, never a path), the scores,
        and what the benchmark shares with training data.

    Raises:
        UserError: if there are no scores, a file has another form, or another model was evaluated.
    """
    if not (paths := score_files(directory)):
        raise UserError(f"{directory} has no scores.json. Give an output directory of `medst evaluate`.")
    for path in paths:
        file = ScoresFile.read(path)
        evaluated = Path(name) if (name := file.content.get("model")) else None
        if evaluated and evaluated.exists() and not _is_model(evaluated, model):
            raise UserError(f"{path} has the scores of {evaluated}, not of {model}. Leave it out, or push that model.")
        contamination = Contamination.read(path.with_name(CONTAMINATION_FILE)) or Contamination()
        yield _benchmark_name(file.content.get("benchmark") or "", path), file, contamination


def _for_hub(name: str, file: ScoresFile) -> list[EvalResult]:
    """Return the scores in the form that the Hub shows beside a model card."""
    return [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=name,
            dataset_name=name,
            dataset_split=file.content.get("split") or "test",
            metric_type=path[-1],
            metric_name=f"{metric} {label}",
            metric_value=round(leaf["value"], 2),
        )
        for metric, path, label, leaf in file.for_card()
    ]


def _is_model(evaluated: Path, model: Path) -> bool:
    """Whether the evaluated model is this one, or the adapter that was merged into it: their answers are the same."""
    adapter = Path((read_merged(model) or {}).get("adapter_path") or model)
    return evaluated.samefile(model) or (adapter.exists() and evaluated.samefile(adapter))


def _benchmark_name(benchmark: str, path: Path) -> str:
    """Return the Hub id, the source that the benchmark's record names, or else the directory of the scores."""
    if is_hub_id(benchmark):
        return benchmark.partition("@")[0]
    steps = steps_to(Path(benchmark)) if benchmark else []
    return (steps[-1]["settings"].get("source") if steps else None) or path.parent.name


# How a result was made, from the `stage.json` of its directory and of the directories of its inputs


def steps_to(directory: Path) -> list[dict[str, Any]]:
    """
    Return the stages that led to a result, in pipeline order, as far as their directories still exist.

    Args:
        directory (`Path`): Output of a stage, or a dataset inside it.

    Returns:
        `list[dict]`: for each stage what can be published, without paths, file names and secrets: its name (`stage`),
        its `settings`, `counts` (with its metrics) and `versions`, what it read (`inputs`: name to a Hub id with its
        revision, or a local directory by its SHA-256), and the `source` of that data, the fields of a
        [`~medst_trl.data.source.SourceCard`] or None.
    """
    steps = []
    for record in records_of(directory).values():
        # One that is damaged, or of another program: the card says less.
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            inputs = {name: sources for name, sources in record["inputs"].items() if name != "group_salt"}
            steps.append({
                "stage": record["stage"],
                "settings": _public_settings(record["stage"], record.get("settings", {}), inputs),
                "inputs": {name: ", ".join(map(_describe, sources)) for name, sources in inputs.items() if sources},
                "counts": record.get("counts", {}) | record.get("metrics", {}),
                "source": _source_card(record),
                "versions": {name: version for name, version in record.get("versions", {}).items() if version},
            })  # fmt: skip
    return steps


def _public_settings(stage: str, settings: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the settings to publish, without paths and secrets. Of a stage that is not registered, only numbers."""
    if stage in STAGES:
        shown = STAGES.get(stage).shown_settings(settings)
    else:
        shown = {name: value for name, value in settings.items() if isinstance(value, int | float)}
    public = {}
    for name, value in shown.items():
        items = [str(item) for item in (value if isinstance(value, list) else [value])]
        if name not in inputs and not is_private_key(name) and not any(map(looks_local, items)):
            public[name] = hide_secrets(", ".join(items))
    return public


def _source_card(record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the card in the record, or that of the registered source if an earlier version wrote the record."""
    card, name = record.get("source_card"), record.get("settings", {}).get("source")
    if card is None and name in SOURCES:
        card = asdict(SOURCES.get(name).card)
    return card if isinstance(card, dict) and isinstance(card.get("title"), str) else None


def _describe(source: dict[str, Any]) -> str:
    if "hub_id" in source:
        return f"{source['hub_id']} at {source.get('revision') or 'an unknown revision'}"
    return f"a local directory or file (SHA-256 {str(source.get('sha256', source.get('used_sha256')))[:12]})"


def read_merged(directory: Path) -> dict[str, Any] | None:
    """
    Read what the record of `medst merge` says.

    Args:
        directory (`Path`): A model.

    Returns:
        `dict` or `None`: `base`, the Hub id of the base with its revision, None for a local one; `adapter` as
        Markdown; `adapter_path`, which no card shows; `dtype` of the weights; `float32_difference` and
        `stored_difference`, the largest differences of log-probabilities from the adapter's; `trained_in_4bit`,
        whether the adapter's base was quantized to 4 bits while it was trained. None if the model was not made by
        `medst merge` or its record is missing.
    """
    _, record = nearest_record(directory)
    try:
        merged, (adapter,) = record["merged"], record["inputs"]["model_name_or_path"]
        base, facts = merged["base"], merged | merged["proof"]
        shown = {name: facts[name] for name in ("dtype", "float32_difference", "stored_difference", "trained_in_4bit")}
        return shown | {
            "base": with_revision(base, merged["base_revision"]) if is_hub_id(base) else None,
            "adapter": hub_id_text(adapter["hub_id"], merged["adapter_revision"])
            if "hub_id" in adapter
            else f"a local adapter (SHA-256 {str(adapter.get('sha256'))[:12]})",
            "adapter_path": adapter.get("path"),
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def hub_id_text(hub_id: str, revision: str | None = None) -> str:
    """Return a Hub id as Markdown, with the revision that it carries or that is given."""
    name, _, own = hub_id.partition("@")
    revision = revision or own
    return f"`{name}`" + (f" (revision {revision[:12]})" if revision else "")

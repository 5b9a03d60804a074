# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The cards (README.md) of what is published: what it is, how it is used, how it was made, what it scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.data.schema import KINDS, complete_shards, splits_in
from medst_trl.data.source import SOURCES, SourceCard

from .card_texts import ABOUT
from .contents import Contents
from .merged import is_plain, merged_from, named
from .provenance import Step, looks_local, steps_to
from .results import Results, eval_results, read_results


TEMPLATES = Path(__file__).parent / "cards"
KIND = "medst_trl_kind"  # in a card's metadata; says that a repository is ours, and what is in it


def dataset_card(contents: Contents, repo_id: str, *, license: str | None = None, run: Path | None = None) -> str:
    """The README.md of a dataset."""
    from huggingface_hub import DatasetCardData

    steps, card = steps_to(contents.folder, run), KINDS.get(contents.kind).card
    splits = [_split(contents.folder, split) for split in splits_in(contents.folder)]
    rows = sum(split["rows"] for split in splits)
    license = license or _own_license(steps)
    data = DatasetCardData(
        license=license,
        pretty_name=_title(repo_id),
        size_categories=[_size(rows)],
        task_categories=["visual-question-answering"] if contents.kind != "images" else None,
        tags=["medst_trl", "medical", "trl", *(["preference", "dpo"] if contents.kind == "preferences" else [])],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split["name"], "path": f"{split['name']}-*.parquet"} for split in splits],
            }
        ],
        **{KIND: contents.kind},
    )
    return _render(
        "dataset",
        data,
        kind=contents.kind,
        title=_title(repo_id),
        about=card.about,
        use=card.use.format(id=repo_id),
        repo_id=repo_id,
        has_references=any(name.startswith(REFERENCE_FOLDER) for name in contents.files),
        splits=splits,
        columns=[(name, card.columns.get(name, "")) for name in _columns(contents)],
        sources=_sources(steps),
        licence=_licence(license),
        **_history(steps),
    )


def model_card(
    contents: Contents,
    repo_id: str,
    *,
    base_model: str | None = None,
    evaluations: Sequence[Path] = (),
    license: str | None = None,
    run: Path | None = None,
) -> str:
    """
    The README.md of an adapter or a model.

    Args:
        base_model (`str`, *optional*): Hub id of the base of an adapter, or of what was merged.
        evaluations: Folders with `scores.json`.
    """
    from huggingface_hub import ModelCardData

    results = [result for folder in evaluations for result in read_results(folder, contents.folder)]
    steps = steps_to(contents.folder, run)
    adapter = contents.kind == "adapter"
    merged = merged_from(contents.folder)
    base_model = base_model or (merged.base if merged else None)
    data = ModelCardData(
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model.partition("@")[0] if base_model and not looks_local(base_model) else None,
        tags=["medst_trl", "medical", "trl", "self-questioning", *(step.stage for step in steps[-1:])],
        model_name=repo_id.rpartition("/")[2],
        eval_results=eval_results(results) or None,
        **{KIND: contents.kind},
    )
    return _render(
        "model",
        data,
        kind=contents.kind,
        title=_title(repo_id),
        about=ABOUT[contents.kind],
        repo_id=repo_id,
        base_model=base_model,
        merged=merged,
        base_text=named(base_model, None) if base_model else merged and merged.base_text,
        is_plain=is_plain(contents),
        results=[_tables(result) for result in results],
        sources=_sources(steps),
        licence=_licence(license, base_model),
        **_history(steps),
    )


def write_card(folder: str | Path) -> None:
    """The model card of a run's folder, in the place of the one that PEFT and TRL leave there (for a text model)."""
    import os

    from .contents import find_contents
    from .staging import base_of

    folder = Path(folder)
    card = model_card(find_contents(folder), str(folder), base_model=base_of(folder))
    temporary = folder / ".README.md.tmp"
    temporary.write_text(card, encoding="utf-8")
    os.replace(temporary, folder / "README.md")


def _render(template: str, data, **values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # Markdown
    source = (TEMPLATES / f"{template}.md").read_text(encoding="utf-8")
    return environment.from_string(source).render(card_data=data.to_yaml(), **values)


def _history(steps: list[Step]) -> dict[str, Any]:
    return {
        "steps": [
            {
                "stage": step.stage,
                "inputs": [(_cell(name), _cell(value)) for name, value in step.inputs.items()],
                "settings": [(_cell(name), _cell(value)) for name, value in step.settings.items()],
                "counts": [(_cell(name), _cell(value)) for name, value in _flat(step.counts | step.metrics)],
            }
            for step in steps
        ],
        "versions": ", ".join(f"{name} {version}" for name, version in steps[-1].versions.items()) if steps else "",
    }


def _flat(counts: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Nested counts as lines; long numbers lose the digits that mean nothing."""
    lines = []
    for name, value in counts.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{above}{name} / ")
        elif isinstance(value, float):
            lines.append((f"{above}{name}", f"{value:.4g}"))
        elif isinstance(value, int | str):
            lines.append((f"{above}{name}", value))
    return lines


def _cell(value: Any) -> str:
    """A text in a table of Markdown: what data says can neither break the table nor become markup."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return text.replace("[", "&#91;").replace("`", "&#96;")


def _split(folder: Path, split: str) -> dict[str, Any]:
    import pyarrow.parquet as pq

    rows, images = 0, set()
    for shard in complete_shards(folder, split):
        file = pq.ParquetFile(shard)
        rows += file.metadata.num_rows
        for column in {"image_id", "image_ids"} & set(file.schema_arrow.names):
            for value in file.read(columns=[column])[column].to_pylist():
                images.update([value] if isinstance(value, str) else value)
    return {"name": split, "rows": rows, "images": len(images)}


def _columns(contents: Contents) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_schema(contents.folder / contents.files[0]).names


def _title(repo_id: str) -> str:
    return repo_id.rpartition("/")[2].replace("_", " ").replace("-", " ")


def _size(rows: int) -> str:
    limits = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))
    return next((name for name, limit in limits if rows < limit), "10M<n<100M")


def _source_cards(steps: list[Step]) -> list[SourceCard]:
    names = dict.fromkeys(step.settings["source"] for step in steps if step.settings.get("source") in SOURCES)
    return [SOURCES.get(name).card for name in names]


def _sources(steps: list[Step]) -> str:
    cards = _source_cards(steps)
    if not cards:
        return "The records do not say where the images come from."
    return "\n".join(f"- {_source_text(card)}" for card in cards)


def _source_text(card: SourceCard) -> str:
    parts = [f"[{card.title}]({card.homepage})" if card.homepage else card.title]
    if card.licence:
        parts.append(f"licence: {card.licence}")
    if card.citation:
        parts.append(f"please cite {card.citation}")
    return "; ".join(parts)


def _own_license(steps: list[Step]) -> str | None:
    """The licence of data of which nothing belongs to others: drawn by one synthetic source."""
    cards = _source_cards(steps)
    return cards[0].licence if len(cards) == 1 and cards[0].synthetic else None


def _licence(license: str | None, base_model: str | None = None) -> str:
    own = f"Licence: {license}." if license else "No licence was stated for this repository."
    base = f" The base model {base_model} has a licence of its own." if base_model else ""
    return f"{own}{base} Images and labels keep the licences of their sources, which bind whoever uses them."


def _tables(result: Results) -> dict[str, Any]:
    return {
        "title": _cell(result.name),
        "questions": result.questions,
        "images": result.images,
        "controls": [_cell(name) for name in result.controls],
        "rows": [[_cell(cell) for cell in row] for row in result.rows()],
    }

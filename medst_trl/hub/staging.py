# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of a push as they are uploaded: links to the originals, and copies of the few that name this machine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from medst_trl.base.errors import UserError
from medst_trl.base.fingerprints import split_revision

from .contents import Contents
from .provenance import looks_local


JSON_COLUMNS = ("generation", "judge")  # texts that may name a model by its folder
PLACE_KEYS = ("name_or_path", "_name_or_path")  # where transformers notes what a file was loaded from


def stage_files(contents: Contents, target: Path, card: str, base_model: str | None = None) -> None:
    """
    Fill an empty folder with what is to be uploaded.

    Args:
        contents ([`Contents`]): What is published. Its files are not changed.
        target (`Path`): The folder.
        card (`str`): README.md.
        base_model (`str`, *optional*): Hub id for an adapter's base, in the place of a local folder.
    """
    for name in contents.files:
        source, path = contents.folder / name, target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "adapter_config.json":
            _write_json(path, _with_base(json.loads(source.read_text(encoding="utf-8")), base_model))
        elif name.endswith("config.json"):
            _write_without_places(source, path)
        elif not (name.endswith(".parquet") and _write_without_local_models(source, path)):
            path.symlink_to(source.resolve())
    (target / "README.md").write_text(card, encoding="utf-8")


def base_of(folder: Path) -> str | None:
    """The base that an adapter names, with its revision (`org/name@revision`) where it has one."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{base}@{revision}" if base and revision else base


def public_base(folder: Path, given: str | None) -> str | None:
    """
    The Hub id of an adapter's base: the one given, or the adapter's own.

    Raises:
        UserError: if the base is a local folder, which nobody else could load.
    """
    base = given or base_of(folder)
    if base is None:
        return None
    if looks_local(base) or Path(base).exists() or base.count("/") != 1:
        raise UserError(
            f"The adapter in {folder} is one of {base}, a local model that nobody else can load. Push that first "
            f"(`medst push --source {base} --repo_id ORG/BASE`), then say so with --base_model_name_or_path ORG/BASE."
        )
    return base


def _with_base(config: dict, base_model: str | None) -> dict:
    if base_model is not None:
        config["base_model_name_or_path"], config["revision"] = split_revision(base_model)
    return config


def _write_without_places(source: Path, path: Path) -> None:
    """A copy only where something has to go, so that files stay what they are byte for byte."""
    config = json.loads(source.read_text(encoding="utf-8"))
    kept = _without_places(config)
    if kept == config:
        path.symlink_to(source.resolve())
    else:
        _write_json(path, kept)


def _without_places(config):
    if isinstance(config, dict):
        return {
            key: _without_places(value)
            for key, value in config.items()
            if not (key in PLACE_KEYS and isinstance(value, str) and looks_local(value))
        }
    return [_without_places(item) for item in config] if isinstance(config, list) else config


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_without_local_models(source: Path, path: Path) -> bool:
    """Whether a shard named local models; then `path` is a copy that calls them by their last names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(source)
    names = [name for name in JSON_COLUMNS if name in file.schema_arrow.names]
    columns = {name: file.read(columns=[name])[name].to_pylist() for name in names}
    public = {name: [_public_model(text) for text in texts] for name, texts in columns.items()}
    if public == columns:
        return False
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for start, table in _row_groups(file):
            for name in names:
                place = table.schema.get_field_index(name)
                texts = pa.array(public[name][start : start + len(table)], table.schema.field(name).type)
                table = table.set_column(place, table.schema.field(name), texts)
            writer.write_table(table)
    return True


def _row_groups(file) -> Iterator[tuple[int, "object"]]:
    """Where each begins, and its table: the images of all would not fit into memory."""
    start = 0
    for number in range(file.num_row_groups):
        table = file.read_row_group(number)
        yield start, table
        start += len(table)


def _public_model(text: str | None) -> str | None:
    try:
        content = json.loads(text or "")
    except ValueError:
        return text
    if not isinstance(content, dict) or not isinstance(content.get("model"), str):
        return text
    model = content["model"]
    if not (looks_local(model) or os.path.exists(model)):
        return text
    return json.dumps(content | {"model": Path(model).name}, ensure_ascii=False)

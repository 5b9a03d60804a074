# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of recipes: packaged ones and your own, and how YAML is read."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from medst_trl.base.errors import UserError, closest

from .options import refuse_secrets


RECIPES = Path(__file__).parents[1] / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """The files of the packaged recipes, by name."""
    return _files_by_name(RECIPES)


def find_recipe(source: str | os.PathLike) -> Path:
    """Find the file of a recipe; see [`find_yaml`]."""
    return find_yaml(source, RECIPES, "recipe")


def find_yaml(source: str | os.PathLike, directory: Path, kind: str) -> Path:
    """
    Find a YAML file by its path or, for a packaged one in `directory`, by its name.

    Raises:
        UserError: if there is no such file.
    """
    packaged = _files_by_name(directory)
    path = Path(source)
    path = path if path.is_file() else packaged.get(str(source), path)
    if not path.is_file():
        near = closest(path.stem, packaged)
        raise UserError(f"{source}: no such file or packaged {kind}.{near} Choose one of {', '.join(packaged)}.")
    return path


def _files_by_name(directory: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}


def summary(path: Path) -> str:
    """The first line of the comment at the top of a recipe."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!"))
    first = next(lines, "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Read a mapping from YAML 1.2, in which `1e-4` is a number and `no` is text.

    Raises:
        UserError: if it is not YAML, is not a mapping, or has a key twice or one that holds a secret.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings of the form `key: value`, found {content!s:.60}.")
    return content


class _Loader(yaml.SafeLoader):
    """Loader for YAML 1.2. In PyYAML's 1.1, `1e-4` is text, `eval_strategy: no` is False, and 1:30 is 90."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        refuse_secrets(keys)
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
        return super().construct_mapping(node, deep)


_RESOLVED = {
    "tag:yaml.org,2002:bool": r"(true|True|TRUE|false|False|FALSE)\Z",
    "tag:yaml.org,2002:int": r"([-+]?[0-9]+|0x[0-9a-fA-F]+)\Z",
    "tag:yaml.org,2002:float": r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)\Z",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_RESOLVED, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _RESOLVED.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), None)

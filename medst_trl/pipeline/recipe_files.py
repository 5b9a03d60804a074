# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes as files: where they are, what they say of themselves, and YAML as it is meant."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from medst_trl.base.errors import UserError, closest


def recipes_folder() -> Path:
    """The recipes that come with the package: inside it once installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """Name to file."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(source: str | os.PathLike) -> Path:
    """
    Resolve a path, or the bare name of a packaged recipe.

    Raises:
        UserError: if it is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    packaged = packaged_recipes()
    if str(source) in packaged:
        return packaged[str(source)]
    raise UserError(
        f"{source}: no such file, nor a recipe of that name.{closest(path.stem, packaged)} See `medst recipes ls`."
    )


def summary(path: Path) -> str:
    """The first line of the comment that opens a recipe."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#!"):
            continue
        return line.removeprefix("#").strip() if line.startswith("#") else ""
    return ""


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Read a mapping from YAML, with `1e-4` as a number and `no` as a word.

    Raises:
        UserError: if it is not YAML, not a mapping, or names a key twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings of the form `key: value`, found {content!s:.60}.")
    return content


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises: there `1e-4` is text, `eval_strategy: no` is False, and 1:30 is 90."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
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

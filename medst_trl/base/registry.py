# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Registries: all objects of one kind (sources, judge prompts, engines, families, metrics, losses, stages), by name.

An object registers itself when its module is imported:

```python
SOURCES.register(Source(name="my_hospital", summary="our own export", read=read_my_hospital))
```

Built-in modules are imported when a registry is first read. A user's own come from package entry points (group
`medst_trl.plugins`), from `--plugins FILE` and from the environment variable `MEDST_PLUGINS`, which every process of a
run inherits. They never come from a recipe: recipes come from strangers.
"""

import importlib.util
import os
import pkgutil
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from .errors import UserError, closest


_T = TypeVar("_T")

PLUGINS_VARIABLE = "MEDST_PLUGINS"  # paths of plugin files, joined by os.pathsep
PLUGINS_GROUP = "medst_trl.plugins"

_PACKAGE = "medst_trl"
_loading = _PACKAGE  # the package or plugin that is being imported
_plugins: dict[str, UserError | None] = {}  # the plugins imported so far, and the errors of those that failed


class Registry(Generic[_T]):
    """
    All objects of one kind. Iterating yields their names in listing order.

    Args:
        kind (`str`):
            The name of an object in messages, for example `"source"`.
        modules (sequence of `str`):
            Modules that register the built-in objects. For a package, all modules directly inside it are imported.
        parts (sequence of `str`):
            Attributes that every object must have.
        order (`Callable`, *optional*):
            Takes all objects and returns them in the order in which they are listed.
    """

    def __init__(
        self,
        kind: str,
        modules: Sequence[str],
        parts: Sequence[str],
        order: Callable[[Sequence[_T]], Sequence[_T]] = list,
    ):
        self.kind, self.modules, self.parts, self.order = kind, modules, ("name", *parts), order
        self._objects: dict[str, _T] = {}
        self._origins: dict[str, str] = {}
        self._is_loaded = False

    def register(self, item: _T) -> _T:
        """
        Add an object and return it.

        Raises:
            UserError: if it lacks a part or another object has its name.
        """
        missing = [part for part in self.parts if getattr(item, part, None) is None]
        name = getattr(item, "name", None) or type(item).__name__
        if missing:
            raise UserError(f"The {self.kind} {name!r} of {_loading} lacks {', '.join(missing)}.")
        if name in self._objects:
            raise UserError(
                f"Two {self.kind} objects share the name {name!r}: one is from {self._origins[name]}, one from "
                f"{_loading}. Rename one of them."
            )
        if settings := item if isinstance(item, type) else getattr(item, "settings", None):
            settings._argument_group_name = f"settings of the {self.kind} {name}"  # read by HfArgumentParser
        self._objects[name], self._origins[name] = item, _loading
        return item

    def get(self, name: str) -> _T:
        """
        Return the object of that name.

        Raises:
            UserError: if it is unknown; the message lists the known names.
        """
        self._load()
        if name not in self._objects:
            raise UserError(
                f"Unknown {self.kind} {name!r}.{closest(str(name), self._objects)} Choose one of {', '.join(self)}, "
                "or load your own with --plugins."
            )
        return self._objects[name]

    def check(self, name: str) -> str:
        """Return `name` if it is registered; raise as [`get`] otherwise."""
        return self.get(name).name

    def built_in(self) -> list[str]:
        """Names of the objects that come with the package, in order."""
        return [name for name in self if self._origins[name] == _PACKAGE]

    def __iter__(self) -> Iterator[str]:
        return (item.name for item in self.values())

    def values(self) -> list[_T]:
        """All objects in listing order."""
        self._load()
        return list(self.order(list(self._objects.values())))

    def settings(self) -> list[type]:
        """The dataclasses with settings of the objects, without those of objects that have none."""
        return [item.settings for item in self.values() if item.settings is not None]

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True  # the modules may read the registry while they are imported
        try:
            for module in self.modules:
                package = import_module(module)
                for info in pkgutil.iter_modules(getattr(package, "__path__", ())):
                    import_module(f"{module}.{info.name}")
            load_plugins()
        except BaseException:
            self._is_loaded = False
            raise


def _plugin_files() -> list[str]:
    """Paths of the plugin files that this process and its children import."""
    return [path for path in os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep) if path]


def add_plugins(argv: Sequence[str]) -> list[str]:
    """
    Remove `--plugins FILE` from a command line, and make the files known to this process and its children.

    Returns:
        The rest of the command line.
    """
    parser = ArgumentParser("medst", add_help=False, allow_abbrev=False)
    parser.add_argument("--plugins", action="append", metavar="FILE", default=[])
    given, rest = parser.parse_known_args(argv)
    if files := [str(Path(path).resolve()) for path in given.plugins]:
        os.environ[PLUGINS_VARIABLE] = os.pathsep.join(dict.fromkeys([*_plugin_files(), *files]))
    return rest


def load_plugins() -> None:
    """
    Import every plugin once: entry points first, then files.

    Raises:
        UserError: if one fails to import, with its name and its own error.
    """
    for entry_point in entry_points(group=PLUGINS_GROUP):
        _load_plugin(entry_point.value, entry_point.load)
    for path in _plugin_files():
        _load_plugin(path, lambda path=path: _import_file(path))


def _load_plugin(name: str, load: Callable[[], object]) -> None:
    global _loading
    if name in _plugins:
        if _plugins[name] is not None:
            raise _plugins[name]
        return
    _plugins[name] = None
    before, _loading = _loading, name
    try:
        load()
    except Exception as error:
        own = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        _plugins[name] = UserError(f"The plugin {name} failed to import: {own}")
        raise _plugins[name] from error
    finally:
        _loading = before


def _import_file(path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file (set by --plugins or {PLUGINS_VARIABLE})")
    name = f"medst_trl_plugin_{sha256(path.encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that dataclasses and pickle find it
    spec.loader.exec_module(module)

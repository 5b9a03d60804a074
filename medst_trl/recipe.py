# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A recipe: one run in one YAML file, a section a stage.

```yaml
output_dir: runs/demo            # each stage writes to a folder of its own in here, such as runs/demo/sft
seed: 0                          # shared: every stage that knows the key takes it
prepare:
  source: phantoms
sft:                             # reads runs/demo/prepare/instruct, as nothing else is said
  accelerate_config: multi_gpu   # a name of medst_trl/accelerate_configs, or a path
  learning_rate: 1e-4
evaluate:                        # a list runs the stage once an item, into runs/demo/evaluate/<name>
  - name: benchmark
  - name: blank
    control: blank
```

Relative paths are relative to the current folder, as in TRL; neither `~` nor `$VARIABLES` in them are expanded. Of two
settings the more particular wins (an item or section over a shared one), and the command line over the file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medst_trl.arguments import closest, convert, keys_of, require
from medst_trl.errors import UserError
from medst_trl.options import Option, refuse_secrets
from medst_trl.recipe_files import find_recipe, read_yaml
from medst_trl.stages import STAGES, Stage


LAUNCH_KEYS = ("accelerate_config", "num_processes")  # shared or of a section; they are for the launcher
RECIPE_KEYS = ("output_dir", "env", *LAUNCH_KEYS)


@dataclass(frozen=True)
class Step:
    """
    One run of one stage, with everything it needs to be told.

    Args:
        stage ([`~medst_trl.stages.Stage`]):
            The stage.
        label (`str`):
            `"sft"`, or `"prepare/<name>"` where the section is a list.
        settings (`dict`):
            Its arguments, in the types that its parser declares.
        where (`str`):
            The file and section they come from, for messages.
        accelerate_config (`str`, *optional*):
            Name or path of the launcher's configuration, if one is asked for.
        num_processes (`int`, *optional*):
            Number of processes, if one is asked for.
    """

    stage: Stage
    label: str
    settings: dict[str, Any]
    where: str
    accelerate_config: str | None = None
    num_processes: int | None = None


class Recipe:
    """
    A recipe with the options of the command line laid over it. Made by [`read_recipe`].

    Args:
        path (`str`):
            Where it comes from, for messages.
        content (`dict`):
            What the file holds.
        options (sequence of [`~medst_trl.options.Option`], *optional*):
            Settings from the command line.
    """

    def __init__(self, path: str, content: Mapping[str, Any], options: Sequence[Option] = ()):
        self.path = path
        self.sections = {name: _items(path, name, content[name]) for name in STAGES if name in content}
        self.shared = {key: value for key, value in content.items() if key not in STAGES}
        self.options = options
        self._parsers = {}
        if not self.sections:
            raise UserError(
                f"{path}: a recipe needs a section for at least one stage ({', '.join(STAGES)}). "
                f"Settings of a single stage are for `medst <stage> --config {path}`."
            )
        for option in options:
            if option.target is not None and option.target not in self.labels:
                raise UserError(f"--{option.target}.{option.key}: {self._no_section(option.target)}")

    @property
    def labels(self) -> list[str]:
        """The sections, and their items where they are lists."""
        items = [f"{name}/{item['name']}" for name, items in self.sections.items() for item in items if "name" in item]
        return [*self.sections, *items]

    @cached_property
    def output_dir(self) -> str:
        """The folder of the run: from the command line, the recipe, or after the recipe's name."""
        given = self._given(None).get("output_dir") or self.shared.get("output_dir")
        return str(given or Path("runs", Path(self.path).stem))

    def steps(self, which: str | None = None, complete: bool = True) -> list[Step]:
        """
        What there is to run, in the order of the data's way, each step checked.

        Args:
            which (`str`, *optional*):
                A stage (`"prepare"`) or one item of it (`"prepare/slake"`). All by default.
            complete (`bool`, *optional*, defaults to `True`):
                Whether settings that a stage cannot do without have to be there.

        Raises:
            UserError: for a key or value in the recipe or on the command line that cannot be meant.
        """
        chosen = [
            (STAGES[name], item)
            for name, items in self.sections.items()
            for item in items
            if which in (None, name, _label(name, item))
        ]
        if not chosen:
            raise UserError(self._no_section(which))
        self._check_shared_keys(first=[stage.name for stage, _ in chosen])
        steps = [self._step(stage, item) for stage, item in chosen]
        for step in steps if complete else ():
            require(self._parser(step.stage), step.settings, step.where)
        return steps

    def _step(self, stage: Stage, item: dict[str, Any]) -> Step:
        label = _label(stage.name, item)
        where = f"{self.path}, section {label}"
        own = {key: value for key, value in item.items() if key != "name"}
        own_given = self._given(stage.name) | (self._given(label) if label != stage.name else {})
        for key in LAUNCH_KEYS:
            if key in own | own_given and not stage.distributed:
                raise UserError(f"{where}: {stage.name} runs in a single process and takes no {key}.")

        known = keys_of(self._parser(stage)) - {"output_dir"} | set(LAUNCH_KEYS if stage.distributed else ())
        shared = {key: value for key, value in self.shared.items() if key in known}
        given = {key: value for key, value in self._given(None).items() if key in known}
        settings = {"output_dir": str(Path(self.output_dir, label))} | shared | own | given | own_given
        settings = self._inputs(stage, settings) | settings
        launch = {key: settings.pop(key, None) for key in LAUNCH_KEYS}
        launch["num_processes"] = as_count(launch["num_processes"], where)
        return Step(stage, label, convert(self._parser(stage), settings, where), where, **launch)

    def _inputs(self, stage: Stage, settings: Mapping[str, Any]) -> dict[str, str]:
        """Where the sections before this one leave what it reads. Where that is a list, it has to be said."""
        inputs = {}
        for key, source, folder in stage.reads if settings.get(stage.unless) is None else ():
            if source == "run":
                inputs.setdefault(key, self.output_dir)
            items = self.sections.get(source, [])
            if len(items) == 1 and "name" not in items[0]:
                output_dir = (items[0] | self._given(source)).get("output_dir") or Path(self.output_dir, source)
                inputs.setdefault(key, str(Path(output_dir, folder)))
        return inputs

    def _given(self, target: str | None) -> dict[str, Any]:
        return {option.key: option.value for option in self.options if option.target == target}

    def _parser(self, stage: Stage):
        if stage.name not in self._parsers:  # the one of sft imports torch
            self._parsers[stage.name] = stage.make_parser(f"medst {stage.name}")
        return self._parsers[stage.name]

    def _check_shared_keys(self, first: Sequence[str]) -> None:
        """Each shared key has to mean something to a stage of this recipe; `first` are asked first, to import less."""
        stages = [STAGES[name] for name in dict.fromkeys([*first, *self.sections])]
        for key in {**self.shared, **self._given(None)}:
            if key in RECIPE_KEYS or any(key in keys_of(self._parser(stage)) for stage in stages):
                continue
            known = {*STAGES, *RECIPE_KEYS}.union(*(keys_of(self._parser(stage)) for stage in stages))
            raise UserError(
                f"{self.path}: {key!r} is neither a section nor a setting of any stage here.{closest(key, known)}"
            )

    def _no_section(self, name: str) -> str:
        return f"{self.path} has no section {name!r}, it has {', '.join(self.labels)}.{closest(name, self.labels)}"


def read_recipe(source: str | os.PathLike, options: Sequence[Option] = ()) -> Recipe:
    """
    Read a recipe, and set the environment variables it lists under `env`, as TRL does.

    Args:
        source (`str` or `os.PathLike`):
            A file, or the name of a recipe that comes with the package (`"demo"`).
        options (sequence of [`~medst_trl.options.Option`], *optional*):
            Settings from the command line.

    Raises:
        UserError: if there is no such recipe, it is no valid YAML, or its sections are not what they should be.
    """
    path = find_recipe(source)
    content = _read(path)
    return Recipe(str(path), content, options)


def step_of_file(stage: Stage, source: str | os.PathLike) -> Step:
    """
    The settings that a file holds for one stage: its section of a recipe, or all of a file of TRL's flat kind.

    Raises:
        UserError: if it is a recipe for other stages, or one that runs this stage several times.
    """
    path = find_recipe(source)
    content = _read(path)
    if STAGES.keys() & content.keys():
        steps = Recipe(str(path), content).steps(stage.name, complete=False)
        if len(steps) > 1:
            commands = "".join(f"\n  medst run {path} --stage {step.label}" for step in steps)
            raise UserError(f"{path} runs {stage.name} several times:{commands}")
        return steps[0]
    settings = {key: value for key, value in content.items() if key not in ("env", *LAUNCH_KEYS)}
    settings = convert(stage.make_parser(f"medst {stage.name}"), settings, str(path))
    num_processes = as_count(content.get("num_processes"), str(path))
    return Step(stage, stage.name, settings, str(path), content.get("accelerate_config"), num_processes)


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    refuse_secrets(_all_keys(content))
    env = content.get("env") or {}
    if not isinstance(env, dict):
        raise UserError(f"{path}: env has to map names of environment variables to their values.")
    os.environ.update({str(key): str(value) for key, value in env.items()})
    return content


def _items(path: str, name: str, section: Any) -> list[dict[str, Any]]:
    if section is None:
        return [{}]  # `base:` alone: run it, nothing to change
    if isinstance(section, dict):
        return [section]
    if not isinstance(section, list) or not section or not all(isinstance(item, dict) for item in section):
        raise UserError(
            f"{path}, section {name}: has to hold `key: value` settings, or a list of such with a name each."
        )
    names = [str(item.get("name", "")) for item in section]
    for item_name in names:
        if not re.fullmatch(r"\w[\w-]*", item_name) or names.count(item_name) > 1:
            raise UserError(
                f"{path}, section {name}: each item of a list needs a `name` of its own, of letters, digits, _ and -; "
                f"found {item_name!r}."
            )
    return [item | {"name": item_name} for item, item_name in zip(section, names)]


def _label(stage: str, item: Mapping[str, Any]) -> str:
    return f"{stage}/{item['name']}" if "name" in item else stage


def as_count(value: Any, where: str) -> int | None:
    """A number of processes, or None for none given."""
    if value is None or (str(value).isdecimal() and int(value) > 0):
        return value if value is None else int(value)
    raise UserError(f"{where}: num_processes: {value!r} is not a number of processes.")


def _all_keys(content: Any):
    if isinstance(content, dict):
        for key, value in content.items():
            yield str(key)
            yield from _all_keys(value)
    elif isinstance(content, list):
        for item in content:
            yield from _all_keys(item)

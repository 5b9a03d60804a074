# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Recipes: the settings of a whole run in one YAML file, with a section for each stage.

```yaml
output_dir: runs/demo            # each stage writes to its own directory in here, such as runs/demo/sft
seed: 0                          # shared: every stage that has this setting takes it
prepare:
  source: phantoms
sft:                             # reads runs/demo/prepare/instruct by default
  accelerate_config: multi_gpu   # a name from medst_trl/accelerate_configs, or a path
  learning_rate: 1e-4
evaluate:                        # a list runs the stage once per item, into runs/demo/evaluate/<name>
  - name: benchmark
  - name: blank
    controls: [blank]
```

The settings of a step are merged in this order, and later ones replace earlier ones (`Recipe._merge`):

1. default inputs: the outputs of earlier sections
2. shared settings of the file, if the stage has and shares them
3. its section, or its item of a list
4. `--key value` on the command line, if the stage has and shares that setting
5. `--section.key value` on the command line
6. in later rounds, the policy of the previous round and the records that follow those of the previous round

Then `{sft}` in a value is replaced by the directory of that section, `{prepare/slake}` by that of one item, and
`{run}` by the run directory. Relative paths are relative to the current directory, as in TRL; neither `~` nor
`$VARIABLES` are expanded.

With `rounds: 3` (or `--rounds 3`) the stages that repeat (generate, judge, dpo), and the evaluations that read from
them, run three times, into `round_1/`, `round_2/` and `round_3/`. The model that a section names is the one for the
first round.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from medst_trl.base.errors import Problems, UserError, closest
from medst_trl.base.registry import PLUGINS_VARIABLE

from .options import Options, actions_of, as_count, convert
from .recipe_files import find_recipe, read_yaml
from .record import RECORD_FILE, is_complete
from .stage import MODEL, RUN, STAGES, Stage


LAUNCH_KEYS = ("accelerate_config", "num_processes")  # shared or in a section; they are for the launcher
RECIPE_KEYS = ("output_dir", "env", "rounds", *LAUNCH_KEYS)


@dataclass(frozen=True)
class Step:
    """
    One run of one stage, with all its settings.

    Args:
        stage ([`~medst_trl.pipeline.stage.Stage`]):
            The stage.
        label (`str`):
            `"sft"`, `"prepare/<name>"` if the section is a list, or `"round_1/dpo"`.
        settings (`dict`):
            Its settings, in the types that its parser declares.
        where (`str`):
            The file and section they come from, for messages.
        accelerate_config (`str`, *optional*):
            Name or path of the launcher's configuration, if one is given.
        num_processes (`int`, *optional*):
            Number of processes, if one is given.
        given (`frozenset` of `str`):
            The settings that its section or `--section.key` sets: neither shared ones nor default inputs.
    """

    stage: Stage
    label: str
    settings: dict[str, Any]
    where: str
    accelerate_config: str | None = None
    num_processes: int | None = None
    given: frozenset[str] = frozenset()

    @property
    def replaces_results(self) -> bool:
        """Whether it deletes the results of an earlier run when it starts."""
        return bool(self.settings.get("overwrite")) and Path(self.settings["output_dir"], RECORD_FILE).exists()

    @property
    def is_finished(self) -> bool:
        """Whether it has a result to keep: it is skipped, or refused because something has changed."""
        return is_complete(self.settings["output_dir"]) and not self.settings.get("overwrite")


@dataclass(frozen=True)
class _Entry:
    """A stage to run, before its settings are merged: its section (or one item of it) and its round."""

    stage: Stage
    content: dict[str, Any]
    round: int | None = None

    @property
    def section(self) -> str:
        return f"{self.stage.name}/{self.content['name']}" if "name" in self.content else self.stage.name

    @property
    def label(self) -> str:
        return self.section if self.round is None else f"round_{self.round}/{self.section}"

    @property
    def targets(self) -> tuple[str, ...]:
        """The sections under which the command line can set its settings, from the least to the most specific."""
        return (self.stage.name, self.section, self.label)

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in self.content.items() if key != "name"}


class Recipe:
    """
    A recipe with the options of the command line. Made by [`read_recipe`].

    Args:
        path (`str`):
            The file, for messages.
        content (`dict`):
            The content of the file.
        options ([`~medst_trl.pipeline.options.Options`], *optional*):
            Settings from the command line.
    """

    def __init__(self, path: str, content: Mapping[str, Any], options: Options | None = None):
        self.path = path
        self.sections = {name: _items_of(path, name, content[name]) for name in STAGES if name in content}
        self.shared = {key: value for key, value in content.items() if key not in STAGES}
        self.options = options or {}
        self._parser = cache(lambda name: STAGES.get(name).make_parser())  # those of the training stages import torch
        if not self.sections:
            raise UserError(
                f"{path}: a recipe needs a section for at least one stage ({', '.join(STAGES)}). "
                f"Settings of a single stage are for `medst <stage> --config {path}`."
            )

    @cached_property
    def output_dir(self) -> str:
        """The run directory: from the command line, from the recipe, or named after the recipe."""
        directory = self._shared_options.get("output_dir") or self.shared.get("output_dir")
        return str(directory or Path("runs", Path(self.path).stem))

    @cached_property
    def rounds(self) -> int | None:
        """The number of rounds; None to run every stage once, without rounds."""
        return as_count(self._shared_options.get("rounds", self.shared.get("rounds")), "rounds", self.path)

    @property
    def labels(self) -> list[str]:
        """The sections, the items of those that are lists, and the rounds."""
        in_rounds = [entry for entry in self._entries if entry.stage.repeats or entry.stage.runs_in_rounds]
        labels = [*self.sections, *(entry.section for entry in self._entries)]
        for number in range(1, (self.rounds or 0) + 1):
            labels += [f"round_{number}", *(replace(entry, round=number).label for entry in in_rounds)]
        return list(dict.fromkeys(labels))

    def steps(
        self, which: str | None = None, complete: bool = True, check: Callable[[Step], Any] = lambda step: None
    ) -> list[Step]:
        """
        Return the steps to run, in pipeline order, with checked settings.

        Args:
            which (`str`, *optional*):
                A stage (`"prepare"`), an item (`"prepare/slake"`), a round or a label. All by default.
            complete (`bool`, *optional*, defaults to `True`):
                Whether to refuse a step without a required setting.
            check (`Callable`, *optional*):
                Takes a step whose settings are valid, and raises a [`UserError`] if the step cannot work.

        Raises:
            UserError: for all unknown keys and invalid values in the recipe and on the command line, and all errors of
                `check`, one per line.
        """
        entries = self._entries_in_order()
        chosen = [entry for entry in entries if which in (None, *entry.targets, f"round_{entry.round}")]
        if not chosen:
            raise UserError(self._no_section(which))
        steps, problems = [], Problems()
        for target in self.options:
            with problems.collect():
                self._check_options(target)
        for key in self.shared | self._shared_options:
            with problems.collect():
                self._check_shared_key(key, first=[entry.stage.name for entry in chosen])
        for entry in chosen:
            with problems.collect():
                steps.append(self._merged_step(entry, complete))
                check(steps[-1])
        problems.report()
        return steps

    def unused_options(self, steps: Sequence[Step]) -> Iterator[str]:
        """Yield a note for each `--key` that none of these steps takes."""
        taken = set(RECIPE_KEYS).union(*(self._shared_keys(step.stage) for step in steps))
        for key in [key for key in self._shared_options if key not in taken]:
            by_name = [f"--{step.label}.{key}" for step in steps if key in self._keys(step.stage)]
            advice = f" Use {' and '.join(by_name)} to set it." if by_name else ""
            yield f"--{key} has no effect on {', '.join(step.label for step in steps)}.{advice}"

    # The settings of a step

    def _merged_step(self, entry: _Entry, complete: bool) -> Step:
        where, stage = f"{self.path}, section {entry.label}", entry.stage
        own = entry.settings | self._section_options(*entry.targets)
        if entry.round is not None and "output_dir" in own:
            raise UserError(f"{where}: with rounds, a stage writes to the directory of its round. Remove output_dir.")
        for key in LAUNCH_KEYS:
            if key in own and not stage.distributed:
                raise UserError(f"{where}: {stage.name} runs in a single process and takes no {key}.")
        settings = self._merge(entry)
        config = settings.pop("accelerate_config", None)
        number = as_count(settings.pop("num_processes", None), "num_processes", where)
        settings = convert(self._parser(stage.name), settings, where, complete)
        return Step(stage, entry.label, settings, where, config, number, frozenset(own))

    def _merge(self, entry: _Entry) -> dict[str, Any]:
        """Merge the settings of an entry, in the order in the docstring of this module."""
        taken = self._shared_keys(entry.stage) - {"output_dir"} | set(LAUNCH_KEYS if entry.stage.distributed else ())
        shared = {key: value for key, value in self.shared.items() if key in taken}
        options = {key: value for key, value in self._shared_options.items() if key in taken}
        settings = {"output_dir": str(Path(self.output_dir, entry.label))}
        settings |= shared | entry.settings | options | self._section_options(*entry.targets)
        settings = self._default_inputs(entry, settings) | settings
        if entry.round is not None and entry.stage.repeats:
            settings |= self._round_inputs(entry, settings) | self._section_options(entry.label)
        return {key: self._with_directories(value, entry) for key, value in settings.items()}

    @property
    def _shared_options(self) -> dict[str, Any]:
        """The options for all stages (`--key`)."""
        return self.options.get("", {})

    def _section_options(self, *targets: str) -> dict[str, Any]:
        """The options for these sections (`--section.key`); later sections win."""
        return {key: value for name in targets for key, value in self.options.get(name, {}).items()}

    def _default_inputs(self, entry: _Entry, settings: Mapping[str, Any]) -> dict[str, str]:
        """
        The default of each input: the output of the nearest earlier section that makes its kind. If that section is a
        list, the input has no default.
        """
        names, inputs = list(self.sections), {}
        earlier = [STAGES.get(name) for name in reversed(names[: names.index(entry.stage.name)])]
        for needed in entry.stage.inputs:
            if needed.is_replaced(settings):
                continue
            if needed.kind == RUN:
                inputs[needed.key] = self.output_dir
            elif (source := needed.find_default(earlier)) and "name" not in self.sections[source[0].name][0]:
                inputs[needed.key] = str(Path(self._directory_of(source[0].name, entry), source[1].directory))
        return inputs

    def _round_inputs(self, entry: _Entry, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that depend on the previous round: its policy, and the number of records used so far."""
        inputs, where = {}, f"{self.path}, section {entry.stage.name}"
        stages = map(STAGES.get, self.sections)
        trained = next((stage.name for stage in stages if stage.repeats and stage.makes(MODEL)), None)
        policy = next((item for item in entry.stage.inputs if item.kind == MODEL and item.has_default), None)
        if entry.round > 1 and trained is not None and policy is not None:
            inputs[policy.key] = str(self._directory_of_round(entry.round - 1) / trained)
            if policy.is_remote(settings) and policy.key not in self._section_options(entry.label):
                name = f"--round_2/{entry.stage.name}"
                raise UserError(
                    f"{where}: a server cannot switch to the policy of the previous round. Use engine: transformers, "
                    f"or run the rounds one by one with {name}.base_url and {name}.{policy.key}."
                )
        if entry.stage.advances is not None and self.rounds > 1:
            skipped, used = entry.stage.advances
            size = settings.get(used)
            if not str(size).isdecimal():
                raise UserError(f"{where}: each round uses different records. Set {used}, the number per round.")
            inputs[skipped] = int(settings.get(skipped) or 0) + (entry.round - 1) * int(size)
        return inputs

    # Directories

    def _with_directories(self, value: Any, entry: _Entry) -> Any:
        """A setting in which each `{section}` is replaced by that section's directory."""
        if isinstance(value, list | tuple):
            return type(value)(self._with_directories(item, entry) for item in value)
        if not isinstance(value, str):
            return value
        sections = rf"\{{((?:{'|'.join(map(re.escape, STAGES))})(?:/[\w-]+)?|{RUN})\}}"
        return re.sub(sections, lambda match: self._directory_of(match[1], entry), value)

    def _directory_of(self, section: str, reader: _Entry) -> str:
        """The directory of a section (or of one of its items) from which a step reads."""
        if section == RUN:
            return self.output_dir
        found = next((entry for entry in self._entries if entry.section == section), None)
        if found is None:
            where = f"{self.path}, section {reader.label}: {{{section}}}"
            if items := [f"{{{entry.section}}}" for entry in self._entries if entry.stage.name == section]:
                raise UserError(f"{where} is a list. Name one of its items: {', '.join(items)}.")
            raise UserError(f"{where}: {self._no_section(section)}")
        number = (reader.round or self.rounds) if found.stage.repeats else None
        own = found.settings | self._section_options(*found.targets)
        return str(own.get("output_dir") or Path(self._directory_of_round(number), section))

    def _directory_of_round(self, number: int | None) -> Path:
        return Path(self.output_dir) if number is None else Path(self.output_dir, f"round_{number}")

    # The order of the steps

    @property
    def _entries(self) -> list[_Entry]:
        return [_Entry(STAGES.get(name), item) for name, items in self.sections.items() for item in items]

    def _entries_in_order(self) -> list[_Entry]:
        """All entries in the order of their steps: those before the rounds, the rounds, and those after the rounds."""
        entries = self._entries
        if self.rounds is None:
            return entries
        order, repeats = list(STAGES), [stage.name for stage in STAGES.values() if stage.repeats]
        repeated = [entry for entry in entries if entry.stage.repeats or self._reads_a_round(entry)]
        if not repeated:
            raise UserError(
                f"{self.path}: `rounds` repeats {', '.join(repeats)}, but the recipe has a section for none of them."
            )
        if any(entry.stage.repeats and "name" in entry.content for entry in entries):
            raise UserError(f"{self.path}: with rounds, {', '.join(repeats)} must be one section each, not lists.")
        later = order[order.index(repeats[-1]) + 1 :]
        last = [entry for entry in entries if entry.stage.name in later and not entry.stage.runs_in_rounds]
        first = [entry for entry in entries if entry not in repeated and entry not in last]
        return [*first, *(replace(entry, round=n) for n in range(1, self.rounds + 1) for entry in repeated), *last]

    def _reads_a_round(self, entry: _Entry) -> bool:
        """Whether a stage that runs in rounds reads what a round makes. Otherwise it runs once."""
        if not entry.stage.runs_in_rounds:
            return False
        directory = self._directory_of_round(1)
        settings = self._merge(replace(entry, round=1)) | {"output_dir": None}
        values = [item for value in settings.values() for item in (value if isinstance(value, list) else [value])]
        return any(isinstance(value, str) and Path(value).is_relative_to(directory) for value in values)

    # Checks

    def _keys(self, stage: Stage) -> set[str]:
        return set(actions_of(self._parser(stage.name)))

    def _shared_keys(self, stage: Stage) -> set[str]:
        """The settings that a stage takes from the top level of the recipe and from `--key`."""
        return self._keys(stage) - stage.not_shared

    def _check_options(self, target: str) -> None:
        """Check that options for a section name one, and that those for the run and its launchers have a value."""
        options = self.options[target]
        if flags := [key for key in RECIPE_KEYS if isinstance(options.get(key), tuple)]:
            raise UserError(f"--{flags[0]} takes one value.")
        if target and target not in self.labels:
            raise UserError(f"--{target}.{next(iter(options))}: {self._no_section(target)}")
        if re.fullmatch(r"round_\d+", target):
            raise UserError(f"--{target}.{next(iter(options))}: name a section, such as {target}/dpo.")

    def _check_shared_key(self, key: str, first: Sequence[str]) -> None:
        """Check that a stage here takes a shared key. Those in `first` come first: it imports less."""
        stages = [STAGES.get(name) for name in dict.fromkeys([*first, *self.sections])]
        if key in RECIPE_KEYS or any(key in self._shared_keys(stage) for stage in stages):
            return
        if owners := [stage.name for stage in stages if key in self._keys(stage)]:
            raise UserError(f"{self.path}: {key} is not shared. Set it in a section, or as --{owners[0]}.{key}.")
        near = closest(key, {*STAGES, *RECIPE_KEYS}.union(*map(self._keys, stages)))
        if key in self._shared_options:
            raise UserError(f"--{key}: no stage of {self.path} has such a setting.{near}")
        raise UserError(f"{self.path}: {key!r} is neither a section nor a setting of any stage here.{near}")

    def _no_section(self, name: str) -> str:
        labels = self.labels
        return f"{self.path} has no section {name!r}. Its sections: {', '.join(labels)}.{closest(name, labels)}"


def _items_of(path: str, name: str, section: Any) -> list[dict[str, Any]]:
    """The settings of each item of a section; of the section itself if it is not a list."""
    if section is None:
        return [{}]  # `base:` alone runs it with its defaults
    if isinstance(section, dict):
        return [section]
    items = [item for item in section if isinstance(item, dict)] if isinstance(section, list) else []
    names = [str(item.get("name", "")) for item in items]
    if not items or len(set(filter(re.compile(r"\w[\w-]*").fullmatch, names))) < len(section):
        raise UserError(
            f"{path}, section {name}: must be `key: value` settings, or a list of settings in which each item has a "
            "different `name` of letters, digits, _ and -."
        )
    return [item | {"name": item_name} for item, item_name in zip(items, names)]


# Reading


def read_recipe(source: str | os.PathLike, options: Options | None = None) -> Recipe:
    """
    Read a recipe, and set the environment variables in its `env`, as TRL does.

    Args:
        source (`str` or `os.PathLike`):
            A file, or the name of a packaged recipe (`"demo"`).
        options ([`~medst_trl.pipeline.options.Options`], *optional*):
            Settings from the command line.

    Raises:
        UserError: if there is no such recipe, or it is not valid YAML, or a section is invalid.
    """
    path = find_recipe(source)
    return Recipe(str(path), _read(path), options)


def step_of_file(stage: Stage, source: str | os.PathLike) -> Step:
    """
    Read the settings of one stage from its section of a recipe, or from a flat file as in TRL.

    Raises:
        UserError: if it is a recipe without this stage, or one that runs it several times.
    """
    path = find_recipe(source)
    content = _read(path)
    if not any(name in content for name in STAGES):
        content = {stage.name: {key: value for key, value in content.items() if key != "env"}}
    steps = Recipe(str(path), content).steps(stage.name, complete=False)
    if len(steps) > 1:
        labels = ", ".join(step.label for step in steps)
        raise UserError(f"{path} runs {stage.name} several times. Choose with `medst run {path} --stage`: {labels}.")
    return steps[0]


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    env = content.get("env") or {}
    if not isinstance(env, dict):
        raise UserError(f"{path}: env must map names of environment variables to their values.")
    if PLUGINS_VARIABLE in env:
        raise UserError(
            f"{path}: env cannot set {PLUGINS_VARIABLE}: a recipe from a stranger must not choose code to run. Use "
            f"--plugins FILE, or set {PLUGINS_VARIABLE} yourself."
        )
    os.environ.update({str(key): str(value) for key, value in env.items()})
    return content

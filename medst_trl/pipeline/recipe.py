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

`{sft}` in a value stands for the folder of that section, `{prepare/slake}` for that of one item, `{run}` for the
folder of the run. With `rounds: 3` (or `--rounds 3`) the sections generate, judge, dpo, and the evaluations that read
from them, run three times, into `round_1/`, `round_2/`, `round_3/`: each round's policy asks and answers for the next
one, about the images that follow those of the round before. What a section says of its model is for the first round.

Relative paths are relative to the current folder, as in TRL; neither `~` nor `$VARIABLES` in them are expanded. Of two
settings the more particular wins (an item or section over a shared one), and the command line over the file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError, closest
from medst_trl.base.registry import PLUGINS_VARIABLE

from .arguments import convert, keys_of, require
from .options import Option, refuse_secrets
from .recipe_files import find_recipe, read_yaml
from .stage import MODEL, RUN, STAGES, Stage


LAUNCH_KEYS = ("accelerate_config", "num_processes")  # shared or of a section; they are for the launcher
RECIPE_KEYS = ("output_dir", "env", "rounds", *LAUNCH_KEYS)


@dataclass(frozen=True)
class Step:
    """
    One run of one stage, with everything it needs to be told.

    Args:
        stage ([`~medst_trl.pipeline.stage.Stage`]):
            The stage.
        label (`str`):
            `"sft"`, `"prepare/<name>"` where the section is a list, or `"round_1/dpo"`.
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
        options (sequence of [`~medst_trl.pipeline.options.Option`], *optional*):
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
        """The sections, their items where they are lists, and the rounds."""
        items = [f"{name}/{item['name']}" for name, items in self.sections.items() for item in items if "name" in item]
        stages = {name: STAGES.get(name) for name in self.sections}
        of_rounds = {name for name, stage in stages.items() if stage.repeats or stage.joins_rounds}
        names = [name for name in (*self.sections, *items) if name.partition("/")[0] in of_rounds]
        rounds = [f"round_{number}" for number in range(1, (self.rounds or 0) + 1)]
        return [*self.sections, *items, *rounds, *(f"{number}/{name}" for number in rounds for name in names)]

    @cached_property
    def output_dir(self) -> str:
        """The folder of the run: from the command line, the recipe, or after the recipe's name."""
        given = self._given(None).get("output_dir") or self.shared.get("output_dir")
        return str(given or Path("runs", Path(self.path).stem))

    @cached_property
    def rounds(self) -> int | None:
        """How often generate, judge, dpo and what evaluates them are repeated; None for once, without rounds."""
        value = self._given(None).get("rounds", self.shared.get("rounds"))
        if value is None or (str(value).isdecimal() and int(value) > 0):
            return None if value is None else int(value)
        raise UserError(f"{self.path}: rounds: {value!r} is not a number of rounds.")

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
        chosen = [job for job in self._jobs() if which in (None, *job.names)]
        if not chosen:
            raise UserError(self._no_section(which))
        self._check_shared_keys(first=[job.stage.name for job in chosen])
        steps = [self._step(job) for job in chosen]
        for step in steps if complete else ():
            require(self._parser(step.stage), step.settings, step.where)
        return steps

    def _jobs(self) -> list["_Job"]:
        """Every run of a stage, in its order: what is done once, the rounds, what is made of all of them."""
        order = list(STAGES)  # of which the sections are a part, in the same order
        once = [_Job(STAGES.get(name), item) for name, items in self.sections.items() for item in items]
        if self.rounds is None:
            return once
        repeats = [stage.name for stage in STAGES.values() if stage.repeats]
        repeated = [job for job in once if job.stage.repeats or self._reads_a_round(job)]
        if not repeated:
            raise UserError(f"{self.path}: rounds repeat {', '.join(repeats)}, and it has a section for none of them.")
        if any(job.stage.repeats and "name" in job.item for job in once):
            raise UserError(f"{self.path}: with rounds, {', '.join(repeats)} have to be one section each, not lists.")
        behind = order[order.index(repeats[-1]) + 1 :]
        last = [job for job in once if job.stage.name in behind and not job.stage.joins_rounds]
        jobs = [job for job in once if job not in repeated and job not in last]
        jobs += [replace(job, round=number) for number in range(1, self.rounds + 1) for job in repeated]
        return jobs + last

    def _reads_a_round(self, job: "_Job") -> bool:
        """Whether a stage that joins rounds reads what a round makes. Otherwise it needs to run only once."""
        if not job.stage.joins_rounds:
            return False
        folder = self._folder_of_round(1)
        settings = self._settings(replace(job, round=1)) | {"output_dir": None}
        items = [item for value in settings.values() for item in (value if isinstance(value, list) else [value])]
        return any(isinstance(item, str) and Path(item).is_relative_to(folder) for item in items)

    def _step(self, job: "_Job") -> Step:
        where = f"{self.path}, section {job.label}"
        settings = self._settings(job)
        if job.round is not None and "output_dir" in self._own(job):
            raise UserError(f"{where}: with rounds its output_dir is in that of the round, so leave it out.")
        for key in LAUNCH_KEYS:
            if key in self._own(job) and not job.stage.distributed:
                raise UserError(f"{where}: {job.stage.name} runs in a single process and takes no {key}.")
        launch = {key: settings.pop(key, None) for key in LAUNCH_KEYS}
        launch["num_processes"] = as_count(launch["num_processes"], where)
        return Step(job.stage, job.label, convert(self._parser(job.stage), settings, where), where, **launch)

    def _settings(self, job: "_Job") -> dict[str, Any]:
        """What a run of a stage is told: defaults of the recipe, shared settings, its own, the command line's."""
        stage = job.stage
        known = keys_of(self._parser(stage)) - {"output_dir"} | set(LAUNCH_KEYS if stage.distributed else ())
        shared = {key: value for key, value in self.shared.items() if key in known}
        given = {key: value for key, value in self._given(None).items() if key in known}
        own = {key: value for key, value in job.item.items() if key != "name"}
        settings = {"output_dir": str(Path(self.output_dir, job.label))} | shared | own | given | self._given_to(job)
        settings = self._inputs(job, settings) | settings
        if job.round is not None and stage.repeats:
            settings |= self._inputs_of_round(job, settings) | self._given(job.label)
        return {key: self._resolved(value, job) for key, value in settings.items()}

    def _given_to(self, job: "_Job") -> dict[str, Any]:
        """Settings that the command line has for this section, its item or this round."""
        given = {}
        for name in dict.fromkeys([job.stage.name, _label(job.stage.name, job.item), job.label]):
            given |= self._given(name)
        return given

    def _own(self, job: "_Job") -> dict[str, Any]:
        """Settings of the section itself, in the file and on the command line."""
        return {key: value for key, value in job.item.items() if key != "name"} | self._given_to(job)

    def _inputs(self, job: "_Job", settings: Mapping[str, Any]) -> dict[str, str]:
        """Where the sections before this one leave what it reads. Where that is a list, it has to be said."""
        inputs = {}
        for item in job.stage.inputs:
            if item.unless is not None and settings.get(item.unless) is not None:
                continue
            for source, folder in item.sources:
                items = self.sections.get(source, [])
                if source == RUN or (len(items) == 1 and "name" not in items[0]):
                    inputs.setdefault(item.key, str(Path(self._folder_of(source, job), folder)))
        return inputs

    def _inputs_of_round(self, job: "_Job", settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a round takes from the one before: its policy, and the place among the images where it stopped."""
        inputs = {}
        name, trained = job.stage.name, self._trained_by_a_round()
        policy = next((item for item in job.stage.inputs if item.kind == MODEL and item.sources), None)
        if job.round > 1 and trained is not None and policy is not None:
            inputs[policy.key] = str(self._folder_of_round(job.round - 1) / trained)
            if policy.is_remote(settings) and policy.key not in self._given(job.label):
                raise UserError(
                    f"{self.path}, section {name}: a server cannot be told to run the policy of the round before. Use "
                    f"engine: transformers, or run the rounds one by one with --round_2/{name}.base_url and "
                    f"--round_2/{name}.{policy.key}."
                )
        if job.stage.advances is not None and self.rounds > 1:
            skipped, used = job.stage.advances
            size = settings.get(used)
            if not str(size).isdecimal():
                raise UserError(
                    f"{self.path}, section {name}: each round uses other records, so set the number that a round "
                    f"uses: {used}."
                )
            inputs[skipped] = int(settings.get(skipped) or 0) + (job.round - 1) * int(size)
        return inputs

    def _trained_by_a_round(self) -> str | None:
        """The section whose model the next round starts from."""
        sections = [STAGES.get(name) for name in self.sections]
        return next((stage.name for stage in sections if stage.repeats and stage.makes(MODEL)), None)

    def _folder_of(self, label: str, job: "_Job") -> str:
        """The folder of a section (or of one of its items), seen from a run of a stage."""
        name, _, item_name = label.partition("/")
        if label == RUN:
            return self.output_dir
        item = next((item for item in self.sections.get(name, []) if item.get("name", "") == item_name), None)
        if item is None:
            raise UserError(f"{self.path}, section {job.label}: {{{label}}}: {self._no_section(label)}")
        of_round = self.rounds is not None and STAGES.get(name).repeats
        number = (job.round or self.rounds) if of_round else None
        own = self._own(_Job(STAGES.get(name), item))
        return str(own.get("output_dir") or Path(self._folder_of_round(number), label))

    def _folder_of_round(self, number: int | None) -> Path:
        return Path(self.output_dir) if number is None else Path(self.output_dir, f"round_{number}")

    def _resolved(self, value: Any, job: "_Job") -> Any:
        """A setting whose `{section}` is replaced by that section's folder."""
        if isinstance(value, list):
            return [self._resolved(item, job) for item in value]
        if not isinstance(value, str):
            return value
        folder = re.compile(rf"\{{((?:{'|'.join(map(re.escape, STAGES))})(?:/[\w-]+)?|{RUN})\}}")
        return folder.sub(lambda match: self._folder_of(match[1], job), value)

    def _given(self, target: str | None) -> dict[str, Any]:
        return {option.key: option.value for option in self.options if option.target == target}

    def _parser(self, stage: Stage):
        if stage.name not in self._parsers:  # the one of sft imports torch
            self._parsers[stage.name] = stage.make_parser(f"medst {stage.name}")
        return self._parsers[stage.name]

    def _check_shared_keys(self, first: Sequence[str]) -> None:
        """Each shared key has to mean something to a stage of this recipe; `first` are asked first, to import less."""
        stages = [STAGES.get(name) for name in dict.fromkeys([*first, *self.sections])]
        for key in {**self.shared, **self._given(None)}:
            if key in RECIPE_KEYS or any(key in keys_of(self._parser(stage)) for stage in stages):
                continue
            known = {*STAGES, *RECIPE_KEYS}.union(*(keys_of(self._parser(stage)) for stage in stages))
            raise UserError(
                f"{self.path}: {key!r} is neither a section nor a setting of any stage here.{closest(key, known)}"
            )

    def _no_section(self, name: str) -> str:
        return f"{self.path} has no section {name!r}, it has {', '.join(self.labels)}.{closest(name, self.labels)}"


@dataclass(frozen=True)
class _Job:
    """One run of a stage before its settings are known."""

    stage: Stage
    item: dict[str, Any]
    round: int | None = None

    @property
    def label(self) -> str:
        label = _label(self.stage.name, self.item)
        return label if self.round is None else f"round_{self.round}/{label}"

    @property
    def names(self) -> tuple[str, ...]:
        """By what it can be chosen: its stage, its item, its round, or exactly."""
        label = _label(self.stage.name, self.item)
        return (self.stage.name, label, self.label, *([] if self.round is None else [f"round_{self.round}"]))


def read_recipe(source: str | os.PathLike, options: Sequence[Option] = ()) -> Recipe:
    """
    Read a recipe, and set the environment variables it lists under `env`, as TRL does.

    Args:
        source (`str` or `os.PathLike`):
            A file, or the name of a recipe that comes with the package (`"demo"`).
        options (sequence of [`~medst_trl.pipeline.options.Option`], *optional*):
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
    if any(name in content for name in STAGES):
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
    if PLUGINS_VARIABLE in env:
        raise UserError(
            f"{path}: env cannot set {PLUGINS_VARIABLE}: a recipe from a stranger must not choose code to run. Use "
            f"--plugins FILE, or set {PLUGINS_VARIABLE} yourself."
        )
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

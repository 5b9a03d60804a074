# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A recipe: one run in one YAML file, with a section for each stage.

```yaml
output_dir: runs/demo            # each stage writes to its own directory in here, such as runs/demo/sft
seed: 0                          # shared: every stage that knows the key takes it
prepare:
  source: phantoms
sft:                             # reads runs/demo/prepare/instruct by default
  accelerate_config: multi_gpu   # a name from medst_trl/accelerate_configs, or a path
  learning_rate: 1e-4
evaluate:                        # a list runs the stage once per item, into runs/demo/evaluate/<name>
  - name: benchmark
  - name: blank
    control: blank
```

`{sft}` in a value stands for the directory of that section, `{prepare/slake}` for that of one item, `{run}` for the
run directory. With `rounds: 3` (or `--rounds 3`) the stages that repeat (generate, judge, dpo), and the evaluations
that read from them, run three times, into `round_1/`, `round_2/` and `round_3/`. Each round's policy asks and answers
in the next one, about the images after those of the round before. The model that a section names is the one for the
first round.

Relative paths are relative to the current directory, as in TRL; neither `~` nor `$VARIABLES` are expanded. Of two
settings the more specific one applies (an item or section over a shared one), and the command line over the file.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from medst_trl.base.errors import UserError, closest
from medst_trl.base.registry import PLUGINS_VARIABLE

from .settings import Option, actions_of, as_count, convert, refuse_secrets, require
from .stage import MODEL, RUN, STAGES, Stage


if TYPE_CHECKING:
    from trl.scripts.utils import TrlParser

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
    """

    stage: Stage
    label: str
    settings: dict[str, Any]
    where: str
    accelerate_config: str | None = None
    num_processes: int | None = None


@dataclass(frozen=True)
class _Job:
    """One run of a stage before its settings are known: the stage, an item of its section, and a round."""

    stage: Stage
    item: dict[str, Any]
    round: int | None = None

    @property
    def section(self) -> str:
        return f"{self.stage.name}/{self.item['name']}" if "name" in self.item else self.stage.name

    @property
    def label(self) -> str:
        return self.section if self.round is None else f"round_{self.round}/{self.section}"

    @property
    def names(self) -> tuple[str, ...]:
        """What chooses it: its stage, its item, its round, or its label."""
        return (self.stage.name, self.section, self.label, f"round_{self.round}")

    @property
    def own(self) -> dict[str, Any]:
        return {key: value for key, value in self.item.items() if key != "name"}


class Recipe:
    """
    A recipe with the options of the command line laid over it. Made by [`read_recipe`].

    Args:
        path (`str`):
            The file, for messages.
        content (`dict`):
            What the file holds.
        options (sequence of [`~medst_trl.pipeline.settings.Option`], *optional*):
            Settings from the command line.
    """

    def __init__(self, path: str, content: Mapping[str, Any], options: Sequence[Option] = ()):
        self.path = path
        self.sections = {name: _items(path, name, content[name]) for name in STAGES if name in content}
        self.shared = {key: value for key, value in content.items() if key not in STAGES}
        self.options = options
        self._parsers: dict[str, TrlParser] = {}
        if not self.sections:
            raise UserError(
                f"{path}: a recipe needs a section for at least one stage ({', '.join(STAGES)}). "
                f"Settings of a single stage are for `medst <stage> --config {path}`."
            )
        for option in options:
            if option.target is not None and option.target not in self.labels:
                raise UserError(f"--{option.target}.{option.key}: {self._no_section(option.target)}")

    @cached_property
    def output_dir(self) -> str:
        """The run directory: from the command line, from the recipe, or named after the recipe."""
        given = self._given(None).get("output_dir") or self.shared.get("output_dir")
        return str(given or Path("runs", Path(self.path).stem))

    @cached_property
    def rounds(self) -> int | None:
        """The number of rounds; None to run every stage once, without rounds."""
        return as_count(self._given(None).get("rounds", self.shared.get("rounds")), "rounds", self.path)

    @property
    def labels(self) -> list[str]:
        """The sections, the items of those that are lists, and the rounds."""
        jobs = self._jobs_without_rounds
        in_rounds = [job for job in jobs if job.stage.repeats or job.stage.joins_rounds]
        labels = [*self.sections, *(job.section for job in jobs)]
        for number in range(1, (self.rounds or 0) + 1):
            names = [name for job in in_rounds for name in (job.stage.name, job.section)]
            labels += [f"round_{number}", *(f"round_{number}/{name}" for name in names)]
        return list(dict.fromkeys(labels))

    def steps(self, which: str | None = None, complete: bool = True) -> list[Step]:
        """
        The steps to run, in pipeline order, each checked.

        Args:
            which (`str`, *optional*):
                A stage (`"prepare"`), an item (`"prepare/slake"`), a round or a label. All by default.
            complete (`bool`, *optional*, defaults to `True`):
                Whether required settings must be there.

        Raises:
            UserError: for an unknown key or an invalid value in the recipe or on the command line.
        """
        chosen = [job for job in self._jobs() if which in (None, *job.names)]
        if not chosen:
            raise UserError(self._no_section(which))
        self._check_shared_keys(first=[job.stage.name for job in chosen])
        steps = [self._step(job) for job in chosen]
        for step in steps if complete else ():
            require(self._parser(step.stage), step.settings, step.where)
        return steps

    # Which steps there are, and in which order

    @property
    def _jobs_without_rounds(self) -> list[_Job]:
        return [_Job(STAGES.get(name), item) for name, items in self.sections.items() for item in items]

    def _jobs(self) -> list[_Job]:
        """Every run of a stage in its order: what runs once, then the rounds, then what uses all of them."""
        once = self._jobs_without_rounds
        if self.rounds is None:
            return once
        order, repeats = list(STAGES), [stage.name for stage in STAGES.values() if stage.repeats]
        repeated = [job for job in once if job.stage.repeats or self._reads_a_round(job)]
        if not repeated:
            raise UserError(f"{self.path}: rounds repeat {', '.join(repeats)}, and it has a section for none of them.")
        if any(job.stage.repeats and "name" in job.item for job in once):
            raise UserError(f"{self.path}: with rounds, {', '.join(repeats)} must be one section each, not lists.")
        behind = order[order.index(repeats[-1]) + 1 :]
        last = [job for job in once if job.stage.name in behind and not job.stage.joins_rounds]
        first = [job for job in once if job not in repeated and job not in last]
        return [*first, *(replace(job, round=n) for n in range(1, self.rounds + 1) for job in repeated), *last]

    def _reads_a_round(self, job: _Job) -> bool:
        """Whether a stage that joins rounds reads what a round makes. Otherwise it needs to run only once."""
        if not job.stage.joins_rounds:
            return False
        directory = self._directory_of_round(1)
        settings = self._settings(replace(job, round=1)) | {"output_dir": None}
        items = [item for value in settings.values() for item in (value if isinstance(value, list) else [value])]
        return any(isinstance(item, str) and Path(item).is_relative_to(directory) for item in items)

    # The settings of a step

    def _step(self, job: _Job) -> Step:
        where = f"{self.path}, section {job.label}"
        own = job.own | self._given_to(job)
        if job.round is not None and "output_dir" in own:
            raise UserError(f"{where}: with rounds, output_dir lies in the directory of the round. Remove it.")
        for key in LAUNCH_KEYS:
            if key in own and not job.stage.distributed:
                raise UserError(f"{where}: {job.stage.name} runs in a single process and takes no {key}.")
        settings = self._settings(job)
        config, number = (settings.pop(key, None) for key in LAUNCH_KEYS)
        settings = convert(self._parser(job.stage), settings, where)
        return Step(job.stage, job.label, settings, where, config, as_count(number, "num_processes", where))

    def _settings(self, job: _Job) -> dict[str, Any]:
        """Defaults, then shared settings, then the section's own, then the command line's: the last one applies."""
        known = self._keys(job.stage) - {"output_dir"} | set(LAUNCH_KEYS if job.stage.distributed else ())
        shared, given = (
            {key: value for key, value in settings.items() if key in known}
            for settings in (self.shared, self._given(None))
        )
        settings = {"output_dir": str(Path(self.output_dir, job.label))}
        settings |= shared | job.own | given | self._given_to(job)
        settings = self._inputs(job, settings) | settings
        if job.round is not None and job.stage.repeats:
            settings |= self._inputs_of_round(job, settings) | self._given(job.label)
        return {key: self._resolved(value, job) for key, value in settings.items()}

    def _given(self, target: str | None) -> dict[str, Any]:
        return {option.key: option.value for option in self.options if option.target == target}

    def _given_to(self, job: _Job) -> dict[str, Any]:
        """Settings from the command line for this section, its item or this round."""
        names = dict.fromkeys([job.stage.name, job.section, job.label])
        return {key: value for name in names for key, value in self._given(name).items()}

    def _inputs(self, job: _Job, settings: Mapping[str, Any]) -> dict[str, str]:
        """
        Default inputs: for each, the output of the nearest earlier section that makes its kind. If that section is a
        list, the input has no default.
        """
        names, inputs = list(STAGES), {}
        earlier = [
            STAGES.get(name) for name in reversed(names[: names.index(job.stage.name)]) if name in self.sections
        ]
        for item in job.stage.inputs:
            if item.unless is None or settings.get(item.unless) is None:
                if item.kind == RUN:
                    inputs[item.key] = self.output_dir
                elif (made := item.default_among(earlier)) and "name" not in self.sections[made[0].name][0]:
                    inputs[item.key] = str(Path(self._directory_of(made[0].name, job), made[1].directory))
        return inputs

    def _inputs_of_round(self, job: _Job, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a round takes from the one before: its policy, and the record at which it stopped."""
        inputs, where = {}, f"{self.path}, section {job.stage.name}"
        stages = map(STAGES.get, self.sections)
        trained = next((stage.name for stage in stages if stage.repeats and stage.makes(MODEL)), None)
        policy = next((item for item in job.stage.inputs if item.kind == MODEL and item.has_default), None)
        if job.round > 1 and trained is not None and policy is not None:
            inputs[policy.key] = str(self._directory_of_round(job.round - 1) / trained)
            if policy.is_remote(settings) and policy.key not in self._given(job.label):
                name = f"--round_2/{job.stage.name}"
                raise UserError(
                    f"{where}: a server cannot be told to run the policy of the round before. Use engine: "
                    f"transformers, or run the rounds one by one with {name}.base_url and {name}.{policy.key}."
                )
        if job.stage.advances is not None and self.rounds > 1:
            skipped, used = job.stage.advances
            size = settings.get(used)
            if not str(size).isdecimal():
                raise UserError(f"{where}: each round uses other records. Set the number per round: {used}.")
            inputs[skipped] = int(settings.get(skipped) or 0) + (job.round - 1) * int(size)
        return inputs

    def _resolved(self, value: Any, job: _Job) -> Any:
        """A setting with each `{section}` replaced by that section's directory."""
        if isinstance(value, list):
            return [self._resolved(item, job) for item in value]
        if not isinstance(value, str):
            return value
        sections = rf"\{{((?:{'|'.join(map(re.escape, STAGES))})(?:/[\w-]+)?|{RUN})\}}"
        return re.sub(sections, lambda match: self._directory_of(match[1], job), value)

    def _directory_of(self, label: str, job: _Job) -> str:
        """The directory of a section (or of one of its items), as a run of a stage sees it."""
        if label == RUN:
            return self.output_dir
        found = next((other for other in self._jobs_without_rounds if other.section == label), None)
        if found is None:
            raise UserError(f"{self.path}, section {job.label}: {{{label}}}: {self._no_section(label)}")
        number = (job.round or self.rounds) if found.stage.repeats else None
        own = found.own | self._given_to(found)
        return str(own.get("output_dir") or Path(self._directory_of_round(number), label))

    def _directory_of_round(self, number: int | None) -> Path:
        return Path(self.output_dir) if number is None else Path(self.output_dir, f"round_{number}")

    # Checks

    def _parser(self, stage: Stage) -> "TrlParser":
        if stage.name not in self._parsers:  # those of the training stages import torch
            self._parsers[stage.name] = stage.make_parser(f"medst {stage.name}")
        return self._parsers[stage.name]

    def _keys(self, stage: Stage) -> set[str]:
        return set(actions_of(self._parser(stage)))

    def _check_shared_keys(self, first: Sequence[str]) -> None:
        """Each shared key must be a setting of some stage here; `first` are asked first, to import less."""
        stages = [STAGES.get(name) for name in dict.fromkeys([*first, *self.sections])]
        for key in {**self.shared, **self._given(None)}:
            if key in RECIPE_KEYS or any(key in self._keys(stage) for stage in stages):
                continue
            known = {*STAGES, *RECIPE_KEYS}.union(*map(self._keys, stages))
            raise UserError(
                f"{self.path}: {key!r} is neither a section nor a setting of any stage here.{closest(key, known)}"
            )

    def _no_section(self, name: str) -> str:
        return f"{self.path} has no section {name!r}, it has {', '.join(self.labels)}.{closest(name, self.labels)}"


def _items(path: str, name: str, section: Any) -> list[dict[str, Any]]:
    """The settings in a section, once per item if it is a list."""
    if section is None:
        return [{}]  # `base:` alone: run it with its defaults
    if isinstance(section, dict):
        return [section]
    if not isinstance(section, list) or not section or not all(isinstance(item, dict) for item in section):
        raise UserError(
            f"{path}, section {name}: must hold `key: value` settings, or a list of such settings with a name each."
        )
    names = [str(item.get("name", "")) for item in section]
    for item_name in names:
        if not re.fullmatch(r"\w[\w-]*", item_name) or names.count(item_name) > 1:
            raise UserError(
                f"{path}, section {name}: each item of a list needs a different `name` of letters, digits, _ and -. "
                f"Found {item_name!r}."
            )
    return [item | {"name": item_name} for item, item_name in zip(section, names)]


# Reading


def read_recipe(source: str | os.PathLike, options: Sequence[Option] = ()) -> Recipe:
    """
    Read a recipe, and set the environment variables it lists under `env`, as TRL does.

    Args:
        source (`str` or `os.PathLike`):
            A file, or the name of a packaged recipe (`"demo"`).
        options (sequence of [`~medst_trl.pipeline.settings.Option`], *optional*):
            Settings from the command line.

    Raises:
        UserError: if there is no such recipe, it is not valid YAML, or a section is invalid.
    """
    path = find_recipe(source)
    return Recipe(str(path), _read(path), options)


def step_of_file(stage: Stage, source: str | os.PathLike) -> Step:
    """
    The settings for one stage in a file: its section of a recipe, or the whole of a flat file as TRL has them.

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
    number = as_count(content.get("num_processes"), "num_processes", str(path))
    return Step(stage, stage.name, settings, str(path), content.get("accelerate_config"), number)


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    refuse_secrets(_all_keys(content))
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


def _all_keys(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield str(key)
            yield from _all_keys(value)
    elif isinstance(content, list):
        for item in content:
            yield from _all_keys(item)


# Files


def recipes_directory() -> Path:
    """The packaged recipes: inside the package once it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """Name to file."""
    return {path.stem: path for path in sorted(recipes_directory().glob("*.yaml"))}


def find_recipe(source: str | os.PathLike) -> Path:
    """
    Resolve a path, or the name of a packaged recipe.

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
        f"{source}: no such file or packaged recipe.{closest(path.stem, packaged)} See `medst recipes ls`."
    )


def summary(path: Path) -> str:
    """The first line of the comment at the top of a recipe."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!"))
    first = next(lines, "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Read a mapping from YAML, with `1e-4` as a number and `no` as a word.

    Raises:
        UserError: if it is not YAML, is not a mapping, or has a key twice.
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

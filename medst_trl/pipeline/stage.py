# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Stages: what each of them reads and makes, and its settings.

A stage is one file. It defines a dataclass of settings and a `main` that takes it, and registers both at the end:

```python
STAGE = STAGES.register(
    Stage(
        name="filter",
        summary="keep the pairs of long answers",
        help=__doc__,
        after=("judge",),
        arguments=lambda: (FilterArguments,),
        main=main,
        inputs=(Input("pairs", "preferences", split="split"),),
        outputs=(Output("preferences", "preferences"),),
    )
)
```

Commands, recipes, `medst recipes validate`, `--dry_run`, the push after a stage and the report read these fields. The
built-in stages are imported when `STAGES` is first read, so their modules import nothing heavy at the top: `arguments`
and `main` import what they need when they are called.
"""

import warnings
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from medst_trl.base.errors import UserError
from medst_trl.base.redaction import is_private_key
from medst_trl.base.registry import Registry


if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl.scripts.utils import TrlParser

# Kinds of inputs besides the kinds of datasets (`medst_trl.data.schema.KINDS`).
ANY = "data"  # a dataset of any kind
MODEL = "model"  # a model or an adapter: a directory or a Hub id
CHECKPOINT = "checkpoint"  # weights in another project's format: a file, a directory or a Hub id
FILE = "file"  # a file or directory on this machine
RUN = "run"  # the directory of a whole run
NO_DATASETS = frozenset({MODEL, CHECKPOINT, FILE, RUN})

COMMANDS = ("run", "recipes", "help")  # of `medst`, besides the stages


@dataclass(frozen=True)
class Count:
    """
    The number of records in a dataset that may not exist yet.

    Args:
        number (`int`, *optional*): The number; None if it is unknown.
        at_most (`bool`): Whether the number is an upper bound: some records may be rejected, or only a limit is known.
        depends_on (`str`): What must run or exist before the number is known.
    """

    number: int | None
    at_most: bool = False
    depends_on: str = ""

    def times(self, factor: int) -> "Count":
        return self if self.number is None else replace(self, number=self.number * factor)

    def capped(self, limit: int | None, skipped: int = 0) -> "Count":
        """The count without the first `skipped` records and with at most `limit`, as `max_records` sets it."""
        if self.number is None:
            return self if limit is None else Count(limit, at_most=True)
        left = max(0, self.number - skipped)
        return replace(self, number=left if limit is None else min(left, limit))

    def describe(self, noun: str) -> str:
        """The count in words: `at most 200 pairs`."""
        if self.number is None:
            return f"all {noun} of {self.depends_on}"
        return f"{'at most ' if self.at_most else ''}{self.number:,} {noun}"


class RowCounter(Protocol):
    """Counts the rows of datasets, including those that an earlier step will make."""

    def rows(self, directory: str, split: str) -> Count:
        """The number of rows in a split of a dataset, on disk or made by an earlier step."""

    def settings_of_maker(self, directory: str) -> Mapping[str, Any]:
        """The settings of the step that makes a dataset; empty if no step of the recipe does."""


@dataclass(frozen=True)
class Input:
    """
    One input of a stage.

    Args:
        key (`str`):
            The setting that names it; its value is a string or a list of strings.
        kind (`str`):
            A kind of dataset (such as `"instruct"`), `"data"` for any of them, or `"model"`, `"checkpoint"`, `"file"`
            or `"run"`.
        has_default (`bool`):
            Whether a recipe fills in a missing setting: with the output of this kind of the nearest earlier section,
            or, for the kind `"run"`, with the directory of the run.
        accepts (`Callable`, *optional*):
            Takes an earlier stage and its output, and returns whether that output can be the default.
        alternatives (`tuple` of `str`):
            Other kinds of dataset that are accepted.
        split (`str`, *optional*):
            The setting that names the split.
        default_split (`str`):
            The split if that setting is not given.
        replaced_by (`str`, *optional*):
            A setting that replaces this input: if it is given, there is no default.
        is_remote (`Callable`, *optional*):
            Takes the settings and returns whether the value is a name on a server, so that nothing is looked up on
            this machine.
    """

    key: str
    kind: str
    has_default: bool = True
    accepts: "Callable[[Stage, Output], bool]" = field(default=lambda stage, output: True)
    alternatives: tuple[str, ...] = ()
    split: str | None = None
    default_split: str = "train"
    replaced_by: str | None = None
    is_remote: Callable[[Mapping[str, Any]], bool] = field(default=lambda settings: False)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind, *self.alternatives)

    @property
    def is_dataset(self) -> bool:
        return self.kind not in NO_DATASETS

    def is_replaced(self, settings: Mapping[str, Any]) -> bool:
        """Whether the setting that replaces this input is given."""
        return self.replaced_by is not None and settings.get(self.replaced_by) is not None

    def split_in(self, settings: Mapping[str, Any]) -> str:
        """The split that the settings name."""
        return self.default_split if self.split is None else settings.get(self.split, self.default_split)

    def names(self, settings: Mapping[str, Any]) -> list[str]:
        """The paths and Hub ids that the settings give for this input."""
        value = settings.get(self.key)
        if value is None or self.is_remote(settings):
            return []
        return [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]

    def find_default(self, stages: "Iterable[Stage]") -> "tuple[Stage, Output] | None":
        """Return the first of the stages that has an output that can be the default, and that output."""
        made = ((stage, output) for stage in stages for output in stage.outputs if output.kind == self.kind)
        return next((found for found in made if self.has_default and self.accepts(*found)), None)


@dataclass(frozen=True)
class Output:
    """
    One result of a stage.

    Args:
        directory (`str`):
            Its directory inside the stage's `output_dir`; `""` for `output_dir` itself.
        kind (`str`):
            A kind of dataset, or `"model"`.
        count (`Callable`, *optional*):
            `(settings, split, counter) -> Count`: how many rows it will have, for `--dry_run`; see [`RowCounter`].
        config (`Callable`, *optional*):
            For a new model, for `--dry_run`: takes the settings and returns its configuration and whether it has the
            text role `VUSER:`; None if that is unknown before the stage has run.
        merges (`str`, *optional*):
            For a new model that merges an adapter, which is one of the inputs: the setting of that input.
        is_published (`bool`):
            Whether `push_to_hub` uploads it.
    """

    directory: str
    kind: str
    count: Callable[[Mapping[str, Any], str, RowCounter], Count] | None = None
    config: Callable[[Mapping[str, Any]], "tuple[PreTrainedConfig, bool] | None"] | None = None
    merges: str | None = None
    is_published: bool = True


@dataclass(frozen=True)
class Stage:
    """
    One stage: a command (`medst NAME`) and a section of recipes.

    A simple stage needs `name`, `summary`, `help`, `arguments`, `main`, `inputs` and `outputs`.

    Args:
        name (`str`):
            The command, the section in a recipe and the directory inside the run directory.
        summary (`str`):
            One line for `medst --help`.
        help (`str`):
            The text above the settings in `medst NAME --help`: the module's docstring.
        arguments (`Callable`):
            Returns the dataclasses of its settings. Called when they are needed, so it can import heavy modules.
        listed (`Callable`, *optional*):
            Returns the dataclasses that `--help` shows, if it should not show all (`--help all` does) or `arguments`
            imports torch.
        main (`Callable`):
            Runs the stage. Takes one object of each dataclass, without `HubArguments`.
        check (`Callable`, *optional*):
            Takes what `main` takes and raises a [`UserError`] for settings that cannot work. Called before earlier
            stages have run and for plans, so it changes nothing and looks at no paths.
        after (`tuple` of `str`):
            Stages before it. It is listed and run directly after the last of them.
        repeats (`bool`):
            Whether every round of `rounds: N` runs it. Stages after the last one that repeats run after all rounds.
        runs_in_rounds (`bool`):
            Whether a round runs it if it reads what the round makes; otherwise it runs before the rounds.
        advances (`(str, str)`, *optional*):
            The settings for the number of records to skip and to use. Each round uses the records that follow those of
            the previous round.
        distributed (`bool`):
            Whether it can use several processes. The others run in one.
        trains (`str`, *optional*):
            For a stage that trains a policy, what its examples are called, such as `"pairs"`. Its dataclasses are then
            a `TrainingStageArguments` and a `TrainingArguments`, and `--dry_run` shows parameters, batch, steps and
            memory.
        plan (`Callable`, *optional*):
            Adds rows to the plan of a recipe (`--dry_run`). Takes a [`RowCounter`] and what `main` takes, and yields
            pairs of a label and a text. Rows with the same label are shown as one.
        inputs (`tuple` of [`Input`]):
            What it reads.
        outputs (`tuple` of [`Output`]):
            What it makes.
        operational (`frozenset` of `str`):
            Settings that do not affect the result, so that a resumed run may change them; `*` matches any text.
            If more depend on other settings, the first dataclass names them in a property `operational`.
        not_shared (`frozenset` of `str`):
            Settings that must be set in the stage's section or as `--STAGE.key`. Shared settings and `--key` do not
            set them.
        registries (`Mapping` of [`Registry`]):
            Settings whose value is a name in a registry. The help lists the names, and other values are refused.
        earlier_defaults (`Mapping`):
            Values to assume for settings that records of earlier versions lack, if they differ from today's defaults.
    """

    name: str
    summary: str
    arguments: Callable[[], Sequence[type]]
    main: Callable[..., None]
    help: str = ""
    listed: Callable[[], Sequence[type]] | None = None
    check: Callable[..., Any] | None = None
    after: tuple[str, ...] = ()
    repeats: bool = False
    runs_in_rounds: bool = False
    advances: tuple[str, str] | None = None
    distributed: bool = False
    trains: str | None = None
    plan: Callable[..., Iterable[tuple[str, str]]] | None = None
    inputs: tuple[Input, ...] = ()
    outputs: tuple[Output, ...] = ()
    operational: frozenset[str] = frozenset()
    not_shared: frozenset[str] = frozenset()
    registries: Mapping[str, Registry] = field(default_factory=dict)
    earlier_defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.name in COMMANDS:
            raise UserError(f"A stage cannot have the name {self.name!r}: `medst {self.name}` is another command.")

    @property
    def published(self) -> tuple[str, ...]:
        """Directories inside its output that `push_to_hub` uploads, `""` for the output itself."""
        return tuple(output.directory for output in self.outputs if output.is_published)

    def input(self, key: str) -> Input | None:
        """The input of that setting, if it is one."""
        return next((item for item in self.inputs if item.key == key), None)

    def output(self, directory: str) -> Output | None:
        """The output in that directory, `""` or `"."` for `output_dir` itself."""
        directory = "" if directory == "." else directory
        return next((item for item in self.outputs if item.directory == directory), None)

    def makes(self, kind: str) -> bool:
        """Whether one of its outputs is of that kind."""
        return any(output.kind == kind for output in self.outputs)

    def shown_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """
        Return the settings in a record that cards and the report show: those that `--help` lists and that can change
        the result, without inputs, secrets, places and what is not set.
        """
        kinds = self.listed() if self.listed is not None else ()
        names = [item.name for kind in kinds for item in fields(kind)] or list(settings)
        hidden = {*self.operational, *(item.key for item in self.inputs), "output_dir", "overwrite"}
        for key, registry in self.registries.items():
            for item in registry.values():
                if item.name == settings.get(key):
                    hidden |= getattr(item, "operational", frozenset())
        return {
            name: value
            for name in names
            if not is_private_key(name) and not any(fnmatchcase(name, pattern) for pattern in hidden)
            if (value := settings.get(name)) not in (None, "", []) and not isinstance(value, dict)
        }

    def ignored(self, arguments: Sequence[Any], given: Collection[str]) -> Iterator[str]:
        """
        Yield a note for each setting that has no effect: those of a source, engine or metric that is not chosen.

        Args:
            arguments (sequence of dataclasses): All settings of the stage.
            given (collection of `str`): The settings that the user has given for this stage.
        """
        values = {name: value for item in arguments for name, value in vars(item).items()}
        for key, registry in self.registries.items():
            chosen = values[key] if isinstance(values[key], list) else [values[key]]
            others = [item for item in registry.values() if item.name not in chosen]
            for item in (item for item in others if getattr(item, "settings", None) is not None):
                owner = f"the {registry.kind} {item.name}, and {key} is {', '.join(map(str, chosen))}"
                for name in [setting.name for setting in fields(item.settings) if setting.name in given]:
                    yield f"{name} is ignored: it is a setting of {owner}"

    def make_parser(self, *, is_listing: bool = False) -> "TrlParser":
        """
        Make the parser of its settings. Its errors raise a [`UserError`]; argparse would print all options and exit.

        Args:
            is_listing (`bool`, *optional*, defaults to `False`):
                Whether it is only for `--help`, which shows the settings in `listed`.
        """
        from trl.scripts.utils import TrlParser

        # TRL 1.16 and PEFT 0.21 use a name that transformers 5.23 has deprecated. Users can do nothing about it.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        kinds = self.listed() if is_listing and self.listed is not None else self.arguments()
        parser = TrlParser(kinds, prog=f"medst {self.name}", formatter_class=_Help)
        parser.description, parser.error = self.help.strip(), self.refuse
        for key, registry in self.registries.items():
            action = parser._option_string_actions[f"--{key}"]
            names = ", ".join(f"{item.name} ({item.summary})" for item in registry.values())
            action.help, action.type = f"{action.help} One of {names}.".replace("%", "%%"), registry.check
        for action in parser._actions:
            if action.nargs == 0 and action.const is False:  # --no_x, which turns a flag off
                action.help = SUPPRESS
        needed = (f"{action.option_strings[0]} {action.dest.upper()}" for action in parser._actions if action.required)
        parser.usage = " ".join(["%(prog)s", *needed, "[--setting value ...]"])  # the complete one fills three screens
        parser.epilog = "`medst --help` explains --config, --accelerate_config, --no_x and --help all."
        return parser

    def refuse(self, message: str) -> NoReturn:
        """Report an invalid command line of the stage."""
        raise UserError(f"medst {self.name}: {message}. See `medst {self.name} --help`.")


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Keep the line breaks of the description, and add the default of each option."""


def _in_pipeline_order(stages: Sequence[Stage]) -> list[Stage]:
    """Put each stage directly after the last of those before it."""
    ordered, waiting = [], list(stages)
    while waiting:
        placed = [stage.name for stage in ordered]
        stage = next((stage for stage in waiting if set(stage.after) <= set(placed)), None)
        if stage is None:
            names = ", ".join(f"{stage.name} (after {', '.join(stage.after)})" for stage in waiting)
            raise UserError(
                f"Stages have a circular order, or name an unknown stage in `after`: {names}. Correct `after`."
            )
        ordered.insert(max((placed.index(name) + 1 for name in stage.after), default=0), stage)
        waiting.remove(stage)
    return ordered


STAGES: Registry[Stage] = Registry(
    "stage",
    ("medst_trl.pipeline.stages", "medst_trl.interop.convert_stage", "medst_trl.demo.base_stage"),
    ("summary", "arguments", "main"),
    _in_pipeline_order,
)

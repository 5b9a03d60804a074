# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One file a stage, each a script of its own: `make_parser()` and `main(...)`. This is the list of them."""

import warnings
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass
from importlib import import_module

from medst_trl.base.errors import UserError


@dataclass(frozen=True)
class Stage:
    """
    What the command line and recipes have to know of a stage without importing it.

    Args:
        name (`str`):
            Its command, its section in a recipe, and its file here.
        summary (`str`):
            One line for `medst --help`.
        reads (`tuple` of `(key, stage, folder)`):
            Inputs that a recipe takes from another of its sections when none is given: `key` becomes `folder` inside
            that stage's output. Of several with one key, the first whose section is there. The stage `"run"` stands
            for the folder of the whole run.
        unless (`str`, *optional*):
            A setting that stands in the place of `reads`: with it in the recipe, nothing is taken from other sections.
        distributed (`bool`, *optional*, defaults to `False`):
            Whether it can use several processes. The others run in one.
        publishes (`tuple` of `str`, *optional*):
            Folders inside its output that `push_to_hub` publishes, `""` for the output itself.
    """

    name: str
    summary: str
    reads: tuple[tuple[str, str, str], ...] = ()
    unless: str | None = None
    distributed: bool = False
    publishes: tuple[str, ...] = ()
    module: str = ""

    def __post_init__(self):
        object.__setattr__(self, "module", self.module or f"medst_trl.pipeline.stages.{self.name}")

    def make_parser(self, prog: str | None = None):
        """The stage's own parser, made to raise a `UserError` where argparse would print all its options and exit."""
        # TRL (1.16) and PEFT (0.21) go by a name that transformers (5.23) has changed: nothing a user could mend.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        parser = import_module(self.module).make_parser(prog)
        parser.formatter_class = _Help
        parser.allow_abbrev = False  # an abbreviation could be meant for the launcher
        parser.error = self._refuse
        needed = (f"{action.option_strings[0]} {action.dest.upper()}" for action in parser._actions if action.required)
        parser.usage = " ".join(["%(prog)s", *needed, "[--setting value ...]"])  # all of them fill three screens
        if self.distributed:
            parser.epilog = (
                "--config FILE reads settings from a recipe or a flat YAML file. --accelerate_config (cpu, "
                "single_gpu, multi_gpu, zero2, zero3, fsdp2, or a path), --num_processes and other options of "
                "`accelerate launch` start the stage under that launcher; without any it runs in this process."
            )
        else:
            parser.epilog = "--config FILE reads settings from a recipe or a flat YAML file."
        return parser

    def _refuse(self, message: str) -> None:
        raise UserError(f"medst {self.name}: {message}. See `medst {self.name} --help`.")

    def main(self, *arguments) -> None:
        """Runs the stage, and publishes what it has made, now or in an earlier run, where its settings say so."""
        from medst_trl.hub.after_stage import HubArguments, PushAfterStage

        push = PushAfterStage(self.publishes, arguments)
        own = [argument for argument in arguments if not isinstance(argument, HubArguments)]
        import_module(self.module).main(*own)
        push.run()


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The stage's docstring as it is written, and each option's default."""


# In the order of the data's way.
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "convert",
            "turn an original LLaVA, SQ-LLaVA or STLLaVA-Med checkpoint into a Hugging Face one",
            module="medst_trl.interop.convert_stage",
        ),
        Stage("base", "build a tiny vision-language model to start from", module="medst_trl.demo.base_stage"),
        Stage(
            "prepare",
            "turn medical images, questions and conversations into datasets",
            publishes=("instruct", "benchmark", "images"),
        ),
        Stage(
            "sft",
            "stage 1: train a model to answer and to ask",
            reads=(
                ("model_name_or_path", "convert", ""),
                ("model_name_or_path", "base", ""),
                ("dataset", "prepare", "instruct"),
            ),
            distributed=True,
            publishes=("",),
        ),
        Stage(
            "generate",
            "let the model ask about images and answer its questions, twice each",
            reads=(
                ("model_name_or_path", "sft", ""),
                ("model_name_or_path", "convert", ""),
                ("model_name_or_path", "base", ""),
                ("images", "prepare", "images"),
            ),
            distributed=True,
            publishes=("candidates",),
        ),
        Stage(
            "judge",
            "have a stronger model compare the answers, and build preference pairs",
            reads=(("candidates", "generate", "candidates"), ("benchmarks", "prepare", "benchmark")),
            publishes=("preferences",),
        ),
        Stage(
            "dpo",
            "stage 2: train the model to prefer its better answers",
            reads=(
                ("model_name_or_path", "sft", ""),
                ("model_name_or_path", "convert", ""),
                ("model_name_or_path", "base", ""),
                ("dataset", "judge", "preferences"),
            ),
            distributed=True,
            publishes=("",),
        ),
        Stage(
            "merge",
            "make a stand-alone model of an adapter, for servers and other tools",
            reads=(("model_name_or_path", "dpo", ""), ("model_name_or_path", "sft", "")),
            publishes=("",),
        ),
        Stage(
            "evaluate",
            "answer a benchmark and score the answers",
            reads=(
                ("model_name_or_path", "dpo", ""),
                ("model_name_or_path", "sft", ""),
                ("model_name_or_path", "convert", ""),
                ("model_name_or_path", "base", ""),
                ("benchmark", "prepare", "benchmark"),
            ),
            unless="predictions",
            distributed=True,
        ),
        Stage(
            "report",
            "one HTML page on a whole run: data, curves, scores, judge, gallery",
            reads=(("run", "run", ""),),
        ),
        Stage("push", "publish a dataset, an adapter or a model on the Hub"),
    )
}

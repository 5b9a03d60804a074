# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Answers a benchmark's questions and scores the answers, beside what the same model scores without the right images.

```bash
medst evaluate \
    --model_name_or_path runs/vqa_rad/sft \
    --benchmark runs/vqa_rad/prepare/benchmark \
    --output_dir runs/vqa_rad/evaluate
```

Input: a benchmark, one row an image with columns `image_id`, `image`, `questions` (`medst prepare` writes one), and a
model or an adapter. Output in `output_dir`: `predictions.jsonl` (id, image_id, question, answer, answer_type,
question_type, prediction, generation), `predictions_blank.jsonl` and `predictions_shuffled.jsonl` of the two controls,
`scores.json`, and a table on the terminal. With several benchmarks, each in a folder of its own. Run again after a
crash, it goes on where it was.

Scoring a predictions file alone needs no model (controls are compared where their files lie beside it):

```bash
medst evaluate --predictions runs/vqa_rad/evaluate/predictions.jsonl --output_dir runs/vqa_rad/rescored
medst evaluate --predictions answer-file.jsonl --predictions_format llava_med \
    --benchmark runs/vqa_rad/prepare/benchmark --output_dir runs/vqa_rad/llava_med
```

Files of LLaVA-Med, MedEvalKit and VLMEvalKit are read too, and kept as `predictions.jsonl` in our own form. Right
answers come from `benchmark` where it is given, as it has to be for LLaVA-Med's files, which hold none.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.pipeline.stage import FILE, MODEL, STAGES, Input, Output, Stage


if TYPE_CHECKING:
    from datasets import Dataset

    from medst_trl.pipeline.record import StageRecord


@dataclass
class EvaluateArguments:
    """Arguments of `medst evaluate`."""

    output_dir: str = field(metadata={"help": "Folder for predictions and scores."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a vision-language model, or of an adapter."}
    )
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base of an adapter, where it has moved from the place the adapter names."}
    )
    benchmark: list[str] = field(
        default_factory=list, metadata={"help": "Folders or Hub ids of benchmarks (`medst prepare` writes them)."}
    )
    split: str = field(default="test", metadata={"help": "Split of the benchmarks."})
    predictions: str | None = field(
        default=None, metadata={"help": "Score this predictions file instead of running a model."}
    )
    predictions_format: str | None = field(
        default=None,
        metadata={"help": "Its format: medst, llava_med, medevalkit or vlmevalkit. Default: what its keys say."},
    )
    controls: list[str] = field(
        default_factory=lambda: ["blank", "shuffled"],
        metadata={"help": "Runs with images that do not help, beside the real one: blank, shuffled, or none."},
    )
    variants: list[str] = field(
        default_factory=lambda: ["strict", "llava_med"], metadata={"help": "Rules to score by: strict, llava_med."}
    )
    closed_rule: str = field(
        default="gated",
        metadata={"help": "When llava_med takes a closed answer as right: gated, substring, drop_misses."},
    )
    batch_size: int = field(default=16, metadata={"help": "Questions answered at a time on each process."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens after which an answer is cut off."})
    max_records: int | None = field(
        default=None, metadata={"help": "Ask the first so many questions of each benchmark only."}
    )
    bootstrap_samples: int = field(
        default=1000, metadata={"help": "Resamples behind each confidence interval; 0 for none."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the shuffled images and of the resamples."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto (the checkpoint's), float32, bfloat16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let code from the model's repository run."})
    overwrite: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in output_dir and start anew."}
    )

    def __post_init__(self):
        for name in ("benchmark", "controls", "variants"):  # a recipe may give a single one without a list
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))
        if self.controls == ["none"]:
            self.controls = []


def main(args: EvaluateArguments) -> None:
    from medst_trl.evaluation.tables import format_file
    from medst_trl.pipeline.record import StageRecord

    check(args)
    benchmarks = _open_benchmarks(args)
    record = StageRecord.open(
        args.output_dir,
        stage="evaluate",
        settings=asdict(args),
        inputs={name: getattr(args, name) for name in ("model_name_or_path", "benchmark", "predictions")},
        operational=STAGE.operational,
        overwrite=args.overwrite,
    )
    folders = _folders(args)
    if record.status != "finished":
        counts = _score_file(args) if args.predictions else _run(args, record, folders, benchmarks)
        record.finish(counts=counts)
    if int(os.environ.get("RANK", "0")) == 0:
        for folder in folders:
            print(format_file(json.loads((folder / "scores.json").read_text(encoding="utf-8"))))
        print(f"Scores are in {', '.join(str(folder / 'scores.json') for folder in folders)}.")


def check(args: EvaluateArguments) -> None:
    from medst_trl.base.errors import UserError
    from medst_trl.evaluation.controls import CONTROLS
    from medst_trl.evaluation.llava_med import CLOSED_RULES
    from medst_trl.evaluation.metrics import VARIANTS
    from medst_trl.interop.predictions import FORMATS

    if args.predictions and (args.model_name_or_path or len(args.benchmark) > 1):
        raise UserError(
            "Give either predictions (to score a file, with at most one benchmark that it answers) or "
            "model_name_or_path and benchmark (to run a model)."
        )
    if args.predictions_format and not args.predictions:
        raise UserError("predictions_format says how to read predictions; give that file, or leave the format out.")
    if not args.predictions and not (args.model_name_or_path and args.benchmark):
        raise UserError("Nothing to evaluate: give model_name_or_path and benchmark, or predictions to score a file.")
    known = {"controls": CONTROLS, "variants": VARIANTS, "closed_rule": CLOSED_RULES, "predictions_format": FORMATS}
    for name, choices in known.items():
        value = getattr(args, name) or []
        if wrong := [item for item in ([value] if isinstance(value, str) else value) if item not in choices]:
            raise UserError(f"There is no {wrong[0]!r} for {name}; choose from {', '.join(choices)}.")
    for name, least in {"batch_size": 1, "max_new_tokens": 1, "max_records": 1, "bootstrap_samples": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it has to be at least {least}.")


def _folders(args: EvaluateArguments) -> list[Path]:
    """Where each benchmark's files go: several benchmarks get a folder each, by their names."""
    from medst_trl.base.errors import UserError

    output_dir = Path(args.output_dir)
    if len(args.benchmark) < 2:
        return [output_dir]
    paths = [Path(name) for name in args.benchmark]
    names = [path.parent.name if path.name == "benchmark" else path.name for path in paths]
    if len(set(names)) < len(names):
        raise UserError(
            f"Benchmarks would share a folder of output_dir: {', '.join(names)}. Evaluate them one by one."
        )
    return [output_dir / name for name in names]


def _open_benchmarks(args: EvaluateArguments) -> list["Dataset"]:
    """
    The benchmarks, or the file of predictions, checked before the record is written: a mistyped split or a missing
    benchmark must not stand in the way of the same command put right.
    """
    if args.predictions:
        from medst_trl.interop.predictions import read_predictions

        benchmark = next(iter(args.benchmark), None)
        read_predictions(args.predictions, args.predictions_format, benchmark=benchmark, split=args.split)
        return []
    from medst_trl.data.schema import check_columns, load_records
    from medst_trl.evaluation.vqa import check_control

    benchmarks = [load_records(name, args.split) for name in args.benchmark]
    for benchmark in benchmarks:
        check_columns(benchmark, "benchmark")
        for control in args.controls:
            check_control(benchmark, control, args.seed)
    return benchmarks


def _run(
    args: EvaluateArguments, record: "StageRecord", folders: list[Path], benchmarks: list["Dataset"]
) -> dict[str, Any]:
    from medst_trl import load_policy
    from medst_trl.base.processes import process_state
    from medst_trl.evaluation.score_files import control_path, score_files, write_scores
    from medst_trl.evaluation.vqa import write_predictions

    state = process_state()
    model, processor = load_policy(
        args.model_name_or_path,
        base_model_name_or_path=args.base_model_name_or_path,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    model.to(state.device)
    counts, sources = {}, record.content["inputs"]["benchmark"]
    for name, data, benchmark, folder in zip(args.benchmark, sources, benchmarks, folders):
        path = folder / "predictions.jsonl"
        for control in [None, *args.controls]:
            write_predictions(
                control_path(path, control),
                model,
                processor,
                benchmark,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                control=control,
                seed=args.seed,
                max_records=args.max_records,
                model_name=args.model_name_or_path,
            )
        if state.is_main_process:
            about = {"benchmark": name, "data": data, "split": args.split, "model": args.model_name_or_path}
            scores, _ = score_files(path, controls=args.controls, **_scoring(args))
            write_scores(folder / "scores.json", about | scores)
            counts[name] = scores["counts"]
        state.wait_for_everyone()
    return counts


def _score_file(args: EvaluateArguments) -> dict[str, Any]:
    from medst_trl.base.files import write_jsonl
    from medst_trl.evaluation.score_files import control_path, score_files, write_scores
    from medst_trl.interop.predictions import guess_format

    folder = Path(args.output_dir)
    controls = [control for control in args.controls if control_path(args.predictions, control).is_file()]
    path, rejected = args.predictions, []
    format = args.predictions_format or guess_format(path)
    if format != "medst" or args.benchmark:
        path, rejected = _in_our_form(args, format, controls)
    scores, more = score_files(path, controls=controls, **_scoring(args))
    rejected += more
    scores["counts"]["rejected"] = dict(Counter(line["reason"] for line in rejected))
    write_scores(folder / "scores.json", {"predictions": args.predictions, "format": format} | scores)
    if rejected:
        write_jsonl(folder / "rejected.jsonl", rejected)
        reasons = ", ".join(f"{number} {reason}" for reason, number in scores["counts"]["rejected"].items())
        print(f"evaluate: {len(rejected)} lines were set aside ({reasons}), see {folder / 'rejected.jsonl'}.")
    if guessed := scores["counts"].get("answer_types_guessed"):
        print(
            f"evaluate: {guessed} questions count as closed or open by whether their answer is yes or no, since "
            f"{args.predictions} does not say. Give --benchmark for the benchmark's own types."
        )
    return scores["counts"]


def _in_our_form(args: EvaluateArguments, format: str, controls: list[str]) -> tuple[Path, list[dict[str, str]]]:
    """Another project's file, and those of controls beside it, as `predictions*.jsonl`; and what was set aside."""
    from medst_trl.base.files import write_jsonl
    from medst_trl.evaluation.score_files import control_path
    from medst_trl.interop.predictions import read_predictions
    from medst_trl.interop.predictions.questions import read_questions

    path = Path(args.output_dir) / "predictions.jsonl"
    benchmark = read_questions(args.benchmark[0], args.split) if args.benchmark else None
    rejected = []
    for control in [*controls, None]:
        records, rejected = read_predictions(control_path(args.predictions, control), format, benchmark=benchmark)
        write_jsonl(control_path(path, control), records)
    return path, rejected


def _scoring(args: EvaluateArguments) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("variants", "closed_rule", "bootstrap_samples", "seed")}


STAGE = STAGES.register(
    Stage(
        name="evaluate",
        summary="answer a benchmark and score the answers",
        help=__doc__,
        after=("merge",),
        joins_rounds=True,
        distributed=True,
        arguments=lambda: (EvaluateArguments,),
        check=check,
        main=main,
        inputs=(
            Input(
                "model_name_or_path",
                MODEL,
                sources=(("dpo", ""), ("sft", ""), ("convert", ""), ("base", "")),
                unless="predictions",
            ),
            Input("base_model_name_or_path", MODEL),
            Input(
                "benchmark",
                "benchmark",
                sources=(("prepare", "benchmark"),),
                split="split",
                default_split="test",
                unless="predictions",
            ),
            Input("predictions", FILE),
        ),
        outputs=(Output("", "predictions", is_published=False),),
        operational=frozenset({"batch_size"}),
    )
)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Answer the questions of a benchmark and score the answers, next to scores on blank and shuffled images.

```bash
medst evaluate \
    --model_name_or_path runs/vqa_rad/sft \
    --benchmark runs/vqa_rad/prepare/benchmark \
    --output_dir runs/vqa_rad/evaluate
```

Input: a benchmark, one row per image with columns `image_id`, `image`, `questions` (`medst prepare` writes one), and a
model or an adapter. Output in `output_dir`: `predictions.jsonl` (id, image_id, question, answer, answer_type,
question_type, prediction, generation), `predictions_blank.jsonl` and `predictions_shuffled.jsonl` for the two
controls, `scores.json`, and `contamination.json`: what the benchmark shares with the training data of the model, as
far as that is known. A table is printed. If you give several benchmarks, each gets its own directory. An interrupted
run resumes. Unless `batch_size` is set, a model in this process answers 16 questions per batch.

To evaluate a model on an OpenAI-compatible server, with the same questions, images and controls (questions that the
server refuses count as wrong):

```bash
medst evaluate --engine server --base_url https://api.openai.com/v1 --server_kind openai --model_name_or_path gpt-4o \
    --benchmark runs/vqa_rad/prepare/benchmark --output_dir runs/gpt_4o
```

To score a predictions file, you need no model. Controls are included if their files are beside it:

```bash
medst evaluate --predictions runs/vqa_rad/evaluate/predictions.jsonl --output_dir runs/vqa_rad/rescored
medst evaluate --predictions answer-file.jsonl --predictions_format llava_med \
    --benchmark runs/vqa_rad/prepare/benchmark --output_dir runs/vqa_rad/llava_med
```

Predictions of other projects are converted to our format and saved as `predictions.jsonl`. The right answers come from
`benchmark` if it is given. LLaVA-Med's files need it, because they do not contain the right answers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import read_object, write_json, write_jsonl
from medst_trl.base.processes import process_state, rank
from medst_trl.base.settings import check_bounds, check_choice, documented, make_lists, settings_among
from medst_trl.data.loading import load_records, split_files
from medst_trl.data.source import list_reasons
from medst_trl.engines.calls import NOT_SHARED
from medst_trl.engines.engine import DEFAULT_ENGINE, ENGINES, loads_model
from medst_trl.evaluation.contamination import CONTAMINATION_FILE, Contamination
from medst_trl.evaluation.metric import METRICS
from medst_trl.evaluation.predictions import (
    OWN_FORMAT,
    PREDICTION_FORMATS,
    PREDICTIONS_FILE,
    control_path,
    guess_format,
    read_predictions,
    read_questions,
    score_predictions,
)
from medst_trl.evaluation.scores_file import SCORES_FILE, ScoresFile
from medst_trl.evaluation.vqa import CONTROLS, shown_rows, write_predictions
from medst_trl.pipeline.lineage import check_contamination
from medst_trl.pipeline.record import StageRecord
from medst_trl.pipeline.stage import FILE, MODEL, STAGES, Count, Input, Output, RowCounter, Stage


# Records and rejected lines of the answers (under None) and of each control.
_Predictions = Mapping[str | None, tuple[list[dict[str, Any]], list[dict[str, Any]]]]

BATCH_SIZE = 16  # of a model in this process, unless batch_size is given; the same as in earlier versions


@documented
@dataclass
class EvaluateArguments:
    """
    Arguments of `medst evaluate`, besides the settings of engines and metrics.

    Args:
        output_dir (`str`):
            Directory for predictions and scores.
        model_name_or_path (`str`, *optional*):
            Directory or Hub id of a vision-language model or an adapter. For the engine server, the model's name on
            the server.
        engine (`str`, *optional*, defaults to `"transformers"`):
            What answers the questions.
        benchmark (`list[str]`, *optional*, defaults to `[]`):
            Directories or Hub ids of one or more benchmarks (`medst prepare` writes them).
        split (`str`, *optional*, defaults to `"test"`):
            Split of the benchmarks.
        predictions (`str`, *optional*):
            Score this predictions file instead of running a model.
        predictions_format (`str`, *optional*):
            Format of the predictions file. Default: detected from its keys.
        controls (`list[str]`, *optional*, defaults to `["blank", "shuffled"]`):
            Additional runs with wrong images: blank (a gray image), shuffled (the image of another question), or none.
        variants (`list[str]`, *optional*, defaults to `["strict", "llava_med"]`):
            Metrics to compute. The default is those that come with the package.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Maximum number of tokens of an answer.
        max_records (`int`, *optional*):
            Ask only the first N questions of each benchmark.
        bootstrap_samples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap samples for each confidence interval; 0 for no intervals.
        seed (`int`, *optional*, defaults to `0`):
            Seed for the shuffled images and the bootstrap samples.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the results of an earlier run in output_dir and start again.
    """

    output_dir: str
    model_name_or_path: str | None = None
    engine: str = DEFAULT_ENGINE
    benchmark: list[str] = field(default_factory=list)
    split: str = "test"
    predictions: str | None = None
    predictions_format: str | None = None
    controls: list[str] = field(default_factory=lambda: ["blank", "shuffled"])
    variants: list[str] = field(default_factory=METRICS.built_in)
    max_new_tokens: int = 64
    max_records: int | None = None
    bootstrap_samples: int = 1000
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        make_lists(self, "benchmark", "controls", "variants")
        if self.controls == ["none"]:
            self.controls = []


def main(args: EvaluateArguments, *settings: Any) -> None:
    """
    Run the stage.

    Args:
        args ([`EvaluateArguments`]): Arguments.
        *settings: Settings of engines and metrics; those left out keep their defaults.
    """
    check(args, *settings)
    engine_settings = settings_among(settings, ENGINES.get(args.engine).settings)
    if getattr(engine_settings, "batch_size", 1) is None:  # one that does not depend on memory: it can change answers
        engine_settings = replace(engine_settings, batch_size=BATCH_SIZE)
    record = StageRecord.of(STAGE, args, engine_settings, *settings)
    if record.decision != "skip":
        with record:
            if args.predictions:
                counts = _score_file(args, settings)
            else:
                counts = _run(args, engine_settings, settings, record.content["inputs"]["benchmark"])
            record.finish(counts=counts)
    if rank() == 0:  # the others need not wait for it
        if not args.predictions:
            with suppress(UserError):  # a finished evaluation whose benchmark cannot be downloaded any more
                _check_contamination(args)
        if not record.is_silent:
            paths = [directory / SCORES_FILE for directory in _output_directories(args)]
            for path in paths:
                print(ScoresFile.read(path))
                print(Contamination.read(path.with_name(CONTAMINATION_FILE)) or Contamination())
            print(f"Scores are in {', '.join(map(str, paths))}.")


def check(args: EvaluateArguments, *settings: Any) -> None:
    """Raise a `UserError` for arguments that contradict each other or are invalid."""
    if args.predictions and (args.model_name_or_path or len(args.benchmark) > 1):
        raise UserError("Give either predictions with at most one benchmark, or model_name_or_path and benchmark.")
    if args.predictions_format and not args.predictions:
        raise UserError("predictions_format needs predictions. Give that file, or leave the format out.")
    if not args.predictions and not (args.model_name_or_path and args.benchmark):
        raise UserError("Nothing to evaluate. Give model_name_or_path and benchmark, or predictions to score a file.")
    kind = ENGINES.get(args.engine)
    if not args.predictions:
        kind.check(settings_among(settings, kind.settings), args.model_name_or_path)
    for control in args.controls:
        check_choice("control", control, CONTROLS)
    check_bounds(args, at_least={"max_new_tokens": 1, "max_records": 1, "bootstrap_samples": 0})
    _output_directories(args)


def _output_directories(args: EvaluateArguments) -> list[Path]:
    """Return the output directory of each benchmark. Several benchmarks get one each, named after them."""
    output_dir = Path(args.output_dir)
    if len(args.benchmark) < 2:
        return [output_dir]
    paths = [Path(name) for name in args.benchmark]
    names = [path.parent.name if path.name == "benchmark" else path.name for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"Benchmarks would share a directory: {', '.join(names)}. Evaluate them one by one.")
    return [output_dir / name for name in names]


def _run(args: EvaluateArguments, engine_settings: Any, settings: Sequence[Any], data: list[dict]) -> dict[str, Any]:
    """Answer the benchmarks, whose fingerprints are `data`, and write their scores. Return their counts."""
    benchmarks = [load_records(name, args.split, "benchmark") for name in args.benchmark]
    for benchmark in benchmarks:
        for control in args.controls:  # before the model answers anything
            shown_rows(benchmark["image_id"][:], control, args.seed)
    engine = ENGINES.get(args.engine).open(args.model_name_or_path, engine_settings)
    engine.model_name = args.model_name_or_path
    engine.check()
    state, counts = process_state(), {}
    asking = {name: getattr(args, name) for name in ("max_new_tokens", "seed", "max_records")}
    for name, source, directory, benchmark in zip(args.benchmark, data, _output_directories(args), benchmarks):
        paths = {one: control_path(directory / PREDICTIONS_FILE, one) for one in (None, *args.controls)}
        for control, path in paths.items():
            write_predictions(path, engine, benchmark, control=control, **asking)
        if state.is_main_process:
            found = {control: read_predictions(path, OWN_FORMAT) for control, path in paths.items()}
            header = {"benchmark": name, "data": source, "split": args.split, "model": args.model_name_or_path}
            counts[name] = _write_scores(args, settings, directory, found, header)
        state.wait_for_everyone()
    return counts


def _check_contamination(args: EvaluateArguments) -> None:
    """Write the contamination of each benchmark, also of an evaluation of an earlier version that has none."""
    paths = [directory / CONTAMINATION_FILE for directory in _output_directories(args)]
    todo = {path: name for path, name in zip(paths, args.benchmark) if Contamination.read(path) is None}
    model = args.model_name_or_path if ENGINES.get(args.engine).loads_model else None
    benchmarks = [(Path(name), load_records(name, args.split, "benchmark")) for name in todo.values()]
    for path, found in zip(todo, check_contamination(model, benchmarks)):
        write_json(path, found)


def _score_file(args: EvaluateArguments, settings: Sequence[Any]) -> dict[str, Any]:
    """Score a predictions file, and those of its controls beside it. Return the counts."""
    path, output_dir = Path(args.predictions), Path(args.output_dir)
    file_format = args.predictions_format or guess_format(path)
    questions = read_questions(args.benchmark[0], args.split) if args.benchmark else None
    paths = {None: path} | {control: control_path(path, control) for control in args.controls}
    found = {
        control: read_predictions(path, file_format, benchmark=questions)
        for control, path in paths.items()
        if control is None or path.is_file()
    }
    counts = _write_scores(args, settings, output_dir, found, {"predictions": args.predictions, "format": file_format})
    if file_format != OWN_FORMAT:
        for control, (records, _) in found.items():
            write_jsonl(control_path(output_dir / PREDICTIONS_FILE, control), records)
    elif path.name == PREDICTIONS_FILE and (shared := read_object(path.with_name(CONTAMINATION_FILE))):
        write_json(output_dir / CONTAMINATION_FILE, shared)  # that of other files can be of another model or benchmark
    if guessed := counts.get("answer_types_guessed"):
        print(
            f"evaluate: {args.predictions} does not say which questions are closed. {guessed} count as closed if "
            "their answer is yes or no, otherwise as open. Give --benchmark to use the benchmark's own types."
        )
    return counts


def _write_scores(
    args: EvaluateArguments, settings: Sequence[Any], directory: Path, found: _Predictions, header: dict[str, Any]
) -> dict[str, Any]:
    """Score predictions, and write the scores below `header`, which says what was scored. Return the counts."""
    records, rejected = found[None]
    controls = {name: answers for name, (answers, _) in found.items() if name is not None}
    scoring = {name: getattr(args, name) for name in ("variants", "bootstrap_samples", "seed")}
    scores = score_predictions(records, controls, settings=settings, **scoring)
    scores["counts"]["rejected"] = dict(Counter(line["reason"] for line in rejected))
    write_json(directory / SCORES_FILE, header | scores)
    if rejected:
        write_jsonl(directory / "rejected.jsonl", rejected)
        reasons = list_reasons(scores["counts"]["rejected"])
        print(f"evaluate: {len(rejected)} lines were rejected ({reasons}), see {directory / 'rejected.jsonl'}.")
    return scores["counts"]


def plan(counter: RowCounter, args: EvaluateArguments, *settings: Any) -> Iterator[tuple[str, str]]:
    """Yield the stage's rows in a plan."""
    if args.predictions:
        yield "scores", args.predictions
        return
    again = f", each again for {' and '.join(args.controls)}" if args.controls else ""
    for name in args.benchmark:
        count = _count_questions(name, args.split).capped(args.max_records)
        yield "answers", f"{name}: {'its questions' if count.number is None else count.describe('questions')}{again}"


def _count_questions(benchmark: str, split: str) -> Count:
    """Count the questions of a benchmark in Parquet files on this machine. Others have to be read as a whole."""
    from pyarrow import compute, parquet

    try:
        files = split_files(Path(benchmark), split)
        questions = parquet.read_table(files, columns=["questions"], partitioning=None)["questions"]
    except (UserError, OSError, ValueError, KeyError):  # also of Arrow, for other files and columns
        return Count(None)
    return Count(compute.sum(compute.list_value_length(questions)).as_py() or 0)


STAGE = Stage(
    name="evaluate",
    summary="answer the questions of a benchmark and score the answers",
    help=__doc__,
    after=("merge",),
    runs_in_rounds=True,
    distributed=True,
    arguments=lambda: (EvaluateArguments, *ENGINES.settings(), *METRICS.settings()),
    check=check,
    main=main,
    plan=plan,
    inputs=(
        Input(
            "model_name_or_path",
            MODEL,
            accepts=lambda stage, output: output.merges is None,
            replaced_by="predictions",
            is_remote=lambda settings: not loads_model(settings),
        ),
        Input("base_model_name_or_path", MODEL, has_default=False),
        Input("benchmark", "benchmark", split="split", default_split="test", replaced_by="predictions"),
        Input("predictions", FILE),
    ),
    outputs=(Output("", "predictions", is_published=False),),
    not_shared=NOT_SHARED,
    earlier_defaults={"engine": DEFAULT_ENGINE},
    registries={"engine": ENGINES, "variants": METRICS, "predictions_format": PREDICTION_FORMATS},
)
STAGES.register(STAGE)

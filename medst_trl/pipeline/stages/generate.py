# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
The policy asks about unlabelled images and answers each of its questions twice: candidates for preference pairs.

```bash
medst generate \
    --model_name_or_path runs/vqa_rad/sft \
    --images runs/vqa_rad/prepare/instruct \
    --num_questions 2 \
    --output_dir runs/vqa_rad/generate
```

Input: images with columns `id`, `images`, `image_ids`, `messages` (not looked at, so `instruct/` of `medst prepare`
serves as well as `images/`, which sources such as VQA-RAD do not have), and a policy that stage 1 taught to ask.
Where `images/` is asked for and `instruct/` alone is there, that is read. Output in `output_dir`: `candidates/`
(Parquet; `id`, `images`, `image_ids`, `prompt`, `answers`, `generation`) for `medst judge`, `rejected.jsonl` with the
reason for each question and record that was set aside, and counts in `stage.json`. Run again after a crash, it goes on
where it was. Several processes share the images; with the engine `transformers` the candidates are the same for any
number.

With a server that runs the policy (vLLM, SGLang, `transformers serve`), which has to use the policy's chat template:

```bash
medst generate --engine server --server_kind vllm --base_url http://localhost:8000/v1 \
    --model_name_or_path runs/vqa_rad/merged --images runs/vqa_rad/prepare/instruct \
    --output_dir runs/vqa_rad/generate
```
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.hub.after_stage import HubArguments
from medst_trl.pipeline.stage import MODEL, STAGES, Count, Counter, Input, Output, Stage


if TYPE_CHECKING:
    from datasets import Dataset

    from medst_trl.selftrain.generate import CandidateGenerator

ENGINES = ("transformers", "server")


@dataclass
class GenerateArguments:
    """Arguments of `medst generate`."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub id of a policy or its adapter; for a server, its name there."}
    )
    images: str = field(
        metadata={"help": "Folder or Hub id of images to ask about; `medst prepare` writes images/ or instruct/."}
    )
    output_dir: str = field(metadata={"help": "Folder for the candidates."})
    split: str = field(default="train", metadata={"help": "Split of the images."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base of an adapter, where it has moved from the place the adapter names."}
    )
    num_questions: int = field(default=1, metadata={"help": "Questions about each image, drawn independently."})
    num_answers: int = field(
        default=2,
        metadata={"help": "Answers to each question; the first and second, third and fourth ... are a pair."},
    )
    temperature: float = field(default=1.2, metadata={"help": "Temperature of answers."})
    top_k: int = field(default=100, metadata={"help": "Draw answers from the so many likeliest tokens; 0: all."})
    top_p: float = field(
        default=0.95, metadata={"help": "Draw answers from tokens of this total probability; 1: all."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens after which an answer is cut off."})
    question_temperature: float = field(default=1.2, metadata={"help": "Temperature of questions; 0: the likeliest."})
    question_top_k: int = field(default=100, metadata={"help": "The same as top_k for questions."})
    question_top_p: float = field(default=0.95, metadata={"help": "The same as top_p for questions."})
    max_question_tokens: int = field(default=128, metadata={"help": "Tokens after which a question is cut off."})
    describe_first: bool = field(
        default=False,
        metadata={"help": "Describe the image first, greedily, and ask and answer with that as history."},
    )
    skip_records: int = field(
        default=0, metadata={"help": "Leave out the first so many records: an earlier round has used them."}
    )
    max_records: int | None = field(default=None, metadata={"help": "Ask about so many records only."})
    min_question_words: int = field(default=3, metadata={"help": "Shorter questions are set aside."})
    max_question_words: int = field(default=60, metadata={"help": "Longer questions are set aside."})
    english_questions: bool = field(
        default=True,
        metadata={"help": "Set aside what does not read as an English question; false for other languages."},
    )
    max_answer_similarity: float = field(
        default=0.95,
        metadata={
            "help": "Answers that share more of their words are nearly identical and set aside; 1: only equals."
        },
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Texts written at a time on each process; by default as many as fit, on a CPU 16."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all draws (a server makes no promise about it)."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto (the checkpoint's), float32, bfloat16."})
    engine: str = field(
        default="transformers", metadata={"help": "What runs the model: transformers (this process) or server."}
    )
    base_url: str | None = field(
        default=None, metadata={"help": "server: where its API begins. Its key: OPENAI_API_KEY in the environment."}
    )
    server_kind: str = field(
        default="vllm", metadata={"help": "server: how it takes sampling settings: vllm, sglang, transformers."}
    )
    concurrency: int = field(default=32, metadata={"help": "server: requests at a time from each process."})
    rows_per_shard: int = field(default=512, metadata={"help": "Rows in one Parquet file."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let code from the model's repository run."})
    overwrite: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in output_dir and start anew."}
    )


def main(args: GenerateArguments) -> None:
    from medst_trl.base.files import explain_full_disk
    from medst_trl.data.schema import check_columns, load_records
    from medst_trl.pipeline.record import StageRecord
    from medst_trl.selftrain.generate.files import select_records

    settings = settings_of(args)
    args = replace(args, images=_images(args.images))
    images = load_records(args.images, args.split)
    check_columns(images, "instruct")
    records, rejected = select_records(images, args.skip_records, args.max_records)
    server = _server(args)
    record = StageRecord.open(
        args.output_dir,
        stage="generate",
        settings=asdict(args),
        inputs={"images": args.images} | ({} if server else {"model_name_or_path": args.model_name_or_path}),
        operational=STAGE.operational,
        overwrite=args.overwrite,
    )
    if record.status != "finished":
        log = Path(args.output_dir, ".generated.jsonl")
        try:
            generator = _generator(args, settings, server)
            with explain_full_disk(args.output_dir):
                counts = _run(args, generator, records, rejected, log)
        except Exception:
            _leave_if_empty(log)
            raise
        record.finish(counts=counts)
        if int(os.environ.get("RANK", "0")) == 0:
            log.unlink(missing_ok=True)
            _report(args, counts)


def _images(images: str) -> str:
    """The folder to read: `instruct/` for the `images/` that a finished `medst prepare` did not write."""
    from medst_trl.pipeline.record import FILE_NAME

    folder = Path(images)
    instruct = folder.parent / "instruct"
    if folder.name != "images" or folder.exists() or not instruct.is_dir():
        return images
    try:
        record = json.loads((folder.parent / FILE_NAME).read_text(encoding="utf-8"))
        finished = (record["stage"], record["status"]) == ("prepare", "complete")
    except (OSError, ValueError, LookupError, TypeError):
        finished = False
    if not finished:
        return images
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"generate: {images} does not exist, the images of {instruct} are taken (not their messages).")
    return str(instruct)


def settings_of(args: GenerateArguments) -> dict[str, Any]:
    """How [`CandidateGenerator`] is to work, checked."""
    from medst_trl.base.errors import UserError
    from medst_trl.engines.prompts import Sampling
    from medst_trl.policy.loading import DTYPES
    from medst_trl.selftrain.generate.filters import QuestionFilter

    if args.engine not in ENGINES:
        raise UserError(f"There is no engine {args.engine!r}; choose from {', '.join(ENGINES)}.")
    if args.dtype not in DTYPES:
        raise UserError(f"There is no dtype {args.dtype!r}; choose from {', '.join(DTYPES)}.")
    if args.engine == "server" and not args.base_url:
        raise UserError("The engine `server` needs base_url, for example --base_url http://localhost:8000/v1.")
    least = {
        "num_questions": 1, "num_answers": 2, "temperature": 0.01, "top_k": 0, "top_p": 0.01, "max_new_tokens": 1,
        "question_temperature": 0, "question_top_k": 0, "question_top_p": 0.01, "max_question_tokens": 1,
        "skip_records": 0, "max_records": 1, "min_question_words": 1, "max_question_words": args.min_question_words,
        "max_answer_similarity": 0, "batch_size": 1, "concurrency": 1, "rows_per_shard": 1,
    }  # fmt: skip
    most = {"top_p": 1, "question_top_p": 1, "max_answer_similarity": 1}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value <= most.get(name, float("inf")):
            upper = f" and at most {most[name]}" if name in most else ""
            raise UserError(f"{name} is {value}; it has to be at least {bound}{upper}.")
    return {
        "num_questions": args.num_questions,
        "num_answers": args.num_answers,
        "question_sampling": Sampling(
            args.question_temperature, args.question_top_k, args.question_top_p, args.max_question_tokens
        ),
        "answer_sampling": Sampling(args.temperature, args.top_k, args.top_p, args.max_new_tokens),
        "describe_first": args.describe_first,
        "question_filter": QuestionFilter(
            args.min_question_words, args.max_question_words, english=args.english_questions
        ),
        "max_answer_similarity": args.max_answer_similarity,
        "seed": args.seed,
        "model_name": _public_name(args.model_name_or_path),
    }


def _public_name(model_name_or_path: str) -> str:
    """Candidates are made to be shared, and a local path is nobody else's business."""
    path = Path(model_name_or_path)
    return path.name if path.exists() else model_name_or_path


def _server(args: GenerateArguments):
    """The server, if there is to be one. It has to answer, unless there is nothing left to ask."""
    if args.engine != "server":
        return None
    from medst_trl.engines.server import ChatServer

    server = ChatServer(args.base_url, args.model_name_or_path, args.server_kind, args.concurrency)
    if not Path(args.output_dir, "candidates").is_dir():
        server.check()
    return server


def _generator(args: GenerateArguments, settings: dict[str, Any], server) -> "CandidateGenerator":
    from medst_trl import CandidateGenerator, load_policy
    from medst_trl.base.processes import process_state

    if server is not None:
        return CandidateGenerator(server, **settings)
    state = process_state()
    model, processor = load_policy(
        args.model_name_or_path,
        base_model_name_or_path=args.base_model_name_or_path,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    return CandidateGenerator(model.to(state.device), processor, batch_size=args.batch_size, **settings)


def _run(
    args: GenerateArguments,
    generator: "CandidateGenerator",
    records: "Dataset",
    rejected: list[dict[str, str]],
    path: Path,
) -> dict[str, Any] | None:
    """Complete the log; then the first process writes the files and returns their counts."""
    from medst_trl.base.row_log import RowLog
    from medst_trl.selftrain.generate.files import write_candidates

    RowLog.fill(path, records["id"], lambda done: generator.outcomes(records, done))
    if int(os.environ.get("RANK", "0")) > 0:
        return None
    outcomes = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return write_candidates(
        Path(args.output_dir), records, outcomes, rejected, generator.generation(), args.rows_per_shard
    )


def _leave_if_empty(log: Path) -> None:
    """A start that wrote no text, such as one with the wrong model, must not hold the folder to its settings."""
    from medst_trl.pipeline.record import FILE_NAME

    if int(os.environ.get("RANK", "0")) > 0:
        return
    parts = list(log.parent.glob(f"{log.name}*"))
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # an empty part of another process may not stay empty
    if not any(part.stat().st_size or not alone for part in parts):
        for part in parts:
            part.unlink()
        log.with_name(FILE_NAME).unlink(missing_ok=True)


def _report(args: GenerateArguments, counts: dict[str, Any]) -> None:
    print(
        f"generate: {counts['candidates']:,} candidates with {counts['answers']:,} answers, from "
        f"{counts['questions']:,} questions about {counts['images']:,} images, are in "
        f"{Path(args.output_dir, 'candidates')}."
    )
    if counts["rejected"]:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in counts["rejected"].items())
        print(f"  set aside: {reasons} (see {Path(args.output_dir, 'rejected.jsonl')})")


def _count(settings: Mapping[str, Any], split: str, counter: Counter) -> Count:
    """Questions with answers that it writes at most: some are filtered."""
    return replace(images_to_ask_about(settings, counter).times(settings.get("num_questions", 1)), at_most=True)


def images_to_ask_about(settings: Mapping[str, Any], counter: Counter) -> Count:
    """Images that the stage asks about, for a plan."""
    if "images" not in settings:
        return Count(None, depends_on="images")
    images = counter.rows(settings["images"], settings.get("split", "train"))
    if images.number is None and Path(settings["images"]).name == "images":  # as `main` does without images/
        images = counter.rows(str(Path(settings["images"]).with_name("instruct")), "train")
    return images.capped(settings.get("max_records"), settings.get("skip_records", 0))


STAGE = STAGES.register(
    Stage(
        name="generate",
        summary="let the model ask about images and answer its questions, twice each",
        help=__doc__,
        after=("sft",),
        repeats=True,
        advances=("skip_records", "max_records"),
        distributed=True,
        arguments=lambda: (GenerateArguments, HubArguments),
        check=settings_of,
        main=main,
        inputs=(
            Input(
                "model_name_or_path",
                MODEL,
                sources=(("sft", ""), ("convert", ""), ("base", "")),
                is_remote=lambda settings: settings.get("engine") == "server",
            ),
            Input("base_model_name_or_path", MODEL),
            Input("images", "instruct", sources=(("prepare", "images"),), alternatives=("images",), split="split"),
        ),
        outputs=(Output("candidates", "candidates", _count),),
        operational=frozenset({"batch_size", "base_url", "concurrency"}),
    )
)

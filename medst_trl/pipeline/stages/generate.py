# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Let the policy ask about unlabeled images and answer each of its questions twice: candidates for preference pairs.

```bash
medst generate \
    --model_name_or_path runs/vqa_rad/sft \
    --images runs/vqa_rad/prepare/instruct \
    --num_questions 2 \
    --output_dir runs/vqa_rad/generate
```

Input: a policy that stage 1 trained to ask, and a dataset with a column `images` or `image`, for example `images/` or
`instruct/` of `medst prepare`. If `images/` does not exist, `instruct/` beside it is read. Output in `output_dir`:
`candidates/` (Parquet with columns `id`, `images`, `image_ids`, `prompt`, `answers`, `generation`) for `medst judge`,
`rejected.jsonl` with the reason for each rejected question and record, and counts in `stage.json`. An interrupted run
resumes where it stopped. Several processes share the images. With the engine `transformers`, the candidates are the
same for any number of processes.

To generate on a server that runs the policy with its chat template (vLLM, SGLang, `transformers serve`):

```bash
medst generate --engine server --server_kind vllm --base_url http://localhost:8000/v1 \
    --model_name_or_path runs/vqa_rad/merged --images runs/vqa_rad/prepare/instruct \
    --output_dir runs/vqa_rad/generate
```
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError, number_of
from medst_trl.base.files import fill_rows, read_jsonl, write_jsonl
from medst_trl.base.processes import rank
from medst_trl.base.settings import check_bounds, documented, settings_among
from medst_trl.data.loading import load_records
from medst_trl.data.schema import features_of, write_split
from medst_trl.data.source import list_reasons
from medst_trl.engines.calls import NOT_SHARED
from medst_trl.engines.engine import DEFAULT_ENGINE, ENGINES, Sampling, loads_model
from medst_trl.hub import HubArguments
from medst_trl.pipeline.record import StageRecord, was_skipped_as_empty
from medst_trl.pipeline.stage import MODEL, STAGES, Count, Input, Output, RowCounter, Stage
from medst_trl.selftrain.candidates import CandidateGenerator
from medst_trl.selftrain.filters import QuestionFilter


if TYPE_CHECKING:
    from datasets import Dataset


@documented
@dataclass
class GenerateArguments:
    """
    Arguments of `medst generate`, besides the settings of engines.

    Args:
        model_name_or_path (`str`):
            Directory or Hub id of a policy or its adapter. For the engine server, the model's name on the server.
        images (`str`):
            Directory or Hub id of the images to ask about: images/ or instruct/ of `medst prepare`.
        output_dir (`str`):
            Directory for the candidates.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the images.
        engine (`str`, *optional*, defaults to `"transformers"`):
            What runs the model.
        num_questions (`int`, *optional*, defaults to `1`):
            Number of questions about each image, sampled independently.
        num_answers (`int`, *optional*, defaults to `2`):
            Number of answers to each question. The first and second are a pair, the third and fourth, and so on.
        temperature (`float`, *optional*, defaults to `1.2`):
            Sampling temperature of answers.
        top_k (`int`, *optional*, defaults to `100`):
            Sample answers from the k most likely tokens; 0 for all.
        top_p (`float`, *optional*, defaults to `0.95`):
            Sample answers from the most likely tokens with this total probability; 1 for all.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of an answer.
        question_temperature (`float`, *optional*, defaults to `1.2`):
            Sampling temperature of questions; 0 is greedy.
        question_top_k (`int`, *optional*, defaults to `100`):
            top_k of questions.
        question_top_p (`float`, *optional*, defaults to `0.95`):
            top_p of questions.
        max_question_tokens (`int`, *optional*, defaults to `128`):
            Maximum number of tokens of a question.
        describe_first (`bool`, *optional*, defaults to `False`):
            Let the model describe the image first, with greedy decoding. The description is the first turn when it
            asks and answers.
        skip_records (`int`, *optional*, defaults to `0`):
            Skip the first N records, because an earlier round has used them.
        max_records (`int`, *optional*):
            Ask about at most N records.
        min_question_words (`int`, *optional*, defaults to `3`):
            Reject questions with fewer words.
        max_question_words (`int`, *optional*, defaults to `60`):
            Reject questions with more words.
        english_questions (`bool`, *optional*, defaults to `True`):
            Reject texts that do not look like an English question. Set it to false for other languages.
        max_answer_similarity (`float`, *optional*, defaults to `0.95`):
            Reject pairs of answers that share a larger fraction of their words. 1 rejects only equal answers.
        seed (`int`, *optional*, defaults to `0`):
            Seed for sampling. A server may ignore it.
        rows_per_shard (`int`, *optional*, defaults to `512`):
            Rows per Parquet file.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the results of an earlier run in output_dir and start again.
    """

    model_name_or_path: str
    images: str
    output_dir: str
    split: str = "train"
    engine: str = DEFAULT_ENGINE
    num_questions: int = 1
    num_answers: int = 2
    temperature: float = 1.2
    top_k: int = 100
    top_p: float = 0.95
    max_new_tokens: int = 256
    question_temperature: float = 1.2
    question_top_k: int = 100
    question_top_p: float = 0.95
    max_question_tokens: int = 128
    describe_first: bool = False
    skip_records: int = 0
    max_records: int | None = None
    min_question_words: int = 3
    max_question_words: int = 60
    english_questions: bool = True
    max_answer_similarity: float = 0.95
    seed: int = 0
    rows_per_shard: int = 512
    overwrite: bool = False


_AT_LEAST = {
    "num_questions": 1, "num_answers": 2, "temperature": 0.01, "top_k": 0, "top_p": 0.01, "max_new_tokens": 1,
    "question_temperature": 0, "question_top_k": 0, "question_top_p": 0.01, "max_question_tokens": 1,
    "skip_records": 0, "max_records": 1, "min_question_words": 1, "max_answer_similarity": 0, "rows_per_shard": 1,
}  # fmt: skip
_AT_MOST = {"top_p": 1, "question_top_p": 1, "max_answer_similarity": 1}


def main(args: GenerateArguments, *engine_settings: Any) -> None:
    """
    Run the stage.

    Args:
        args ([`GenerateArguments`]): Arguments.
        *engine_settings: Settings of engines; those of the chosen one default to its defaults.
    """
    check(args, *engine_settings)
    args = replace(args, images=_find_images(args.images))
    images = load_records(args.images, args.split, "images")
    records, rejected = select_records(images, args.skip_records, args.max_records)
    record = StageRecord.of(STAGE, args, *engine_settings)
    if record.decision == "skip":
        return
    log, counts = record.output_dir / ".generated.jsonl", None
    with record:
        kind = ENGINES.get(args.engine)
        engine = kind.open(args.model_name_or_path, settings_among(engine_settings, kind.settings))
        engine.model_name = args.model_name_or_path
        if not log.exists():
            engine.check()
        generator = make_generator(args, engine)
        fill_rows(log, records["id"], lambda done: generator.outcomes(records, done))
        if rank() == 0:
            counts = _write_candidates(args, records, read_jsonl(log), rejected, generator.row_maker(records))
        record.finish(counts=counts)
    if rank() == 0:
        log.unlink(missing_ok=True)
        print(
            f"generate: {counts['candidates']:,} candidates with {counts['answers']:,} answers, from "
            f"{counts['questions']:,} questions about {number_of(format(counts['images'], ','), 'image')}, are in "
            f"{record.output_dir / 'candidates'}."
        )
        if counts["rejected"]:
            print(f"  rejected: {list_reasons(counts['rejected'])} (see {record.output_dir / 'rejected.jsonl'})")


def check(args: GenerateArguments, *engine_settings: Any) -> None:
    """Raise a `UserError` for arguments that are invalid."""
    kind = ENGINES.get(args.engine)
    kind.check(settings_among(engine_settings, kind.settings), args.model_name_or_path)
    check_bounds(args, at_least=_AT_LEAST | {"max_question_words": args.min_question_words}, at_most=_AT_MOST)


def make_generator(args: GenerateArguments, engine: Any) -> CandidateGenerator:
    """Return a generator with the settings of the stage."""
    asking = args.question_temperature, args.question_top_k, args.question_top_p, args.max_question_tokens
    names = ("num_questions", "num_answers", "describe_first", "max_answer_similarity", "seed")
    return CandidateGenerator(
        engine,
        question_sampling=Sampling(*asking),
        answer_sampling=Sampling(args.temperature, args.top_k, args.top_p, args.max_new_tokens),
        question_filter=QuestionFilter(args.min_question_words, args.max_question_words, args.english_questions),
        **{name: getattr(args, name) for name in names},
    )


def _find_images(images: str) -> str:
    """Return the directory to read: `instruct/` if a finished stage did not make `images/`."""
    instruct = Path(images).with_name("instruct")
    if not (was_skipped_as_empty(images, "images") and instruct.is_dir()):
        return images
    if rank() == 0:
        print(f"generate: {images} does not exist. Using the images of {instruct} (not its messages).")
    return str(instruct)


def select_records(dataset: "Dataset", skip: int = 0, most: int | None = None) -> tuple["Dataset", list[dict]]:
    """
    Drop records that repeat the images of an earlier one, skip the first `skip`, and return at most `most`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Columns `id`, `image_ids`.
        skip (`int`, *optional*, defaults to `0`):
            Number of records that earlier rounds have used.
        most (`int`, *optional*):
            Maximum number of records; all by default.

    Returns:
        `tuple[Dataset, list[dict]]`: the records, and `id`, `reason`, `value` of those with the images of an earlier
        record.

    Raises:
        UserError: if none is left.
    """
    seen, rows, rejected = set(), [], []
    for row, (record_id, image_ids) in enumerate(zip(dataset["id"], dataset["image_ids"])):
        images = frozenset(image_ids)
        if images and images in seen:
            rejected.append({"id": record_id, "reason": "repeated_images", "value": ", ".join(image_ids)})
        else:
            seen.add(images)
            rows.append(row)
    chosen = rows[skip:][:most]
    if not chosen:
        raise UserError(
            f"No images are left: {len(dataset)} records have {len(rows)} different sets of images, and "
            f"skip_records is {skip}. Prepare more images, or lower skip_records (with several rounds: max_records)."
        )
    return dataset.select(chosen), rejected


def _write_candidates(
    args: GenerateArguments, records: "Dataset", outcomes: list[dict], rejected: list[dict], make_row: Callable
) -> dict[str, Any]:
    """
    Write `candidates/` and `rejected.jsonl`, and return the counts for `stage.json`.

    Args:
        args ([`GenerateArguments`]): Arguments.
        records ([`~datasets.Dataset`]): The records that were asked about.
        outcomes (`list[dict]`): Their outcomes, see [`CandidateGenerator.outcomes`].
        rejected (`list[dict]`): Records that were rejected before.
        make_row (`Callable`): See [`CandidateGenerator.row_maker`].

    Raises:
        UserError: if there is no candidate, with the reasons.
    """
    candidates = [candidate for outcome in outcomes for candidate in outcome["candidates"]]
    rejected = [*rejected, *(row for outcome in outcomes for row in outcome["rejected"])]
    counts = {
        "images": len({image for image_ids in records["image_ids"] for image in image_ids}),
        "records": len(outcomes),
        "questions": sum(outcome["drawn"] for outcome in outcomes),
        "candidates": len(candidates),
        "answers": sum(len(candidate["answers"]) for candidate in candidates),
        "rejected": dict(Counter(row["reason"] for row in rejected).most_common()),
    }
    path = Path(args.output_dir, "rejected.jsonl")
    write_jsonl(path, rejected)
    if not candidates:
        raise UserError(
            f"All of {counts['questions']} questions about {number_of(counts['images'], 'image')} were rejected: "
            f"{list_reasons(counts['rejected'])}. The texts are in {path}, and docs/troubleshooting.md says what to "
            "change for each reason. To ask again, add --overwrite."
        )
    directory = Path(args.output_dir, "candidates")
    write_split(directory, "train", candidates, make_row, features_of("candidates"), args.rows_per_shard)
    return counts


def _count(settings: Mapping[str, Any], split: str, counter: RowCounter) -> Count:
    """Return the largest number of questions with answers: some are rejected."""
    return replace(images_to_ask_about(settings, counter).times(settings.get("num_questions", 1)), at_most=True)


def images_to_ask_about(settings: Mapping[str, Any], counter: RowCounter) -> Count:
    """Return the number of images that the stage asks about, for a plan."""
    if "images" not in settings:
        return Count(None, depends_on="images")
    images = counter.rows(settings["images"], settings.get("split", "train"))
    if images.number is None and Path(settings["images"]).name == "images":  # as `main` does without images/
        images = counter.rows(str(Path(settings["images"]).with_name("instruct")), "train")
    return images.capped(settings.get("max_records"), settings.get("skip_records", 0))


def plan(counter: RowCounter, args: GenerateArguments, *engine_settings: Any) -> Iterator[tuple[str, str]]:
    """Return the stage's rows in a plan."""
    images = images_to_ask_about(vars(args), counter)
    yield "prompts", f"{images.describe('images')}, {args.num_questions} x a question and {args.num_answers} answers"
    yield "writes", counter.rows(str(Path(args.output_dir, "candidates")), "train").describe("candidates")


STAGE = Stage(
    name="generate",
    summary="let the model ask about images and answer each question twice",
    help=__doc__,
    after=("sft",),
    repeats=True,
    advances=("skip_records", "max_records"),
    distributed=True,
    arguments=lambda: (GenerateArguments, *ENGINES.settings(), HubArguments),
    check=check,
    main=main,
    plan=plan,
    inputs=(
        Input("model_name_or_path", MODEL, is_remote=lambda settings: not loads_model(settings)),
        Input("base_model_name_or_path", MODEL, has_default=False),
        Input("images", "images", alternatives=("instruct",), split="split"),
    ),
    outputs=(Output("candidates", "candidates", _count),),
    not_shared=NOT_SHARED,
    registries={"engine": ENGINES},
)
STAGES.register(STAGE)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Compare the answers of each candidate with a stronger vision-language model, and build preference pairs.

```bash
export OPENAI_API_KEY=...
medst judge \
    --candidates runs/vqa_rad/generate/candidates \
    --model gpt-4o \
    --max_cost 20 \
    --benchmarks runs/vqa_rad/prepare/benchmark \
    --output_dir runs/vqa_rad/judge
```

Any OpenAI-compatible server works. Your own server needs no key: `--base_url http://localhost:8000/v1 --model
Qwen/Qwen2.5-VL-32B-Instruct`. `--dry_run` prints the estimated cost and the first request, and sends nothing.

Input: candidates (columns `id`, `images`, `image_ids`, `prompt`, `answers`; `medst generate` writes them). Output in
`output_dir`: `judgements.jsonl` (scores, verdicts of both orders, replies, usage), `preferences/train-*.parquet` and
`validation-*.parquet` in the format of TRL's DPOTrainer, `rejected.jsonl` (dropped pairs, with the reason), and
`judge_cache.jsonl` (all replies you paid for, kept even with `--overwrite`). After a crash, an exhausted budget
or a lost connection, run the same command again: it resumes.

OpenAI's Batch API costs half as much. `--write_batch requests.jsonl` writes its input files. When the batch is done,
`--read_batch results.jsonl` builds the same judgements from the results.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.errors import UserError, number_of
from medst_trl.base.files import write_jsonl
from medst_trl.base.settings import check_bounds, documented, make_lists
from medst_trl.data.groups import MOST_BITS, NEAR_COPY_BITS
from medst_trl.data.loading import load_records
from medst_trl.data.reading import read_text_file
from medst_trl.data.schema import features_of, with_stored_images, write_split
from medst_trl.engines.calls import CALL_SETTINGS
from medst_trl.hub import HubArguments
from medst_trl.pipeline.lineage import read_inventory
from medst_trl.pipeline.record import StageRecord, was_skipped_as_empty
from medst_trl.pipeline.stage import FILE, STAGES, Count, Input, Output, RowCounter, Stage
from medst_trl.selftrain.judge.judge import JUDGE_PROMPTS, LOCAL_JUDGES, JudgeSettings, LocalJudge, chosen_judge
from medst_trl.selftrain.judge.statistics import format_statistics, judge_statistics, nothing_left, warnings_of
from medst_trl.selftrain.preferences import Preferences, benchmark_reason, build_preferences, read_benchmarks


if TYPE_CHECKING:
    from datasets import Dataset

    from medst_trl.selftrain.judge.pairwise import PairwiseJudge

# Settings of `select_preferences`.
_SELECTION = (
    "keep_benchmark_images", "near_copy_bits", "duplicate_similarity", "validation_share", "length_balanced", "seed",
)  # fmt: skip


@documented
@dataclass(kw_only=True)
class JudgeArguments(JudgeSettings):
    """
    Arguments of `medst judge`, besides the settings of the judge.

    Args:
        candidates (`str`):
            Directory or Hub id of candidates (`medst generate` writes them).
        output_dir (`str`):
            Directory for judgements and preference pairs.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the candidates.
        reference_captions (`str`, *optional*):
            JSON lines file with image_id and caption, for judge prompts that show captions.
        cache_dir (`str`, *optional*):
            Directory of judge_cache.jsonl. Several runs can share it. Default: output_dir.
        dry_run (`bool`, *optional*, defaults to `False`):
            Print the estimated cost and the first request, and send nothing.
        write_batch (`str`, *optional*):
            Write the calls to this input file of the Batch API, and send nothing.
        read_batch (`list[str]`, *optional*, defaults to `[]`):
            Result files of the Batch API to read instead of calling the judge.
        benchmarks (`list[str]`, *optional*, defaults to `[]`):
            Benchmarks to protect: pairs about their images, near copies of these, or their groups (such as patients)
            are dropped. The judge does not see them.
        keep_benchmark_images (`bool`, *optional*, defaults to `False`):
            Keep pairs about images and groups of the benchmarks anyway.
        near_copy_bits (`int`, *optional*, defaults to `10`):
            Count images as near copies (resized or re-encoded) if at most this many of the 256 bits of their
            perceptual hashes differ. 0 looks for none.
        duplicate_similarity (`float`, *optional*, defaults to `0.9`):
            Keep only one of the questions about an image or a group that share this fraction of their words.
        validation_share (`float`, *optional*, defaults to `0.0`):
            Fraction of the images to use for validation. All pairs of an image or a group are in one split.
        length_balanced (`bool`, *optional*, defaults to `False`):
            Drop pairs until the longer answer is chosen as often as it is rejected.
        seed (`int`, *optional*, defaults to `0`):
            Seed for the validation images, the length balance, and the oracle's phantoms.
        rows_per_shard (`int`, *optional*, defaults to `512`):
            Rows per Parquet file.
        num_workers (`int`, *optional*, defaults to `1`):
            Number of threads that write Parquet files.
        overwrite (`bool`, *optional*, defaults to `False`):
            Delete the results of an earlier run and start again. Replies that you already paid for are kept.
    """

    candidates: str
    output_dir: str
    split: str = "train"
    reference_captions: str | None = None
    cache_dir: str | None = None
    dry_run: bool = False
    write_batch: str | None = None
    read_batch: list[str] = field(default_factory=list)
    benchmarks: list[str] = field(default_factory=list)
    keep_benchmark_images: bool = False
    near_copy_bits: int = NEAR_COPY_BITS
    duplicate_similarity: float = 0.9
    validation_share: float = 0.0
    length_balanced: bool = False
    seed: int = 0
    rows_per_shard: int = 512
    num_workers: int = 1
    overwrite: bool = False

    def __post_init__(self):
        make_lists(self, "benchmarks", "read_batch")


def main(args: JudgeArguments, *judges: LocalJudge) -> None:
    """
    Run the stage.

    Args:
        args ([`JudgeArguments`]): Its arguments.
        *judges ([`LocalJudge`]): Settings of local judges.
    """
    from medst_trl.selftrain.judge.batch_api import read_batch

    check(args, *judges)
    # Recipes name a benchmark by default.
    for name in [name for name in args.benchmarks if was_skipped_as_empty(name, "benchmark")]:
        print(f"judge: {Path(name).parent} was prepared without a benchmark, so it excludes no images.")
        args.benchmarks.remove(name)
    candidates = with_stored_images(load_records(args.candidates, args.split, "candidates"))
    benchmarks = [load_records(name, "test", "benchmark") for name in args.benchmarks]
    judge = _make_judge(args, judges, candidates)
    if not (args.dry_run or args.write_batch or args.read_batch):
        judge.check_key()
    record = None if args.dry_run or args.write_batch else StageRecord.of(STAGE, args, *judges)
    if record and record.decision == "skip":
        return None if record.is_silent else _print_summary(record)
    with record or nullcontext():
        # `prepare` has stored most hashes.
        hashes = read_inventory(Path(args.candidates), [candidates]).hashes if args.near_copy_bits else {}
        protected = read_benchmarks(benchmarks, hashes, args.near_copy_bits)
        if not args.keep_benchmark_images:
            judge.held_out = partial(benchmark_reason, protected)
        if args.dry_run:
            return _print_request(judge, candidates)
        if args.write_batch:
            return _write_batch(args.write_batch, judge, candidates)
        if args.read_batch:
            counts = read_batch(judge.cache, args.read_batch)
            kinds = ", ".join(f"{what}: {number:,}" for what, number in counts.items())
            print(f"judge: {number_of(sum(counts.values()), 'result')} read ({kinds}).")
        judgements, statistics = _judge(args, judge, candidates)
        selection = {name: getattr(args, name) for name in _SELECTION}
        preferences = build_preferences(candidates, judgements, benchmarks=protected, near_hashes=hashes, **selection)
        _write_preferences(args, candidates, preferences)
        record.finish(counts={"judge": statistics, "preferences": preferences.counts})
    _print_summary(record)


def check(args: JudgeArguments, *judges: LocalJudge) -> None:
    """Raise a `UserError` for arguments that cannot work."""
    if local := chosen_judge(judges):
        local.check(args)
    args.check_judge(is_local=local is not None)
    at_least = {"validation_share": 0, "rows_per_shard": 1, "num_workers": 1, "near_copy_bits": 0}
    at_most = {"duplicate_similarity": 1, "near_copy_bits": MOST_BITS}
    above, below = {"duplicate_similarity": 0}, {"validation_share": 1}
    check_bounds(args, at_least=at_least, above=above, at_most=at_most, below=below)
    if args.write_batch and args.read_batch:
        raise UserError("write_batch and read_batch are two steps. Write, have the files processed, then read.")


def _read_captions(path: str | None) -> dict[str, str]:
    """Return captions by image_id from JSON lines, none without a file."""
    text = read_text_file(Path(path), "reference_captions") if path else ""
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return {"".join([row["image_id"]]): "".join([row["caption"]]) for row in rows}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} must have JSON lines with image_id and caption (texts): {error!r}.") from None


def _make_judge(args: JudgeArguments, judges: Sequence[LocalJudge], candidates: "Dataset") -> "PairwiseJudge":
    from medst_trl.selftrain.judge.pairwise import PairwiseJudge

    settings = {item.name: getattr(args, item.name) for item in fields(JudgeSettings)}
    settings |= {"cache_dir": args.cache_dir or args.output_dir, "captions": _read_captions(args.reference_captions)}
    if local := chosen_judge(judges):
        settings |= {"model": local.model_name(args), "local": local.open(args, candidates)}
    return PairwiseJudge(**settings)


def _print_request(judge: "PairwiseJudge", candidates: "Dataset") -> None:
    """Print the estimate and the first request."""
    from medst_trl.data.image_formats import ImageProblem
    from medst_trl.engines.images import without_image_bytes

    print(f"judge: {judge.estimate(candidates)}")
    for _, calls in judge.requests(candidates):
        with suppress(ImageProblem):
            for call in calls[:1]:
                text = without_image_bytes(json.dumps(call.body(), indent=2, ensure_ascii=False))
                return print("The first request:", text, sep="\n")
    print("There is no pair to ask about.")


def _write_batch(path: str, judge: "PairwiseJudge", candidates: "Dataset") -> None:
    """Write the input files of the Batch API, and print the next step."""
    from medst_trl.selftrain.judge.batch_api import write_batch

    print(f"judge: {judge.estimate(candidates)} (at the prices of live calls)")
    if files := write_batch(judge, candidates, path):
        print(
            f"The requests are in {', '.join(map(str, files))}. Have the Batch API process them, download the "
            "results, and run the same command with --read_batch RESULTS.jsonl in place of --write_batch."
        )
    else:
        print("No request is left to write. Run the same command without --write_batch, or with --read_batch.")


def _judge(args: JudgeArguments, judge: "PairwiseJudge", candidates: "Dataset") -> tuple[list[dict], dict[str, Any]]:
    """Write all judgements to their file, and return them with their statistics."""
    from tqdm.auto import tqdm

    offline = bool(args.read_batch)
    estimate = judge.estimate(candidates)
    print(f"judge: {estimate}")
    judgements = list(tqdm(judge(candidates, offline), "judge", total=estimate.pairs, unit="pair", disable=None))
    write_jsonl(Path(args.output_dir, "judgements.jsonl"), judgements)
    return judgements, judge_statistics(judgements) | {
        "left_over_answers": sum(len(answers) % 2 for answers in candidates["answers"]),
        "events": dict(judge.events.most_common()),
    }


def _write_preferences(args: JudgeArguments, candidates: "Dataset", preferences: Preferences) -> None:
    """Write the pairs with their images, undecoded and without metadata, and the dropped pairs."""
    from medst_trl.data.images import publishable  # loads NumPy and Pillow

    output_dir, counts = Path(args.output_dir), preferences.counts
    write_jsonl(output_dir / "rejected.jsonl", preferences.rejected)
    if not preferences.train:
        raise nothing_left(counts["rejected"], counts["pairs"], output_dir / "judgements.jsonl")
    images, directory = candidates.select_columns(["images"]), output_dir / "preferences"

    def row(pair: dict) -> dict:
        return pair | {"images": [publishable(image) for image in images[pair["row"]]["images"]]}

    shutil.rmtree(directory, ignore_errors=True)  # of an interrupted run, perhaps with other replies
    for split in ("train", "validation"):
        pairs = getattr(preferences, split)
        write_split(directory, split, pairs, row, features_of("preferences"), args.rows_per_shard, args.num_workers)


def _print_summary(record: StageRecord) -> None:
    counts = record.content["counts"]
    print(f"judge: {record.output_dir}")
    print(format_statistics(counts["judge"], counts["preferences"].get("rejected")))
    for split in ("train", "validation"):
        print(f"  {f'preferences, {split}':42}{counts['preferences'][split]['pairs']:>20,}")
    if reason := counts["preferences"].get("groups_not_compared"):
        print(f"judge: WARNING: pairs (the training data) about groups of the benchmarks may be left: {reason}.")
    for line in warnings_of(counts["judge"]):
        print(f"judge: WARNING: {line}")


def pairs_to_judge(settings: Mapping[str, Any], counter: RowCounter) -> Count:
    """Count the pairs of answers that the stage compares: the first and second answer, the third and fourth ..."""
    if "candidates" not in settings:
        return Count(None, depends_on="candidates")
    candidates = counter.rows(settings["candidates"], settings.get("split", "train"))
    return candidates.times(counter.settings_of_maker(settings["candidates"]).get("num_answers", 2) // 2)


def _count(settings: Mapping[str, Any], split: str, counter: RowCounter) -> Count:
    return replace(pairs_to_judge(settings, counter), at_most=True)  # ties and disagreements are dropped


def plan(counter: RowCounter, args: JudgeArguments, *judges: LocalJudge) -> Iterator[tuple[str, str]]:
    """Return the stage's rows in a plan: the requests, and their budget."""
    if local := chosen_judge(judges):
        yield "prompts", f"none: {local.summary}"
    elif args.read_batch:
        yield "prompts", "none: replies come from read_batch"
    elif args.write_batch:
        yield "prompts", f"none: they are written to {args.write_batch}"
    else:
        count = pairs_to_judge(vars(args), counter).times(2 if args.order == "both" else 1)
        unknown = f"requests (their number depends on {count.depends_on})"
        requests = unknown if count.number is None else f"at most {count.number:,} requests"
        url = args.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        yield "prompts", f"{requests} to {url}, model {args.model}"
        yield "prompts", args.budget_note


STAGE = Stage(
    name="judge",
    summary="compare the answers with a stronger model, and build preference pairs",
    help=__doc__,
    after=("generate",),
    repeats=True,
    arguments=lambda: (JudgeArguments, *LOCAL_JUDGES.values(), HubArguments),
    check=check,
    main=main,
    plan=plan,
    registries={"prompt_version": JUDGE_PROMPTS},
    inputs=(
        Input("candidates", "candidates", split="split"),
        Input("benchmarks", "benchmark", default_split="test"),
        Input("reference_captions", FILE),
        Input("read_batch", FILE),
    ),
    outputs=(Output("preferences", "preferences", _count),),
    earlier_defaults={"near_copy_bits": NEAR_COPY_BITS},
    # These settings change how replies are obtained, not their content. A judge is identified by its model name.
    operational=CALL_SETTINGS | {"cache_dir", "dry_run", "write_batch", "read_batch", "num_workers"},
)
STAGES.register(STAGE)

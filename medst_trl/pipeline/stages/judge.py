# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Has a stronger vision-language model compare the answers of each candidate, and makes preference pairs of its verdicts.

```bash
export OPENAI_API_KEY=...
medst judge \
    --candidates runs/vqa_rad/generate/candidates \
    --model gpt-4o \
    --max_cost 20 \
    --benchmarks runs/vqa_rad/prepare/benchmark \
    --output_dir runs/vqa_rad/judge
```

Any OpenAI-compatible server will do, and one of your own needs no key: `--base_url http://localhost:8000/v1 --model
Qwen/Qwen2.5-VL-32B-Instruct`. `--dry_run true` shows the estimate and the first request, and asks nothing.

Input: candidates (columns `id`, `images`, `image_ids`, `prompt`, `answers`; `medst generate` writes them). Output in
`output_dir`: `judgements.jsonl` (scores, verdicts of both orders, raw replies, usage), `preferences/train-*.parquet`
and `validation-*.parquet` as TRL's DPOTrainer reads them, `rejected.jsonl` (pairs left out, with their reason),
`judge_cache.jsonl` (every reply paid for; it stays when the stage is started anew with `--overwrite true`). Run again
after a crash, a used-up budget or a lost connection, it goes on where it was.

OpenAI's Batch API, at half the price: `--write_batch requests.jsonl` writes its input files, and after they were
processed `--read_batch results.jsonl` makes the same judgements of the results.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.hub.after_stage import HubArguments
from medst_trl.pipeline.stage import FILE, STAGES, Count, Counter, Input, Output, Stage
from medst_trl.selftrain.judge.prompt import JUDGE_PROMPTS


if TYPE_CHECKING:
    from datasets import Dataset

    from medst_trl.pipeline.record import StageRecord
    from medst_trl.selftrain.judge import PairwiseJudge
    from medst_trl.selftrain.preferences import Preferences


@dataclass
class JudgeArguments:
    """Arguments of `medst judge`."""

    candidates: str = field(metadata={"help": "Folder or Hub id of candidates (`medst generate` writes them)."})
    output_dir: str = field(metadata={"help": "Folder for judgements and preference pairs."})
    model: str | None = field(default=None, metadata={"help": "The judge, as its server calls it, such as gpt-4o."})
    base_url: str | None = field(
        default=None,
        metadata={"help": "An OpenAI-compatible API, such as http://localhost:8000/v1. Default: OpenAI's."},
    )
    key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Name of the environment variable that holds the API key."}
    )
    split: str = field(default="train", metadata={"help": "Split of the candidates."})
    prompt_version: str = field(default="rubric", metadata={"help": "How the judge is asked."})
    order: str = field(
        default="both",
        metadata={"help": "Show each pair in both orders and ask for agreement, or single as the paper."},
    )
    min_margin: float = field(default=1.0, metadata={"help": "Drop pairs whose mean scores lie closer together."})
    reference_captions: str | None = field(
        default=None, metadata={"help": "JSON lines with image_id and caption, shown to the judge (rubric only)."}
    )
    image_size: int = field(default=768, metadata={"help": "Longest side of an image as sent, in pixels."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature of the judge."})
    max_tokens: int = field(default=600, metadata={"help": "Most tokens of a reply."})
    max_cost: float | None = field(
        default=None, metadata={"help": "US dollars these judgements may cost, earlier runs included. A hard stop."}
    )
    price_per_million_input_tokens: float | None = field(
        default=None, metadata={"help": "US dollars. Default: known for gpt-4o, gpt-4.1 and their small forms."}
    )
    price_per_million_output_tokens: float | None = field(default=None, metadata={"help": "US dollars, likewise."})
    concurrency: int = field(default=16, metadata={"help": "Calls under way at most."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds for one call."})
    max_retries: int = field(default=6, metadata={"help": "Repetitions of a call after 429, 5xx or a time-out."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of judge_cache.jsonl, which runs can share. Default: output_dir."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the estimate and the first request, ask nothing."})
    write_batch: str | None = field(
        default=None, metadata={"help": "Write the calls to be made as this file for the Batch API, ask nothing."}
    )
    read_batch: list[str] = field(
        default_factory=list, metadata={"help": "Result files of the Batch API. Makes no calls of its own."}
    )
    oracle_error_rate: float | None = field(
        default=None, metadata={"help": "Judge drawn phantoms by their truth, wrong for this share of the pairs."}
    )
    benchmarks: list[str] = field(
        default_factory=list, metadata={"help": "Benchmarks whose images must not enter the preference pairs."}
    )
    keep_benchmark_images: bool = field(
        default=False, metadata={"help": "Let images of the benchmarks into the preference pairs all the same."}
    )
    duplicate_similarity: float = field(
        default=0.9, metadata={"help": "Of questions about one image sharing this part of their words, keep one."}
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Part of the images that becomes validation, with all their pairs."}
    )
    length_balanced: bool = field(
        default=False, metadata={"help": "Keep as many pairs in which the longer answer wins as in which it loses."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of validation images, of the balance, and of the oracle's phantoms."}
    )
    rows_per_shard: int = field(default=512, metadata={"help": "Rows in one Parquet file."})
    num_workers: int = field(default=1, metadata={"help": "Threads that write Parquet files."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Delete what an earlier run left, but for the replies it paid, and start anew."},
    )

    def __post_init__(self):
        for name in ("benchmarks", "read_batch"):  # a recipe may give a single one without a list
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))


def main(args: JudgeArguments) -> None:
    from medst_trl.base.errors import UserError
    from medst_trl.pipeline.record import FILE_NAME, StageRecord
    from medst_trl.selftrain.judge.inputs import made_benchmarks, open_benchmark, open_candidates

    check(args)
    args.benchmarks = made_benchmarks(args.benchmarks)
    candidates = open_candidates(args.candidates, args.split)
    benchmarks = [open_benchmark(name) for name in args.benchmarks]
    with _judge(args, candidates) as judge:
        if args.dry_run:
            return _show(judge, candidates)
        if args.write_batch:
            return _write_batch(args, judge, candidates)
        if not args.read_batch:
            judge.check_key()
        record = StageRecord.open(
            args.output_dir,
            stage="judge",
            settings=asdict(args),
            inputs={name: getattr(args, name) for name in ("candidates", "benchmarks", "reference_captions")},
            operational=STAGE.operational,
            overwrite=args.overwrite,
        )
        if record.status == "finished":
            return _report(record)
        if args.read_batch:
            _read_batch(args, judge)
        try:
            judgements, statistics = _judgements(args, judge, candidates)
        except UserError:
            if record.status == "new" and not judge.cache.added:  # a wrong model's name must not hold the folder
                (record.output_dir / FILE_NAME).unlink()
            raise
    _preferences(args, record, candidates, benchmarks, judgements, statistics)
    _report(record)


def check(args: JudgeArguments) -> None:
    from medst_trl.base.errors import UserError
    from medst_trl.demo.phantoms import SIZE

    if args.model is None and args.oracle_error_rate is None:
        raise UserError("No judge is named: give --model, as its server calls it (such as gpt-4o).")
    if args.oracle_error_rate is not None and not 0 <= args.oracle_error_rate <= 1:
        raise UserError(f"oracle_error_rate is {args.oracle_error_rate}; it has to be from 0 to 1.")
    if args.oracle_error_rate is not None and args.image_size < SIZE:
        raise UserError(
            f"image_size is {args.image_size}; with oracle_error_rate it has to be at least {SIZE}: the oracle knows "
            "the phantoms by their pixels, so they have to be sent as they are."
        )
    if not 0 < args.duplicate_similarity <= 1:
        raise UserError(
            f"duplicate_similarity is {args.duplicate_similarity}; it has to be more than 0 and at most 1, which "
            "drops questions of the same words only."
        )
    if not 0 <= args.validation_share < 1:
        raise UserError(f"validation_share is {args.validation_share}; it has to be at least 0 and less than 1.")
    for name in ("rows_per_shard", "num_workers"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it has to be at least 1.")
    if args.write_batch and args.read_batch:
        raise UserError("write_batch and read_batch are two steps: write, have the files processed, then read.")


@contextmanager
def _judge(args: JudgeArguments, candidates: "Dataset"):
    """The judge, and the oracle's server where that is the judge."""
    from medst_trl.selftrain.judge import PairwiseJudge
    from medst_trl.selftrain.judge.inputs import read_captions

    model, prices = args.model, (args.price_per_million_input_tokens, args.price_per_million_output_tokens)
    server = nullcontext(args.base_url)
    if args.oracle_error_rate is not None:
        from medst_trl.demo.oracle import serve_oracle

        # Replies are kept by the model's name, so it says all that decides them.
        model, prices = f"phantom-oracle-{args.oracle_error_rate:g}-{args.seed}", (0.0, 0.0)
        server = serve_oracle(candidates, args.oracle_error_rate, args.seed, args.prompt_version)
    with server as base_url:
        yield PairwiseJudge(
            model,
            base_url=base_url,
            prompt_version=args.prompt_version,
            order=args.order,
            min_margin=args.min_margin,
            captions=read_captions(args.reference_captions),
            concurrency=args.concurrency,
            max_cost=args.max_cost,
            price_per_million_input_tokens=prices[0],
            price_per_million_output_tokens=prices[1],
            image_size=args.image_size,
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            cache_dir=args.cache_dir or args.output_dir,
            timeout=args.timeout,
            max_retries=args.max_retries,
            key_variable=args.key_variable,
        )


def _show(judge: "PairwiseJudge", candidates: "Dataset") -> None:
    """The dry run."""
    from medst_trl.data.image_formats import ImageProblem
    from medst_trl.selftrain.judge.images import without_image_bytes

    print(f"judge: {judge.estimate(candidates)}")
    for _, requests in judge.requests(candidates):
        with suppress(ImageProblem):
            for request in requests[:1]:
                print("The first request:")
                return print(json.dumps(without_image_bytes(request.body()), indent=2, ensure_ascii=False))
    print("There is no pair to ask about.")


def _write_batch(args: JudgeArguments, judge: "PairwiseJudge", candidates: "Dataset") -> None:
    from medst_trl.selftrain.judge.batch import write_batch

    print(f"judge: {judge.estimate(candidates)} (at the prices of live calls)")
    files = write_batch(judge, candidates, args.write_batch)
    if not files:
        print("Every reply is there: run without write_batch.")
        return
    print(
        f"Requests are in {', '.join(map(str, files))}. Have the Batch API process them, download the results, and "
        "run the same command with --read_batch RESULTS.jsonl in place of --write_batch."
    )


def _read_batch(args: JudgeArguments, judge: "PairwiseJudge") -> None:
    from medst_trl.selftrain.judge.batch import read_batch

    counts = read_batch(judge.cache, args.read_batch)
    print(f"judge: read {', '.join(f'{number:,} {what}' for what, number in counts.items())}.")


def _judgements(
    args: JudgeArguments, judge: "PairwiseJudge", candidates: "Dataset"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All judgements, written to their file, with their statistics."""
    from tqdm.auto import tqdm

    from medst_trl.base.files import explain_full_disk, write_jsonl
    from medst_trl.selftrain.judge.statistics import judge_statistics

    output_dir = Path(args.output_dir)
    estimate = judge.estimate(candidates)
    print(f"judge: {estimate}")
    if judge.max_cost is not None and (estimate.cost or 0) > judge.max_cost:
        print(f"judge: that is more than max_cost {judge.max_cost:g}; the run will stop there and can be continued.")
    with explain_full_disk(output_dir):
        judgements = list(
            tqdm(
                judge(candidates, offline=bool(args.read_batch)),
                "judge",
                total=estimate.pairs,
                unit="pair",
                disable=None,
            )
        )
        write_jsonl(output_dir / "judgements.jsonl", judgements)
    single = sum(len(answers) % 2 for answers in candidates["answers"])
    return judgements, judge_statistics(judgements, judge.prices) | {
        "left_over_answers": single,
        "events": dict(judge.events.most_common()),
    }


def _preferences(
    args: JudgeArguments,
    record: "StageRecord",
    candidates: "Dataset",
    benchmarks: list["Dataset"],
    judgements: list[dict[str, Any]],
    statistics: dict[str, Any],
) -> None:
    from medst_trl.base.files import explain_full_disk, write_jsonl
    from medst_trl.selftrain.judge.advice import nothing_left
    from medst_trl.selftrain.preferences import build_preferences

    output_dir = Path(args.output_dir)
    preferences = build_preferences(
        candidates,
        judgements,
        benchmarks=benchmarks,
        keep_benchmark_images=args.keep_benchmark_images,
        duplicate_similarity=args.duplicate_similarity,
        validation_share=args.validation_share,
        length_balanced=args.length_balanced,
        seed=args.seed,
    )
    with explain_full_disk(output_dir):
        write_jsonl(output_dir / "rejected.jsonl", preferences.rejected)
        if not preferences.train:
            judged = output_dir / "judgements.jsonl"
            raise nothing_left(preferences.counts["rejected"], statistics["pairs"], judged)
        _write(args, candidates, preferences)
    record.finish(counts={"judge": statistics, "preferences": preferences.counts})


def _write(args: JudgeArguments, candidates: "Dataset", preferences: "Preferences") -> None:
    """The pairs with their images, whose bytes are copied undecoded."""
    from medst_trl.data.schema import preference_features, write_split

    images = candidates.select_columns(["images"])

    def row(pair: dict) -> dict:
        kept = {name: value for name, value in pair.items() if name != "row"}
        return kept | {"images": images[pair["row"]]["images"]}

    folder = Path(args.output_dir) / "preferences"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut short, perhaps after other replies
    for split, pairs in (("train", preferences.train), ("validation", preferences.validation)):
        write_split(folder, split, pairs, row, preference_features(), args.rows_per_shard, args.num_workers)


def _report(record: "StageRecord") -> None:
    from medst_trl.selftrain.judge.statistics import format_statistics, warnings_of

    counts = record.content["counts"]
    print(f"judge: {record.output_dir}")
    print(format_statistics(counts["judge"]))
    for split in ("train", "validation"):
        print(f"  {f'preferences, {split}':28}{counts['preferences'][split]['pairs']:>20,}")
    for line in warnings_of(counts["judge"]):
        print(f"judge: WARNING: {line}")


def pairs_to_judge(settings: Mapping[str, Any], counter: Counter) -> Count:
    """Pairs of answers that the stage compares: the first and second answer to a question, the third and fourth ..."""
    if "candidates" not in settings:
        return Count(None, depends_on="candidates")
    candidates = counter.rows(settings["candidates"], settings.get("split", "train"))
    return candidates.times(counter.settings_behind(settings["candidates"]).get("num_answers", 2) // 2)


def _count(settings: Mapping[str, Any], split: str, counter: Counter) -> Count:
    return replace(pairs_to_judge(settings, counter), at_most=True)  # ties and disagreements are dropped


STAGE = STAGES.register(
    Stage(
        name="judge",
        summary="have a stronger model compare the answers, and build preference pairs",
        help=__doc__,
        after=("generate",),
        repeats=True,
        arguments=lambda: (JudgeArguments, HubArguments),
        check=check,
        main=main,
        registries={"prompt_version": JUDGE_PROMPTS},
        inputs=(
            Input("candidates", "candidates", sources=(("generate", "candidates"),), split="split"),
            Input("benchmarks", "benchmark", sources=(("prepare", "benchmark"),), default_split="test"),
            Input("reference_captions", FILE),
            Input("read_batch", FILE),
        ),
        outputs=(Output("preferences", "preferences", _count),),
        # How the replies are got, not what they say. A server is known by its model, wherever it runs.
        operational=frozenset(
            {
                "base_url", "key_variable", "concurrency", "max_cost", "price_per_million_input_tokens",
                "price_per_million_output_tokens", "timeout", "max_retries", "cache_dir", "dry_run", "write_batch",
                "read_batch", "num_workers",
            }
        ),
    )
)  # fmt: skip

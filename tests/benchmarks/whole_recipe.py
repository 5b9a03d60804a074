# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
How long the paper's whole recipe takes on one device, from what the benchmarks have measured there.

```bash
python tests/benchmarks/bench_sft.py --shape llava_7b --output runs/bench/sft.json
python tests/benchmarks/bench_generate.py --shape llava_7b --output runs/bench/generate.json
python tests/benchmarks/bench_dpo.py --shape llava_7b --output runs/bench/dpo.json
python tests/benchmarks/whole_recipe.py runs/bench/*.json
```

STLLaVA-Med (https://huggingface.co/papers/2406.19973), which took 4 A100 for 10 hours: 37k conversations, a question
about each of 10k images and two answers, 10k pairs. Each figure is a count of the paper times a measured time; what
was not measured is not counted: loading, saving, evaluation, and the judge, which waits for a server. Conversations
and answers are as long as those measured.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """
    A part of the recipe.

    Args:
        bench (`str`): Benchmark that measures it.
        name (`str`): What it is.
        count (`int`): Of what the benchmark counts.
        baseline (`str`): How the benchmark calls the way without ours.
    """

    bench: str
    name: str
    count: int
    baseline: str


ITEMS = (
    Item("SFT", "stage 1, SFT", 37_000, "stock"),
    Item("Generation", "questions and answers", 10_000, "batch 1"),
    Item("DPO", "stage 2, DPO", 10_000, "stock"),
)


def read(files: Sequence[Path]) -> dict[str, dict]:
    """
    The results by benchmark.

    Raises:
        SystemExit: if one is missing or there twice, or they are of different devices or models.
    """
    results = {}
    for file in files:
        result = json.loads(file.read_text())
        if result["bench"] in results:
            raise SystemExit(f"{file}: there are two results of {result['bench']}; give one of each.")
        results[result["bench"]] = result
    if missing := [item.bench for item in ITEMS if item.bench not in results]:
        raise SystemExit(f"No result of {', '.join(missing)}: run that benchmark with --output first.")
    for what, values in {
        "devices": {result["machine"]["device"] for result in results.values()},
        "shapes": {result["settings"]["shape"] for result in results.values()},
    }.items():
        if len(values) > 1:
            raise SystemExit(f"The results are of different {what}: {', '.join(sorted(values))}.")
    return results


def seconds_a_unit(row: dict, epochs: int) -> float:
    """So many epochs, and what is done once before them."""
    return epochs * row["seconds"]["median"] + row["once_seconds"]


def fastest(rows: Sequence[dict], baseline: str, epochs: int) -> tuple[dict, dict]:
    """The fastest row of ours in the first setting that was measured, and that of the baseline."""
    first = rows[0]["what"].removesuffix(", checkpointing")
    rows = [row for row in rows if row["what"].removesuffix(", checkpointing") == first]
    by_time = lambda row: seconds_a_unit(row, epochs)  # noqa: E731
    ours = min((row for row in rows if row["way"].startswith("ours")), key=by_time)
    return ours, min((row for row in rows if row["way"] == baseline), key=by_time)


def whole_recipe(results: dict[str, dict], epochs: dict[str, int]) -> str:
    """
    Args:
        results (`dict`): From [`read`].
        epochs (`dict[str, int]`): How often each benchmark's data is gone through.

    Returns:
        `str`: A Markdown table.
    """
    any_result = next(iter(results.values()))
    lines = [
        f"One {any_result['machine']['device']}, shape {any_result['settings']['shape']}:",
        "",
        "| item | count | measured | hours | without ours |",
        "|---|---|---|---|---|",
    ]
    hours, without = {}, 0.0
    for item in ITEMS:
        ours, baseline = fastest(results[item.bench]["rows"], item.baseline, epochs[item.bench])
        hours[item.name], stock = (
            item.count * seconds_a_unit(row, epochs[item.bench]) / 3600 for row in (ours, baseline)
        )
        without += stock
        measured = f"{1e3 * ours['seconds']['median']:.3g} ms a {ours['unit']}"
        measured += f" and {1e3 * ours['once_seconds']:.3g} once" if ours["once_seconds"] else ""
        lines.append(
            f"| {item.name} ({ours['what']}; {ours['way']}) | {item.count:,} x {epochs[item.bench]} | {measured}, "
            f"{ours['tokens_per_second']:.0f} tokens/s | {hours[item.name]:.2f} | {stock:.2f} ({item.baseline}) |"
        )
    total = sum(hours.values())
    largest = sorted(hours, key=hours.get, reverse=True)[:2]
    lines += [
        f"| all | | | {total:.2f} | {without:.2f} |",
        "",
        "The two largest items: " + ", ".join(f"{name} ({hours[name] / total:.0%})" for name in largest) + ".",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of bench_sft, bench_generate and bench_dpo")
    parser.add_argument("--sft_epochs", type=int, default=1)
    parser.add_argument("--dpo_epochs", type=int, default=1)
    args = parser.parse_args(arguments)
    epochs = {"SFT": args.sft_epochs, "Generation": 1, "DPO": args.dpo_epochs}
    print(whole_recipe(read(args.results), epochs))


if __name__ == "__main__":
    main()

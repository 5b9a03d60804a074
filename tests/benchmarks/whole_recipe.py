# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Estimate the time of the paper's whole recipe on one device from the results of the benchmarks.

```bash
python tests/benchmarks/bench_sft.py --shape llava_7b --output runs/bench/sft.json
python tests/benchmarks/bench_generate.py --shape llava_7b --output runs/bench/generate.json
python tests/benchmarks/bench_dpo.py --shape llava_7b --output runs/bench/dpo.json
python tests/benchmarks/whole_recipe.py runs/bench/*.json
```

STLLaVA-Med (https://huggingface.co/papers/2406.19973) was trained on 4 A100 GPUs in 10 hours: 37k conversations, a
question and two answers for each of 10k images, and 10k pairs. Each figure is a count of the paper multiplied by a
measured time. Loading, saving, evaluation and the judge, which depends on a server, are not included. The lengths of
conversations and answers are those of the benchmarks.
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
        bench (`str`): Benchmark that measures the part.
        name (`str`): Name in the table.
        count (`int`): Number of units of the benchmark.
        baseline (`str`): Name of the baseline in the benchmark.
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
    Read the results, by benchmark.

    Raises:
        SystemExit: If a result is missing or given twice, or if the results are of different devices or shapes.
    """
    results = {}
    for file in files:
        result = json.loads(file.read_text())
        if result["bench"] in results:
            raise SystemExit(f"{file}: {result['bench']} has two results. Give one result per benchmark.")
        results[result["bench"]] = result
    if missing := [item.bench for item in ITEMS if item.bench not in results]:
        raise SystemExit(f"No result of {', '.join(missing)}. Run the benchmark with --output first.")
    for what, values in {
        "devices": {result["machine"]["device"] for result in results.values()},
        "shapes": {result["settings"]["shape"] for result in results.values()},
    }.items():
        if len(values) > 1:
            raise SystemExit(f"The results are of different {what}: {', '.join(sorted(values))}.")
    return results


def seconds_per_unit(row: dict, epochs: int) -> float:
    """Return the seconds per unit of all epochs and of the work that is done once before them."""
    return epochs * row["seconds"]["median"] + row["once_seconds"]


def fastest(rows: Sequence[dict], baseline: str, epochs: int) -> tuple[dict, dict]:
    """Return the fastest row of ours in the first setting, and the fastest row of the baseline."""
    first = rows[0]["what"].removesuffix(", checkpointing")
    rows = [row for row in rows if row["what"].removesuffix(", checkpointing") == first]
    by_time = lambda row: seconds_per_unit(row, epochs)  # noqa: E731
    ours = min((row for row in rows if row["way"].startswith("ours")), key=by_time)
    return ours, min((row for row in rows if row["way"] == baseline), key=by_time)


def whole_recipe(results: dict[str, dict], epochs: dict[str, int]) -> str:
    """
    Make a table of the time of each part of the recipe.

    Args:
        results (`dict`): Results from [`read`].
        epochs (`dict[str, int]`): Number of epochs, by benchmark.

    Returns:
        `str`: A Markdown table.
    """
    any_result = next(iter(results.values()))
    lines = [
        f"One {any_result['machine']['device']}, shape {any_result['settings']['shape']}:",
        "",
        "| item | count | measured | hours | baseline, hours |",
        "|---|---|---|---|---|",
    ]
    hours, baseline_hours = {}, 0.0
    for item in ITEMS:
        ours, baseline = fastest(results[item.bench]["rows"], item.baseline, epochs[item.bench])
        hours[item.name], stock = (
            item.count * seconds_per_unit(row, epochs[item.bench]) / 3600 for row in (ours, baseline)
        )
        baseline_hours += stock
        measured = f"{1e3 * ours['seconds']['median']:.3g} ms per {ours['unit']}"
        measured += f" and {1e3 * ours['once_seconds']:.3g} once" if ours["once_seconds"] else ""
        lines.append(
            f"| {item.name} ({ours['what']}; {ours['way']}) | {item.count:,} x {epochs[item.bench]} | {measured}, "
            f"{ours['tokens_per_second']:.0f} tokens/s | {hours[item.name]:.2f} | {stock:.2f} ({item.baseline}) |"
        )
    total = sum(hours.values())
    largest = sorted(hours, key=hours.get, reverse=True)[:2]
    lines += [
        f"| total | | | {total:.2f} | {baseline_hours:.2f} |",
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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Does self-training help? Run the arms of `recipes/phantom_study.yaml` over several seeds and plot the results.

```bash
python examples/phantom_study.py --output_dir runs/study --seeds 101 102 103 104 105
```

Every seed has its own base model, scans, random numbers and test images. The settings were chosen on seed 0, which is
not one of these seeds. One seed takes about 20 minutes on one core; `--jobs 2` runs two seeds in parallel. The command
can be interrupted and re-run; it skips finished stages. It writes `results.json` and `index.html`.
"""

import argparse
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jinja2 import Template

from medst_trl.pipeline.recipe_files import find_recipe
from medst_trl.pipeline.stages.dpo import end_of_log
from medst_trl.report.charts import Bar, bar_chart


PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Self-training on synthetic scans</title>
<style>
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1d2530; }
figure { margin: 2rem 0; max-width: 44rem; } table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #dfe3e8; }
th:first-child, td:first-child { text-align: left; }
</style></head><body>
<h1>Self-training on synthetic scans</h1>
<p>{{ seeds | length }} seeds ({{ seeds | join(", ") }}), each with its own base model, 225 labelled scans, 2,000
unlabelled scans and 300 test scans. Values are means and standard errors over seeds. Changes against stage 1 are
paired by seed.</p>
{% for chart in charts %}<figure>{{ chart }}</figure>{% endfor %}
{% for rows in tables %}<table><tr>{% for cell in rows[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endfor %}
</body></html>
""",
    autoescape=True,
)
ARMS = {
    "stage_1": "stage 1 on 9% of the labels",
    "all_labels": "stage 1 on all labels",
    "with_sft": "DPO with an SFT term",
    "only_sft": "SFT on the chosen answers only",
    "without_sft": "the same DPO without the SFT term",
    "paper": "DPO as in the paper",
    "frozen_vision": "DPO with an SFT term, vision tower frozen",
    "with_sft_errs_10": "DPO with an SFT term, judge errs in 10%",
    "only_sft_errs_10": "SFT on the chosen, judge errs in 10%",
    "paper_errs_10": "DPO as in the paper, judge errs in 10%",
    "with_sft_errs_30": "DPO with an SFT term, judge errs in 30%",
    "only_sft_errs_30": "SFT on the chosen, judge errs in 30%",
    "paper_errs_30": "DPO as in the paper, judge errs in 30%",
    "with_sft_random": "DPO with an SFT term, pairs swapped at random",
}
# Labels in charts: the judge, then the arm.
BARS = {
    "labels only": {"stage_1": "9%", "all_labels": "100%"},
    "judge is right": {
        "with_sft": "DPO and SFT", "only_sft": "SFT", "without_sft": "DPO", "paper": "paper's DPO",
        "frozen_vision": "vision frozen",
    },
    "judge errs in 10%": {
        "with_sft_errs_10": "DPO and SFT", "only_sft_errs_10": "SFT", "paper_errs_10": "paper's DPO",
    },
    "judge errs in 30%": {
        "with_sft_errs_30": "DPO and SFT", "only_sft_errs_30": "SFT", "paper_errs_30": "paper's DPO",
    },
    "pairs swapped at random": {"with_sft_random": "DPO and SFT"},
}  # fmt: skip
MEASURES = {
    "exact_match": "exact match, %",
    "open_f1": "open F1, %",
    "open_recall": "open recall, %",
    "closed_accuracy": "closed accuracy, %",
    "asked_well": "sampled questions that are well-formed, %",
    "asked_answerable": "sampled questions that the scan answers, %",
    "chosen": "log-probability of the chosen answers against the reference, nats",
    "rejected": "log-probability of the rejected answers against the reference, nats",
}


def run_seed(seed: int, directory: Path) -> None:
    """Run all arms of one seed, in one process with one thread."""
    directory.mkdir(parents=True, exist_ok=True)
    recipe = str(find_recipe("phantom_study"))
    command = [sys.executable, "-m", "medst_trl", recipe, "--seed", str(seed), "--output_dir", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(directory / "study.log", "a") as log:
        print(f"seed {seed}: running, see {log.name}", flush=True)
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    for arm in ARMS:
        measure_questions(directory, arm)
    print(f"seed {seed}: done", flush=True)


def measure_questions(directory: Path, arm: str) -> None:
    """Sample 400 questions with the paper's settings about scans that no arm was trained on, and save their scores."""
    path = directory / f"questions_{arm}.json"
    if path.exists():
        return
    measure = runpy.run_path(str(Path(__file__).with_name("ask_questions.py")))["measure"]
    shares = measure(str(adapter(directory, arm)), 400, seed=10_000, temperature=1.2, top_k=100, top_p=0.95)
    path.write_text(json.dumps(dict(zip(("asked_well", "asked_answerable"), shares, strict=True))))


def adapter(directory: Path, arm: str) -> Path:
    return directory / {"stage_1": "sft/few", "all_labels": "sft/all"}.get(arm, f"dpo/{arm}")


def read_arm(directory: Path, arm: str) -> dict[str, float]:
    scores = json.loads((directory / "evaluate" / arm / "scores.json").read_text())["scores"]["strict"]
    figures = {
        "exact_match": scores["exact_match"]["value"],
        "open_f1": scores["open"]["f1"]["value"],
        "open_recall": scores["open"]["recall"]["value"],
        "closed_accuracy": scores["closed"]["accuracy"]["value"],
    }
    questions = json.loads((directory / f"questions_{arm}.json").read_text())
    figures |= {name: 100 * share for name, share in questions.items()}
    state = json.loads((adapter(directory, arm) / "trainer_state.json").read_text())
    end = end_of_log(state["log_history"])
    return figures | {kind: end[f"logratios/{kind}"] for kind in ("chosen", "rejected") if f"logratios/{kind}" in end}


def summary(values: list[float]) -> dict[str, float]:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "standard_error": error, "seeds": len(values)}


def collect(seeds: dict[int, Path]) -> dict:
    runs = {seed: {arm: read_arm(directory, arm) for arm in ARMS} for seed, directory in seeds.items()}
    arms = {}
    for arm in ARMS:
        arms[arm] = {"values": {}, "against_stage_1": {}}
        for name in MEASURES:
            values = [runs[seed][arm][name] for seed in runs if name in runs[seed][arm]]
            if values:
                arms[arm]["values"][name] = summary(values)
            if values and name in runs[next(iter(runs))]["stage_1"]:
                changes = [run[arm][name] - run["stage_1"][name] for run in runs.values()]
                arms[arm]["against_stage_1"][name] = summary(changes)
    return {"seeds": sorted(runs), "arms": arms, "runs": runs}


def chart(results: dict, name: str, kind: str, title: str) -> str:
    charts = []
    for judge, arms in BARS.items():
        figures = {label: results["arms"][arm][kind].get(name) for arm, label in arms.items()}
        bars = []
        for label, figure in figures.items():
            if figure and any(figure[end] for end in ("mean", "standard_error")):  # skip stage 1 against itself
                spread = 0 if math.isnan(figure["standard_error"]) else figure["standard_error"]
                bars.append(Bar(label, figure["mean"], (figure["mean"] - spread, figure["mean"] + spread)))
        charts.append(bar_chart(f"{title}: {judge}", bars, unit="mean over seeds, bars: standard error"))
    return "".join(charts)


def table(results: dict, names: list[str]) -> list[list[str]]:
    def cell(figure):
        return "" if figure is None else f"{figure['mean']:.1f} ± {figure['standard_error']:.1f}"

    rows = [["arm", *(MEASURES[name] for name in names), "change in exact match"]]
    for arm, label in ARMS.items():
        values = results["arms"][arm]["values"]
        change = results["arms"][arm]["against_stage_1"]["exact_match"]
        rows.append([label, *(cell(values.get(name)) for name in names), cell(change) if arm != "stage_1" else ""])
    return rows


def write_page(results: dict, path: Path) -> None:
    charts = [
        chart(results, "exact_match", "against_stage_1", "Change in exact match against stage 1, points"),
        chart(results, "closed_accuracy", "against_stage_1", "Change in closed accuracy, points"),
        chart(results, "asked_answerable", "values", "Sampled questions that the scan answers, %"),
        chart(results, "chosen", "values", "Chosen answers: change in log-probability, nats"),
    ]
    names = list(MEASURES)
    tables = [table(results, names[:4]), table(results, names[4:])]
    path.write_text(PAGE.render(seeds=results["seeds"], charts=charts, tables=tables), encoding="utf-8")


def main(output_dir: Path, seeds: list[int], jobs: int) -> dict:
    directories = {seed: output_dir / f"seed_{seed}" for seed in seeds}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_seed, directories, directories.values()))
    results = collect(directories)
    (output_dir / "results.json").write_text(json.dumps(results, indent=1))
    write_page(results, output_dir / "index.html")
    for row in table(results, ["exact_match", "closed_accuracy", "asked_answerable"]):
        print(f"{row[0]:<48}" + "".join(f"{value:>26.26}" for value in row[1:]))
    print(f"The report is {output_dir / 'index.html'}.")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--jobs", type=int, default=1, help="number of seeds to run in parallel, one thread each")
    args = parser.parse_args()
    main(args.output_dir, args.seeds, args.jobs)

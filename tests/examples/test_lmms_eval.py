# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The task files for lmms-eval give the scores of `score_vqa`. They run here as in lmms-eval 0.7: `process_docs`
flattens the documents, each document has its prompt and image, results are scored on documents without images, and
each metric has its own aggregation.
"""

import importlib.util
import random
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_dataset
from phantom_rows import benchmark_rows
from PIL import Image

from medst_trl.data.schema import benchmark_features
from medst_trl.demo.phantoms import make_phantoms
from medst_trl.evaluation.scoring import score_vqa
from medst_trl.evaluation.vqa import questions_of


TASKS_DIRECTORY = Path(__file__).parents[2] / "examples" / "lmms_eval"
TASKS = ("vqa_rad", "slake", "path_vqa")


class Loader(yaml.FullLoader):
    """Resolve `!function utils.name` to the function in the utils.py next to the file."""


def _function(loader, node):
    module, name = loader.construct_scalar(node).split(".")
    spec = importlib.util.spec_from_file_location(module, TASKS_DIRECTORY / f"{module}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return getattr(found, name)


Loader.add_constructor("!function", _function)


def read_task(name):
    task = yaml.load((TASKS_DIRECTORY / name).read_text(encoding="utf-8"), Loader)
    return (read_task(task.pop("include")) if "include" in task else {}) | task


def evaluate(task, dataset, answer):
    """Return the score of each metric, and its records."""
    docs = task["process_docs"](dataset)
    without_images = docs.remove_columns("image")
    results = defaultdict(list)
    for number, doc in enumerate(docs):
        prompt = task["doc_to_text"](doc, task["lmms_eval_specific_kwargs"]["default"])
        (image,) = task["doc_to_visual"](doc)
        assert isinstance(image, Image.Image) and image.mode == "RGB"
        scored = task["process_results"](without_images[number], [answer(prompt, image).strip()])
        for metric, record in scored.items():
            results[metric].append(record)
    aggregations = {metric["metric"]: metric["aggregation"] for metric in task["metric_list"]}
    assert results.keys() <= aggregations.keys()
    return {metric: aggregations[metric](records) for metric, records in results.items()}, results


def figure_of(metric, scores):
    variant = "llava_med" if metric.startswith("llava_med") else "strict"
    name = metric.removeprefix(f"{variant}_")
    part = next((part for part in ("open", "closed") if name.startswith(f"{part}_")), None)
    return scores[variant][part][name.removeprefix(f"{part}_")] if part else scores[variant][name]


@pytest.fixture(scope="module")
def benchmark_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("benchmark")
    rows = list(benchmark_rows(make_phantoms(8, seed=0, split="test")))
    Dataset.from_list(rows, features=benchmark_features()).to_parquet(directory / "test-00000-of-00001.parquet")
    return directory


@pytest.mark.parametrize("name", TASKS)
def test_scores_equal_those_of_score_vqa(benchmark_directory, name):
    task = read_task(f"{name}.yaml")
    benchmark = load_dataset(str(benchmark_directory), split=task["test_split"])  # as lmms-eval opens `dataset_path`
    rng = random.Random(0)
    right = {question["question"]: question["answer"] for question in questions_of(benchmark)}
    answers = []

    def answer(prompt, image):
        answers.append(
            rng.choice([right[prompt], "no", "I see no lung here", "", f"{right[prompt]} {right[prompt]}\n"])
        )
        return answers[-1]

    figures, records = evaluate(task, benchmark, answer)
    questions = questions_of(benchmark)
    rows = [question | {"prediction": text} for question, text in zip(questions, answers, strict=True)]
    scores = {variant: score_vqa(rows, variant, bootstrap_samples=0) for variant in ("strict", "llava_med")}
    assert figures.keys() == {metric["metric"] for metric in task["metric_list"]}
    for metric, value in figures.items():
        leaf = figure_of(metric, scores)
        assert value == leaf["value"], metric
        # lmms-eval computes standard errors from these: one score per question, clustered by image
        assert len(records[metric]) == leaf["n"]
        assert sum(record["score"] for record in records[metric]) / leaf["n"] == pytest.approx(value)
        assert {record[task["cluster_key"]] for record in records[metric]} <= set(benchmark["image_id"])
    assert len({round(value) for value in figures.values()}) > 5, "the scores must differ between metrics"


def test_each_question_keeps_its_image(benchmark_directory):
    task = read_task("vqa_rad.yaml")
    benchmark = load_dataset(str(benchmark_directory), split="test")
    docs = task["process_docs"](benchmark)
    by_id = dict(zip(benchmark["image_id"], benchmark["image"]))
    questions = questions_of(benchmark)
    assert [(doc["id"], doc["image_id"]) for doc in docs] == [(row["id"], row["image_id"]) for row in questions]
    assert all(doc["image"].tobytes() == by_id[doc["image_id"]].tobytes() for doc in docs)


def test_a_mirror_on_the_hub_is_scored_without_types():
    """Yes and no answers count as closed, and records as independent, without the columns of the benchmark."""
    rows = [
        {"image": Image.new("L", (4, 4), shade), "question": question, "answer": answer}
        for shade, (question, answer) in enumerate([("Is it?", "Yes"), ("Where is it?", "left lung")])
    ]
    task = read_task("path_vqa.yaml")
    figures, records = evaluate(task, Dataset.from_list(rows), lambda prompt, image: "yes, left")
    assert figures["strict_closed_accuracy"] == 100 and figures["strict_open_recall"] == 50
    assert len(records["strict_closed_accuracy"]) == len(records["strict_open_recall"]) == 1


def test_prompts_can_be_changed():
    to_text = read_task("slake.yaml")["doc_to_text"]
    doc = {"question": "Where?"}
    assert to_text(doc) == to_text(doc, {"pre_prompt": "", "post_prompt": ""}) == "Where?"
    assert to_text(doc, {"pre_prompt": "Q: ", "post_prompt": "\nBe short."}) == "Q: Where?\nBe short."


def test_the_group_lists_all_tasks():
    tasks = [read_task(f"{name}.yaml") for name in TASKS]
    group = yaml.safe_load((TASKS_DIRECTORY / "medst.yaml").read_text())
    assert group["task"] == [task["task"] for task in tasks]
    # lmms-eval reads every .yaml file as a task, so the template has no suffix
    assert {path.stem for path in TASKS_DIRECTORY.glob("*.yaml")} == {*TASKS, "medst"}
    assert all(task["generation_kwargs"]["max_new_tokens"] == 64 for task in tasks)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
VQA-RAD, SLAKE (English) and PathVQA as lmms-eval tasks, scored by medst_trl's rules.

```bash
pip install lmms-eval && pip install --no-deps .      # in the checkout; the scores are pure Python
lmms-eval eval --include_path examples/lmms_eval --tasks medst_vqa_rad --model llava_hf \\
    --model_args pretrained=llava-hf/llava-1.5-7b-hf --batch_size 1 --log_samples --output_path runs/lmms_eval
```

`dataset_path` of each task is a benchmark that `medst prepare` wrote: a directory, or its repository on the Hub. A
mirror with the columns image, question and answer works too; the file of each task describes the differences. Figures
are percentages and equal those of `medst evaluate` on the same answers. The prompts are lmms-eval's, so answers may
differ.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from medst_trl import score_vqa
from medst_trl.evaluation.predictions import answer_type
from medst_trl.evaluation.scoring import score_records


if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

COLUMNS = ("id", "question", "answer", "answer_type", "question_type")
METRICS = {
    "strict_exact_match": ("strict", ("exact_match",)),
    "strict_open_exact_match": ("strict", ("open", "exact_match")),
    "strict_open_precision": ("strict", ("open", "precision")),
    "strict_open_recall": ("strict", ("open", "recall")),
    "strict_open_f1": ("strict", ("open", "f1")),
    "strict_closed_accuracy": ("strict", ("closed", "accuracy")),
    "strict_closed_no_verdict": ("strict", ("closed", "no_verdict")),
    "llava_med_open_precision": ("llava_med", ("open", "precision")),
    "llava_med_open_recall": ("llava_med", ("open", "recall")),
    "llava_med_open_f1": ("llava_med", ("open", "f1")),
    "llava_med_closed_accuracy": ("llava_med", ("closed", "accuracy")),
}


def process_docs(dataset: "Dataset") -> "Dataset":
    """Turn a benchmark (one row per image) into one row per question with its image. A mirror stays unchanged."""
    if "questions" not in dataset.column_names:
        return dataset
    pairs = [(row, question) for row, questions in enumerate(dataset["questions"]) for question in questions]
    flat = dataset.remove_columns("questions").select([row for row, _ in pairs])
    for column in COLUMNS:
        flat = flat.add_column(column, [question[column] for _, question in pairs])
    return flat


def doc_to_visual(doc: dict[str, Any]) -> list["Image.Image"]:
    """Return the image of a question."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """Put the question between the texts that the task's file sets."""
    texts = lmms_eval_specific_kwargs or {}
    return f"{texts.get('pre_prompt', '')}{doc['question']}{texts.get('post_prompt', '')}"


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """Return the record of an answer for each of its metrics, with its `score` for lmms-eval's standard errors."""
    record = {key: doc.get(key) for key in ("image_id", *COLUMNS)}
    record |= {"prediction": results[0], **answer_type(doc["answer"], doc.get("answer_type"))}
    scores = {variant: score_records([record], variant)[0][1] for variant in ("strict", "llava_med")}
    return {
        name: record | {"score": 100 * scores[variant][figure]}
        for name, (variant, figure) in METRICS.items()
        if figure in scores[variant]
    }


def _figure(records: list[dict[str, Any]], variant: str, figure: tuple[str, ...]) -> float | None:
    found = score_vqa(records, variant, bootstrap_samples=0)
    for key in figure:
        found = found[key]
    return found["value"]


def __getattr__(name: str) -> partial:
    """Return the aggregation function of a metric, for example for `!function utils.strict_open_f1`."""
    if name not in METRICS:
        raise AttributeError(name)
    variant, figure = METRICS[name]
    return partial(_figure, variant=variant, figure=figure)

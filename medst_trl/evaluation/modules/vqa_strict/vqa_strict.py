# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Medical visual question answering, variant `strict`, for `evaluate`: a shell over [`medst_trl.score_vqa`].

Example:

```python
>>> import evaluate
>>> metric = evaluate.load("medst_trl/evaluation/modules/vqa_strict")
>>> metric.compute(predictions=["Yes."], references=["yes"], answer_types=["closed"])["closed"]["accuracy"]["value"]
100.0
```
"""

# `evaluate` reads a module's imports line by line with a regular expression: each stands on its own line.
import datasets
import evaluate

from medst_trl.evaluation.metrics import score_vqa


DESCRIPTION = (
    "Token overlap by minimum counts, whole-answer exact match, first whole-word verdict for yes/no questions."
)
ARGUMENTS = """
    Args:
        predictions (`list[str]`):
            The model's answers.
        references (`list[str]`):
            The right answers.
        answer_types (`list[str]`):
            `"open"` or `"closed"` for each.
        question_types, image_ids (`list[str]`, *optional*):
            For scores by type, and for intervals that draw whole images.
        bootstrap_samples (`int`, *optional*, defaults to `1000`), seed (`int`, *optional*, defaults to `0`):
            Resamples behind each interval, and their seed.

    Returns:
        `dict`: see [`medst_trl.score_vqa`].
"""


class VqaStrict(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        names = ("predictions", "references", "answer_types")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="https://huggingface.co/papers/2406.19973",
            inputs_description=ARGUMENTS,
            features=datasets.Features({name: datasets.Value("string") for name in names}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        answer_types: list[str],
        question_types: list[str] | None = None,
        image_ids: list[str] | None = None,
        bootstrap_samples: int = 1000,
        seed: int = 0,
    ) -> dict:
        columns = {"prediction": predictions, "answer": references, "answer_type": answer_types}
        columns |= {"question_type": question_types} if question_types is not None else {}
        columns |= {"image_id": image_ids} if image_ids is not None else {}
        return score_vqa(
            [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)],
            "strict",
            bootstrap_samples=bootstrap_samples,
            seed=seed,
        )

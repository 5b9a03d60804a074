# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Base of the modules that Hugging Face's `evaluate` loads: [`medst_trl.score_vqa`] with its interface."""

import inspect
from typing import Any

import datasets
import evaluate

from .metric import METRICS
from .scoring import score_vqa


class VqaMetric(evaluate.Metric):
    """`score_vqa` with the metric `variant`, a name in `METRICS`, as a metric of `evaluate`."""

    variant: str

    def _info(self) -> evaluate.MetricInfo:
        names = ("predictions", "references", "answer_types")
        return evaluate.MetricInfo(
            description=METRICS.get(self.variant).summary,
            citation="https://huggingface.co/papers/2406.19973",
            inputs_description=inspect.getdoc(self._compute),
            features=datasets.Features({name: datasets.Value("string") for name in names}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        answer_types: list[str],
        question_types: list[str] | None = None,
        image_ids: list[str] | None = None,
        **kwargs: Any,
    ) -> dict:
        """
        Score predictions, open and closed questions apart.

        Args:
            predictions (`list[str]`):
                The model's answers.
            references (`list[str]`):
                The right answers.
            answer_types (`list[str]`):
                `"open"` or `"closed"` for each.
            question_types, image_ids (`list[str]`, *optional*):
                For scores by type, and for intervals that resample whole images.
            **kwargs:
                `bootstrap_samples`, `seed` and settings of the metric, as for [`medst_trl.score_vqa`].

        Returns:
            `dict`: see [`medst_trl.score_vqa`].
        """
        columns = {"prediction": predictions, "answer": references, "answer_type": answer_types}
        columns |= {"question_type": question_types} if question_types is not None else {}
        columns |= {"image_id": image_ids} if image_ids is not None else {}
        rows = [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
        return score_vqa(rows, self.variant, **kwargs)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Metric `llava_med` of medical visual question answering for Hugging Face's `evaluate`.

Example:

```python
>>> import evaluate
>>> metric = evaluate.load("medst_trl/evaluation/modules/vqa_llava_med")
>>> metric.compute(predictions=["Yes."], references=["yes"], answer_types=["closed"])["closed"]["accuracy"]["value"]
100.0
```
"""

# `evaluate` reads imports line by line with a regular expression: keep each on its own line. It uses the first metric
# among the names of this module, so the base class must not be one of them.
from medst_trl.evaluation import evaluate_metric


class VqaLlavaMed(evaluate_metric.VqaMetric):
    variant = "llava_med"

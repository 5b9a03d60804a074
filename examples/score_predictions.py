# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Score the answers of any model, without the model and without torch.

```bash
python examples/score_predictions.py
python examples/score_predictions.py runs/vqa_rad/evaluate/predictions.jsonl
```
"""

import sys

from medst_trl import score_vqa
from medst_trl.base.errors import UserError
from medst_trl.evaluation.predictions import read_predictions
from medst_trl.evaluation.scores_file import ScoresFile


EXAMPLES = [
    {"id": "1", "answer": "yes", "answer_type": "closed", "prediction": "Yes, there is a small effusion."},
    {
        "id": "2",
        "answer": "no",
        "answer_type": "closed",
        "prediction": "The lungs are normal.",
    },  # correct under llava_med
    {
        "id": "3",
        "answer": "left lower lobe",
        "answer_type": "open",
        "prediction": "In the lower lobe of the left lung.",
    },
    {
        "id": "4",
        "answer": "CT",
        "answer_type": "open",
        "prediction": "CT CT CT CT",
    },  # repetition does not raise recall
]


def main(predictions: str | None = None) -> dict[str, dict]:
    records = EXAMPLES
    if predictions:
        records, rejected = read_predictions(predictions)
        print(f"{predictions}: {len(records)} predictions, {len(rejected)} rejected")
    scores = {variant: score_vqa(records, variant=variant) for variant in ("strict", "llava_med")}
    tables = ScoresFile({"scores": scores})
    for variant in scores:
        print(f"\n{tables.table(variant)}")
    return scores


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except UserError as error:
        sys.exit(f"error: {error}")

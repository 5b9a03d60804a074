# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Convert predictions from one project's format into another's: `medst`, `llava_med`, `medevalkit`, `vlmevalkit`.

```bash
python examples/convert_predictions.py runs/vqa_rad/evaluate/predictions.jsonl answers.jsonl llava_med
python examples/convert_predictions.py results.json predictions.tsv vlmevalkit

# LLaVA-Med's answer files lack the right answers. Take them from a benchmark, or from LLaVA-Med's own test.json
python examples/convert_predictions.py answer-file.jsonl predictions.jsonl medst runs/vqa_rad/prepare/benchmark
```

The format of the source file is detected. `llava_med` also writes `answers_questions.json`, the file for `--gt` of
LLaVA-Med's `run_eval.py --pred answers.jsonl --gt ...`.
"""

import argparse
from collections import Counter

from medst_trl.base.errors import UserError
from medst_trl.evaluation.predictions import PREDICTION_FORMATS, export_predictions, read_predictions


def main(source: str, target: str, format: str = "medst", benchmark: str | None = None) -> dict[str, int]:
    """Convert a file and print what was rejected."""
    records, rejected = read_predictions(source, benchmark=benchmark)
    export_predictions(records, target, format)
    reasons = Counter(row["reason"] for row in rejected)
    print(f"{target}: {len(records)} predictions, {len(rejected)} rejected {dict(reasons) or ''}")
    return {"records": len(records), **reasons}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="predictions file in any of these formats")
    parser.add_argument("target", help="file to write; for vlmevalkit .tsv, .csv or .json")
    parser.add_argument("format", nargs="?", default="medst", choices=list(PREDICTION_FORMATS), help="format to write")
    parser.add_argument("benchmark", nargs="?", help="where to find the right answers: directory, Hub id or test.json")
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")

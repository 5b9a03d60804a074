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
LLaVA-Med's `run_eval.py --pred answers.jsonl --gt ...`. Keys that a format does not have go into fields that its own
tools ignore, so that `medst_trl` reads the same records back: id, image_id, question, answer, answer_type,
question_type, prediction and group_id.
"""

import argparse
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.base.files import write_json, write_jsonl, write_text
from medst_trl.base.settings import check_choice
from medst_trl.evaluation.predictions import GOLD, read_predictions


DELIMITERS = {".tsv": "\t", ".csv": ","}  # of VLMEvalKit's tables
VLMEVALKIT = ("index", "question", "answer", "prediction")
OURS = ("id", "image_id", "answer_type", "question_type", "group_id")


def main(source: str, target: str, format: str = "medst", benchmark: str | None = None) -> dict[str, int]:
    """Convert a file and print what was rejected."""
    records, rejected = read_predictions(source, benchmark=benchmark)
    export_predictions(records, target, format)
    reasons = Counter(row["reason"] for row in rejected)
    print(f"{target}: {len(records)} predictions, {len(rejected)} rejected {dict(reasons) or ''}")
    return {"records": len(records), **reasons}


def export_predictions(records: Iterable[Mapping[str, Any]], path: str | Path, format: str) -> None:
    """Write predictions in one of `WRITERS`. Those without an `id` are numbered."""
    check_choice("format", format, WRITERS)
    rows = [
        {**record, "id": str(number if record.get("id") is None else record["id"])}
        for number, record in enumerate(records)
    ]
    row_id, times = Counter(row["id"] for row in rows).most_common(1)[0]
    if times > 1:
        raise UserError(f"{times} predictions have the id {row_id!r}. Give each question its own.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[format](rows, path)


def write_llava_med(records: list[dict[str, Any]], path: Path) -> None:
    """Write an answer file, and `answers_questions.json`, against which LLaVA-Med's `run_eval.py` scores it."""
    write_jsonl(path, map(_llava_med_row, records))
    write_json(path.with_name(f"{path.stem}_questions.json"), [_llava_med_question(record) for record in records])


def _llava_med_row(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question_id": str(record["id"]),
        "prompt": record.get("question") or "",
        "text": str(record["prediction"]),
        "answer_id": hashlib.sha256(str(record["id"]).encode()).hexdigest()[:22],
        "model_id": (record.get("generation") or {}).get("model") or "",
        "metadata": {key: record[key] for key in GOLD if record.get(key) is not None},
    }


def _llava_med_question(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(record["id"]),
        "image": str(record.get("image_id") or ""),
        "answer_type": str(record["answer_type"]).strip().upper(),
        "conversations": [
            {"from": "human", "value": f"{record.get('question') or ''}\n<image>"},
            {"from": "gpt", "value": str(record["answer"])},
        ],
    }


def write_medevalkit(records: list[dict[str, Any]], path: Path) -> None:
    """Write a `results.json` whose records also carry `id`, `image_id`, `question_type` and `group_id`."""
    rows = [
        {
            "lang": "en",
            "answer_type": str(record["answer_type"]).strip().upper(),
            "answer": str(record["answer"]),
            "question": record.get("question") or "",
            "response": str(record.get("response", record["prediction"])),
            **{key: record.get(key) for key in ("id", "image_id", "question_type", "group_id")},
            "prediction": str(record["prediction"]),
        }
        for record in records
    ]
    write_json(path, rows)


def write_vlmevalkit(records: list[dict[str, Any]], path: Path) -> None:
    """Write `.tsv`, `.csv` or `.json`, depending on the suffix."""
    rows = [
        {
            "index": number,
            "question": record.get("question") or "",
            "answer": str(record["answer"]),
            "prediction": str(record["prediction"]),
            **{key: record.get(key) for key in OURS},
        }
        for number, record in enumerate(records)
    ]
    suffix = path.suffix.lower()
    if suffix == ".json":
        write_json(path, rows)
        return
    if suffix not in DELIMITERS:
        raise UserError(f"VLMEvalKit's predictions are written as .tsv, .csv or .json. Rename {path}.")
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=DELIMITERS[suffix], quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow((*VLMEVALKIT, *OURS))
    writer.writerows([row[key] for key in (*VLMEVALKIT, *OURS)] for row in rows)
    write_text(path, text.getvalue())


WRITERS = {
    "medst": lambda records, path: write_jsonl(path, records),
    "llava_med": write_llava_med,
    "medevalkit": write_medevalkit,
    "vlmevalkit": write_vlmevalkit,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="predictions file in any of these formats")
    parser.add_argument("target", help="file to write; for vlmevalkit .tsv, .csv or .json")
    parser.add_argument("format", nargs="?", default="medst", choices=list(WRITERS), help="format to write")
    parser.add_argument("benchmark", nargs="?", help="where to find the right answers: directory, Hub id or test.json")
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")

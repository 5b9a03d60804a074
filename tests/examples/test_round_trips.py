# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Predictions that the example writes are read back unchanged, and can be read by the project of each format."""

import csv
import json
import runpy
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medst_trl.base.errors import UserError
from medst_trl.evaluation.predictions import PREDICTION_FORMATS, guess_format, read_predictions


export_predictions = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "convert_predictions.py"))[
    "export_predictions"
]

COLUMNS = ("id", "image_id", "group_id", "question", "answer", "answer_type", "question_type", "prediction")
SUFFIXES = {"medst": ".jsonl", "llava_med": ".jsonl", "medevalkit": ".json", "vlmevalkit": ".tsv"}
KINDS = [*SUFFIXES.items(), ("vlmevalkit", ".csv"), ("vlmevalkit", ".json")]

DIFFICULT_TEXTS = (
    "", " ", "=1+1", "a\tb", "a\nb", "a\r\nb\r", '"', '""', "'", ",", "\\", "NA", "null", "None", "nan", "3.0",
    "\ufeff", "\u2028", "\x00", "\x1c", "<image>", "<answer>no</answer>", "\\boxed{no}", "\\boxed{", "{}",
    "[yes, no]", "左肺", "🫁", "x" * 200_000,
)  # fmt: skip
TEXTS = st.sampled_from(DIFFICULT_TEXTS) | st.text(max_size=20)
ANSWERS = TEXTS.filter(lambda text: text.strip())
RECORDS = st.lists(
    st.fixed_dictionaries(
        {
            "image_id": st.none() | st.sampled_from(["a", "b"]),
            "group_id": st.none() | st.sampled_from(["5a17ed-0", "5a17ed-1"]),
            "question": TEXTS,
            "answer": ANSWERS,
            "answer_type": st.sampled_from(["open", "closed"]),
            "question_type": st.none() | st.sampled_from(["PRES", "SIZE, PRES"]),
            "prediction": TEXTS,
        }
    ),
    min_size=1,
    max_size=6,
).map(lambda rows: [{"id": f"vqa_rad-{number}", **row} for number, row in enumerate(rows)])


def known_columns(records):
    return [{key: record.get(key) for key in COLUMNS} for record in records]


def difficult_records():
    return [
        {"id": str(number), "image_id": None, "group_id": None, "question": text,
         "answer": text if text.strip() else "x", "answer_type": "open", "question_type": None, "prediction": text}
        for number, text in enumerate(DIFFICULT_TEXTS)
    ]  # fmt: skip


@pytest.mark.parametrize(("format", "suffix"), KINDS)
@settings(deadline=None, max_examples=40)
@given(RECORDS)
@example(difficult_records())
def test_every_format_is_read_back(format, suffix, records):
    with TemporaryDirectory() as directory:
        path = Path(directory) / f"predictions{suffix}"
        export_predictions(records, path, format)
        assert guess_format(path) == format
        reread, rejected = read_predictions(path)
    assert known_columns(reread) == records
    assert rejected == []
    assert not any(record.get("answer_type_guessed") for record in reread)


@settings(deadline=None, max_examples=10)
@given(RECORDS, st.permutations(KINDS))
def test_records_are_unchanged_by_a_chain_of_formats(records, kinds):
    with TemporaryDirectory() as directory:
        current = records
        for number, (format, suffix) in enumerate(kinds):
            path = Path(directory) / f"{number}{suffix}"
            export_predictions(current, path, format)
            current, _ = read_predictions(path)
    assert known_columns(current) == records


@pytest.mark.parametrize("separator", ["\t", ","])
def test_tables_are_exchanged_with_pandas(tmp_path, separator):
    """VLMEvalKit uses pandas and quotes every field."""
    records = [record for record in difficult_records() if "\x00" not in record["prediction"]]
    path, pandas_path = (
        tmp_path / f"{name}.{'tsv' if separator == chr(9) else 'csv'}" for name in ("exported", "pandas")
    )
    export_predictions(records, path, "vlmevalkit")
    frame = pd.read_csv(path, sep=separator, keep_default_na=False, dtype=str)
    assert frame["prediction"].tolist() == [record["prediction"] for record in records]
    assert frame["index"].is_unique

    frame = frame.drop(columns=["id", "image_id", "answer_type", "question_type"])
    frame.to_csv(pandas_path, sep=separator, index=False, encoding="utf-8", quoting=csv.QUOTE_ALL)
    reread, _ = read_predictions(pandas_path)
    assert [record["prediction"] for record in reread] == [record["prediction"] for record in records]
    assert [record["id"] for record in reread] == frame["index"].tolist()


def test_files_have_the_fields_that_other_tools_require(tmp_path):
    record = {"id": "q1", "question": "Is it?", "answer": "yes", "answer_type": "closed", "prediction": "no"}
    record["generation"] = {"model": "org/model"}
    export_predictions([record], tmp_path / "a.jsonl", "llava_med")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (row["question_id"], row["prompt"], row["text"], row["model_id"]) == ("q1", "Is it?", "no", "org/model")
    (gold,) = json.loads((tmp_path / "a_questions.json").read_text())
    assert (gold["id"], gold["answer_type"], gold["conversations"][1]["value"]) == ("q1", "CLOSED", "yes")

    export_predictions([record], tmp_path / "results.json", "medevalkit")
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert {"lang": "en", "answer_type": "CLOSED", "answer": "yes", "response": "no"}.items() <= row.items()


def test_unwritable_records_are_refused(tmp_path):
    record = {"id": "1", "question": "?", "answer": "yes", "answer_type": "closed", "prediction": "no"}
    for records, path, format, message in (
        ([record], "p.xlsx", "vlmevalkit", ".tsv, .csv or .json"),
        ([record], "p.jsonl", "coco", "Choose one of medst, llava_med"),
        ([record, record], "p.jsonl", "llava_med", "2 predictions have the id '1'"),
    ):
        with pytest.raises(UserError, match=message):
            export_predictions(records, tmp_path / path, format)
    assert list(tmp_path.iterdir()) == []
    assert {format for format, _ in KINDS} == set(PREDICTION_FORMATS)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that predictions files of other projects are read, and are joined only with the right answers."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medst_trl.base.errors import UserError
from medst_trl.data.sources.vqa import read_vqa_rad, read_vqa_rad_mevf
from medst_trl.evaluation.predictions import guess_format, read_predictions
from medst_trl.evaluation.scoring import score_vqa
from medst_trl.interop.predictions import final_answer


OPTIONS = " Please choose from the following two options: [yes, no]"
QUESTIONS = [
    {"id": f"vqa_rad-{number}", "image_id": image, "question": text, "answer": answer, "answer_type": kind,
     "question_type": "PRES"}
    for number, image, text, answer, kind in [
        (10, "a", "Is there air?", "Yes", "closed"),
        (13, "a", "Is this axial?", "No", "closed"),
        (20, "b", "Is this axial?", "Yes", "closed"),
        (21, "b", "What is it?", "a lung", "open"),
    ]
]  # fmt: skip


def answers(*changes):
    """Return answers to `QUESTIONS` in the format of LLaVA-Med, with the changes to each row."""
    rows = [
        {"question_id": int(question["id"][8:]), "prompt": question["question"] + OPTIONS, "text": f"said {number}",
         "answer_id": "x", "model_id": "m", "metadata": {}}
        for number, question in enumerate(QUESTIONS)
    ]  # fmt: skip
    return [row | change for row, change in zip(rows, changes or [{}] * len(rows))]


def write_lines(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def read_joined(path, rows, questions=QUESTIONS):
    """Write and read the rows. Return the predictions and the reasons of rejected rows, by id."""
    records, rejected = read_predictions(write_lines(path, rows), benchmark=questions)
    return {record["id"]: record["prediction"] for record in records}, {row["id"]: row["reason"] for row in rejected}


class TestLlavaMed:
    def test_answers_are_joined_by_id_in_any_order(self, path):
        expected = {question["id"]: f"said {number}" for number, question in enumerate(QUESTIONS)}
        assert read_joined(path, answers()) == (expected, {})
        assert read_joined(path, answers()[::-1]) == (expected, {})
        (record, *_), _ = read_predictions(path, benchmark=QUESTIONS)
        assert {key: record[key] for key in QUESTIONS[-1]} == QUESTIONS[-1]  # joined from the benchmark
        assert record["generation"] == {"model": "m"}

    def test_answers_are_joined_by_order_if_the_ids_differ(self, path):
        shifted = [row | {"question_id": row["question_id"] + 1} for row in answers()]  # the ids of MEVF
        expected = {question["id"]: f"said {number}" for number, question in enumerate(QUESTIONS)}
        assert read_joined(path, shifted) == (expected, {})
        # The order is that of the ids of the benchmark.
        assert read_joined(path, shifted, QUESTIONS[::-1]) == (expected, {})
        with pytest.raises(UserError, match="does not answer the questions.*by order"):
            read_joined(path, [shifted[index] for index in (1, 0, 2, 3)])
        with pytest.raises(UserError, match="3 rows, 4 questions"):
            read_joined(path, shifted[:3])

    def test_ids_of_other_questions_are_refused(self, path):
        wrong = answers({}, {"prompt": "Is this coronal?"}, {}, {})
        with pytest.raises(UserError, match="by id 1 differ.*'Is this coronal.' and 'Is this axial"):
            read_joined(path, wrong)

    def test_every_unusable_row_is_reported(self, path):
        rows = answers({}, {"question_id": 99}, {"text": None}, {})
        del rows[3]["text"]
        predictions, reasons = read_joined(path, [*rows, rows[0], "{cut off\n", "[1]\n"])
        assert predictions == {"vqa_rad-10": "said 0"}
        assert reasons == {
            "row 2": "not in the benchmark", "row 3": "no text", "row 4": "no text", "vqa_rad-10": "repeated id",
            "row 6": "not JSON", "row 7": "not a JSON object", "vqa_rad-13": "no prediction for a question",
            "vqa_rad-20": "no prediction for a question", "vqa_rad-21": "no prediction for a question",
        }  # fmt: skip

    def test_right_answers_are_read_from_a_file_of_questions(self, path, tmp_path):
        gold = [
            {"id": 10, "image": "a.jpg", "answer_type": "CLOSED", "conversatons": [  # the spelling of LLaVA-Med
                {"from": "human", "value": "<image>\nIs there air?"}, {"from": "gpt", "value": "yes"}]},
            {"id": 21, "image": "b.jpg", "answer_type": "OPEN", "conversations": [
                {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "a lung"}]},
        ]  # fmt: skip
        (tmp_path / "test.json").write_text(json.dumps(gold))
        rows = [answers()[0], answers()[3]]
        records, _ = read_predictions(write_lines(path, rows), benchmark=str(tmp_path / "test.json"))
        assert [(row["id"], row["answer"], row["answer_type"], row["image_id"]) for row in records] == [
            ("10", "yes", "closed", "a.jpg"), ("21", "a lung", "open", "b.jpg"),
        ]  # fmt: skip
        (tmp_path / "test.json").write_text(json.dumps([{"id": 10, "text": "?"}]))
        with pytest.raises(UserError, match="record 1 is not one of LLaVA-Med's questions"):
            read_predictions(path, benchmark=str(tmp_path / "test.json"))

    def test_a_file_without_right_answers_needs_a_benchmark(self, path):
        with pytest.raises(UserError, match="holds no right answers. Give the benchmark"):
            read_predictions(write_lines(path, answers()))


class TestMedEvalKit:
    def test_results_are_read(self, tmp_path):
        rows = [
            {"lang": "en", "answer_type": "CLOSED", "answer": "Left", "question": "Which?", "response": "left"},
            {"lang": "zh", "answer_type": "OPEN", "answer": "左", "question": "?", "response": "左"},
            {"question": "Is it?", "answer": "Yes", "response": "No \\boxed{yes}", "correct": True},
            {"question": "What?", "answer": "lung", "response": ""},
        ]  # fmt: skip
        path = tmp_path / "results.json"
        path.write_text(json.dumps(rows))
        records, rejected = read_predictions(path)
        assert guess_format(path) == "medevalkit"
        assert [(row["id"], row["answer_type"], row["prediction"]) for row in records] == [
            ("0", "closed", "left"), ("2", "closed", "yes"), ("3", "open", ""),
        ]  # fmt: skip
        assert [row.get("answer_type_guessed") for row in records] == [None, True, True]
        assert records[1]["response"] == "No \\boxed{yes}"
        assert [row["reason"] for row in rejected] == ["not in English"]

    @pytest.mark.parametrize(
        ("response", "answer"),
        [
            ("plain", "plain"),
            ("no \\boxed{a {b} c} \\boxed{d}", "d"),
            ("\\boxed{a {b} c} so", "a {b} c"),
            ("\\boxed{cut off", "\\boxed{cut off"),
            ("<think>no</think><answer> yes </answer>", "yes"),
            ("<answer>cut off", "<answer>cut off"),
        ],
    )
    def test_final_answer_is_extracted(self, response, answer):
        assert final_answer(response) == answer

    def test_results_are_joined_by_order_only_with_the_same_right_answers(self, tmp_path):
        rows = [{"question": q["question"], "answer": q["answer"].lower(), "response": "x"} for q in QUESTIONS]
        path = tmp_path / "results.json"
        path.write_text(json.dumps(rows))
        records, _ = read_predictions(path, benchmark=QUESTIONS)
        assert [record["image_id"] for record in records] == ["a", "a", "b", "b"]
        assert not any("answer_type_guessed" in record for record in records)
        # SLAKE has questions in both languages.
        path.write_text(json.dumps([rows[0], rows[0] | {"lang": "zh"}, *rows[1:]]))
        records, rejected = read_predictions(path, benchmark=QUESTIONS)
        assert (len(records), [row["reason"] for row in rejected]) == (4, ["not in English"])
        # The two rows ask the same question about different images.
        rows[1]["answer"], rows[2]["answer"] = rows[2]["answer"], rows[1]["answer"]
        path.write_text(json.dumps(rows))
        with pytest.raises(UserError, match="by order 2 differ"):
            read_predictions(path, benchmark=QUESTIONS)


class TestVlmEvalKit:
    def test_tables_are_read(self, tmp_path):
        path = tmp_path / "model_PathVQA_TEST.tsv"
        path.write_text(
            "index\tquestion\tanswer\tprediction\tsplit\n"
            '0\tIs it?\tno\tNA\tt\n1\t?\t\tx\tt\n2\tonly\n3\t"a\nb"\tc\t\tt\n'
        )
        records, rejected = read_predictions(path)
        assert [(row["id"], row["question"], row["answer_type"], row["prediction"]) for row in records] == [
            ("0", "Is it?", "closed", "NA"), ("3", "a\nb", "open", ""),  # an empty prediction is wrong, not missing
        ]  # fmt: skip
        assert [row["reason"] for row in rejected] == ["no answer", "2 cells instead of 5"]

    @pytest.mark.parametrize("suffix", [".tsv", ".csv"])
    def test_an_unclosed_quote_costs_only_its_line(self, tmp_path, suffix):
        rows = [["index", "question", "answer", "prediction"], *([str(n), "Is it?", "no", f"x{n}"] for n in range(6))]
        rows[2][3], rows[5][3] = '"x1', 'x4"'
        path = tmp_path / f"p{suffix}"
        path.write_text("\n".join(("\t" if suffix == ".tsv" else ",").join(row) for row in rows))
        records, rejected = read_predictions(path)
        assert [record["id"] for record in records] == ["0", "2", "3", "5"]
        assert [(row["id"], row["reason"]) for row in rejected] == [
            ("row 2", "unclosed quotes"), ("row 5", "unclosed quotes"),
        ]  # fmt: skip

    def test_tables_with_semicolons_are_read(self, tmp_path):
        (tmp_path / "p.csv").write_text("Index;question;answer;prediction\n0;Is it?;no;yes\n")
        assert read_predictions(tmp_path / "p.csv")[0][0]["prediction"] == "yes"

    def test_nan_in_json_is_a_missing_value(self, tmp_path):
        path = tmp_path / "p.json"
        rows = [f'{{"index": {n}, "question": "{q["question"]}", "answer": NaN, "prediction": "x"}}' for n, q in
                enumerate(QUESTIONS)]  # fmt: skip
        rows[1] = rows[1].replace('"x"', "NaN")
        path.write_text(f"[{', '.join(rows)}]")
        assert guess_format(path) == "vlmevalkit"
        records, rejected = read_predictions(path, benchmark=QUESTIONS)
        assert [record["id"] for record in records] == ["vqa_rad-10", "vqa_rad-20", "vqa_rad-21"]
        assert [row["reason"] for row in rejected] == ["no prediction", "no prediction for a question"]
        with pytest.raises(UserError, match="no right answers"):  # a test set with hidden answers
            read_predictions(path)

    def test_the_error_for_a_missing_openpyxl_names_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "openpyxl", None)
        (tmp_path / "p.xlsx").write_bytes(b"no workbook")
        with pytest.raises(UserError, match=r"medst_trl\[xlsx\], or save the sheet as CSV"):
            read_predictions(tmp_path / "p.xlsx")

    def test_workbooks_are_read_with_openpyxl(self, tmp_path):
        openpyxl = pytest.importorskip("openpyxl")
        path = tmp_path / "p.xlsx"
        path.write_bytes(b"no workbook")
        with pytest.raises(UserError, match="cannot be read as a workbook"):
            read_predictions(path)
        book = openpyxl.Workbook()
        header, formula = ["index", "question", "answer", "prediction"], [2, "Which?", "x", "=1+1"]
        for row in (header, [0, "Is it?", "no", None], [1, "How many?", 3, 3], formula):
            book.active.append(row)
        book.save(path)
        records, _ = read_predictions(path)
        assert [(row["answer"], row["prediction"]) for row in records] == [("no", ""), (3, 3), ("x", "=1+1")]


@pytest.mark.parametrize(
    ("name", "text", "format", "message"),
    [
        ("a.jsonl", '{"id": "1"}', "llava_med", "no question_id.*LLaVA-Med's answer files are JSON lines"),
        ("a.json", '[{"id": "1"}]', "medevalkit", "no question.*results.json is an array"),
        ("a.json", '[{"id": "1"}]', "vlmevalkit", "no index.*have the columns index"),
        ("a.tsv", "a\tb\n1\t2\n", None, "no column `index`, .*it has a, b"),
        ("a.tsv", "", None, "no column `index`"),
        ("a.csv", "index;question;prediction\n", None, "holds no prediction that can be scored"),
        ("a.csv", "index,question,answer,prediction,prediction\n", None, "several columns `prediction`"),
        ("a.json", '[{"id": "1", "answer": "a", "answer_type": "open"}]', None, "no prediction.*is JSON lines"),
        ("a.jsonl", "", "llava_med", "holds no records"),
        ("a.json", "text", "medevalkit", "holds no records"),
        ("a.json", '[{"id": "1"}]', "coco", "Unknown predictions format 'coco'"),
        ("b.tsv", None, None, "b.tsv cannot be read"),
        ("b.json", None, "medevalkit", "b.json cannot be read"),
        ("a.json", '[{"question": "\\ud800?", "answer": "yes", "response": "no"}]', None, "invalid Unicode"),
    ],
)  # fmt: skip
def test_invalid_files_are_refused(tmp_path, name, text, format, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_predictions(tmp_path / name, format)


def test_the_format_of_medst_trl_is_joined_like_others(path):
    rows = [{"id": q["id"], "question": q["question"], "prediction": "no"} for q in QUESTIONS]
    with pytest.raises(UserError, match="holds no right answers. Give the benchmark"):
        read_predictions(write_lines(path, rows))
    records, _ = read_predictions(path, benchmark=QUESTIONS)
    assert [record["answer"] for record in records] == [question["answer"] for question in QUESTIONS]
    with pytest.raises(UserError, match="does not answer the questions"):
        read_predictions(write_lines(path, [rows[0], {"id": "vqa_rad-13", "prediction": "no"}]), benchmark=QUESTIONS)


def test_bytes_of_another_encoding_reject_one_row(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b"index,question,answer,prediction\n0,Is it?,no,na\xefve\n1,Is it?,no,no\n")
    records, rejected = read_predictions(path)
    assert len(records) == 1 and rejected[0]["reason"] == "invalid Unicode"


@pytest.mark.parametrize("reader", [read_vqa_rad, read_vqa_rad_mevf])
@pytest.mark.parametrize("name", ["1epoch", "llava-zeorshot"])
def test_published_answers_of_llava_med_have_the_golden_scores(shared_data, golden_metrics, reader, name):
    """The answers are joined with the official release by id, and with MEVF's split, whose ids differ, by order."""
    source = reader(shared_data / "vqa_rad", shared_data / "vqa_rad" / "images")
    test = (question for question in source.questions if question.split == "test")
    questions = [asdict(question) | {"image_id": question.images[0]} for question in test]
    questions.sort(key=lambda question: question["image_id"])  # the order of a benchmark
    file = f"llava_med_v1_vqarad_answer-file-{name}.jsonl"
    records, rejected = read_predictions(shared_data / "predictions" / file, benchmark=questions)
    golden = golden_metrics["files"][file]
    scores = score_vqa(records, "llava_med", bootstrap_samples=0)
    assert (len(records), rejected) == (451, [])
    assert len({record["image_id"] for record in records}) == 203
    for figure in ("f1", "precision", "recall"):
        assert scores["open"][figure]["value"] == pytest.approx(golden[figure], abs=1e-6)
    assert scores["closed"]["accuracy"]["value"] == pytest.approx(golden["closed_gated"], abs=1e-6)


# A row with the fields of all formats. The test replaces one value at a time.
ROW = {
    "id": "a", "question_id": 1, "prompt": "Is it?", "text": "x", "metadata": {"answer": "no", "answer_type": "open"},
    "question": "Is it?", "answer": "no", "answer_type": "CLOSED", "response": "no", "lang": "en", "index": 3,
    "prediction": "no", "image_id": "i", "question_type": "PRES", "model_id": "m",
}  # fmt: skip
VALUES = ["", "\ud800", "\\boxed{", None, True, 2.5, float("nan"), [], [1], {}, {"answer": ["no"]}, "metadata", -1]


def read_or_refused(path, format, questions):
    try:
        records, _ = read_predictions(path, format, benchmark=questions)
    except UserError:
        return
    assert score_vqa(records, bootstrap_samples=0)["n"] == len(records) > 0
    assert json.dumps(records, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "questions", [None, [QUESTIONS[0] | {"id": i, "question": "Is it?", "answer": "no"} for i in "ab"]]
)
@pytest.mark.parametrize("format", ["llava_med", "medevalkit", "vlmevalkit"])
def test_any_value_is_read_or_refused(tmp_path, format, questions):
    for key in ROW:
        for value in VALUES:
            (tmp_path / "p.json").write_text(json.dumps([ROW | {key: value}, ROW | {"id": "b", "question_id": 2}]))
            read_or_refused(tmp_path / "p.json", format, questions)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60), st.sampled_from([".json", ".jsonl", ".tsv", ".csv"]))
def test_any_bytes_are_read_or_refused(content, suffix):
    with TemporaryDirectory() as directory:
        path = Path(directory) / f"p{suffix}"
        path.write_bytes(content)
        for format in (None, "llava_med", "medevalkit", "vlmevalkit"):
            read_or_refused(path, format, None)

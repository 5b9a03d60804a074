# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables as hospitals export them: broken quotes, delimiters, encodings, workbooks, and columns by other names."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import write_table

from medst_trl.base.errors import UserError
from medst_trl.data.reading import column_name, read_json_records, read_rows
from medst_trl.data.source import Rejected


HEADER = ["image", "question", "answer", "split"]


def read(path):
    """Return the rows, the rejected ones and the notes of a table."""
    notes = {}
    items = [item for _, item in read_rows(path, notes=notes)]
    return [row for row in items if isinstance(row, dict)], [row for row in items if isinstance(row, Rejected)], notes


def lines_of(count=10):
    return [",".join(HEADER), *(f"{n}.png,Question {n}?,yes,train" for n in range(count))]


def test_a_line_with_an_unclosed_quote_is_rejected_by_its_number(tmp_path):
    lines = lines_of()
    lines[3] = '2.png,Which sign?,"tree-in-bud,train'
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    rows, rejected, _ = read(tmp_path / "t.csv")
    assert [row["image"] for row in rows] == [f"{n}.png" for n in (0, 1, *range(3, 10))]
    assert rejected == [Rejected("t.csv#line 4", "bad_quotes", lines[3])]


CELLS = st.text(st.sampled_from('ab ,;"\n'), max_size=8)
BROKEN = ('"tree', '"tree"s', 'a", "b')


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8), st.data())
def test_any_line_with_a_broken_quote_costs_only_itself(tmp_path_factory, cells, data):
    """Properly quoted cells, of several lines too, stay, whatever line before or after them is broken."""
    rows = [[f"{n}.png", *pair, "train"] for n, pair in enumerate(cells)]
    broken = data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=3))
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(HEADER)
    for number, row in enumerate(rows):
        if number in broken:
            text.write(f"{number}.png,q,{data.draw(st.sampled_from(BROKEN[:2]))},train\n")
        writer.writerow(row)
    path = tmp_path_factory.mktemp("quotes") / "t.csv"
    path.write_text(text.getvalue())
    read_back, rejected, _ = read(path)
    assert [list(row.values()) for row in read_back] == rows
    assert [item.reason for item in rejected] == ["bad_quotes"] * len(broken)


@pytest.mark.parametrize("first", [2, 3, 5])
@pytest.mark.parametrize("closing", ['bud",train', 'bud"'])
def test_rows_between_an_unclosed_and_a_stray_quote_stay(tmp_path, first, closing):
    """The two quotes look like those of one cell, which would swallow the rows between them."""
    lines = lines_of()
    lines[first] = f'{first - 1}.png,Which sign?,"tree,train'
    lines[7] = f"6.png,Which sign?,{closing}"
    (tmp_path / "t.csv").write_text("\n".join(lines))
    rows, rejected, _ = read(tmp_path / "t.csv")
    assert rejected[0].id == f"t.csv#line {first + 1}"
    assert {row["image"] for row in rows} >= {f"{n}.png" for n in range(10)} - {f"{first - 1}.png", "6.png"}
    assert not any("\n" in row["answer"] for row in rows)


def test_the_image_may_be_the_last_column(tmp_path):
    lines = ["question,answer,image", 'Q0?,"one, two\nthree, four",0.png', 'Q1?,"tree,1.png', 'Q2?,bud",2.png']
    (tmp_path / "t.csv").write_text("\n".join([*lines, "Q3?,yes,3.png"]))
    rows, rejected, _ = read(tmp_path / "t.csv")
    assert rows[0] == {"question": "Q0?", "answer": "one, two\nthree, four", "image": "0.png"}
    assert [item.id for item in rejected] == ["t.csv#line 4"]
    assert [row["image"] for row in rows[1:]] == ["2.png", "3.png"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.text(st.sampled_from('ab ,"'), min_size=1, max_size=8)), min_size=1, max_size=6))
def test_quotes_in_tsv_are_text(tmp_path_factory, answers):
    path = tmp_path_factory.mktemp("tsv") / "t.tsv"
    path.write_text("image\tanswer\n" + "".join(f"{n}.png\t{answer}\n" for n, (answer,) in enumerate(answers)))
    rows, rejected, _ = read(path)
    assert [row["answer"] for row in rows] == [answer for (answer,) in answers] and not rejected


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5),
    st.sampled_from(",;\t|"),
    st.sampled_from(["t.csv", "t.txt"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_any_delimiter_is_recognized(tmp_path_factory, cells, delimiter, name, encoding, end, declared):
    rows = [[f"{n}.png", *pair] for n, pair in enumerate(cells)]
    text = io.StringIO(newline="")
    text.write(f"sep={delimiter}{end}" if declared else "")
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows([["Image", "Question", "answer"], *rows])
    path = tmp_path_factory.mktemp("delimiters") / name
    path.write_bytes(text.getvalue().encode(encoding))
    read_back, rejected, notes = read(path)
    assert [list(row.values()) for row in read_back] == rows and not rejected
    assert ("encoding" in notes) == encoding.startswith("utf-16")


WESTERN = (
    "Wo liegt die Läsion?;rechts; Größe 5 mm", "Où est la lésion?;à gauche, près du cœur", "¿Dónde está?;en el riñón",
    "Size?;5 µm ± 2 – “normal” at 37 °C", "Är det normalt?;nej, förstorat", "ÜBERSICHT?;ÖDEM RÜCKLÄUFIG",
)  # fmt: skip
CHINESE = ("病变在哪里？;右上肺", "这是什么器官？;肝脏", "图像是否正常？;是", "这张图片是什么模态？;磁共振成像（MRI）")


@pytest.mark.parametrize(
    ("encoding", "texts"), [("cp1252", WESTERN), ("latin-1", WESTERN[:3]), ("gbk", CHINESE), ("gb18030", CHINESE)]
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_files_in_western_european_and_chinese_encodings_are_read(tmp_path, encoding, texts, suffix):
    for number, chosen in enumerate([*([text] for text in texts), texts]):
        rows = [{"image": f"{n}.png", "text": text.replace("œ", "oe")} for n, text in enumerate(chosen)]
        path = write_table(tmp_path / f"{number}{suffix}", rows)
        path.write_bytes(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)
            if suffix == ".jsonl"
            else path.read_text().encode(encoding)
        )
        found, rejected, notes = read(path)
        assert (found, rejected) == (rows, []) and "not UTF-8" in notes["encoding"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1250", "Czy w prawym płucu są zmiany?,powiększone węzły chłonne"),
        ("cp1251", "Где находится поражение?,в правом лёгком"),
        ("koi8_r", "Норма?,да"),
        ("cp932", "病変はどこですか,右肺です"),
        ("euc_jp", "臓器はどこですか,肝臓"),
        ("cp949", "정상인가요?,네"),
        ("big5", "病變在哪裡？,右上肺"),
        ("cp1253", "Πού είναι η βλάβη;,δεξιά"),
    ],
)
def test_other_encodings_are_refused_instead_of_read_wrongly(tmp_path, encoding, text):
    (tmp_path / "t.csv").write_bytes(f"image,question,answer\n0.png,{text}\n".encode(encoding))
    with pytest.raises(UserError, match=r"t\.csv is not UTF-8, and its encoding is not clear. Save it as UTF-8"):
        read(tmp_path / "t.csv")


def test_a_damaged_character_of_utf8_costs_its_row_only(tmp_path):
    texts = "".join(f"{n}.png,Läsion größer?\n" for n in range(5))
    (tmp_path / "t.csv").write_bytes(b"image,question\n" + texts.encode() + b"6.png,L\xc3,sion\n7.png,caf\xe9\n")
    rows, _, notes = read(tmp_path / "t.csv")
    assert len(rows) == 6 and [row["question"] for row in rows[:5]] == ["Läsion größer?"] * 5 and not notes
    assert "\udce9" in rows[5]["question"]  # rejected as `bad_unicode`


def test_without_notes_bytes_of_another_encoding_are_kept_apart(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "caf\xe9"}\n')
    assert [item for _, item in read_json_records(tmp_path / "a.jsonl", "a")] == [{"a": "caf\udce9"}]


@pytest.mark.parametrize("name", [" Answer Type ", "answer-type", "ANSWER_TYPE", "\u00a0Answer type"])
def test_columns_are_named_without_case_and_blanks(tmp_path, name):
    assert column_name(name) == "answer_type"
    for suffix in (".csv", ".jsonl", ".xlsx"):
        rows, _, _ = read(write_table(tmp_path / f"t{suffix}", [{"Image": "a.png", name: "open"}]))
        assert rows == [{"image": "a.png", "answer_type": "open"}]


def test_two_columns_of_one_name_are_refused_or_rejected(tmp_path):
    with pytest.raises(UserError, match="several columns `answer`"):
        read(write_table(tmp_path / "t.csv", [{"image": "a", "answer": "x", "Answer ": "y"}]))
    rows, rejected, _ = read(write_table(tmp_path / "t.jsonl", [{"image": "a", "answer": "x", "Answer ": "y"}]))
    assert not rows and [item.reason for item in rejected] == ["repeated_column"]


def test_the_column_of_images_may_have_its_usual_names(tmp_path):
    """`file_name` is the column of `metadata.csv` in Hugging Face's image folders."""
    assert read(write_table(tmp_path / "t.csv", [{"file_name": "a.png"}]))[0] == [{"image": "a.png"}]
    assert read(write_table(tmp_path / "t.jsonl", [{"images": ["a", "b"]}]))[0] == [{"image": ["a", "b"]}]
    both = {"image": "a.png", "file_name": "b.png"}
    assert read(write_table(tmp_path / "both.csv", [both]))[0] == [both]


def test_blank_rows_are_skipped_and_wide_ones_rejected(tmp_path):
    (tmp_path / "t.csv").write_text("\n\nimage;answer;\n;;\n0.png;yes;\n ; ;\n1.png;no;;\n\n")
    rows, rejected, _ = read(tmp_path / "t.csv")
    assert rows == [{"image": "0.png", "answer": "yes", "": ""}]
    assert [(item.id, item.reason) for item in rejected] == [("t.csv#line 7", "malformed_row")]


def workbook(path, *sheets):
    book = pytest.importorskip("openpyxl").Workbook()
    book.remove(book.active)
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"Sheet {number}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_the_first_sheet_of_a_workbook_is_read(tmp_path):
    rows = [
        [], ["Image ", "answer", "count", None], ["0.png", "Läsion", 3], [None, None], ["1.png", True, 2.5],
        ["2.png", "#N/A", None], ["3.png", "x", 1, "outside"], ["4.png"],
    ]  # fmt: skip
    found, rejected, notes = read(workbook(tmp_path / "t.xlsx", rows, [["legend"]]))
    assert found == [
        {"image": "0.png", "answer": "Läsion", "count": 3}, {"image": "1.png", "answer": True, "count": 2.5},
        {"image": "2.png", "answer": "", "count": ""}, {"image": "4.png", "answer": "", "count": ""},
    ]  # fmt: skip
    assert [(item.id, item.reason) for item in rejected] == [("t.xlsx#line 7", "malformed_row")]
    assert notes == {"sheets_not_read": "Sheet 1"}


def test_formulas_are_not_read_as_text(tmp_path):
    path = workbook(tmp_path / "t.xlsx", [["image", "answer"], ["0.png", '=CONCATENATE("a","b")']])
    assert read(path)[0] == [{"image": "0.png", "answer": ""}]  # no program has computed a value


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", b"no workbook", "cannot be read as a workbook .*Correct it, or save the sheet as CSV UTF-8"),
        ("t.csv", b"PK\x03\x04..", "name it .xlsx, or save the sheet as CSV UTF-8"),
        ("t.xls", b"\xd0\xcf\x11\xe0..", "an Excel workbook of an old version: save it as .xlsx or CSV UTF-8"),
        ("t.csv", b"PAR1..", "is a Parquet file: name it .parquet"),
        ("t.csv", b"picture;question\na.png;x\n", "no column `image` .it has picture, question.. Rename its columns"),
        ("t.xlsx", None, "cannot be read"),
    ],
)
def test_other_files_are_refused_with_what_helps(tmp_path, name, content, message):
    if name.endswith(".xlsx"):
        pytest.importorskip("openpyxl")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=80), st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".txt"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"t{suffix}"
    for start in (b"", b"image,answer\n", b"image\tanswer\n", b'{"image": "a", "answer": "'):
        path.write_bytes(start + content)
        try:
            rows, rejected, _ = read(path)
        except UserError:
            continue
        assert all(isinstance(row, dict) for row in rows) and all(item.as_row() for item in rejected)

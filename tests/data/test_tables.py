# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables as hospitals export them: broken quotes, delimiters, encodings, workbooks, and columns by other names."""

import csv
import io
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tables import write_table

from medst_trl.base.errors import UserError
from medst_trl.data.cells import column_name, is_missing
from medst_trl.data.reading import read_json_records, read_rows
from medst_trl.data.source import Question, Rejected, SourceRequest
from medst_trl.data.sources.images import read_captions, read_table


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
    assert rejected == [Rejected("t.csv#line 4", "bad_quotes")]  # without the line, which may name a patient


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


def test_captions_lose_no_rows_to_an_unclosed_quote(tmp_path):
    lines = ["image;Caption", "0.png;A scan.", '1.png;"A scan', '2.png;"Two\nlines."', "3.png;A scan."]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    source = read_captions(SourceRequest(tmp_path / "t.csv", tmp_path))
    assert [conversation.images[0] for conversation in source.conversations] == ["0.png", "2.png", "3.png"]
    assert [item.id for item in source.rejected] == ["t.csv#line 3"]


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


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.fixed_dictionaries(
            {name: st.sampled_from(["yes", '5"', "a, b; c", "Findings:\n- a, b\n- c", 'ends "q"', "x\ty"])
             for name in ("question", "answer", "note")}
        ),
        min_size=1,
        max_size=6,
    ),
    st.permutations(["image", "question", "answer", "note"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(",;\t"),
)  # fmt: skip
def test_no_row_of_a_valid_table_is_lost(tmp_path_factory, cells, columns, quoting, delimiter):
    """Cells of several lines may be on both sides of the image, and images may have any suffix."""
    rows = [{"image": f"{n}{('.png', '.jpg', '.dcm')[n % 3]}", **row} for n, row in enumerate(cells)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, quoting=quoting, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path = tmp_path_factory.mktemp("valid") / "t.csv"
    path.write_text(text.getvalue(), newline="")
    assert read(path)[:2] == (rows, [])


def test_rows_are_found_in_a_cell_whatever_the_suffixes_of_their_images(tmp_path):
    (tmp_path / "t.csv").write_text('image,question,answer\n0.png,"Q0?,yes\n1.jpg,Q1?",x\n2.dcm,Q2?,y\n')
    rows, rejected, _ = read(tmp_path / "t.csv")
    assert [row["image"] for row in rows] == ["2.dcm"]
    assert [item.id for item in rejected] == ["t.csv#line 2", "t.csv#line 3"]


@pytest.mark.parametrize("line", ['1.png","Q1?","b"', '"1.png",Q1?","b"', '"1.png","Q1?",b"'])
def test_a_line_without_an_opening_quote_is_rejected(tmp_path, line):
    (tmp_path / "t.csv").write_text(f'"image","question","answer"\n"0.png","Q0?","a"\n{line}\n"2.png","Q2?","c"\n')
    rows, rejected, _ = read(tmp_path / "t.csv")
    assert [row["image"] for row in rows] == ["0.png", "2.png"]
    assert [(item.id, item.reason) for item in rejected] == [("t.csv#line 3", "bad_quotes")]


@pytest.mark.parametrize("line", ['2.png,Q2?,no"', '2.png,c",d'])
@pytest.mark.parametrize("place", [1, 2])
def test_a_line_without_an_opening_quote_is_rejected_if_another_row_has_quotes(tmp_path, line, place):
    lines = ["image,question,answer", '1.png,"Where, exactly?",yes']
    (tmp_path / "t.csv").write_text("\n".join([*lines[:place], line, *lines[place:]]))
    rows, rejected, _ = read(tmp_path / "t.csv")
    assert [row["image"] for row in rows] == ["1.png"] and [item.reason for item in rejected] == ["bad_quotes"]


def test_inches_are_text(tmp_path):
    (tmp_path / "t.csv").write_text('image,question,answer\n0.png,5" nail?,7"\n')
    assert read(tmp_path / "t.csv")[:2] == ([{"image": "0.png", "question": '5" nail?', "answer": '7"'}], [])


def test_no_line_of_a_table_is_quoted_in_what_is_rejected(tmp_path):
    """The line may name a patient."""
    (tmp_path / "t.csv").write_text('patient,image,answer\nMILLER,0.png,"a\nMILLER,1.png,b,c\n')
    (tmp_path / "t.jsonl").write_text('{"image": "0.png", "patient": "MILLER"\n"MILLER"\n["MILLER"]\n')
    for name, reasons in [
        ("t.csv", ["bad_quotes", "malformed_row"]),
        ("t.jsonl", ["malformed_json", "not_an_object", "not_an_object"]),
    ]:
        _, rejected, _ = read(tmp_path / name)
        assert [item.reason for item in rejected] == reasons and "MILLER" not in str(rejected)


def test_the_image_may_be_the_last_column(tmp_path):
    lines = ["question,answer,image", 'Q0?,"one, two\nthree, four",0.png', 'Q1?,"tree,1.png', 'Q2?,bud",2.png']
    (tmp_path / "t.csv").write_text("\n".join([*lines, "Q3?,yes,3.png"]))
    rows, rejected, _ = read(tmp_path / "t.csv")
    assert rows[0] == {"question": "Q0?", "answer": "one, two\nthree, four", "image": "0.png"}
    assert [item.id for item in rejected] == ["t.csv#line 4", "t.csv#line 5"]  # the second has a stray quote
    assert [row["image"] for row in rows[1:]] == ["3.png"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.text(st.sampled_from('ab ,"'), min_size=1, max_size=8)), min_size=1, max_size=6))
def test_quotes_in_tsv_are_text(tmp_path_factory, answers):
    path = tmp_path_factory.mktemp("tsv") / "t.tsv"
    path.write_text("image\tanswer\n" + "".join(f"{n}.png\t{answer}\n" for n, (answer,) in enumerate(answers)))
    rows, rejected, _ = read(path)
    assert [row["answer"] for row in rows] == [answer.lstrip(" ") for (answer,) in answers] and not rejected


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
    stripped = [[cell.strip() for cell in row.values()] for row in read_back]
    assert stripped == [[cell.strip() for cell in row] for row in rows]
    assert not rejected and ("encoding" in notes) == encoding.startswith("utf-16")


WESTERN = (
    "Wo liegt die Läsion?;rechts; Größe 5 mm", "Où est la lésion?;à gauche, près du cœur", "¿Dónde está?;en el riñón",
    "Size?;5 µm ± 2 – “normal” at 37 °C", "Är det normalt?;nej, förstorat", "ÜBERSICHT?;ÖDEM RÜCKLÄUFIG",
    "Onde está a lesão?;não há lesões, no coração", "C'è versamento?;sì, è più grande",
    "Læsionen?;i højre lunge, øvre lap", "Onko nestettä?;kyllä, oikeassa", "Waar?;coördinatie, reëel",
    "Dû à quoi?;sûrement là, côté gauche",
    "¿Qué imagen?;la nº3: hígado y riñón", "N° 5?;col·lapse pulmonar, 20 µm²",
    "A quel coût?;sûrement à gauche",
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
        ("cp1250", "Je přítomen výpotek?,V pravé plíci je částečně zřetelné ložisko."),
        ("cp1250", "Hol található az elváltozás?,A jobb tüdőben."),
        ("cp1250", "Unde este leziunea?,În plămânul drept şi stâng"),
        ("cp1250", "Gdje je lezija?,U desnom plućnom krilu, gornji režanj"),
        ("cp1254", "Plevral sıvı var mı?,Sağ akciğer üst lobda."),
        ("cp1257", "Ar yra skysčio?,Dešinėje, viršutinėje skiltyje."),
        ("mac_roman", "Wo liegt die Läsion?,links größer als rechts"),
        ("cp850", "Wo liegt die Läsion?,links größer als rechts"),
        ("gbk", "部位,肺"),
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


@pytest.mark.parametrize("damage", [b"\x81\x8d", b"\xff\xfe\xaa", b"\xd3\xc0\xd2"])
def test_damaged_bytes_in_ascii_cost_their_row_only(tmp_path, damage):
    lines = [b"image,caption", *(b"%d.png,Is it normal?" % n for n in range(50)), b"50.png,Is " + damage + b" it?"]
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    source = read_captions(SourceRequest(tmp_path / "t.csv", tmp_path))
    assert len(source.conversations) == 50 and [item.reason for item in source.rejected] == ["bad_unicode"]


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


def test_a_name_in_the_header_may_have_several_lines(tmp_path):
    (tmp_path / "t.csv").write_text('"Image";"Answer\ntype"\n0.png;open\n')
    assert read(tmp_path / "t.csv")[0] == [{"image": "0.png", "answer_type": "open"}]


def test_blanks_before_quotes_are_skipped(tmp_path):
    (tmp_path / "t.csv").write_text('image, question, answer\n0.png, "What, ""exactly""?", "yes\nno"\n')
    assert read(tmp_path / "t.csv")[:2] == (
        [{"image": "0.png", "question": 'What, "exactly"?', "answer": "yes\nno"}],
        [],
    )


def test_formulas_are_not_read_as_text(tmp_path):
    path = workbook(tmp_path / "t.xlsx", [["image", "answer"], ["0.png", '=CONCATENATE("a","b")']])
    assert read(path)[0] == [{"image": "0.png", "answer": ""}]  # no program has computed a value


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", b"no workbook", "cannot be read as a workbook .*Save the sheet as CSV UTF-8"),
        ("t.csv", b"PK\x03\x04..", "name it .xlsx, or save the sheet as CSV UTF-8"),
        ("t.xls", b"\xd0\xcf\x11\xe0..", "an Excel workbook of an old version: save it as .xlsx or CSV UTF-8"),
        ("t.csv", b"PAR1..", "is a Parquet file: name it .parquet"),
        ("t.csv", b"picture;question\na.png;x\n", "no column `image` .it has picture, question.. Rename its columns"),
        ("t.xlsx", None, "cannot be read"),
        ("t.tsv", b'"image"\t"answer"\n"a.png"\t"x"\n', "Quotes are text in a .tsv file: name it .csv"),
        ("t.csv", b'image,"question,answer\na.png,"q",x\n', 'it has image,"question,answer'),
        ("t.csv", b'image,"question,answer\na.png,q",x\n', 'The quotes in the header of .*: image,"question,answer'),
        ("t.csv", b'image;"question;answer\na.png;q;x\n', 'it has image;"question;answer'),
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


SUFFIXES = pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".xlsx"])


@SUFFIXES
def test_values_are_recognized_whatever_their_case(tmp_path, suffix):
    rows = [
        {"Image": "0.png", "Question": "Normal?", " Answer ": "Yes.", "Answer Type": "CLOSED", "SPLIT": "Train"},
        {"Image": "1.png", "Question": "Normal?", " Answer ": "no", "Answer Type": "closed ", "SPLIT": "val"},
        {"Image": "2.png", "Question": "Side?", " Answer ": "left", "Answer Type": "Open", "SPLIT": "TEST"},
        {"Image": "3.png", "Question": "Side?", " Answer ": "right", "Answer Type": "open-ended", "SPLIT": " test"},
        {"Image": "4.png", "Question": "Side?", " Answer ": "no", "Answer Type": "", "SPLIT": ""},
        {"Image": "5.png", "Question": "Side?", " Answer ": "up", "Answer Type": "Close Ended", "SPLIT": "Dev"},
        {"Image": "6.png", "Question": "Side?", " Answer ": "up", "Answer Type": "free", "SPLIT": "train"},
        {"Image": "7.png", "Question": "Side?", " Answer ": "up", "Answer Type": "open", "SPLIT": "fold 1"},
    ]
    source = read_table(SourceRequest(write_table(tmp_path / f"t{suffix}", rows), tmp_path))
    assert [(question.split, question.answer_type) for question in source.questions] == [
        ("train", "closed"), ("validation", "closed"), ("test", "open"), ("test", "open"), ("train", "closed"),
        ("validation", "closed"),
    ]  # fmt: skip
    assert [(item.reason, item.value) for item in source.rejected] == [
        ("bad_answer_type", "free"), ("bad_split", "fold 1"),
    ]  # fmt: skip


@SUFFIXES
def test_columns_that_were_not_used_are_named(tmp_path, suffix):
    rows = [
        {"image": "0.png", "Patient ID": "P1", "Age": 7, "question": "q?", "answer": "a", "empty": "", "Link": "l"}
    ]
    source = read_table(SourceRequest(write_table(tmp_path / f"t{suffix}", rows), tmp_path))
    assert source.counts == {"columns_not_used": "patient_id, age"}
    caption = write_table(tmp_path / f"c{suffix}", [{"image": "0.png", "Caption": "A scan.", "question": "q?"}])
    captions = read_captions(SourceRequest(caption, tmp_path))
    assert captions.counts == {"columns_not_used": "question"} and len(captions.conversations) == 1


MISSING = st.one_of(
    st.none(),
    st.text(" \t\n\u00a0", max_size=3),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["nan", "NaN", "-nan", "inf", "-Infinity", "NULL", "null", "<NA>", "NaT", "#N/A", "#NV", "#REF!",
                     "#WERT!", "#DIV/0!", " nan "]),
)  # fmt: skip
ANSWERS = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: not is_missing(text)),
    st.sampled_from(["None", "NA", "N/A", "no", "#3", "infarct", "nano", "0", "-"]),
)


@given(MISSING)
def test_missing_values_never_become_text(value):
    assert is_missing(value)
    row = {"image": "a.png", "question": "What?", "answer": "x"}
    assert Question.from_row("q", row | dict.fromkeys(("split", "answer_type", "link", "question_type"), value)) == (
        Question("q", ("a.png",), "train", "What?", "x", "open")
    )
    for name in row:
        with pytest.raises(ValueError, match=f"no_{name}"):
            Question.from_row("q", row | {name: value})


@given(ANSWERS)
def test_numbers_and_booleans_are_answers(value):
    expected = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value).strip()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        expected = str(int(value))
    assume(expected.strip(" -–—./?_"))
    question = Question.from_row("q", {"image": "a.png", "question": "What?", "answer": value})
    assert question.answer == expected
    assert question.answer_type == ("closed" if expected.lower() in ("yes", "no") else "open")


@pytest.mark.parametrize("value", [["x"], {"a": 1}, ("x",), b"x"])
def test_other_values_are_no_answers(value):
    with pytest.raises(ValueError, match="not_text"):
        Question.from_row("q", {"image": "a.png", "question": "What?", "answer": value})


def test_rows_of_json_with_missing_values_stay_images_or_are_rejected(tmp_path):
    nan = float("nan")
    pairs = [("?", "yes"), (nan, nan), ("?", nan), ("?", None), ("?", False), ("?", 4)]
    rows = [{"image": f"{n}.png", "id": nan, "question": q, "answer": a} for n, (q, a) in enumerate(pairs)]
    for suffix in (".json", ".jsonl"):
        path = tmp_path / f"t{suffix}"
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
        assert "NaN" in path.read_text()
        source = read_table(SourceRequest(path, tmp_path))
        assert [(question.id, question.answer) for question in source.questions] == [
            ("row-000000", "yes"), ("row-000004", "no"), ("row-000005", "4"),
        ]  # fmt: skip
        assert [conversation.images for conversation in source.conversations] == [("1.png",)]
        assert [(item.id, item.reason) for item in source.rejected] == [
            ("row-000002", "no_answer"), ("row-000003", "no_answer"),
        ]  # fmt: skip


@pytest.mark.parametrize("cell", ["0.png|1.png", " 0.png | 1.png|"])
@SUFFIXES
def test_several_images_in_a_cell_are_one_conversation(tmp_path, cell, suffix):
    rows = [{"image": cell, "question": "What has changed?", "answer": "nothing", "caption": "Two scans."}]
    path = write_table(tmp_path / f"t{suffix}", rows)
    (question,) = read_table(SourceRequest(path, tmp_path)).questions
    assert question.images == ("0.png", "1.png")
    (conversation,) = read_captions(SourceRequest(path, tmp_path)).conversations
    assert conversation.images == ("0.png", "1.png")
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "image", "text"]


def test_several_images_without_question_are_unlabeled_one_by_one(tmp_path):
    table = write_table(tmp_path / "t.csv", [{"image": "0.png|1.png"}, {"image": "2.png"}])
    source = read_table(SourceRequest(table, tmp_path))
    assert [record.images for record in source] == [("0.png",), ("1.png",), ("2.png",)]


def test_several_images_may_be_a_list_in_json(tmp_path):
    rows = [
        {"image": ["0.png", "1.png"], "question": "?", "answer": "x"}, {"image": ["2.png"], "question": "?"},
        {"image": ["0.png", None], "question": "?", "answer": "x"}, {"image": [], "question": "?", "answer": "x"},
        {"image": [["0.png"]], "question": "?", "answer": "x"}, {"image": "[1] a.png", "question": "?", "answer": 1},
        {"image": ["0.png", "1.png"], "question": "?", "answer": "x", "split": "test"},
    ]  # fmt: skip
    source = read_table(SourceRequest(write_table(tmp_path / "t.jsonl", rows), tmp_path))
    assert [question.images for question in source.questions] == [
        ("0.png", "1.png"), ("[1] a.png",), ("0.png", "1.png"),
    ]  # fmt: skip
    assert [item.reason for item in source.rejected] == ["no_answer", "no_image", "no_image", "not_text"]


def test_images_without_question_have_a_split(tmp_path):
    rows = [
        {"image": f"{n}.png", "question": question, "answer": question, "split": split}
        for n, (question, split) in enumerate([("", "test"), ("#N/A", "val"), ("nan", ""), ("", "fold 1")])
    ]
    source = read_table(SourceRequest(write_table(tmp_path / "t.csv", rows), tmp_path))
    assert [(conversation.images, conversation.split) for conversation in source.conversations] == [
        (("0.png",), "test"), (("1.png",), "validation"), (("2.png",), "train"),
    ]  # fmt: skip
    assert [(item.reason, item.value) for item in source.rejected] == [("bad_split", "fold 1")]


def test_captions_of_another_split_are_no_training_data(tmp_path):
    rows = [{"image": f"{n}.png", "caption": "A scan.", "split": s} for n, s in enumerate(["", "val", "test", "x"])]
    source = read_captions(SourceRequest(write_table(tmp_path / "t.csv", rows), tmp_path))
    assert [conversation.split for conversation in source.conversations] == ["train", "validation", "test"]
    assert [item.reason for item in source.rejected] == ["bad_split"] and not source.counts


def test_a_table_whose_columns_of_questions_have_other_names_is_noted(tmp_path):
    table = write_table(tmp_path / "t.csv", [{"image": "0.png", "Frage": "Q?", "": "0"}])
    assert read_table(SourceRequest(table, tmp_path)).counts["columns_not_used"] == "frage"


def test_rows_with_the_id_of_another_one_are_renamed_and_copies_rejected(tmp_path):
    rows = [
        {"id": "a", "image": f"{n}.png", "question": "Q?", "answer": "x", "caption": "A scan."} for n in (0, 1, 0, 2)
    ]
    for read_source in (read_table, read_captions):
        source = read_source(SourceRequest(write_table(tmp_path / "t.csv", rows), tmp_path))
        assert [(record.id, record.images) for record in source] == [
            ("a", ("0.png",)), ("a-2", ("1.png",)), ("a-3", ("2.png",)),
        ]  # fmt: skip
        assert [(item.id, item.reason) for item in source.rejected] == [("a", "duplicate_id")]

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import made_run
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from medst_trl.base.errors import UserError
from medst_trl.evaluation.contamination import FIGURES
from medst_trl.report import ReportArguments
from medst_trl.report.data import data_url
from medst_trl.report.report import make_report, write_report


HOSTILE_TEXTS = (
    "<script>alert(1)</script>",
    '"><img src=https://example.com/x onerror=alert(1)>',
    "</style></svg></title><iframe src=//example.com>",
    "' onload='alert(1)",
    "{{ 7 * 7 }}",
    "\u202eabc\u2066",
    "\x00\x1b[31m",
)
VOID = {"meta", "img"}  # elements without an end tag
FAST = {"bootstrap_samples": 10, "gallery": 6}


class Page(HTMLParser):
    """Parser that collects the elements with their attributes, and the text without the style sheet."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open, self.unbalanced = [], "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    @property
    def words(self):
        return " ".join(self.text.split())


def report_on(run, **kwargs):
    report = make_report(ReportArguments(str(run), **FAST | kwargs))
    return report, Page(report.html)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return made_run.whole_run(tmp_path_factory.mktemp("runs") / "tried", rounds=2)


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture(scope="module")
def page(original):
    return report_on(original)[1]


def test_the_page_is_self_contained(page):
    assert not page.unbalanced and not page.open
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "video", "audio", "base", "use"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert re.match("data:image/(png|jpeg);base64,", attributes.get("src", "data:image/png;base64,"))
        assert attributes.get("href", "#").startswith("#")
        assert "url(" not in attributes.get("style", "") and "srcset" not in attributes
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_images_charts_and_tables_are_labelled_for_screen_readers(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in page.elements if tag == "a"} <= set(ids)
    for tag, attributes in page.elements:
        if tag == "img":
            assert attributes["alt"].startswith("Image asked about: ")
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("col", "row", "rowgroup")


def test_the_page_shows_all_sections(page):
    for text in (
        "Generated 20", "prepare/benchmark, split test", "majority", "real − blank", "real − shuffled",
        "turn medical images", "truncated", "not a question", "near duplicate question",
        "loss_question", "loss_answer", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
        "Likelihood displacement", "no less likely", "dropped: flip", "dropped: tie", "oracle, prompt rubric",
        "answer shown first wins", "longer answer wins", "tokens in prompts", "$0.0", "Rounds side by side",
        "Dropped: unparsable", "Kept: answer 1 is preferred", "The first answer is right.",
        "Wrong before, right after", "learning_rate 0.0007", "seed 0", "torch 2.13.0", "1 min 2 s",
    ):  # fmt: skip
        assert text in page.words, text


def test_scores_and_their_differences_are_shown(original, page):
    before, after = (
        json.loads((original / "evaluate" / name / "scores.json").read_text())["scores"]["strict"]
        for name in ("stage_1", "aligned")
    )
    for scores in (before, after):
        leaf = scores["exact_match"]
        assert f"{leaf['value']:.1f} [{leaf['interval'][0]:.1f}, {leaf['interval'][1]:.1f}]" in page.words
    difference = after["exact_match"]["value"] - before["exact_match"]["value"]
    assert f"{difference:+.1f} [".replace("-", "−") in page.words


def test_the_contamination_of_each_evaluation_is_shown(run):
    _, before = report_on(run)
    section = before.words.partition("What the base model was trained on is not known.")[2]
    assert "exact copies not checked not checked" in section and "so nothing was compared" in section
    assert "scores can be too high" not in before.words
    figures = {name: {"n": 3, "of": 96} for name in FIGURES} | {"near": {"n": None, "of": 96}}
    missing = {"near": "the dataset has changed since the training"}
    one = {"path": str(run / "prepare" / "instruct"), "stage": "sft", "images": 1234, "not_checked": missing}
    two = {"path": "/hospital/patients/pairs", "stage": "<script>alert(1)</script>", "images": 5, "not_checked": {}}
    content = {"figures": figures, "compared": [one, two]}
    (run / "evaluate" / "aligned" / "contamination.json").write_text(json.dumps(content))
    report, page = report_on(run)
    assert "Notes The training data of aligned contains parts of the benchmark …/benchmark, split test" in page.words
    assert any("scores can be too high" in note for note in report.notes)  # also in the terminal
    assert "same group not checked 3 of 96 images" in page.words
    assert "near copies not checked not checked" in page.words
    text = "prepare/instruct: 1,234 images; not checked: near copies (the dataset"
    assert f"aligned: compared with the training data of sft, {text}" in page.words
    assert "…/pairs: 5 images" in page.words and "hospital" not in report.html
    assert "<script" not in report.html


def test_the_terminal_table_has_scores_and_differences(original):
    report, _ = report_on(original)
    header, *lines = report.table.splitlines()[1:]
    names = ("aligned", "round 1", "round 2")
    assert " ".join(header.split()) == " ".join(["n stage 1", *names, *(f"{name} - stage 1" for name in names)])
    assert lines[0].startswith("exact match") and lines[0].count("[") == 3
    assert not report.notes


def test_the_number_of_kept_pairs_is_that_of_the_preferences(original, page):
    """The judge's stage leaves out duplicates after the judge has decided."""
    counts = json.loads((original / "round_2" / "judge" / "stage.json").read_text())["counts"]
    kept, pairs = counts["preferences"]["train"]["pairs"], counts["judge"]["pairs"]
    assert kept < counts["judge"]["judged"]
    assert f"Preference pairs kept, round 2 {kept}of {pairs} pairs of answers" in page.words


def test_answers_that_became_right_are_counted(original, page):
    rows = {}
    for name in ("stage_1", "aligned"):
        lines = (original / "evaluate" / name / "predictions.jsonl").read_text().splitlines()
        rows[name] = {row["id"]: row for row in map(json.loads, lines)}
    last = (original / "round_2" / "evaluate" / "aligned" / "predictions.jsonl").read_text().splitlines()
    gained = sum(
        rows["stage_1"][row["id"]]["prediction"] == "Unclear." != row["prediction"] for row in map(json.loads, last)
    )
    assert f"{gained} wrong before, right after" in page.words


def test_images_of_the_run_are_scaled_down(run, monkeypatch):
    monkeypatch.setattr("medst_trl.report.data.IMAGE_SIZE", 20)
    _, page = report_on(run)
    urls = [a["src"] for tag, a in page.elements if tag == "img"]
    assert len(urls) > 6
    for url in urls:
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert max(picture.size) == 20 and not picture.info.get("exif")


def test_each_pair_of_a_candidate_is_a_separate_case(tmp_path):
    run = tmp_path / "run"
    candidates = made_run.generate(run, made_run.make_phantoms(2, seed=0, split="test"))
    rows = [
        made_run.judgement(one, dropped="flip" if k else None, id=f"{one['id']}/{k}", answers=[f"a{n}{k}", f"b{n}{k}"])
        for n, one in enumerate(candidates)
        for k in range(3)
    ]
    made_run.judge(run, candidates, rows=rows)
    _, page = report_on(run, gallery=20)
    assert "pairs of answers12" in page.words and "judged4 of 12 (33.3%)" in page.words  # cells of one row
    assert sum(tag == "img" for tag, _ in page.elements) == 12
    assert all(page.words.count(answer) == 1 for row in rows for answer in row["answers"])


def test_the_gallery_shows_the_requested_number_of_cases(original):
    for number in (0, 1, 5):
        _, page = report_on(original, gallery=number)
        shown = page.words.count("Dropped: ") + page.words.count("Kept: answer")
        assert shown == 3 * number  # for the run itself, round 1 and round 2


def test_no_path_of_this_machine_is_on_the_page(run):
    path = run / "judge" / "stage.json"
    record = json.loads(path.read_text())
    record["settings"] |= {"model": "/home/ward-7/models/judge-9b", "cache_dir": f"{run}/judge/cache"}
    path.write_text(json.dumps(record))
    report, page = report_on(run)
    assert "…/judge-9b" in page.words  # the name of the model, without its directory
    for hidden in ("/home", "ward-7", str(run), str(run.parent)):
        assert hidden not in report.html


def test_secrets_are_not_on_the_page(run):
    key = "hf_" + "a" * 30
    path = run / "judge" / "stage.json"
    record = json.loads(path.read_text())
    record["settings"] |= {"model": f"judge {key}", "base_url": "https://me:password@example.com", "api_key": "k" * 9}
    path.write_text(json.dumps(record))
    lines = (run / "judge" / "judgements.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["orders"][0]["reply"] = f"Authorization: {key}"
    (run / "judge" / "judgements.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    html = report_on(run, gallery=30)[0].html
    assert "Authorization:" in html
    assert key not in html and "me:password" not in html and "kkkkkkkkk" not in html


@pytest.mark.parametrize("hostile_text", HOSTILE_TEXTS)
def test_text_from_data_cannot_become_markup(tmp_path, hostile_text, page):
    """All texts from data are hostile. The page has only the elements and attributes of an ordinary run."""
    run = tmp_path / "run"
    counts = {"rejected": {hostile_text: 3}, "datasets": {hostile_text: {hostile_text: 2}}}
    made_run.write_stage(run / "prepare", "prepare", counts=counts, settings={"source": hostile_text})
    phantoms = made_run.make_phantoms(4, seed=0, split="test")
    candidates = made_run.generate(run, phantoms)
    rows = [made_run.judgement(c, dropped=[None, "flip", hostile_text][i % 3]) for i, c in enumerate(candidates)]
    for row in rows:
        row |= {
            "question": hostile_text,
            "answers": [hostile_text, f"{hostile_text} {hostile_text}"],
            "model": hostile_text,
            "prompt_version": hostile_text,
        }
        for order in row["orders"]:
            order |= {"reply": hostile_text, "scores": [hostile_text, 3]}
    made_run.judge(run, candidates, rows=[json.loads(json.dumps(row)) for row in rows])
    made_run.sft(run)
    made_run.write_log(
        run / "sft",
        [
            {"step": 1, "loss": 1.0, hostile_text: 3},
            {"step": 2, "loss": 0.5},
            {"step": hostile_text, "loss": hostile_text},
            hostile_text,
        ],
    )

    def replace_texts(predictions):
        return [
            row | {"question": hostile_text, "prediction": hostile_text, "question_type": hostile_text}
            for row in predictions
        ]

    made_run.evaluate(run, "evaluate/stage_1", phantoms, "sft", 0.5)
    made_run.evaluate(run, "evaluate/aligned", phantoms, "dpo", 0.5, replace_texts)
    report, hostile = report_on(run, title=hostile_text, gallery=12)
    write_report(report, tmp_path / "out")
    assert not hostile.unbalanced and not hostile.open
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in page.elements}
    known = {(tag, name) for tag, attributes in page.elements for name in attributes}
    assert {(tag, name) for tag, attributes in hostile.elements for name in attributes} <= known
    for _, attributes in hostile.elements:
        assert attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith("#")
    visible = hostile_text.translate({c: f"⟨U+{c:04X}⟩" for c in (0x202E, 0x2066, 0x00, 0x1B)})
    assert hostile.text.count(visible) > 20
    assert "\u202e" not in hostile.text and "\x00" not in report.html


def test_lone_surrogates_can_be_written(run, tmp_path):
    path = run / "judge" / "judgements.jsonl"
    path.write_text(path.read_text().replace("The first answer", "\\ud83d"))
    report, page = report_on(run)
    write_report(report, tmp_path / "out")
    assert "\ufffd is right." in page.text


def test_long_answers_are_cut_with_the_number_of_missing_characters(run):
    lines = (run / "judge" / "judgements.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"answers": ["word " * 10_000, "b"], "question": "q" * 50_000} for line in lines]
    (run / "judge" / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, page = report_on(run)
    assert "(49,400 more characters)" in page.text and "(49,600 more characters)" in page.text
    assert len(report.html) < 400_000


def test_missing_and_unfinished_stages_are_listed(run):
    for name in ("judge", "dpo", "round_1", "round_2", "evaluate/aligned"):
        shutil.rmtree(run / name)
    made_run.write_stage(run / "judge", "judge", status="running")
    made_run.write_stage(run / "evaluate" / "aligned", "evaluate", status="running")
    report, page = report_on(run)
    assert "not finished" in page.words and "judge has no judgements yet" in page.words
    assert "Stages without results: dpo" in page.words and "No preference training here" in page.words
    assert any("evaluate/aligned has no scores yet" in note for note in report.notes)


def test_a_run_with_prepare_only_has_a_page(run):
    for child in run.iterdir():
        if child.name != "prepare":
            shutil.rmtree(child)
    report, page = report_on(run)
    assert report.table == ""
    for text in ("No evaluation has finished yet", "This run has no supervised training", "This run has no judge"):
        assert text in page.words


def test_unfinished_training_shows_the_log_of_its_newest_checkpoint(run):
    state = json.loads((run / "sft" / "trainer_state.json").read_text())
    (run / "sft" / "trainer_state.json").unlink()
    for step in (90, 100):
        (run / "sft" / f"checkpoint-{step}").mkdir()
        state["log_history"] = [{"step": 1, "loss": 5.0}, {"step": step, "loss": step / 1000}]
        made_run.write_log(run / "sft" / f"checkpoint-{step}", state["log_history"])
    assert "loss 0.1" in report_on(run)[1].text


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "binary": lambda data: bytes(range(256)) * 4,
    "list": lambda data: b"[1, 2]",
    "other object": lambda data: b'{"scores": 3, "stage": "sft", "status": [], "log_history": {"a": 1}, "counts": 5}',
    "deep": lambda data: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "sft/stage.json", "judge/stage.json", "evaluate/aligned/stage.json", "sft/trainer_state.json",
        "dpo/trainer_state.json", "judge/judgements.jsonl", "evaluate/aligned/scores.json",
        "evaluate/aligned/predictions.jsonl", "generate/candidates/train-00000-of-00001.parquet",
        "prepare/benchmark/test-00000-of-00001.parquet",
    ],
)  # fmt: skip
def test_a_damaged_file_is_noted_and_the_rest_is_shown(run, name, damage):
    path = run / name
    path.write_bytes(damage(path.read_bytes()))
    report, page = report_on(run)
    assert "Rounds side by side" in page.words
    assert report.notes
    assert str(run) not in report.html
    assert all(str(run) not in note for note in report.notes)


def test_lines_that_are_not_judgements_are_counted_and_skipped(run):
    path = run / "judge" / "judgements.jsonl"
    lines = path.read_text().splitlines()
    good = json.loads(lines[0])
    changes = {"verdict": 1.0, "verdict ": 3, "orders": 4, "answers": ["a"], "scores": None, "dropped": ["tie"]}
    bad = [json.dumps(good | {key.strip(): value}) for key, value in changes.items()]
    path.write_text("\n".join([*bad, "5", "[1]", "{", *lines[9:]]) + "\n")
    report, page = report_on(run, gallery=30)
    assert report.notes == ["judge/judgements.jsonl: 9 judgements are missing or damaged, and are left out."]
    assert "of 16 (" in page.words


def test_evaluations_of_different_questions_have_no_difference(run):
    path = run / "evaluate" / "aligned" / "predictions.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[1:]))
    report, _ = report_on(run)
    assert "aligned - stage 1" not in report.table and "round 1 - stage 1" in report.table
    assert any("did not answer the same questions" in note for note in report.notes)


def test_evaluations_of_different_data_are_not_compared(run):
    path = run / "evaluate" / "aligned" / "scores.json"
    path.write_text(path.read_text().replace("ab" * 32, "cd" * 32))
    report, page = report_on(run)
    assert len(report.table.split("\n\n")) == 2 and "aligned - stage 1" not in report.table
    assert page.words.count("Metric strict (") == 2


def test_a_moved_run_gives_the_same_page(run, tmp_path):
    before, _ = report_on(run, title="same")
    moved = shutil.move(run, tmp_path / "elsewhere")
    after, _ = report_on(moved, title="same")
    assert after.html == before.html and after.html.count("<img") > 0
    assert str(tmp_path) not in after.html


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "run is not a directory.*medst run RECIPE"),
        ("empty", "run holds no stage yet.*medst run demo"),
        ("file", "run is not a directory.*medst run RECIPE"),
        ("other files", "run holds no stage yet.*medst run demo"),
        ("a stage", "run is the directory of a single stage.*--run "),
    ],
)
def test_a_path_without_a_run_is_refused(tmp_path, kind, message):
    run = tmp_path / "run"
    if kind == "file":
        run.write_text("x")
    elif kind != "nothing":
        run.mkdir()
    if kind == "other files":
        (run / "notes").mkdir()
        (run / "notes" / "stage.json").write_text('{"stage": "theatre"}')
    if kind == "a stage":
        made_run.write_stage(run, "sft")
    with pytest.raises(UserError, match=message):
        make_report(ReportArguments(str(run)))


def test_circular_links_are_not_followed_forever(run):
    (run / "round_1" / "again").symlink_to(run)
    assert report_on(run)[0].html


def test_only_a_report_of_medst_trl_is_replaced(original, tmp_path):
    report, _ = report_on(original)
    for _ in range(2):
        path = write_report(report, tmp_path / "out")
    assert path.read_text(encoding="utf-8") == report.html and [p.name for p in path.parent.iterdir()] == [
        "index.html"
    ]
    path.write_text("<h1>Mine</h1>")
    with pytest.raises(UserError, match="not a report"):
        write_report(report, tmp_path / "out")
    assert path.read_text() == "<h1>Mine</h1>"


def test_a_comment_in_an_image_is_not_on_the_page():
    for size in (40, 800):  # a small image is not scaled, and PIL reads a comment at its end only then
        file, about = io.BytesIO(), PngImagePlugin.PngInfo()
        about.add_text("comment", "Jane Doe", zip=False)
        image = Image.new("RGB", (size, size))
        image.save(file, "PNG")
        raw, text = file.getvalue(), io.BytesIO()
        image.save(text, "PNG", pnginfo=about)
        start = text.getvalue().index(b"tEXt") - 4
        chunk = text.getvalue()[start : start + 12 + int.from_bytes(text.getvalue()[start : start + 4], "big")]
        end = raw.rindex(b"IEND") - 4
        url = data_url(raw[:end] + chunk + raw[end:])
        assert b"Jane Doe" in chunk and b"Jane Doe" not in base64.b64decode(url.partition(",")[2])


def test_scores_without_intervals_have_a_page(run):
    path = run / "evaluate" / "aligned" / "scores.json"
    path.write_text(re.sub(r'"interval": \[[^]]*\]', '"interval": null', path.read_text()))
    assert '"interval": null' in path.read_text() and '"interval": [' not in path.read_text()
    assert "Scores" in report_on(run)[1].words


def test_images_are_shown_upright_and_deep_ones_in_full_range():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 20), 9).save(file, "JPEG", exif=exif)
    assert picture_in(data_url(file.getvalue())).size == (20, 40)
    file = io.BytesIO()
    Image.fromarray(np.arange(0, 64_000, 1000, dtype=np.uint16).reshape(8, 8)).save(file, "PNG")
    shown = np.asarray(picture_in(data_url(file.getvalue())))
    assert shown.min() < 20 and shown.max() > 235 and 110 < np.median(shown) < 145


def picture_in(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import random
import subprocess
import sys

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from medst_trl.base.errors import UserError
from medst_trl.evaluation.metrics import llava_med, strict
from medst_trl.evaluation.scores_file import ScoresFile
from medst_trl.evaluation.scoring import compare_vqa, iter_figures, score_vqa


def record(answer, prediction, answer_type="open", **more):
    return {"answer": answer, "prediction": prediction, "answer_type": answer_type, **more}


def value(scores, *path):
    for key in path:
        scores = scores[key]
    return scores["value"]


# Records with difficult values: mixed case, blanks, numbers, empty predictions.
WORDS = ("yes", "no", "left", "lung", "the", "two", "no fracture", "x-ray", "", "3.5 cm")
RECORDS = st.lists(
    st.builds(
        record,
        answer=st.sampled_from([word for word in WORDS if word]) | st.integers(0, 12),
        prediction=st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join) | st.integers(0, 12),
        answer_type=st.sampled_from(["OPEN", "closed", "CLOSED ", " Open"]),
        question_type=st.sampled_from(["PRES", "POS", None]),
        image_id=st.sampled_from("abcd"),
    ),
    min_size=1,
    max_size=30,
)
VARIANTS = st.sampled_from(["strict", "llava_med"])


class TestStrict:
    def test_open_figures_equal_values_computed_by_hand(self):
        # 2 of the 5 predicted words are among the 3 expected words ("the" is ignored): P 2/5, R 2/3, F1 = 4/8
        scores = score_vqa([record("the right lower lobe", "It is a right middle lobe.")])
        assert value(scores, "open", "precision") == pytest.approx(40.0)
        assert value(scores, "open", "recall") == pytest.approx(200 / 3)
        assert value(scores, "open", "f1") == pytest.approx(50.0)
        assert value(scores, "open", "exact_match") == 0

    def test_closed_figures_equal_values_computed_by_hand(self):
        scores = score_vqa(
            [
                record("Yes", "Yes, there is no doubt.", "CLOSED"),
                record("No", "No fracture is seen; yes, I am sure.", "CLOSED "),
                record("no", "normal lungs", "closed"),  # contains "no" only inside a word
                record("no", "", "closed"),
                record("yes", "It is not.", "closed"),
                record("Right", "right.", "closed"),
                record("Right", "It is right, not left.", "closed"),
            ]
        )
        assert value(scores, "closed", "accuracy") == pytest.approx(300 / 7)
        assert value(scores, "closed", "yes_no") == pytest.approx(40.0)
        assert scores["closed"]["yes_no"]["n"] == 5
        assert value(scores, "closed", "no_verdict") == pytest.approx(60.0)
        assert value(scores, "closed", "other") == pytest.approx(50.0)
        assert value(scores, "exact_match") == pytest.approx(100 / 7)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("The Left lung.", "left lung"),
            ("x-ray", "X Ray"),
            ("two", 2),
            ("1,000 cells", "1000 cells"),
            ("can't", "cant"),
            ("doesn\u2019t", "doesn't"),
            ("ﬁbrosis", "fibrosis"),
            ("**Yes**", "yes"),
            ("A", "a"),
            ("<5 mm", "< 5 mm"),
            (".5 cm.", "0.5 cm"),
        ],
    )
    def test_spellings_of_the_same_answer_match(self, one, other):
        assert value(score_vqa([record(one, other)]), "exact_match") == 100

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("3.5 cm", "35 cm"),
            (".5 cm", "5 cm"),
            ("-50", "50"),
            ("> 5", "< 5"),
            ("+", "-"),
            ("A", "an"),
            ("no", "none"),
            ("कि", "की"),
            ("left", "left lung"),
            ("left left", "left"),
        ],
    )
    def test_different_answers_do_not_match(self, one, other):
        assert value(score_vqa([record(one, other)]), "exact_match") == 0

    @given(st.text(max_size=30), st.text(max_size=30))
    def test_f1_is_symmetric_and_swaps_precision_with_recall(self, one, other):
        assume(one.strip() and other.strip())
        forward, backward = score_vqa([record(one, other)])["open"], score_vqa([record(other, one)])["open"]
        assert forward["f1"]["value"] == pytest.approx(backward["f1"]["value"])
        assert forward["precision"]["value"] == pytest.approx(backward["recall"]["value"])

    @given(st.text(min_size=1, max_size=40))
    @example("'")
    def test_an_answer_matches_itself(self, text):
        assume(text.strip())
        scores = score_vqa([record(text, f" {text} ")])
        assert value(scores, "exact_match") == value(scores, "open", "f1") == 100

    def test_repetition_does_not_raise_recall(self):
        once, often = (score_vqa([record("left lower lobe", text)]) for text in ("left", "left left left left"))
        assert value(often, "open", "recall") == value(once, "open", "recall")
        assert value(often, "open", "precision") < value(once, "open", "precision")

    def test_recall_and_precision_are_not_swapped(self):
        # MedEvalKit reports precision as recall, and recall as F1.
        scores = score_vqa([record("left lower lobe pneumonia", "pneumonia")])["open"]
        assert [scores[name]["value"] for name in ("precision", "recall", "f1")] == pytest.approx([100, 25, 40])

    def test_majority_is_counted_per_question_type(self):
        rows = [record(answer, "x", "closed", question_type=kind) for answer, kind in zip("yyynny", "aaabbb")]
        rows += [record("lung", "x", question_type="c"), record("Lung.", "x", question_type="c")]
        scores = score_vqa(rows)
        assert scores["closed"]["accuracy"]["majority"] == pytest.approx(500 / 6)
        assert scores["exact_match"]["majority"] == pytest.approx(700 / 8)
        assert scores["question_types"]["b"]["exact_match"]["majority"] == pytest.approx(200 / 3)


class TestLlavaMed:
    def test_repetition_inflates_recall(self):
        # true positives are words of the prediction: 3 / (3 + 2 missed)
        assert value(score_vqa([record("left lower lobe", "left")], "llava_med"), "open", "recall") == pytest.approx(
            100 / 3
        )
        scores = score_vqa([record("left lower lobe", "left left left")], "llava_med")
        assert value(scores, "open", "recall") == pytest.approx(60)
        assert value(scores, "open", "exact") == pytest.approx(100 / 3)

    def test_bleu_counts_ngrams_of_one_order(self):
        # 3 of 4 words, 1 of 3 bigrams and no trigram match; the prediction is not shorter than the answer
        scores = score_vqa([record("left lower lobe", "left lower right lobe")], "llava_med")["open"]
        assert [scores[f"bleu_{n}"]["value"] for n in (1, 2, 3)] == pytest.approx([75, 100 / 3, 0])
        short = score_vqa([record("left lower lobe", "lobe")], "llava_med")
        assert value(short, "open", "bleu_1") == pytest.approx(100 * 2.718281828 ** (1 - 3))

    def test_closed_rules_give_different_accuracies(self):
        rows = [
            record("no", "normal lungs", "closed"),  # correct by all three rules
            record("right", "the right side", "closed"),  # neither yes nor no
            record("yes", "there is nothing", "closed"),  # wrong, but contains "no"
            record("yes", "yes", "closed"),
        ]
        closed = {rule: score_vqa(rows, "llava_med", closed_rule=rule)["closed"] for rule in llava_med.CLOSED_RULES}
        assert closed["gated"]["accuracy"]["value"] == 50
        assert closed["substring"]["accuracy"]["value"] == 75
        assert closed["drop_misses"]["accuracy"] | {"interval": None} == {"value": 200 / 3, "n": 3, "interval": None}

    def test_only_the_first_32_full_stops_are_removed(self):
        assert llava_med.normalize_word("." * 33) == "."

    def test_normalization_equals_the_golden_file(self, golden_metrics):
        golden = golden_metrics["normalize_word"]
        assert {text: llava_med.normalize_word(text.lower()) for text in golden} == golden

    @pytest.mark.parametrize("name", ["1epoch", "llava-zeorshot"])
    def test_scores_equal_the_golden_file(self, shared_data, golden_metrics, name):
        file = f"llava_med_v1_vqarad_answer-file-{name}.jsonl"
        golden = golden_metrics["files"][file]
        release = json.loads((shared_data / "vqa_rad" / "VQA_RAD Dataset Public.json").read_text())
        by_id = {str(row["qid"]): row for row in release}
        lines = (shared_data / "predictions" / file).read_text().splitlines()
        rows = [
            record(row["answer"], prediction["text"], row["answer_type"])
            for prediction in map(json.loads, lines)
            for row in [by_id[str(prediction["question_id"])]]
        ]
        gated, substring = (
            score_vqa(rows, "llava_med", closed_rule=rule, bootstrap_samples=0) for rule in ("gated", "substring")
        )
        for figure in ("f1", "precision", "recall", "exact"):
            assert gated["open"][figure]["n"] == golden["n_open"]
            assert value(gated, "open", figure) == pytest.approx(golden[figure], abs=1e-6)
        assert gated["closed"]["accuracy"]["n"] == golden["n_closed"]
        assert value(gated, "closed", "accuracy") == pytest.approx(golden["closed_gated"], abs=1e-6)
        assert value(substring, "closed", "accuracy") == pytest.approx(golden["closed_substring"], abs=1e-6)


def test_scores_equal_those_published_by_mumc(shared_data):
    """The predictions of MUMC on VQA-RAD get the exact-match scores that MUMC published."""
    directory = shared_data / "predictions"
    published = json.loads((directory / "mumc_vqarad_test_acc.json").read_text())
    questions = json.loads((shared_data / "vqa_rad" / "mevf_testset.json").read_text())
    kinds = {str(row["qid"]): row["question_type"] for row in questions}
    rows = [
        record(
            row["gt"], row["pred"], {"close": "closed"}.get(row["type"], row["type"]), id=key, question_type=kinds[key]
        )
        for key, row in json.loads((directory / "mumc_vqarad_test_compare.json").read_text()).items()
    ]
    scores = score_vqa(rows, bootstrap_samples=0)
    assert round(value(scores, "closed", "accuracy"), 2) == published["perAnswerType"]["CLOSED"] == 84.56
    assert round(value(scores, "open", "exact_match"), 2) == published["perAnswerType"]["OPEN"] == 58.10
    assert round(value(scores, "exact_match"), 2) == published["overall"]
    by_type = {kind: round(value(part, "exact_match"), 2) for kind, part in scores["question_types"].items()}
    assert by_type == published["perQuestionType"]


class TestProperties:
    @settings(deadline=None, max_examples=50)
    @given(RECORDS, VARIANTS, st.randoms(use_true_random=False))
    def test_scores_do_not_depend_on_the_order(self, rows, variant, rng):
        shuffled = list(rows)
        rng.shuffle(shuffled)
        assert score_vqa(shuffled, variant, bootstrap_samples=50) == score_vqa(rows, variant, bootstrap_samples=50)

    @settings(deadline=None, max_examples=50)
    @given(RECORDS, VARIANTS, st.booleans())
    def test_figures_are_consistent(self, rows, variant, by_image):
        rows = rows if by_image else [{key: row[key] for key in row if key != "image_id"} for row in rows]
        scores = score_vqa(rows, variant, bootstrap_samples=300)
        assert scores["bootstrap"]["unit"] == ("image" if by_image else "record")
        for path, leaf in iter_figures(scores):
            assert (leaf["value"] is None) == (leaf["n"] == 0), path
            if leaf["n"]:
                assert 0 <= leaf["value"] <= 100
            if leaf["interval"]:
                assert leaf["interval"][0] - 1e-9 <= leaf["value"] <= leaf["interval"][1] + 1e-9, path
        json.dumps(scores, allow_nan=False)
        assert ScoresFile({"scores": {variant: scores}}).table(variant)

    def test_more_images_narrow_the_interval(self):
        rng = random.Random(0)
        rows = [record("yes", rng.choice(["yes", "no"]), "closed", image_id=i) for i in range(1000)]
        few, many = (score_vqa(rows[:n])["closed"]["accuracy"]["interval"] for n in (100, 1000))
        # 1.96 standard errors of a proportion of one half: 9.8 and 3.1 points on either side
        assert (few[1] - few[0]) == pytest.approx(19.6, abs=3)
        assert (many[1] - many[0]) == pytest.approx(6.2, abs=1)

    def test_questions_about_one_image_widen_the_interval(self):
        rows = [record("yes", "yes" if i % 2 else "no", "closed", image_id=i) for i in range(50) for _ in range(10)]
        by_image = score_vqa(rows)["closed"]["accuracy"]["interval"]
        by_record = score_vqa([row | {"image_id": None} for row in rows])["closed"]["accuracy"]["interval"]
        assert by_image[1] - by_image[0] > 2 * (by_record[1] - by_record[0])

    def test_images_of_one_patient_widen_the_interval(self):
        rows = [
            record("yes", "yes" if i % 2 else "no", "closed", image_id=f"{i}-{j}") for i in range(50) for j in range(6)
        ]
        grouped = [row | {"group_id": row["image_id"].split("-")[0]} for row in rows]
        scores = score_vqa(grouped)
        assert (scores["bootstrap"]["unit"], scores["n_groups"], scores["n_images"]) == ("group", 50, 300)
        assert "of 50 groups" in ScoresFile({"scores": {"strict": scores}}).table("strict")
        low, high = scores["closed"]["accuracy"]["interval"]
        assert high - low == pytest.approx(2 * 196 * (0.25 / 50) ** 0.5, abs=3)  # a proportion of one half in 50
        low, high = score_vqa(rows)["closed"]["accuracy"]["interval"]
        assert high - low == pytest.approx(2 * 196 * (0.25 / 300) ** 0.5, abs=1.5)

    def test_an_image_without_a_group_is_its_own(self):
        rows = [record("yes", "yes" if i < 3 else "no", "closed", image_id=i) for i in range(8)]
        mixed = [row | {"group_id": "p" if i < 2 else None} for i, row in enumerate(rows)]
        named = [row | {"group_id": "p" if i < 2 else f"image {i}"} for i, row in enumerate(rows)]
        assert score_vqa(mixed) == score_vqa(named)
        assert score_vqa(mixed)["n_groups"] == 7
        for missing in (None, "", float("nan")):  # pandas reads empty cells as NaN
            assert score_vqa([row | {"group_id": missing} for row in rows]) == score_vqa(rows)

    def test_intervals_depend_on_the_seed(self):
        predictions = ["left", "right", "lobe x", "left lobe", "left x y", "lobe", "left lobe z"]
        rows = [record("left lobe", text, image_id=i) for i, text in enumerate(predictions)]
        assert score_vqa(rows, seed=1) == score_vqa(rows, seed=1)
        assert score_vqa(rows, seed=1)["open"]["f1"] != score_vqa(rows, seed=2)["open"]["f1"]


class TestBadRecords:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"answer": None}, "no answer"),
            ({"prediction": None}, "no prediction"),
            ({"answer_type": float("nan")}, "no answer_type"),
            ({"answer_type": "yes/no"}, "unknown answer_type"),
            ({"answer": "  "}, "empty answer"),
            ({"prediction": ["yes"]}, "prediction is not a text"),
        ],
    )
    @pytest.mark.parametrize("variant", ["strict", "llava_med"])
    def test_the_message_names_the_record(self, change, message, variant):
        with pytest.raises(UserError, match=f"'q7': {message}"):
            score_vqa([record("yes", "yes", "closed", id="q7") | change], variant)

    def test_a_record_without_an_id_is_named_by_its_number(self):
        with pytest.raises(UserError, match="number 2"):
            score_vqa([record("yes", "yes"), {"answer": "yes", "answer_type": "open"}])

    def test_invalid_settings_are_refused(self):
        for kwargs, message in (
            ({"variant": "loose"}, "Unknown metric 'loose'"),
            ({"closed_rule": "gated"}, "closed_rule is not a setting of the metric 'strict'"),
            ({"variant": "llava_med", "closed_rule": "x"}, "Unknown closed_rule 'x'"),
        ):
            with pytest.raises(UserError, match=message):
                score_vqa([record("yes", "yes")], **kwargs)

    def test_figures_without_records_have_no_value(self):
        for variant in ("strict", "llava_med"):
            scores = score_vqa([], variant)
            assert all(leaf["value"] is None and leaf["n"] == 0 for _, leaf in iter_figures(scores))

    def test_a_figure_without_records_is_none(self):
        assert score_vqa([record("lung", "lung")])["closed"]["accuracy"] == {
            "value": None,
            "n": 0,
            "interval": None,
            "majority": None,
        }


def test_scoring_imports_no_heavy_library():
    code = (
        "import sys; from medst_trl import score_vqa; score_vqa([]);"
        "print([name for name in ('torch', 'numpy', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_one_missing_apostrophe_of_a_contraction_is_restored():
    assert llava_med.normalize_word("couldnt've shouldn'tve yall'll") == "couldn't've shouldn't've y'all'll"
    assert llava_med.normalize_word("its well were hell") == "its well were hell"


def test_only_whole_words_are_verdicts():
    assert strict.verdict(strict.tokens("Normal, nodular, yesterday")) is None
    assert strict.verdict(strict.tokens("Well: NO!")) == "no"


def closed_rows(predictions, answers="yes"):
    return [
        {"id": str(i), "image_id": str(i // 2), "answer": answers, "answer_type": "closed", "prediction": text}
        for i, text in enumerate(predictions)
    ]


@pytest.mark.parametrize("variant", ["strict", "llava_med"])
def test_equal_predictions_have_a_difference_of_zero(variant):
    rng = random.Random(0)
    real = closed_rows([rng.choice(["yes", "no"]) for _ in range(60)])
    result = compare_vqa(real, real[::-1], variant)
    for _, leaf in iter_figures(result):
        assert leaf["difference"] in (0, None)
        assert leaf["difference_interval"] in ([0, 0], None)
    assert (
        dict(iter_figures(result))[("closed", "accuracy")]["value"]
        == score_vqa(real, variant)["closed"]["accuracy"]["value"]
    )


def test_the_difference_equals_a_value_computed_by_hand():
    real = closed_rows(["yes"] * 60 + ["no"] * 40)
    control = closed_rows(["yes"] * 40 + ["no"] * 60)
    leaf = compare_vqa(real, control)["closed"]["accuracy"]
    assert (leaf["value"], leaf["difference"]) == pytest.approx((40, 20))
    assert 5 < leaf["difference_interval"][0] < 20 < leaf["difference_interval"][1] < 35


def test_pairing_narrows_the_interval():
    """The predictions agree on nearly all images, so the paired interval is narrower than that of one score."""
    rng = random.Random(0)
    texts = [rng.choice(["yes", "no"]) for _ in range(400)]
    real, control = closed_rows(texts), closed_rows(["no", *texts[1:]])
    leaf, unpaired = compare_vqa(real, control)["closed"]["accuracy"], score_vqa(real)["closed"]["accuracy"]
    assert leaf["difference_interval"][1] - leaf["difference_interval"][0] < 2
    assert unpaired["interval"][1] - unpaired["interval"][0] > 5


def test_differences_are_paired_by_group():
    real = [record("yes", "yes", "closed", id=n, image_id=n) for n in range(150)]
    other = [row | {"prediction": "no" if row["id"] // 5 % 2 else "yes"} for row in real]
    for clusters, size in ((150, None), (30, 5)):
        sides = [[row | {"group_id": size and f"p{row['id'] // size}"} for row in side] for side in (real, other)]
        leaf = compare_vqa(*sides)["closed"]["accuracy"]
        assert leaf["difference"] == pytest.approx(50)
        width = leaf["difference_interval"][1] - leaf["difference_interval"][0]
        assert width == pytest.approx(2 * 196 * (0.25 / clusters) ** 0.5, rel=0.12)


def test_the_table_shows_the_difference():
    real, control = closed_rows(["yes"] * 20), closed_rows(["no"] * 20)
    controls = {"blank": {"strict": compare_vqa(real, control)}}
    table = ScoresFile({"scores": {"strict": score_vqa(real)}, "controls": controls}).table("strict")
    line = next(line for line in table.splitlines() if line.startswith("closed: accuracy"))
    assert line.split()[2:4] == ["20", "100.0"]
    assert "+100.0 [+100.0, +100.0]" in line


def test_predictions_of_different_questions_are_refused():
    real = closed_rows(["yes", "no"])
    for control, message in (
        (real[:1], "do not answer the same questions: 1 id"),
        ([*real, *real], "an id is missing or repeated"),
        ([row | {"id": None} for row in real], "an id is missing or repeated"),
    ):
        with pytest.raises(UserError, match=message):
            compare_vqa(real, control)

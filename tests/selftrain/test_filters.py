# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.demo.phantoms import QUESTIONS, VIEWS
from medst_trl.engines.engine import Reply
from medst_trl.selftrain.filters import QuestionFilter, is_question, normalized, pair_answers, same_answer


STATEMENTS = [
    "The image shows a lesion in the left lung.",
    "It is small and bright.",
    "Yes",
    "No.",
    "In the upper left quadrant.",
    "There is no lesion in the scan.",
    "CT",
    "When the lesion is bright, it is large.",
    "The arrow points to the liver",
    "Is the lesion large? Yes, it is large.",
    "What does the image show? The image shows a chest X-ray.",
    "This question cannot be answered.",
    "",
    "...",
]


@pytest.mark.parametrize("text", STATEMENTS)
def test_statements_are_not_questions(text):
    assert not is_question(text)


@pytest.mark.parametrize("mark", ["?", ""])
def test_every_wording_of_the_phantoms_is_a_question(mark):
    for wordings in QUESTIONS.values():
        for wording in wordings:
            for view in VIEWS:
                text = wording.format(view=view)
                assert is_question(text.replace("?", mark)), text


@pytest.mark.parametrize(
    "text",
    [
        'What is "this"?"',
        "This is a chest X-ray. Is the heart enlarged?",
        "Here is a scan. Please describe it.",
        "Could you tell me what is shown",
        "The scan is axial, right?",
        "图中有什么？",
        "Is it large?)",
        "what's wrong with the heart?",
    ],
)
def test_other_forms_of_questions_are_recognized(text):
    assert is_question(text)


def test_real_questions_are_accepted(shared_data):
    """Nearly all of them are also recognized without their question mark."""
    path = shared_data / "llava_med" / "instruct_60K_intext_questions.csv"
    with open(path, newline="", encoding="utf-8") as file:
        questions = [row["seq"] for row in csv.DictReader(file)]
    assert len(questions) == 51_578
    question_filter = QuestionFilter()
    assert sum(question_filter.problem(Reply(text)) is None for text in questions) / len(questions) > 0.999
    unmarked = [text.rstrip("?.: ") for text in questions]
    assert sum(map(is_question, unmarked)) / len(unmarked) > 0.99


def test_real_answers_are_not_questions(shared_data):
    path = shared_data / "llava_med" / "llava_med_eval_qa50_qa.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [row["gpt4_answer"] for row in rows]
    assert sum(map(is_question, answers)) / len(answers) < 0.02


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (Reply("Where is the lesion?"), None),
        (Reply("Where is  the LESION"), "repeated"),
        (Reply(""), "empty"),
        (Reply("", ended=False), "empty"),
        (Reply("Where is the lesion and", ended=False), "unfinished"),
        (Reply("Why?"), "too_short"),
        (Reply("What " + "very " * 60 + "thing?"), "too_long"),
        (Reply("The lesion is bright."), "not_a_question"),
        (Reply("refused", problem="request_failed"), "request_failed"),
    ],
)
def test_problems_of_questions_are_found(reply, problem):
    assert QuestionFilter().problem(reply, earlier={normalized("Where is the lesion?")} if problem else ()) == problem


def test_questions_in_other_languages_need_english_false():
    text = "Wo liegt der Herd"
    assert QuestionFilter().problem(Reply(text)) == "not_a_question"
    assert QuestionFilter(english=False).problem(Reply(text)) is None
    assert QuestionFilter(min_words=5, english=False).problem(Reply(text)) == "too_short"


LONG = "the scan shows a round lesion of soft tissue with an even border " * 4


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("It is small and bright.", "It is large and bright.", None),
        ("Yes", "No", None),
        ("Yes.", "yes", "identical_answers"),
        ("It is  small, and bright", "it is small and bright!", "identical_answers"),
        ("+", "-", None),
        (LONG + "near the heart", LONG + "by the heart", "nearly_identical_answers"),
        (LONG + "on the left", LONG + "on the right", None),
        (LONG + "of 5 mm", LONG + "of 7 mm", None),
        (LONG + "of 1.5 cm", LONG + "of 15 cm", None),
        (LONG + "it is seen", LONG + "it is not seen", None),
        ("", "Yes", None),
    ],
)
def test_equal_and_nearly_equal_answers_are_found(first, second, same):
    assert same_answer(first, second) == same_answer(second, first) == same


def test_the_similarity_threshold_is_respected():
    pair = LONG + "near the heart", LONG + "by the heart"
    assert same_answer(*pair, max_similarity=1.0) is None
    assert same_answer("a b c d", "a b c e", max_similarity=0.5) == "nearly_identical_answers"


def replies(*texts):
    return [Reply(text) for text in texts]


@pytest.mark.parametrize(
    ("answers", "kept", "problem"),
    [
        (replies("a", "b"), ["a", "b"], None),
        (replies("a", "A."), [], "identical_answers"),
        (replies("", "b"), [], "empty_answer"),
        ([Reply("a"), Reply("b", ended=False)], [], "unfinished_answer"),
        ([Reply("a"), Reply("502", problem="request_failed")], [], "request_failed"),
        (replies("a", "a", "b", "c"), ["a", "b", "a", "c"], None),
        (replies("a", "a", "a", "b"), ["a", "b"], None),
        (replies("a", "b", "c"), ["a", "b"], None),
        (replies("Yes", "No", "Yes", "No"), ["Yes", "No"], None),
        (replies("Yes", "No", "no.", "yes."), ["Yes", "No"], None),
        (replies("Yes", "No", "Yes", "No", "Maybe", "Maybe"), ["Yes", "No", "Yes", "Maybe", "No", "Maybe"], None),
    ],
)
def test_different_answers_are_paired(answers, kept, problem):
    assert pair_answers(answers) == (kept, problem)


@given(st.lists(st.sampled_from(["a", "A", "b", "c", ""]), min_size=2, max_size=8))
def test_pairs_always_differ(texts):
    kept, problem = pair_answers(replies(*texts))
    assert (problem is None) == bool(kept)
    assert len(kept) % 2 == 0
    pairs = list(zip(kept[::2], kept[1::2]))
    assert all(same_answer(*pair) is None for pair in pairs)
    assert len({frozenset(map(normalized, pair)) for pair in pairs}) == len(pairs), "a pair occurs twice"
    assert not set(kept) - set(texts)


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_is_accepted_as_input(first, second):
    is_question(first)
    assert same_answer(first, first) == "identical_answers"
    assert same_answer(first, second) == same_answer(second, first)


def test_long_texts_are_compared_quickly():
    """Only answers that are nearly the same need the expensive comparison."""
    assert same_answer("lesion " * 7000, "tissue " * 7000) is None
    assert same_answer("?" * 50_000, "!" * 50_000) is None
    assert not is_question("a. " * 17_000)

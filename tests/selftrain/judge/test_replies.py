# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medst_trl.selftrain.judge.replies import parse_scores, read_statements


SCORES = st.sampled_from([score / 2 for score in range(2, 21)])
FORMS = [
    "{a:g} {b:g}",
    "\n\n  {a:g} {b:g}\n\nBoth answers are fine.",
    "{a:g}/10 {b:g}",
    "{a:g}/10, {b:g}/10",
    "{a:g}, {b:g}",
    "({a:g}, {b:g})",
    "**{a:g} {b:g}**",
    "{a:g} {b:g} Answer 1 names the organ, which Answer 2 does not.",
    "Scores: {a:g} {b:g}\nThe first is better.",
    "{a:g}\n{b:g}\n\nThe first names the organ.",
    "Answer 1: {a:g}\nAnswer 2: {b:g}",
    "**Answer 1:** {a:g}/10\n\n**Answer 2:** {b:g}/10",
    "Assistant 1: {a:g} (right)\nAssistant 2: {b:g} (too short)",
    "| Answer 1 | {a:g} |\n| Answer 2 | {b:g} |",
    "I would give Answer 1 a score of {a:g} out of 10 and Answer 2 {b:g}.",
    "I would give the first answer {a:g} out of 10, and the second {b:g}.",
    "Both are good. Answer 2 receives {b:g}/10, while Answer 1 receives {a:g}/10.",
    "A score of {a:g}/10 for Answer 1 and {b:g}/10 for Answer 2.",
    "There are 3 nodules of 4 mm, which only one answer sees.\n\nFinal scores: {a:g} {b:g}",
    "First, the scan: it shows 2 lesions.\n\nScores:\nAnswer 1: {a:g}\nAnswer 2: {b:g}\n\nOutput: ({a:g}, {b:g})",
    '```json\n{{"answer_1": {a:g}, "answer_2": {b:g}}}\n```',
    '{{"scores": [{a:g}, {b:g}], "reason": "Answer 2 invents 5 lesions"}}',
    '{{"answer_1": {{"overall": {a:g}}}, "answer_2": {{"overall": {b:g}}}}}',
    "[{a:g}, {b:g}]",
    "{{'Assistant A': {a:g}, 'Assistant B': {b:g},}}",
    '{{"Score of answer 1": "{a:g}/10", "Score of answer 2": "{b:g} out of 10"}}',
    "{{scores: [{a:g}, {b:g}]}}  # {{reasons}} are below",
    "<think>Perhaps 3 3? No.</think>\n{a:g} {b:g}",
]


@given(st.sampled_from(FORMS), SCORES, SCORES)
def test_replies_of_real_judges_are_read(form, a, b):
    assert parse_scores(form.format(a=a, b=b)) == (a, b)


@given(st.sampled_from(FORMS), SCORES, st.sampled_from([11, 15, 85, 100, 999]))
@example(FORMS[0], 5.0, 11)
def test_a_score_above_ten_is_none(form, a, b):
    assert parse_scores(form.format(a=a, b=b)) is None
    assert parse_scores(form.format(a=b, b=a)) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "   \n\n", "Both answers are good.", "eight nine", "8", "8/9", "8-9", "-8 9", "8 -9", "+8 9", "8 9 7",
        "8,5 7",
        "80/100 70/100", "4/5 3/5", "85% 90%", "1e1 5", "8.5.1 3", "0x8 0x9", "NaN NaN", "inf inf",
        "2 5 mm lesions are visible.", "12/25 Nov", "In 2019 10 patients were seen.", "Both deserve 8.",
        "Answer 1: 8", "Answer 2: 8", "Answer 1: 8 lesions are visible\nAnswer 2: 7 nodules",
        "Answer 1: 2, 3 and 5 are affected. Answer 2: 4, 6.", "1. Answer 1 is good.\n2. Answer 2 is bad.",
        "Answer 1: 8\nAnswer 2: 5\n\nOutput: (5, 8)",  # contradicts itself
        "Accuracy: Answer 1: 8, Answer 2: 7\nHelpfulness: Answer 1: 6, Answer 2: 9",  # no overall score
        '{"answer_1": 8}', '{"answer_1": "good", "answer_2": "bad"}', '{"scores": [8, 7, 6]}', "[8]", "{}",
        '{"answer_1": true, "answer_2": false}', '{"answer_1": null, "answer_2": 5}',
        '{"answer_1": NaN, "answer_2": 5}', '{"answer_1": 8, "answer_2": 5} No: {"answer_1": 5, "answer_2": 8}',
        "{'answer_1': 8,5, 'answer_2': 7}", "{'answer_1': 8, 'answer_1': 7, 'answer_2': 5}",
        '{"answer 1": 8, "answer 2": 5, "winner": "answer 2"}', '{"scores": [8, 5], "verdict": "tie"}',
        '{"answer 1": 8, "answer 2": 5, "winner": "answer 1", "verdict": "answer 2"}',
        '{"scores": [5, 5], "better_answer": "A"}', '{"a":' * 3_000 + "8" + "}" * 3_000,
        "[" * 100_000, "{" * 5_000, "8 " * 50_000,
    ],
)  # fmt: skip
def test_an_ambiguous_reply_is_none(text):
    assert parse_scores(text) is None


@given(SCORES, SCORES, st.sampled_from(["winner", "Verdict", "better answer"]))
def test_a_verdict_beside_the_scores_must_agree(a, b, name):
    for verdict, is_read in (("Answer 1", a > b), ("B", b > a), ("tie", a == b), ("Both name the organ.", True)):
        reply = json.dumps({"answer_1": a, "answer_2": b, name: verdict})
        assert parse_scores(reply) == ((a, b) if is_read else None)


@given(st.text(max_size=400))
def test_any_text_is_none_or_two_scores(text):
    scores = parse_scores(text)
    assert scores is None or (len(scores) == 2 and all(0 <= score <= 10 for score in scores))


@given(st.text(alphabet=st.characters(exclude_categories=("Nd", "No", "Nl", "Lo", "So", "Cs")), max_size=300))
def test_text_without_digits_is_none(text):
    assert parse_scores(text) is None


@given(
    st.lists(
        st.sampled_from(["Answer 1", "answer 2", ":", "8", "9.5", "/10", "the ", "\n", "score", ",", "(", ")", " "])
    )
)
def test_shuffled_parts_give_no_score_outside_the_scale(parts):
    scores = parse_scores("".join(parts))
    assert scores is None or all(0 <= score <= 10 for score in scores)


def test_full_width_digits_are_read():
    assert parse_scores("\uff18 \uff19") == (8, 9)


def test_zero_is_a_score():
    assert parse_scores("0 9\n\nAnswer 1 is empty.") == (0, 9)


def test_scores_of_real_reviews_are_read(shared_data):
    """All parsed scores equal the stored ones, except in one review that stores (10, 2) for the reply "10 4"."""
    directory, different, not_first = shared_data / "gpt4_reviews", [], 0
    for name in ("review_gpt35_vicuna-13b.jsonl", "review_llama-13b_vicuna-13b.jsonl"):
        for review in map(json.loads, (directory / name).read_text(encoding="utf-8").splitlines()):
            stored = review["score"] if isinstance(review["score"], list) else json.loads(review["score"])
            not_first += not review["text"].lstrip()[0].isdigit()
            if parse_scores(review["text"]) != tuple(map(float, stored)):
                different.append((review["review_id"], parse_scores(review["text"]), stored))
    assert different == [("ZgNXGB9wziYPnGFjqLzqVH", (10.0, 4.0), [10, 2])]
    assert not_first == 6  # in 3 of the 80 reviews of each file, the scores are at the end


def test_scores_of_real_medical_reviews_are_read(shared_data):
    path = shared_data / "gpt4_reviews" / "llava_med_eval_qa50_gpt4_judged.jsonl"
    replies = [json.loads(line)["result"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(replies) == 192
    for reply in replies:
        assert parse_scores(reply) == tuple(map(float, reply.split("\n")[0].split()))


# Objects


CRITERIA = ("accuracy", "safety")


def read(content):
    return read_statements(content if isinstance(content, str) else json.dumps(content), CRITERIA)


@pytest.mark.parametrize(
    "content",
    [
        {"answer_1": {"accuracy": 8}, "answer_2": {"accuracy": 5}}, {"accuracy": {"A": 8, "B": 5}},
        {"accuracy": [8, 5]}, {"answer_1_accuracy": 8, "Accuracy of answer 2": "5/10"},
        {"accuracy of the first answer": 8, "Answer 2: accuracy score": 5},
        {"answers": [{"accuracy": 8}, {"accuracy": 5}]}, [{"accuracy": 8}, {"accuracy": 5}],
        {"answers": [{"id": "B", "accuracy": 5}, {"id": "A", "accuracy": 8}]},
        {"answers": [{"answer": "Answer 2", "accuracy": 5}, {"answer": "Answer 1", "accuracy": 8}]},
        {"answers": [{"answer_id": 2, "accuracy": 5}, {"answer_id": 1, "accuracy": 8}]},
        {"answers": [{"number": "2", "accuracy": 5}, {"number": "1", "accuracy": 8}]},
        {"answers": [{"response_id": "B", "rank": 2, "accuracy": 5}, {"response_id": "A", "rank": 1, "accuracy": 8}]},
        {"answers": [{"which": "answer_2", "accuracy": 5}, {"answer_letter": "A", "accuracy": 8}]},
        '{Answer 1: {accuracy: 8}, \'Answer 2\': {accuracy: "5",}}',
    ],
)  # fmt: skip
def test_scores_are_found_in_each_layout(content):
    assert read(content) == {(0, "accuracy"): 8, (1, "accuracy"): 5}


@pytest.mark.parametrize(
    ("content", "statements"),
    [
        ({"accuracy": [8, 5, 3]}, {(None, "accuracy"): None}),  # which of the three are meant?
        ({"answers": [{"id": 1, "name": "Answer 2", "accuracy": 8}, {}]}, {(None, "accuracy"): 8}),
        ({"answers": [{"index": 1, "accuracy": 8}, {"rank": 2, "accuracy": 8}]}, {(None, "accuracy"): 8}),
        ([{"id": 1, "accuracy": 8}, {"id": 0, "accuracy": 5}], {(0, "accuracy"): 8, (None, "accuracy"): 5}),
        ({"answers": [{"answer": "No.", "accuracy": 8}, {"answer": "Yes.", "accuracy": 8}]}, {(None, "accuracy"): 8}),
        ({"answers": [{"id": 1, "accuracy": 8}, {"id": 1, "accuracy": 5}]}, {(0, "accuracy"): None}),
        ({"answer_1": 8, "Answer A": 7}, {(0, None): None}), ({"answer_1": 80}, {(0, None): None}),
        ({"answer_1": 8, "total": {"answer_1": 40}}, {(0, None): None}),
        ({"verdict": "A", "winner": "B"}, {"verdict": None}), ({"verdict": "A", "winner": "1"}, {"verdict": 0}),
        ({"verdict": ["A"]}, {"verdict": 0}), ({"verdict": ["A", "B"]}, {"verdict": None}),
        ({"verdict": "A", "better": "slightly", "preference": 0.9, "best": "it is short"}, {"verdict": 0}),
        ({"verdict": "A", "better": "B"}, {"verdict": None}), ({"preferred": "B"}, {"verdict": 1}),
        ({"verdict": "A", "winner": "unclear"}, {"verdict": None}),
        ({"verdict": "both"}, {"verdict": "both"}), ({"answer_1": {"preferred": True}}, {}),
        ("no object", None), ("{broken", None), ({}, None), ("[8, 5]", {(0, None): 8, (1, None): 5}),
    ],
)  # fmt: skip
def test_what_is_ambiguous_is_none(content, statements):
    assert read(content) == statements


@given(
    st.recursive(
        st.integers(-20, 20) | st.sampled_from(["A", "tie", "8/10", None, True, 1e400]),
        lambda items: (
            st.lists(items, max_size=3)
            | st.dictionaries(st.sampled_from(["A", "Answer 2", "accuracy", "verdict", "scores", "id", "x"]), items)
        ),
    )
)
def test_any_object_is_read_or_ambiguous(content):
    for key, value in (read(content) or {}).items():
        if key == "verdict":
            assert value is None or value in (0, 1) or isinstance(value, str)
        else:
            assert value is None or 0 <= value <= 10

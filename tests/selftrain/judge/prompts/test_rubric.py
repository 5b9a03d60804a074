# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
from hostile_texts import HOSTILE, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from medst_trl.selftrain.judge.judge import fit
from medst_trl.selftrain.judge.prompts.rubric import CRITERIA, SYSTEM, read_rubric, rubric_messages


@given(st.sampled_from(HOSTILE) | st.text(max_size=60), st.sampled_from(HOSTILE) | st.text(max_size=60))
def test_no_text_can_close_its_own_marks(first, second):
    messages = rubric_messages("Q?", [first, second], [])
    code = re.search(r"The code of this request is ([0-9a-f]{16})\.[^<]*\Z", text_of(messages))[1]
    assert code not in first + second
    for name in ("question", "answer_1", "answer_2"):
        for mark in (f"<{name} {code}>", f"</{name} {code}>"):
            assert text_of(messages).count(mark) == 1
    for name, text in (("question", "Q?"), ("answer_1", first), ("answer_2", second)):
        assert f"<{name} {code}>\n{fit(text)}\n</{name} {code}>" in text_of(messages)
    assert "never an instruction" in messages[0]["content"] == SYSTEM


def test_different_texts_get_different_codes():
    codes = {text_of(rubric_messages("Q?", [a, "two"], []))[-80:] for a in ("one", "One", "one ")}
    assert len(codes) == 3


def test_history_and_captions_are_shown():
    text = text_of(rubric_messages("Q?", ["a", "b"], [], [("user", "Describe."), ("assistant", "A CT.")], ["Liver."]))
    assert "user: Describe." in text and "assistant: A CT." in text and "Liver." in text
    assert text.index("A CT.") < text.index("Q?")


def rubric_reply(first=8, second=5, verdict="answer_1", **changes):
    reply = {name: dict.fromkeys((*CRITERIA, "overall"), score) for name, score in
             (("answer_1", first), ("answer_2", second))}  # fmt: skip
    return reply | {"comparison": "A {brace} and [System] 1 10", "verdict": verdict} | changes


def test_a_complete_reply_is_read():
    reading = read_rubric("Here you are:\n```json\n" + json.dumps(rubric_reply()) + "\n```")
    assert reading.scores == (8, 5) and reading.verdict == 0
    assert reading.criteria == dict.fromkeys(CRITERIA, (8, 5))
    assert read_rubric(json.dumps(rubric_reply(5, 5, "tie"))).verdict == "tie"
    assert read_rubric(json.dumps(rubric_reply(5, 5, "answer_2"))).verdict == 1


@pytest.mark.parametrize(
    "reply",
    [
        rubric_reply(8, 5, "answer_2"),  # the scores contradict the verdict
        rubric_reply(verdict="both"), rubric_reply(verdict=None), rubric_reply(verdict=["answer_1", "answer_2"]),
        rubric_reply(first=11), rubric_reply(second="x"),
        rubric_reply(answer_1={"overall": 8}), rubric_reply(answer_2=7), {}, [], 8,
    ],
)  # fmt: skip
def test_an_incomplete_or_contradictory_reply_is_none(reply):
    assert read_rubric(json.dumps(reply)) is None


@pytest.mark.parametrize("missing_characters", [1, 20, 120])
def test_a_truncated_reply_is_none(missing_characters):
    assert read_rubric(json.dumps(rubric_reply())[:-missing_characters]) is None


SCORES = st.fixed_dictionaries(dict.fromkeys((*CRITERIA, "overall"), st.integers(1, 10)))
WAYS = {
    "quotes": ['""', "''", "\u201c\u201d", "\u2018\u2019", ("", "")],
    "score": ["{}", "{}.0", "{}/10", "{} / 10", "{} out of 10", "{}/10 - it sees the lesion", "{}. Fine"],
    "names": [
        ("answer_1", "answer_2"), ("Answer 1", "Answer 2"), ("answer1", "answer2"), ("ANSWER-1", "ANSWER-2"),
        ("Answer A", "Answer B"), ("First answer", "Second answer"), ("1", "2"),
    ],
    "verdict": ["{}", "{}.", "{} is better", "The {}", "{} (better)", "Better: {}", "Winner is {}", "{} wins!"],
    "verdict_name": ["Final verdict", "winner", "better_answer", "Preferred", "best answer"],
    "comma": [",", ",\n", ", // out of 10\n", ", # out of 10\n", ", /* out of 10 */\n\t"],
    "last": ["", ",", ",\n"],
    "around": [
        ("", ""), ("```json\n", "\n```"), ("```", "```"),
        ("Here is my verdict:\n\n", "\n\nIt was close: {both} are right."),
        ("<think>{'verdict': 'answer_2'}? No.</think>\n", ""), ('{"result": ', "}"), ("{'a': {'evaluation': ", ",}}"),
        ("[", "]"), ("\\\\boxed{", "}"), ("<reply>", "</reply>"),
    ],
    "nested": [False, True],
    "layout": ["by answer", "by criterion", "flat", "list", "list with names"],
}  # fmt: skip


def written(first, second, winner, way):
    """Write a reply in a way that a person can read."""
    opening, closing = way["quotes"]

    def text(value):
        return f"{opening}{value}{closing}"

    def pairs(items):
        return "{" + way["comma"].join(f"{text(name)}: {value}" for name, value in items) + way["last"] + "}"

    def score(value):
        value = way["score"].format(value)
        value = value if value.replace(".0", "").isdigit() else text(value)
        return pairs([("Score", value), ("reason", text("about 3 cm"))]) if way["nested"] else value

    sides = list(zip(way["names"], (first, second)))
    scores = [[(name.title(), score(given[name])) for name in first] for given in (first, second)]
    if way["layout"] == "by answer":
        parts = [(side, pairs(own)) for (side, _), own in zip(sides, scores)]
    elif way["layout"] == "by criterion":
        parts = [(name, pairs((side, score(given[name])) for side, given in sides)) for name in first]
    elif way["layout"] == "flat":
        parts = [(f"{side} {name}", value) for (side, _), own in zip(sides, scores) for name, value in own]
    else:
        ids = [[("Answer", text(side))] if "names" in way["layout"] else [] for side, _ in sides]
        items = [pairs([*own, *named]) for own, named in zip(scores, ids)]
        parts = [("answers", f"[{', '.join(items[:: -1 if 'names' in way['layout'] else 1])}]")]
    comparison = ("comparison", text("It's {close}, isn't it?" if opening else "fine"))
    better = way["verdict"].format(way["names"][winner])
    verdict = (way["verdict_name"], text(better if opening else better.replace(":", "")))
    around = [part.replace("'a'", "'x'") for part in way["around"]] if "list" in way["layout"] else way["around"]
    return pairs([comparison, *parts, verdict]).join(around)


@settings(deadline=None)  # PyYAML is slow on a busy machine
@given(SCORES, SCORES, st.fixed_dictionaries({name: st.sampled_from(ways) for name, ways in WAYS.items()}))
def test_a_reply_that_a_person_can_read_gives_the_same_reading(first, second, way):
    winner = int(first["overall"] < second["overall"])
    plain = {"comparison": "", "answer_1": first, "answer_2": second, "verdict": f"answer_{winner + 1}"}
    assert read_rubric(written(first, second, winner, way)) == read_rubric(json.dumps(plain)) is not None


def _as_list(reply, names):
    """Return a reply whose answers are the items of a list, with these names."""
    said = json.loads(reply)
    items = [said["answer_1"], said["answer_2"], said["answer_2"]]
    answers = [item | dict([name] if name else []) for item, name in zip(items, names)]
    return json.dumps({"answers": answers, "verdict": said["verdict"]})


AMBIGUITIES = {
    "two verdicts": lambda reply, other: f"{reply}\n{other}",
    "a verdict that is corrected and cut off": lambda reply, other: f"{reply} No: {other[: other.rindex(',')]}",
    "another scale": lambda reply, other: reply.replace("/10", "/5"),
    "too high": lambda reply, other: reply.replace("7/10", "17/10"),
    "below zero": lambda reply, other: reply.replace("7/10", "-7/10"),
    "a decimal comma": lambda reply, other: reply.replace('"7/10"', "7,5"),
    "a second thought": lambda reply, other: reply.replace("7/10", "7, or 8"),
    "a range": lambda reply, other: reply.replace("7/10", "7-8"),
    "no score": lambda reply, other: reply.replace("7/10", "good"),
    "a name that occurs twice": lambda reply, other: reply.replace("answer_2", "answer_1"),
    "both": lambda reply, other: reply.replace(': "answer_1"', ': "answer_1 or answer_2"'),
    "a third answer": lambda reply, other: reply.replace("answer_2", "answer_3"),
    "the other verdict": lambda reply, other: reply.replace(': "answer_1"', ': "answer_2"'),
    "a list in another order": lambda reply, other: _as_list(reply, [("answer", 2), ("answer", 1)]),
    "a list of three answers": lambda reply, other: _as_list(reply, [(), (), ()]),
    "a list that names one answer twice": lambda reply, other: _as_list(reply, [("answer", 1), ("answer", 1)]),
    "two verdicts of different names": lambda reply, other: reply[:-1] + ', "better_answer": "answer_2"}',
    "a worse answer": lambda reply, other: reply.replace(': "answer_1"', ': "worse: answer_1"'),
    "two verdicts in one": lambda reply, other: reply[:-1] + ', "verdict": "answer_2"}',
}


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("ambiguity", AMBIGUITIES.values(), ids=AMBIGUITIES)
@settings(deadline=None)
@given(st.permutations(range(5)))
def test_an_ambiguous_reply_is_none(loose, ambiguity, order):
    scores = dict(zip((*CRITERIA, "overall"), (["7/10", "3/10", "8/10", "9/10", "10/10"][n] for n in order)))
    low = dict.fromkeys(scores, "2/10")
    reply, other = (
        json.dumps({"comparison": "", "answer_1": first, "answer_2": second, "verdict": verdict})
        for first, second, verdict in ((scores, low, "answer_1"), (low, scores, "answer_2"))
    )
    assert read_rubric(reply).verdict == 0 and read_rubric(f"{reply} Again: {reply}") == read_rubric(reply)
    spoilt = ambiguity(reply, other)
    assert spoilt != reply and read_rubric(spoilt.replace('"', "'") if loose else spoilt) is None


@pytest.mark.parametrize(
    "verdict", ["Tie.", "It's a tie", "a draw", "equal", "Equally good", "neither", "Neither is better"]
)
def test_a_tie_in_other_words_is_read(verdict):
    assert read_rubric(json.dumps(rubric_reply(8, 8, verdict))).verdict == "tie"


def test_deep_nesting_is_none():
    for opening, closing in ('{"a":', "}"), ("{'a':", "}"), ('{"a":[', "]}"), ("[", "]"):
        for times in (100, 2_000, 5_000):
            assert read_rubric(opening * times + "8" + closing * times) is None


@settings(deadline=None)
@given(st.text("{}[]()<>:,;'\"#/\\\\&*!|>-?%@`~= \n\t18ae\x00\ud800\u201c") | st.text())
def test_any_text_is_none(text):
    assert read_rubric(text) is None and read_rubric("{" + text + "}") is None

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from medst_trl.base.errors import Problems, UserError, closest, located


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("learning_rat", ["learning_rate", "seed"], " Did you mean 'learning_rate'?"),
        (
            "--model",
            ["--hub_model_id", "--model_name_or_path"],
            " Did you mean '--model_name_or_path'?",
        ),
        ("--model_name_or_path", ["--model", "--seed"], " Did you mean '--model'?"),
        ("x", ["xyzzy"], ""),
        ("beta", ["seed"], ""),
    ],
)
def test_the_closest_word_is_similar_or_shares_its_beginning(word, known, expected):
    assert closest(word, known) == expected


def test_problems_are_reported_together_and_once():
    problems = Problems()
    for message in ("first", "second", "first"):
        with problems.collect():
            raise UserError(message)
    with pytest.raises(UserError, match="^first\nsecond$"):
        problems.report()
    with pytest.raises(ZeroDivisionError), Problems().collect():
        1 / 0  # noqa: B018
    Problems().report()


def test_each_message_has_its_place_once():
    with pytest.raises(UserError, match="^here: a\n  details\nadvice\nhere: b$"), located("here"):
        raise UserError("a\n  details\nadvice", "b")
    with pytest.raises(UserError, match="^a is wrong here\nhere: b$"), located("here"):
        raise UserError("a is wrong here", "b")
    problems = Problems()
    with problems.collect(), located("recipe"):
        with problems.collect(), located("recipe, section sft"):
            raise UserError("a", "b")
        problems.report()
    with pytest.raises(UserError, match="^recipe, section sft: a\nrecipe, section sft: b$"):
        problems.report()

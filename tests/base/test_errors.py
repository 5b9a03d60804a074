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


def test_each_line_of_a_located_message_has_the_place_unless_it_is_indented():
    with pytest.raises(UserError, match="^here: a\n  details\nhere: b$"), located("here"):
        raise UserError("a\n  details\nb")
    with pytest.raises(UserError, match="^a is wrong here\nb$"), located("here"):
        raise UserError("a is wrong here\nb")

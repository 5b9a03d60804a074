# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from medst_trl.base.errors import closest


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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The closest relation between a record and a benchmark or another split is reported."""

import pytest

from medst_trl.data.overlap import Inventory, normalized, why_groups_not_compared


def inventory(*records) -> Inventory:
    made = Inventory()
    for image_ids, group, *questions in records:
        made.add_record(image_ids, group, questions)
    return made


def test_the_closest_relation_is_found():
    held = inventory((["a"], "s-P", "normal"), (["b", "c"], None, "where"))
    held.near = {"d": {"b", "c"}, "e": {"d"}}
    assert held.relation(["x", "a"], "s-P") == ("image", "a")
    assert held.relation(["x", "d"], "s-P") == ("near_copy", "b")
    assert held.relation(["x"], "s-P") == ("group", "s-P")
    assert held.relation(["e"], None) == held.relation([], "s-Q") == ("nothing", None)  # no chains of copies
    assert held.relation(["x"], "r-P") == ("nothing", None)  # of another salt or kind
    assert held.relation(["x", "d"], "s-P", "where") == ("question", "where")
    assert held.relation(["a"], None, "where") == ("image", "a") and held.texts == {"normal", "where"}


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        (inventory((["t"], "s-1"), (["u"], "s-2")), None),
        (inventory((["t"], None)), "the training data has no groups"),
        (inventory((["t"], "r-1")), "groups of another kind, or hashed with another salt"),
        (inventory((["t"], "s-1"), (["v"], "r-1")), "groups of another kind, or hashed with another salt"),
        (inventory((["t"], "s-1"), (["u"], None)), "1 training image without a group"),
    ],
)
def test_groups_are_compared_only_if_all_would_be_found(training, reason):
    assert why_groups_not_compared(inventory((["a"], "s-1")), training) == reason
    assert why_groups_not_compared(inventory((["a"], None)), training) == "the benchmark has no groups"
    two_salts = inventory((["a"], "s-1"), (["b"], "t-1"))
    assert why_groups_not_compared(two_salts, training) is not None


@pytest.mark.parametrize("spelling", ["Is there a fracture ?", "is there  a fracture", "Is there a \ufb01racture?\n"])
def test_spellings_of_a_question_are_equal(spelling):
    assert normalized(spelling.replace("\ufb01r", "fr")) == normalized("Is there a fracture?")

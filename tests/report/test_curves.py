# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that statements about the chosen answers agree with the log."""

import pytest

from medst_trl.report.curves import displacement


def log(chosen, rejected=None, margin=None):
    """Return a log of five entries, of which only the last belongs to the end of training."""
    figures = {"logratios/chosen": chosen, "logratios/rejected": rejected, "rewards/margins": margin}
    figures = {key: value for key, value in figures.items() if value is not None}
    return [{"step": step, **(figures if step == 5 else dict.fromkeys(figures, 99.0))} for step in range(1, 6)]


def test_displacement_with_a_growing_margin_is_explained():
    text = displacement(log(-0.4, -3.0, 0.26))
    assert text.startswith("Likelihood displacement") and "0.400 nats" in text
    assert "The margin grows because the rejected answers lose even more" in text


@pytest.mark.parametrize(("rejected", "margin"), [(-0.1, -0.03), (-0.4, 0.0), (None, 0.2), (-3.0, None), (None, None)])
def test_a_margin_is_called_growing_only_if_it_grows(rejected, margin):
    text = displacement(log(-0.4, rejected, margin))
    assert text.startswith("Likelihood displacement") and "margin grows" not in text
    assert ("has not grown" in text) == (margin is not None and margin <= 0)


@pytest.mark.parametrize("chosen", [-0.001, -0.049])
def test_a_small_loss_is_not_called_displacement(chosen):
    text = displacement(log(chosen, -0.002, -0.0001))
    assert "about as likely as" in text and "isplacement" not in text and "margin" not in text


def test_chosen_answers_more_likely_than_under_the_reference_are_reported():
    assert "no less likely than under the reference (+0.200 nats)" in displacement(log(0.2, -1.0, 0.12))


def test_a_policy_that_has_not_changed_is_reported():
    assert "The policy has not changed" in displacement(log(0.0, 0.0, 0.0))
    assert "The policy has not changed" not in displacement(log(0.0, -0.1, 0.01))


def test_a_log_without_the_change_of_the_chosen_answers_says_nothing():
    assert displacement([{"step": 1, "loss": 0.7}]) is None

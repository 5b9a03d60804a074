# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What is said of the chosen answers is what the log shows."""

import pytest

from medst_trl.report.curves import displacement


def log(chosen, rejected=None, margin=None, kind="logratios"):
    """Five entries, whose last is the last fifth; the others are far from it."""
    figures = {f"{kind}/chosen": chosen, f"{kind}/rejected": rejected, "rewards/margins": margin}
    figures = {key: value for key, value in figures.items() if value is not None}
    return [{"step": step, **(figures if step == 5 else dict.fromkeys(figures, 99.0))} for step in range(1, 6)]


def test_displacement_that_widens_the_margin():
    told = displacement(log(-0.4, -3.0, 0.26))
    assert told.startswith("Likelihood displacement") and "0.400 nats" in told
    assert "The margin grows because the rejected ones fall further" in told


@pytest.mark.parametrize(("rejected", "margin"), [(-0.1, -0.03), (-0.4, 0.0), (None, 0.2), (-3.0, None), (None, None)])
def test_the_margin_is_not_said_to_grow_where_it_does_not(rejected, margin):
    told = displacement(log(-0.4, rejected, margin))
    assert told.startswith("Likelihood displacement") and "margin grows" not in told
    assert ("has not grown" in told) == (margin is not None and margin <= 0)


@pytest.mark.parametrize("chosen", [-0.001, -0.049])
def test_a_hair_below_the_reference_is_no_displacement(chosen):
    told = displacement(log(chosen, -0.002, -0.0001))
    assert "about as likely as" in told and "isplacement" not in told and "margin" not in told


def test_above_the_reference():
    assert "no less likely than under the reference (+0.200 nats)" in displacement(log(0.2, -1.0, 0.12))


def test_a_log_with_rewards_only():
    assert "0.040 nats × beta" in displacement(log(-0.04, -0.3, 0.26, kind="rewards"))
    assert "about as likely as" in displacement(log(-0.004, -0.3, 0.29, kind="rewards"))
    assert displacement([{"step": 1, "loss": 0.7}]) is None

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import re
from types import SimpleNamespace

import pytest

from medst_trl.base.errors import UserError
from medst_trl.pipeline.stages.batch_size import accumulation_steps, division_of, set_accumulation


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("per_device", [1, 4, 16])
def test_a_step_has_the_same_size_on_any_number_of_processes(per_device, processes):
    assert accumulation_steps(128, per_device, processes) * per_device * processes == 128


@pytest.mark.parametrize(
    ("effective", "per_device", "processes"), [(128, 8, 3), (128, 6, 4), (12, 8, 3), (7, 3, 2), (4, 8, 1)]
)
def test_an_indivisible_batch_size_is_refused_with_alternatives(effective, per_device, processes):
    with pytest.raises(UserError, match="These work") as raised:
        accumulation_steps(effective, per_device, processes)
    said = str(raised.value).partition("These work")[2]
    sizes = re.search(r"per_device_train_batch_size ([\d, or]+) on", said)
    for size in re.findall(r"\d+", sizes[1]) if sizes else ():
        assert accumulation_steps(effective, int(size), processes)
    counts = re.search(r"([\d, or]+) process(?:es)? with", said)
    for count in re.findall(r"\d+", counts[1]) if counts else ():
        assert accumulation_steps(effective, per_device, int(count))
    assert sizes or counts or f"multiple of {per_device * processes}" in said


def test_only_the_nearest_alternatives_are_named():
    with pytest.raises(UserError, match=": 6, 7, 9, 10, 11, 14, 15 or 18 processes with"):
        accumulation_steps(55440, 8, 13)
    with pytest.raises(UserError, match="per_device_train_batch_size 1, "):
        accumulation_steps(10**10 + 1, 8, 1)  # at once: ten thousand million candidates are not tried


@pytest.mark.parametrize("numbers", [(0, 1, 1), (-8, 8, 1), (8, 0, 1)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(UserError, match="1 or more"):
        accumulation_steps(*numbers)


def test_accumulation_is_set_from_the_arguments_of_a_stage():
    training_args = SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=1, world_size=4)
    set_accumulation(SimpleNamespace(effective_batch_size=None), training_args)
    assert training_args.gradient_accumulation_steps == 1
    set_accumulation(SimpleNamespace(effective_batch_size=128), training_args)
    assert training_args.gradient_accumulation_steps == 4
    assert division_of(training_args, "pairs") == "128 pairs per step: 8 x 4 processes x 4 accumulated."
    with pytest.raises(UserError, match="Remove gradient_accumulation_steps"):
        set_accumulation(SimpleNamespace(effective_batch_size=128), training_args)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Self-questioning training gives the same trajectory for all equivalent settings."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from family_models import MODELS, tiny_model
from invariant.trajectory import DESCENT, STEPS, Trajectory, assert_same, follow, follow_ranks
from tiny_run import conversation, make_trainer


TOLERANCE = 2e-6
SETTINGS = {
    **DESCENT, "per_device_train_batch_size": 8, "lora_dropout": 0.0, "question_loss_weight": 0.5,
}  # fmt: skip


def conversations(count: int = 40) -> list[dict]:
    """Conversations of one to five turns, most with an image, some with another one in the last turn."""
    rows = []
    for number in range(count):
        row = conversation(number, turns=1 + (3 * number) % 5, with_image=number % 5 != 1)
        row["images"] = [image.resize((16 + 8 * (number % 3), 16)) for image in row["images"]]
        if row["images"] and number % 4 == 0:
            row["messages"][-2]["content"].insert(0, {"type": "image", "text": None})
            row["images"].append(row["images"][0].rotate(90, expand=True))
        rows.append(row)
    return rows


def sft(directory: Path, **settings) -> Trajectory:
    return follow(make_trainer(directory, **{"rows": conversations(), **SETTINGS, **settings}))


@functools.cache
def baseline(lora: bool) -> Trajectory:
    """Train with padded batches and without gradient checkpointing."""
    with TemporaryDirectory() as directory:
        return sft(Path(directory), lora=lora)


def assert_packed(packed: Trajectory, padded: Trajectory) -> None:
    assert packed.tokens < 0.9 * padded.tokens
    assert packed.images == padded.images > 0


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_packing_does_not_change_the_trajectory(tmp_path, lora):
    packed = sft(tmp_path, lora=lora, pack_sequences=True)
    assert_packed(packed, baseline(lora))
    assert_same(packed, baseline(lora), TOLERANCE)


def test_packing_truncated_and_rejected_conversations_does_not_change_the_trajectory(tmp_path):
    rows = conversations()
    rows[5]["messages"][1]["content"][0]["text"] = "very " * 200
    packed, padded = (
        sft(tmp_path / str(pack), rows=rows, max_length=180, pack_sequences=pack) for pack in (True, False)
    )
    assert_packed(packed, padded)
    assert_same(packed, padded, TOLERANCE)


@pytest.mark.parametrize("family", [family for family in MODELS if family not in ("gemma-3", "internvl")])
def test_packing_does_not_change_the_trajectory_of_any_family_that_separates_conversations(tmp_path, family):
    packed, padded = (
        sft(tmp_path / str(pack), policy=(*tiny_model(family), None), lora=False, pack_sequences=pack)
        for pack in (True, False)
    )
    assert_packed(packed, padded)
    assert_same(packed, padded, TOLERANCE)


def test_packing_in_half_precision_changes_the_trajectory_only_by_rounding(tmp_path):
    packed, padded = (
        sft(tmp_path / str(pack), pack_sequences=pack, bf16=True, use_cpu=True) for pack in (True, False)
    )
    assert_packed(packed, padded)
    assert_same(packed, padded, 1e-2)  # measured differences are 4e-3 to 8e-3


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("lora", "use_reentrant"), [(True, False), (True, True), (False, False)], ids=["lora", "reentrant", "full"]
)
def test_gradient_checkpointing_does_not_change_the_trajectory(tmp_path, lora, use_reentrant, pack):
    checkpointed = sft(
        tmp_path, lora=lora, pack_sequences=pack, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )  # fmt: skip
    assert checkpointed.attentions == baseline(lora).attentions + STEPS
    assert_same(checkpointed, baseline(lora), TOLERANCE)


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradient_accumulation_does_not_change_the_trajectory(tmp_path, lora, pack):
    accumulated = sft(
        tmp_path, lora=lora, pack_sequences=pack, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    # TRL averages these metrics over micro-batches of different sizes
    assert_same(accumulated, baseline(lora), TOLERANCE, ignored_metrics={"entropy", "mean_token_accuracy"})


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_packing_on_two_ranks_does_not_change_the_trajectory(tmp_path, lora):
    settings = {**SETTINGS, "lora": lora, "n": 40}
    one = follow(make_trainer(tmp_path / "one", **settings))
    settings |= {"per_device_train_batch_size": 4, "pack_sequences": True}
    two = follow_ranks("tiny_run.py", tmp_path / "two", 2, **settings)
    # TRL averages these metrics over ranks with different numbers of tokens
    assert_same(two, one, TOLERANCE, ignored_metrics={"entropy", "mean_token_accuracy"})

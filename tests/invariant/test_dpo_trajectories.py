# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""DPO training gives the same trajectory for all equivalent settings."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from family_models import MODELS, tiny_model
from invariant.trajectory import DESCENT, STEPS, Trajectory, assert_same, follow, follow_ranks
from PIL import Image
from tiny_dpo import make_trainer
from tiny_run import text


TOLERANCE = 2e-5  # answers have log-probabilities near -90, where float32 has a spacing of 7.6e-6
POLICIES = ["continued_adapter", "new_adapter", "full"]
LOSSES = [("sigmoid",), ("sigmoid", "sft"), pytest.param(("ipo",), marks=pytest.mark.slow)]


def pairs(count: int = 20, with_images: bool = True) -> list[dict]:
    """Varied pairs: with and without a history, either answer longer, and answers that begin with the same words."""
    rows = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16 + 4 * (number % 3), 3), dtype=np.uint8)
        has_image = with_images and number % 7 != 3
        image = [{"type": "image", "text": None}] * has_image
        question = {"role": "user", "content": [*image, *text(f"What about {'this ' * (number % 4)}{number}?")]}
        history = [
            {"role": "assistant", "content": text("A scan.")},
            {"role": "user", "content": text("And what of the left?")},
        ]
        answers = f"It is {'very ' * (number % 5)}dark.", f"It is {'not ' * ((3 * number) % 7)}bright at all."
        rows.append(
            {
                "id": f"p{number}",
                "images": [Image.fromarray(pixels)] * has_image,
                "prompt": [question, *(history if number % 3 == 2 else [])],
                "chosen": [{"role": "assistant", "content": text(answers[0])}],
                "rejected": [{"role": "assistant", "content": text(answers[1])}],
            }
        )
    return rows


def dpo(directory: Path, **settings) -> Trajectory:
    return follow(make_trainer(directory, **{"rows": pairs(), **DESCENT, **settings}))


@functools.cache
def baseline(policy: str, *loss_types: str) -> Trajectory:
    """As in stock TRL: each answer with its own prompt and image, and the reference computed in every step."""
    with TemporaryDirectory() as directory:
        return dpo(Path(directory), policy=policy, loss_type=list(loss_types), share_prefix=False)


def assert_shared(shared: Trajectory, separate: Trajectory) -> None:
    """Check that prefixes were shared: separate sequences, the fallback, would match exactly."""
    assert shared.tokens < 0.9 * separate.tokens
    assert 2 * shared.images == separate.images


@pytest.mark.parametrize("loss_types", LOSSES, ids="+".join)
@pytest.mark.parametrize("policy", POLICIES)
def test_prefix_sharing_does_not_change_the_trajectory(tmp_path, policy, loss_types):
    shared, separate = dpo(tmp_path, policy=policy, loss_type=list(loss_types)), baseline(policy, *loss_types)
    assert_shared(shared, separate)
    assert_same(shared, separate, TOLERANCE)


@pytest.mark.parametrize("policy", POLICIES)
def test_prefix_sharing_with_truncated_answers_does_not_change_the_trajectory(tmp_path, policy):
    settings = {"policy": policy, "max_length": 80}
    trainer = make_trainer(tmp_path / "shared", rows=pairs(), **DESCENT, **settings)
    assert 0 < trainer.usable["train"].truncated < len(trainer.train_dataset)
    shared, separate = follow(trainer), dpo(tmp_path / "separate", share_prefix=False, **settings)
    assert_shared(shared, separate)
    assert_same(shared, separate, TOLERANCE)


def test_prefix_sharing_without_images_does_not_change_the_trajectory(tmp_path):
    rows = pairs(with_images=False)
    shared, separate = (dpo(tmp_path / str(share), rows=rows, share_prefix=share) for share in (True, False))
    assert_shared(shared, separate)
    assert_same(shared, separate, TOLERANCE)


@pytest.mark.parametrize("family", MODELS)
def test_prefix_sharing_does_not_change_the_trajectory_of_any_family(tmp_path, family):
    shared, separate = (
        dpo(tmp_path / str(share), policy=tiny_model(family), share_prefix=share) for share in (True, False)
    )
    assert_shared(shared, separate)
    assert_same(shared, separate, TOLERANCE)


def test_prefix_sharing_in_half_precision_changes_the_trajectory_only_by_rounding(tmp_path):
    settings = {"bf16": True, "use_cpu": True}
    shared, separate = (dpo(tmp_path / str(share), share_prefix=share, **settings) for share in (True, False))
    assert_shared(shared, separate)
    assert_same(shared, separate, 1e-2)  # measured differences are 4e-3 to 8e-3


@pytest.mark.parametrize("share_prefix", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("policy", "use_reentrant"), [*((p, False) for p in POLICIES), ("continued_adapter", True)])
def test_gradient_checkpointing_does_not_change_the_trajectory(tmp_path, policy, use_reentrant, share_prefix):
    checkpointed = dpo(
        tmp_path, policy=policy, share_prefix=share_prefix, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )  # fmt: skip
    assert checkpointed.attentions >= baseline(policy, "sigmoid").attentions + STEPS
    assert_same(checkpointed, baseline(policy, "sigmoid"), TOLERANCE)


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_cached_reference_does_not_change_the_trajectory(tmp_path, policy, share_prefix):
    settings = {"policy": policy, "share_prefix": share_prefix, "precompute_ref_log_probs": True}
    settings["ref_log_probs_dir"] = str(tmp_path / "cache")
    written, read = (dpo(tmp_path / run, **settings) for run in ("writes_cache", "reads_cache"))
    assert read.attentions == STEPS + 2 * share_prefix  # those of the policy, and two to compare the layouts once
    for cached in (written, read):
        assert_same(cached, baseline(policy, "sigmoid"), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_prefix_sharing_on_two_ranks_does_not_change_the_trajectory(tmp_path, policy):
    settings = {**DESCENT, "policy": policy}
    one = follow(make_trainer(tmp_path / "one", per_device_train_batch_size=4, share_prefix=False, **settings))
    two = follow_ranks("tiny_dpo.py", tmp_path / "two", 2, per_device_train_batch_size=2, **settings)
    assert_same(two, one, TOLERANCE)

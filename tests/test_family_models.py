# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The tiny models react to what the tests of masks and positions change. Otherwise those tests could not fail."""

import pytest
import tiny_run
import torch
from family_models import MODELS, WINDOW, tiny_model

from medst_trl.policy.families import model_parts
from medst_trl.training.collator import DataCollatorForSelfQuestioning


SLIDING = ["llava-mistral", "gemma-3"]
M_ROPE = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
MIN_CHANGE = 1e-3


def _inputs(processor, *rows):
    batch = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)(list(rows) or [tiny_run.conversation(3, turns=3)])
    batch.pop("question_mask")
    return batch


def _logit_change(model, one: dict, other: dict) -> torch.Tensor:
    """Return the largest difference of the logits at each position of the first row."""
    with torch.no_grad():
        difference = model(**one).logits - model(**other).logits
    return difference[0].abs().amax(-1)


@pytest.mark.parametrize("family", MODELS)
def test_a_padded_batch_trains_every_part(family):
    model, processor = tiny_model(family)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) <= 150_000
    batch = _inputs(processor, tiny_run.conversation(0), tiny_run.conversation(3, turns=3))
    assert (batch["attention_mask"] == 0).any()
    loss = model(**batch).loss
    assert loss.isfinite()
    loss.backward()
    part_of = model_parts(model).part_of
    trained = {part_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == {"vision", "projector", "language"}


@pytest.mark.parametrize("family", MODELS)
def test_logits_depend_on_the_image(family):
    model, processor = tiny_model(family)
    one, other = (_inputs(processor, tiny_run.conversation(3, turns=3)) for _ in range(2))
    other["pixel_values"] = other["pixel_values"].flip(0 if family in M_ROPE else -1)
    assert _logit_change(model, one, other).amax() > MIN_CHANGE
    # Every later position depends on the image, with a sliding window at least those within its length.
    reach = slice(None) if family != "llava-mistral" else slice(WINDOW)
    image = (one["input_ids"][0] == model.config.image_token_id).nonzero()
    assert (_logit_change(model, one, other)[int(image[-1]) + 1 :][reach] > MIN_CHANGE).all()


@pytest.mark.parametrize("family", MODELS)
def test_logits_depend_on_the_order_of_distant_tokens(family):
    model, processor = tiny_model(family)
    one, other = _inputs(processor), _inputs(processor)
    end = one["input_ids"].shape[1]
    back = WINDOW + 6 if family == "llava-mistral" else 40  # outside the window, but reached through two layers
    first, second = end - back, end - back + 1
    assert one["input_ids"][0, first] != one["input_ids"][0, second]
    other["input_ids"][0, [first, second]] = one["input_ids"][0, [second, first]]
    change = _logit_change(model, one, other)
    assert not change[:first].any() and change[-1] > MIN_CHANGE


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_windows_are_shorter_than_the_inputs(family):
    (model, processor), (wide, _) = tiny_model(family), tiny_model(family, sliding_window=1000)
    inputs = _inputs(processor)
    with torch.no_grad():
        change = (model(**inputs).logits - wide(**inputs).logits)[0].abs().amax(-1)
    assert change[:WINDOW].amax() < 1e-5 and (change[2 * WINDOW :] > MIN_CHANGE).all()


def test_image_tokens_of_gemma_attend_to_each_other():
    model, processor = tiny_model("gemma-3")
    one, other = _inputs(processor), _inputs(processor)
    other["token_type_ids"] = torch.zeros_like(one["token_type_ids"])
    assert _logit_change(model, one, other)[-1] > MIN_CHANGE


@pytest.mark.parametrize("family", M_ROPE)
def test_qwen_positions_depend_on_image_rows_and_columns(family):
    model, processor = tiny_model(family)
    one, other = _inputs(processor), _inputs(processor)
    other["position_ids"] = torch.arange(one["input_ids"].shape[1])[None]
    assert _logit_change(model, one, other)[-1] > MIN_CHANGE


def test_weights_depend_only_on_the_seed():
    (first, _), (same, _), (other, _) = tiny_model("idefics3"), tiny_model("idefics3"), tiny_model("idefics3", seed=1)
    assert all(map(torch.equal, first.parameters(), same.parameters()))
    assert not any(map(torch.equal, first.parameters(), other.parameters()))

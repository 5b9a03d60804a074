# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A batch without an image runs the vision tower all the same, and nothing else changes."""

import pytest
import torch
from family_models import MODELS, tiny_model
from tiny_run import conversation

from medst_trl.policy.loading import prepare_policy
from medst_trl.policy.parts import model_parts
from medst_trl.training.blank_images import encode_blank_images
from medst_trl.training.collator import DataCollatorForSelfQuestioning


@pytest.mark.parametrize("family", MODELS)
def test_every_family(family):
    model, processor = tiny_model(family)
    prepare_policy(model, processor).train()
    collator = DataCollatorForSelfQuestioning(processor)
    with_image, without = (collator([conversation(number, with_image=number == 0)]) for number in (0, 1))
    for batch in (with_image, without):
        batch.pop("question_mask")
    with torch.no_grad():
        expected = [model(**batch).logits for batch in (with_image, without)]
    encode_blank_images(model, processor)

    parts, runs = model_parts(model), []
    model.get_submodule(parts.vision_tower).register_forward_pre_hook(lambda *_: runs.append(True))
    for batch, logits in zip((with_image, without, without), [*expected, expected[1]]):
        model.zero_grad()
        output = model(**batch)
        assert torch.equal(output.logits, logits)
        output.loss.backward()
    assert len(runs) == 3  # once a batch, whether it has an image or not
    gradients = {"vision": [], "projector": [], "language": []}
    for name, parameter in model.named_parameters():
        gradients[parts.part_of(name)].append(parameter.grad)
    assert all(gradient is not None and not gradient.any() for gradient in gradients["projector"])
    reached = [gradient for gradient in gradients["vision"] if gradient is not None]
    assert len(reached) > len(gradients["vision"]) / 2 and not any(gradient.any() for gradient in reached)
    assert any(gradient is not None and gradient.any() for gradient in gradients["language"])

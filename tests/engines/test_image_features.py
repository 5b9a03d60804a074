# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test the memory of image features. test_decoding.py tests that models write the same texts with it."""

import gc
import weakref

import pytest
import torch
from family_models import MODELS, tiny_model
from random_images import random_image

from medst_trl.engines import image_features
from medst_trl.engines.decoding import chat_inputs
from medst_trl.engines.engine import OpenedImage, Prompt, to_answer
from medst_trl.engines.image_features import ImageFeatureCache


def opened_image(seed, size=(32, 32)):
    return OpenedImage(b"", random_image(seed, size))


def memory_of(family, *images):
    """Encode the images with a tiny model of the family."""
    memory = ImageFeatureCache(*tiny_model(family))
    memory.encode(images)
    return memory


@pytest.mark.parametrize("family", MODELS)
def test_inputs_equal_those_with_pixels(family, monkeypatch):
    """Except for the pixels, which are not processed."""
    first, second = opened_image(0, (40, 20)), opened_image(1, (20, 44))
    memory = memory_of(family, second, first)
    processor = memory.processor
    prompts = [
        Prompt(to_answer([], 2, "Which is larger?"), [first, second]),
        Prompt(to_answer([], 1, "Is it?"), [second]),
    ]
    images = [[one.image for one in prompt.images] for prompt in prompts]
    expected = chat_inputs(processor, [prompt.messages for prompt in prompts], images)
    monkeypatch.setattr(type(processor.image_processor), "preprocess", None)
    inputs = memory.inputs(prompts)
    output = inputs.pop("mm_encoder_outputs")["image"]
    pixels = {"pixel_values", "image_sizes", "pixel_attention_mask"}
    assert set(inputs) == set(expected) - pixels
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    tokens = (expected["input_ids"] == memory.model.config.image_token_id).sum()
    assert sum(one.reshape(-1, one.shape[-1]).shape[0] for one in output.pooler_output) == tokens


def test_deepstack_features_are_remembered():
    image = opened_image(0)
    features, *deepstack = memory_of("qwen3-vl", image).known[image].layers
    assert [layer.shape for layer in deepstack] == [features.shape] * 2
    assert not torch.equal(*deepstack)


def test_features_are_freed_with_their_key():
    first, second = opened_image(0), opened_image(1)
    memory = memory_of("vicuna", first, second)
    features = weakref.ref(memory.known[first].layers[0])
    assert first in memory.known and second in memory.known
    del first
    gc.collect()
    assert features() is None and second in memory.known
    assert memory.known[second].layers[0].untyped_storage().nbytes() == memory.known[second].layers[0].nbytes, (
        "the features share storage"
    )


def test_images_of_the_current_batch_stay_if_there_is_no_room_for_all(monkeypatch):
    first, second, third, fourth = map(opened_image, range(4))
    memory = memory_of("vicuna", first, second)
    monkeypatch.setattr(image_features, "MOST_BYTES", memory.known[first].bytes)
    memory.encode([third], keep=[second])
    assert all(image in memory.known for image in (first, second, third)), "images of the current batch are not kept"
    memory.encode([fourth])
    assert [image in memory.known for image in (first, second, third, fourth)] == [True, False, False, True]
    assert [memory.tokens[image] for image in (first, second, third)] == [len(memory.known[first].layers[0])] * 3


def test_features_are_kept_in_main_memory(monkeypatch):
    """They are moved to the device of the model when they are needed. Here the meta device replaces an accelerator."""
    image = opened_image(0)
    memory = memory_of("qwen3-vl", image)
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.shape[0]) or cpu(self))
    memory.encode([image])
    assert moved == [memory.tokens[image]] * 3, "the features of the image or of its two layers were not moved"
    memory.model.to("meta")
    output = memory.inputs([Prompt(to_answer([], 1, "Is it?"), [image])])["mm_encoder_outputs"]["image"]
    layers = [*output.pooler_output, *(rows for layer in output.deepstack_features for rows in layer)]
    assert [rows.device.type for rows in layers] == ["meta"] * 3
    assert memory.known[image].layers[0].device.type == "cpu"


def test_the_processor_is_unchanged_and_the_memory_works_after_a_failed_call():
    image = opened_image(0)
    memory = memory_of("vicuna", image)
    prompt = Prompt(to_answer([], 1, "Is it?"), [image])
    before, attributes = memory.inputs([prompt]), dict(vars(memory.processor))
    with pytest.raises(StopIteration):  # a prompt about two images with one
        memory.inputs([Prompt(to_answer([], 2, "Is it?"), [image])])
    assert vars(memory.processor) == attributes
    assert "pixel_values" in chat_inputs(memory.processor, [to_answer([], 1, "Is it?")], [[image.image]])
    after = memory.inputs([prompt])
    assert torch.equal(after["input_ids"], before["input_ids"])
    features = (inputs["mm_encoder_outputs"]["image"].pooler_output[0] for inputs in (before, after))
    assert torch.equal(*features)
    other = opened_image(1)
    memory.encode([other])
    assert not torch.equal(memory.known[other].layers[0], memory.known[image].layers[0])

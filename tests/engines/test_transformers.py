# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from family_models import MODELS, tiny_model
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.engines.engine import OpenedImage, Prompt, Sampling, to_answer
from medst_trl.engines.kinds import transformers as transformers_engine
from medst_trl.engines.kinds.transformers import MAX_BATCH_SIZE, TransformersEngine, bytes_of_a_text, largest_batch


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_counts_the_cache(family, dtype):
    """One more token costs its bytes in the cache. A sliding window, which needs less, counts as full attention."""
    model, _ = tiny_model(family)
    model = model.to(dtype)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    text = model.config.get_text_config(decoder=True)
    per_token_bytes = bytes_of_a_text(text, dtype, 100, 60) - bytes_of_a_text(text, dtype, 100, 50)
    assert per_token_bytes == cache_bytes
    assert bytes_of_a_text(text, dtype, 110, 50) - bytes_of_a_text(text, dtype, 100, 50) > cache_bytes


def test_the_estimate_counts_image_features(monkeypatch):
    """The features of every deepstack layer count, for all tokens of a prompt."""
    model, _ = tiny_model("qwen3-vl")
    config = model.config.get_text_config(decoder=True)
    one, three = (bytes_of_a_text(config, model.dtype, 100, 50, layers) for layers in (1, 3))
    assert three - one == 2 * 100 * config.hidden_size * model.dtype.itemsize
    monkeypatch.setattr(
        transformers_engine, "free_bytes", lambda device: int(20 * three / transformers_engine.SHARE_OF_FREE) + 1
    )
    assert largest_batch(model, 100, 50) == 20
    model.config.vision_config.deepstack_visual_indexes = []
    assert largest_batch(model, 100, 50) == int(20 * three / one) > 20


def test_the_estimate_is_close_for_llava_7b():
    """A token takes half a mebibyte in bfloat16: about 0.5 GB for 640 prompt tokens and 256 new tokens."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    cached = (640 + 256) * 2**19
    assert cached < bytes_of_a_text(config, torch.bfloat16, 640, 256) < 1.3 * cached


@pytest.mark.parametrize(("texts_free", "expected"), [(0.5, 1), (1.3, 1), (10.1, 8), (10_000, MAX_BATCH_SIZE)])
def test_the_largest_batch_depends_on_free_memory(texts_free, expected, monkeypatch):
    model, _ = tiny_model("vicuna")
    need = bytes_of_a_text(model.config.get_text_config(), model.dtype, 30, 20)
    monkeypatch.setattr(transformers_engine, "free_bytes", lambda device: int(texts_free * need))
    assert largest_batch(model, 30, 20) == expected
    assert largest_batch(model, 60, 40) <= expected


@pytest.mark.parametrize("family", MODELS)
def test_a_strip_is_refused_and_leaves_the_other_prompts_as_they_are(family):
    model, processor = tiny_model(family)
    engine, sampling = TransformersEngine(model, processor, 4), Sampling(temperature=0, max_new_tokens=3)
    sizes = [(20, 30), (2, 600), (900, 3), (30, 20)]
    prompts = [Prompt(to_answer([], 1, "What?"), [OpenedImage(b"", Image.new("RGB", size))]) for size in sizes]
    replies = engine.write(prompts, sampling)
    assert [reply.problem for reply in replies[::3]] == [None, None]
    assert replies[::3] == engine.write(prompts[::3], sampling)
    assert {reply.problem for reply in replies[1:3]} == {"extreme_aspect_ratio"}
    assert replies[1].text.startswith("2 x 600 pixels") and "200" in replies[1].text
    with pytest.raises(UserError, match="cannot take the image: 900 x 3 pixels"):
        list(engine.stream(prompts[2], sampling))
    assert sorted(number for batch in engine.batches(4, prompts.__getitem__) for number in batch) == [0, 1, 2, 3]

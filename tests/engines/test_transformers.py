# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from family_models import MODELS, tiny_model

from medst_trl.engines.kinds import transformers as transformers_engine
from medst_trl.engines.kinds.transformers import MAX_BATCH_SIZE, bytes_of_a_text, largest_batch


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

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test shared prompts, remembered image features and seeded sampling against transformers alone."""

import math
import random
import re
from collections import Counter
from itertools import accumulate

import pytest
import torch
from family_models import MODELS, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_images import random_image
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList

from medst_trl.base.errors import UserError
from medst_trl.engines import decoding
from medst_trl.engines.decoding import (
    GREEDY,
    SeededSampler,
    StopStrings,
    chat_inputs,
    prefill,
    warpers,
    write_texts,
)
from medst_trl.engines.engine import OpenedImage, Prompt, Sampling, random_stream_name, to_answer, to_ask
from medst_trl.engines.image_features import ImageFeatureCache
from medst_trl.engines.kinds.transformers import TransformersEngine
from medst_trl.policy.families import FAMILIES, family_of
from medst_trl.policy.loading import USED_SETTINGS


WIDE, HIGH, SQUARE = (
    OpenedImage(b"", random_image(seed, size)) for seed, size in enumerate([(40, 20), (20, 44), (32, 32)])
)
# Prompts of unequal lengths about one or two images of unequal sizes. HIGH occurs in three of them.
PROMPTS = [
    (to_ask([], 1), [SQUARE]),
    (to_answer([], 2, "What is in the image? The heart is enlarged"), [WIDE, HIGH]),
    (to_answer([], 1, "Is there a pleural effusion?"), [HIGH]),
    (to_answer([], 1, "Is the heart enlarged?"), [HIGH]),
]
DRAWS = [2, 1, 3, 1]
ROWS = [number for number, draws in enumerate(DRAWS) for _ in range(draws)]
SAMPLING = Sampling(max_new_tokens=12)


def sampler(sampling=SAMPLING):
    return SeededSampler(sampling, [f"stream {row}" for row in range(len(ROWS))])


def plain_inputs(processor, rows=ROWS):
    return chat_inputs(
        processor, [PROMPTS[row][0] for row in rows], [[one.image for one in PROMPTS[row][1]] for row in rows]
    )


def remembered_inputs(model, processor):
    memory = ImageFeatureCache(model, processor)
    # The order and the batches differ from those of the prompts.
    memory.encode([HIGH])
    memory.encode([SQUARE, WIDE])
    return memory.inputs([Prompt(*prompt) for prompt in PROMPTS])


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    return tiny_model(request.param)


def test_every_family_is_covered():
    assert {tiny_model(name)[0].config.model_type for name in MODELS} == {
        model_type for family in FAMILIES.values() if family.shares_prompts for model_type in family.model_types
    }


def test_shared_prompts_give_the_same_logits(family):
    model, processor = family
    assert family_of(model.config.model_type).shares_prompts
    settings = GREEDY | {"max_new_tokens": 4, "output_logits": True}
    with torch.inference_mode():
        plain = model.generate(**plain_inputs(processor), **settings)
        shared = model.generate(**prefill(model, remembered_inputs(model, processor), DRAWS, **GREEDY), **settings)
    assert torch.equal(plain.sequences, shared.sequences)
    for one, other in zip(plain.logits, shared.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=5e-6)
    assert (plain.logits[0][0] - plain.logits[0][3]).abs().max() > 0.1, "all prompts give the same logits"


@pytest.mark.parametrize("steps_per_call", [5, 32])
def test_shared_prompts_give_the_same_texts(family, steps_per_call, monkeypatch):
    """Also if a text ends and leaves the batch before the others."""
    model, processor = family
    monkeypatch.setattr(decoding, "STEPS_PER_CALL", steps_per_call)
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(5, 400, 16)))
    for sampled in (sampler, lambda: None):
        plain = write_texts(model, processor, plain_inputs(processor), 12, sampled())
        shared = write_texts(model, processor, remembered_inputs(model, processor), 12, sampled(), DRAWS)
        assert shared == plain
        if sampled is sampler:
            assert len(set(plain)) == len(plain), "streams or prompts have no effect"
            assert len({ended for _, ended in plain}) == 2, "all texts end, or none does"


def test_shared_prompts_with_one_text_each_give_the_same_texts(family):
    model, processor = family
    inputs = plain_inputs(processor, range(len(PROMPTS)))
    shared = write_texts(model, processor, remembered_inputs(model, processor), 40, None, [1] * len(PROMPTS))
    assert shared == write_texts(model, processor, inputs, 40)


def test_ended_texts_leave_the_batch(monkeypatch):
    model, processor = tiny_model("qwen2.5-vl")
    monkeypatch.setattr(decoding, "STEPS_PER_CALL", 4)
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(5, 400, 16)))
    generate, rows = model.generate, []

    def counting(**kwargs):
        rows.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", counting)
    texts = write_texts(model, processor, remembered_inputs(model, processor), 12, sampler(), DRAWS)
    assert rows[:2] == [len(DRAWS), sum(DRAWS)], "a prompt is read more than once"
    assert rows[1:] == sorted(rows[1:], reverse=True) and rows[-1] < rows[1]
    assert len(texts) == sum(DRAWS)


def test_a_model_saved_without_cache_writes_the_same_texts(monkeypatch):
    model, processor = tiny_model("vicuna")
    expected = write_texts(model, processor, plain_inputs(processor), 12, sampler())
    monkeypatch.setattr(model.generation_config, "use_cache", False)
    monkeypatch.setattr(model.config.text_config, "use_cache", False)
    assert write_texts(model, processor, remembered_inputs(model, processor), 12, sampler(), DRAWS) == expected
    assert write_texts(model, processor, plain_inputs(processor), 12, sampler()) == expected


# Every setting of a generation config that is not used, with a value that would change a text or end in an error. The
# values of some need the others to have an effect.
GENERATION_SETTINGS = {
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 200,
    "min_new_tokens": 10,
    "early_stopping": True,
    "max_time": 1e-9,
    "do_sample": True,
    "num_beams": 2,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "quantized",  # needs another package
    "cache_config": {"backend": "none"},
    "max_cache_len": 1,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "length_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "renormalize_logits": True,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 5,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 3.0),
    "begin_suppress_tokens": list(range(100, 400)),
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "decoder_start_token_id": 7,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "compile_config": CompileConfig(fullgraph=True),
    "disable_compile": True,
    "continuous_batching_config": {"max_batch": 1},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 1.0,
    "num_beam_groups": 2,
    "constraints": [[33]],
    "force_words_ids": [[33]],
    "prefill_chunk_size": 3,
}


def test_every_setting_of_a_generation_config_is_used_or_ignored():
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
    assert known == GENERATION_SETTINGS.keys() | set(USED_SETTINGS)


@pytest.mark.parametrize("name", GENERATION_SETTINGS)
def test_other_settings_of_a_generation_config_change_no_text(name, monkeypatch):
    """With and without shared prompts."""
    model, processor = tiny_model("vicuna")
    monkeypatch.setattr(decoding, "STEPS_PER_CALL", 4)
    model.generation_config.eos_token_id = list(range(5, 400, 16))

    def texts():
        plain = [write_texts(model, processor, plain_inputs(processor), 12, one) for one in (None, sampler())]
        inputs = remembered_inputs(model, processor)
        return plain, [write_texts(model, processor, inputs, 12, one, DRAWS) for one in (None, sampler())]

    expected = texts()
    assert expected[0] == expected[1]
    model.generation_config.do_sample = True  # without it, transformers refuses some of the settings
    setattr(model.generation_config, name, GENERATION_SETTINGS[name])
    assert texts() == expected


def test_tokens_that_a_generation_config_forbids_are_not_written(monkeypatch):
    """With and without shared prompts."""
    model, processor = tiny_model("vicuna")
    before = write_texts(model, processor, plain_inputs(processor), 40)
    ids = processor.tokenizer(before[0][0], add_special_tokens=False)["input_ids"]
    forbidden = set(ids[:2])
    model.generation_config.bad_words_ids = [[token] for token in forbidden]
    written, decode = [], processor.batch_decode
    monkeypatch.setattr(
        processor, "batch_decode", lambda tokens, **kwargs: (written.append(tokens), decode(tokens, **kwargs))[1]
    )
    plain = write_texts(model, processor, plain_inputs(processor), 40)
    assert len(written) == 1 and not forbidden & set(written[0].flatten().tolist())
    assert write_texts(model, processor, remembered_inputs(model, processor), 40, None, DRAWS) == plain


def test_other_families_do_not_share_prompts():
    model, processor = tiny_model("vicuna")
    assert TransformersEngine(model, processor)._images is not None
    model.config.model_type = "another"
    assert TransformersEngine(model, processor)._images is None


@pytest.mark.parametrize("steps_per_call", [3, 32])
def test_a_stop_string_ends_a_text_and_is_not_part_of_it(family, steps_per_call, monkeypatch):
    """Also one that spans tokens or calls."""
    model, processor = family
    monkeypatch.setattr(decoding, "STEPS_PER_CALL", steps_per_call)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [processor.tokenizer.eos_token_id])
    whole = write_texts(model, processor, plain_inputs(processor), 12, sampler())
    # Bytes that are no character become one while a text is written.
    words = [word for text, _ in whole for word in re.findall(r"(?<=.)[!-~]{2,3}", text)]
    for strings in (words[:1], [words[-1], words[-1][1:], words[2]], [words[1][0]]):
        monkeypatch.setattr(model.generation_config, "stop_strings", strings)
        plain = write_texts(model, processor, plain_inputs(processor), 12, sampler())
        shared = write_texts(model, processor, remembered_inputs(model, processor), 12, sampler(), DRAWS)
        assert plain == shared
        for (text, ended), (before, ended_before) in zip(plain, whole, strict=True):
            cut = min((before.find(string) for string in strings if string in before), default=None)
            assert text == before[:cut].strip()
            assert ended == (cut is not None or ended_before)


def test_a_stop_string_may_be_a_special_token(monkeypatch):
    model, processor = tiny_model("vicuna")
    before = write_texts(model, processor, plain_inputs(processor), 12)[0][0]
    inputs = processor.tokenizer(before, add_special_tokens=False)["input_ids"]
    token = processor.tokenizer.convert_ids_to_tokens(inputs[1])
    processor.tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    monkeypatch.setattr(model.generation_config, "stop_strings", [token])
    text, ended = write_texts(model, processor, plain_inputs(processor), 12)[0]
    assert ended and before.startswith(text) and len(text) < len(before)


@given(st.lists(st.text("ab#", max_size=4), max_size=8), st.lists(st.text("b#", min_size=1, max_size=3), max_size=2))
@example(["#", "b", "b"], ["b", "#bb"])
def test_a_streamed_text_ends_before_a_stop_string(pieces, strings):
    shown, text = list(StopStrings(strings, None).cut_pieces(pieces)), "".join(pieces)
    if strings:
        string = "|".join(map(re.escape, strings))
        # The model writes no more after the piece that completes a string.
        text = next((text for text in accumulate(pieces) if re.search(string, text)), text)
        text = re.split(string, text)[0]
    assert "".join(shown) == text
    assert "" not in shown
    if not strings:
        assert shown == [piece for piece in pieces if piece]


@given(st.lists(st.sampled_from(["lung", " the", "\u00e4", "\u2665", ".", " 4 mm", "\n"]), max_size=60), st.data())
@settings(deadline=None)
def test_a_stop_string_is_found_in_the_step_that_completes_it(words, data):
    """However long the text before it is, of which only the end is decoded."""
    _, processor = tiny_model("vicuna")
    ids = processor.tokenizer("A prompt with a lung.\n" + "".join(words), return_tensors="pt")["input_ids"]
    text = processor.tokenizer.decode(ids[0, 5:], skip_special_tokens=True)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    string = text[start : start + data.draw(st.integers(1, 5))] or "?"
    stops = StopStrings([string], processor.tokenizer, prompt_length=5)
    ends = range(6, ids.shape[1] + 1)
    texts = [processor.tokenizer.decode(ids[0, 5:end], skip_special_tokens=True) for end in ends]
    expected = next((end for end, text in zip(ends, texts) if string in text), None)
    assert next((end for end in ends if stops(ids[:, :end]).all()), None) == expected


def test_a_stop_string_in_the_prompt_ends_nothing(monkeypatch):
    model, processor = tiny_model("vicuna")
    before = write_texts(model, processor, plain_inputs(processor), 12)
    monkeypatch.setattr(model.generation_config, "stop_strings", ["ASSISTANT:", "USER", "<image>"])
    assert write_texts(model, processor, plain_inputs(processor), 12) == before


DEFAULT_SAMPLING = Sampling()


def sample_tokens(scores, streams, sampling=DEFAULT_SAMPLING, steps=1):
    """Sample tokens of shape (rows, steps) from the same scores at each step."""
    sampler, tokens = SeededSampler(sampling, streams), []
    for _ in range(steps):
        out = sampler(None, scores.clone())
        assert out.isfinite().sum(1).eq(1).all()
        tokens.append(out.argmax(1))
    sampler.check()
    return torch.stack(tokens, 1)


def chi_square(counts, probabilities):
    """Return the standard score of Pearson's chi-square statistic over the tokens with a positive probability."""
    total = sum(counts.values())
    possible = [(token, p) for token, p in enumerate(probabilities) if p > 0]
    assert set(counts) <= {token for token, _ in possible}, "a token of probability 0 was sampled"
    statistic = sum((counts[token] - total * p) ** 2 / (total * p) for token, p in possible)
    degrees_of_freedom = len(possible) - 1
    return (statistic - degrees_of_freedom) / math.sqrt(2 * degrees_of_freedom)


@pytest.mark.parametrize(
    "sampling",
    [
        DEFAULT_SAMPLING,
        Sampling(temperature=0.7, top_k=0, top_p=1.0),
        Sampling(temperature=1.0, top_k=5, top_p=1.0),
        Sampling(temperature=2.0, top_k=0, top_p=0.5),
    ],
    ids=str,
)
def test_samples_follow_the_distribution_of_the_warpers(sampling):
    """Token frequencies match the warpers of transformers, across streams and along the steps of a stream."""
    n = 5_000
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 1.5
    expected = LogitsProcessorList(warpers(sampling))(None, scores).softmax(-1)[0].tolist()
    across = sample_tokens(scores.expand(n, -1), [random_stream_name(s, "r", "answer", 0) for s in range(n)], sampling)
    assert abs(chi_square(Counter(across[:, 0].tolist()), expected)) < 5
    long = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, max_new_tokens=2000)
    along = sample_tokens(scores.expand(5, -1), list("abcde"), long, steps=2000)
    assert abs(chi_square(Counter(along.flatten().tolist()), expected)) < 5


def test_chi_square_detects_a_wrong_distribution():
    counts = Counter({0: 520, 1: 480})
    assert abs(chi_square(counts, [0.5, 0.5])) < 5 < chi_square(counts, [0.6, 0.4])


def test_a_row_does_not_depend_on_its_batch():
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    streams = [random_stream_name(0, f"r{row}", "question", 0) for row in range(6)]
    together = sample_tokens(scores, streams, steps=8)
    for row in range(6):
        assert (sample_tokens(scores[row : row + 1], streams[row : row + 1], steps=8) == together[row]).all()
    order = [3, 1, 5]
    assert (sample_tokens(scores[order], [streams[row] for row in order], steps=8) == together[order]).all()


def test_random_streams_differ_and_are_reproducible():
    scores = torch.zeros(1, 1000)
    names = [
        random_stream_name(*parts)
        for parts in [(0, "a", "question", 1), (1, "a", "question", 1), (0, "b", "question", 1), (0, "a", "answer", 1),
                      (0, "a", "question", 2), (0, "a", "answer", 1, 0), (0, "a", "answer", 1, 1),
                      (0, "a', 'question", "question", 1)]
    ]  # fmt: skip
    unrestricted = Sampling(top_k=0, top_p=1.0)
    texts = [tuple(sample_tokens(scores, [name], unrestricted, steps=6)[0].tolist()) for name in names]
    assert len(set(texts)) == len(names)
    assert texts == [tuple(sample_tokens(scores, [name], unrestricted, steps=6)[0].tolist()) for name in names]
    # A seed also fixes the random numbers, which are those of `random.Random`.
    numbers = random.Random("a")
    assert sample_tokens(torch.zeros(1, 10), ["a"], unrestricted, steps=6).tolist() == [
        [int(10 * numbers.random()) for _ in range(6)]
    ]


def test_the_token_limit_does_not_change_the_tokens_before_it():
    scores = torch.zeros(1, 1000)
    short, long = (sample_tokens(scores, ["a"], Sampling(max_new_tokens=n), steps=4) for n in (4, 400))
    assert (short == long).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_random_numbers_pick_possible_tokens(uniform):
    """The smallest and the largest uniform number draw a token that has a probability."""
    scores = torch.full((1, 9), -torch.inf)
    scores[0, 3:6] = torch.tensor([0.1, 0.2, 0.3])
    sampler = SeededSampler(Sampling(top_k=0, top_p=1.0), ["a"])
    sampler._uniforms[:] = uniform
    assert sampler(None, scores).argmax() == (5 if uniform else 3)


def test_sampling_beyond_max_new_tokens_is_allowed():
    sample_tokens(torch.zeros(2, 5), ["a", "b"], Sampling(max_new_tokens=2), steps=4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_nan_or_infinite_are_refused(bad):
    scores = torch.zeros(2, 5)
    scores[1, 2] = bad
    sampler = SeededSampler(Sampling(top_k=0, top_p=1.0), ["a", "b"])
    sampler(None, scores)
    sampler(None, torch.zeros(2, 5))
    with pytest.raises(UserError, match="not numbers"):
        sampler.check()

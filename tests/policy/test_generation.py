# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings in generation_config.json: what is used, ignored, saved or refused."""

import json
import warnings
from copy import deepcopy
from functools import cache

import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from medst_trl.base.errors import UserError
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.engines.engine import OpenedImage, Prompt, Sampling, to_answer
from medst_trl.engines.kinds.transformers import TransformersEngine
from medst_trl.policy.loading import load_policy, prepare_policy


VUSR_ID = 400
PROMPTS = [Prompt(to_answer([], 1, "Is it?"), [OpenedImage(b"", tiny_run.conversation(0)["images"][0])])]
SAMPLING_VALUES = {
    "temperature": st.floats(0.1, 2.0), "top_p": st.floats(0.1, 1.0), "top_k": st.integers(0, 100),
    "min_p": st.floats(0.1, 0.9), "typical_p": st.floats(0.1, 1.0), "epsilon_cutoff": st.floats(0.0, 0.9),
}  # fmt: skip
# Settings without effect, which transformers refuses to save once the config has changed.
WITHOUT_EFFECT = {
    "early_stopping": True, "length_penalty": 2.0, "output_scores": True, "cache_implementation": "static",
    "pad_token_id": -1,
}  # fmt: skip
# Settings with which transformers creates no config at all.
REFUSED = {
    "num_return_sequences": 2, "cache_implementation": "unknown", "assistant_model": "org/draft", "max_new_tokens": 0,
    "watermarking_config": {"unknown": 1}, "compile_config": {"fullgraph": True}, "early_stopping": "sometimes",
}  # fmt: skip


@cache
def small_base():
    return tiny_llava(**tiny_run.SMALL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    for part in small_base():
        part.save_pretrained(directory)
    return directory


def load(directory, **generation):
    """Load the model with other settings in its generation_config.json."""
    known = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    (directory / "generation_config.json").write_text(json.dumps(known | generation))
    return load_policy(str(directory))


def saved(model, directory):
    model.save_pretrained(directory)
    return GenerationConfig.from_pretrained(directory)


@settings(deadline=None, max_examples=30)
@given(st.fixed_dictionaries({}, optional=SAMPLING_VALUES), st.sampled_from([None, True, False]))
def test_sampling_values_are_saved_unless_sampling_is_off(tmp_path_factory, values, do_sample):
    model, processor = deepcopy(small_base())
    model.generation_config = GenerationConfig(**values, do_sample=do_sample)
    prepare_policy(model, processor)
    config = saved(model, tmp_path_factory.mktemp("saved"))
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "epsilon_cutoff": 0.0}
    matters = {name: value for name, value in values.items() if value != neutral.get(name)}
    if do_sample is None and matters:
        do_sample = True
    assert config.do_sample is do_sample
    for name in SAMPLING_VALUES:
        assert getattr(config, name) == (values.get(name) if do_sample or name not in matters else None)
    assert config.suppress_tokens == [VUSR_ID] and config.eos_token_id == [2]


@pytest.mark.parametrize("temperature, do_sample", [(0.9, True), (0.0, None)])
def test_a_base_with_sampling_values_is_loaded_and_saved(directory, tmp_path, temperature, do_sample):
    with warnings.catch_warnings(action="error"):
        model, _ = load(directory, temperature=temperature, top_p=0.6)
    config = saved(model, tmp_path)
    assert (config.do_sample, config.temperature) == (do_sample, temperature or None)
    assert load_policy(str(directory))[0].generation_config.do_sample is do_sample


@pytest.mark.parametrize("use_cache", [True, False])
def test_settings_without_effect_are_not_saved(directory, tmp_path, use_cache):
    others = {} if use_cache else {"cache_implementation": "static"}
    model, _ = load(directory, **(WITHOUT_EFFECT | others), use_cache=use_cache)
    config = saved(model, tmp_path)
    assert (config.early_stopping, config.length_penalty, config.pad_token_id) == (None, None, 3)
    assert config.cache_implementation is None
    assert TransformersEngine(*load_policy(str(directory))).write(PROMPTS, Sampling(temperature=0.0))


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_transformers_refuses_is_reduced_to_what_is_used(directory, tmp_path, name):
    used = {"stop_strings": ["#"], "suppress_tokens": [5]}
    model, _ = load(directory, no_repeat_ngram_size=3, **used, **{name: REFUSED[name]})
    config = saved(model, tmp_path)
    assert {key: getattr(config, key) for key in used} == used | {"suppress_tokens": [5, VUSR_ID]}
    assert config.no_repeat_ngram_size is None and getattr(config, name, None) is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("eos_token_id", "</s>"),
        ("eos_token_id", 2.0),
        ("eos_token_id", [2, None]),
        ("pad_token_id", "3"),
        ("pad_token_id", [3]),
        ("suppress_tokens", "x"),
    ],
)
def test_a_token_that_is_not_a_number_is_refused(directory, name, value):
    with pytest.raises(UserError, match="generation_config.json of .* cannot be used .*Correct or remove the file"):
        load(directory, **{name: value})


@pytest.mark.parametrize("content", ["{", "", "[]", '"text"', "5", "\xff"])
def test_a_damaged_file_is_refused(directory, content):
    """transformers would take other tokens instead, with which texts may not end."""
    (directory / "generation_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="generation_config.json of .* cannot be used .*Correct or remove the file"):
        load_policy(str(directory))


@pytest.mark.parametrize("empty", [[], "", [""], None])
def test_empty_settings_are_as_none(directory, empty):
    model, _ = load(directory, stop_strings=empty, bad_words_ids=[], sequence_bias=[])
    assert model.generation_config.stop_strings is None and model.generation_config.bad_words_ids is None


def test_settings_in_the_configuration_of_the_model_count_as_well(directory, tmp_path):
    """Of models saved before there was a generation_config.json."""
    config = json.loads((directory / "config.json").read_text())
    values = {"temperature": 0.9, "num_beams": 4, "max_length": 4096}
    try:
        for changed in (config | values, config | {"text_config": config["text_config"] | values}):
            (directory / "config.json").write_text(json.dumps(changed))
            (directory / "generation_config.json").unlink(missing_ok=True)
            policy = load_policy(str(directory))
            assert TransformersEngine(*policy).write(PROMPTS, Sampling(temperature=0.0, max_new_tokens=4))
            assert saved(policy[0], tmp_path).do_sample
    finally:
        (directory / "config.json").write_text(json.dumps(config))

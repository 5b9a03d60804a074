# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
from families import FAMILIES, TEXT_ROLE, prepared_processor
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from medst_trl.base.errors import UserError
from medst_trl.policy.chat_template import VUSR, saved_role, wrap_chat_template
from medst_trl.policy.vusr import add_vusr, turn_format


def _as_parts(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=1, max_size=5),
    add_generation_prompt=st.booleans(),
)
def test_other_conversations_render_unchanged(family, texts, add_generation_prompt):
    assume(texts[-1].strip() != VUSR)
    original, wrapped = FAMILIES[family](), prepared_processor(family)
    messages = [_as_parts("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    expected_messages = messages
    if not turn_format(original).answer_end:  # the wrapper closes turns that the template leaves open
        eos = original.tokenizer.eos_token
        expected_messages = [
            _as_parts(m["role"], m["content"][0]["text"] + eos) if m["role"] == "assistant" else m for m in messages
        ]
    expected = original.apply_chat_template(expected_messages, add_generation_prompt=add_generation_prompt)
    assert wrapped.apply_chat_template(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("history", [False, True])
def test_a_bare_vusr_turn_stays_open(family, history):
    processor = prepared_processor(family)
    bare = {"role": "user", "content": [{"type": "text", "text": VUSR}]}
    history_messages = [_as_parts("user", "Describe it."), _as_parts("assistant", "A chest.")] if history else []
    rendered = processor.apply_chat_template([*history_messages, _as_parts("user", "QQZZ")])
    expected = rendered[: rendered.index("QQZZ")] + VUSR
    if family == TEXT_ROLE:
        expected = rendered[: rendered.index("USER: QQZZ")] + "VUSER:"
    for add_generation_prompt in (False, True):
        assert (
            processor.apply_chat_template([*history_messages, bare], add_generation_prompt=add_generation_prompt)
            == expected
        )


def test_text_that_contains_the_token_is_not_a_bare_turn():
    processor = prepared_processor("qwen2.5-vl")
    rendered = processor.apply_chat_template([_as_parts("user", f"{VUSR} and more")], add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>assistant\n")


def test_wrapping_twice_changes_nothing():
    once = wrap_chat_template("{{ messages }}\n")
    assert saved_role(once) == "token" and wrap_chat_template(once) == once
    assert saved_role("{{ messages }}") is None and saved_role(None) is None


def test_the_default_of_several_templates_is_wrapped():
    processor = FAMILIES["vicuna"]()
    processor.chat_template = {"default": processor.chat_template, "rag": "x"}
    add_vusr(processor)
    assert processor.chat_template == prepared_processor("vicuna").chat_template


def test_a_template_for_string_content_is_refused():
    processor = FAMILIES["vicuna"]()
    processor.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="list of typed parts"):
        add_vusr(processor)


@pytest.mark.parametrize("family", ["vicuna", "llava-1.5-hf", "gemma-3", "idefics3"])
def test_token_and_template_are_kept_when_saved(family, tmp_path):
    processor = prepared_processor(family)
    processor.save_pretrained(tmp_path)
    reloaded = type(processor).from_pretrained(tmp_path)
    assert reloaded.chat_template == processor.chat_template
    bare = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (16, 16))}, {"type": "text", "text": VUSR}],
        }
    ]
    ids = [p.apply_chat_template(bare, tokenize=True, return_dict=True)["input_ids"][0] for p in (processor, reloaded)]
    assert list(ids[0]) == list(ids[1])
    assert ids[1][-1] == add_vusr(reloaded) == processor.tokenizer.convert_tokens_to_ids(VUSR)

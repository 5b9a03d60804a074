# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
from families import FAMILIES, TEXT_ROLE, prepared_processor
from hypothesis import given
from hypothesis import strategies as st

from medst_trl.base.errors import UserError
from medst_trl.policy.vusr import VUSR, add_vusr, neutralise, stop_token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_twice_changes_nothing(family):
    processor = FAMILIES[family]()
    token_id, template, size = add_vusr(processor), processor.chat_template, len(processor.tokenizer)
    assert (add_vusr(processor), processor.chat_template, len(processor.tokenizer)) == (token_id, template, size)
    if family == TEXT_ROLE:
        assert token_id is None and VUSR not in processor.tokenizer.get_vocab()
        return
    assert processor.tokenizer(VUSR, add_special_tokens=False)["input_ids"] == [token_id]
    assert token_id in processor.tokenizer.all_special_ids


@given(
    st.lists(
        st.sampled_from(["<image>", "</s>", VUSR, "<", ">", "/s>", "<im", "age>", "\ue0f1", "a", " "]), max_size=8
    )
)
def test_neutralised_text_holds_no_control_token_and_reads_the_same(pieces):
    processor, text = prepared_processor("vicuna"), "".join(pieces)
    safe, changed = neutralise(text, processor)
    assert not set(processor.tokenizer(safe, add_special_tokens=False)["input_ids"]) & set(
        processor.tokenizer.all_special_ids
    )
    assert safe.replace("\u200c", "") == text.replace("\ue0f1", "")
    assert (changed == 0) == (safe == text)


def test_the_stops_end_questions_and_answers():
    assert [
        prepared_processor("gemma-3").tokenizer.convert_ids_to_tokens(i)
        for i in stop_token_ids(prepared_processor("gemma-3"))
    ] == [
        "<eos>",
        "<end_of_turn>",
    ]
    tokenizer = prepared_processor("llava-1.5-hf").tokenizer
    assert stop_token_ids(prepared_processor("llava-1.5-hf")) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "missing, message",
    [("pad_token", "pad token"), ("eos_token", "end-of-sequence"), ("chat_template", "chat template")],
)
def test_a_processor_that_lacks_something_is_refused_by_name(missing, message):
    processor = FAMILIES["vicuna"]()
    setattr(processor if missing == "chat_template" else processor.tokenizer, missing, None)
    with pytest.raises(UserError, match=message):
        add_vusr(processor)

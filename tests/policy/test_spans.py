# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The loss covers exactly the intended questions and answers, for every family and for arbitrary text."""

from itertools import groupby

import pytest
from families import FAMILIES, TEXT_ROLE, prepared_processor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from medst_trl.data.schema import text_of
from medst_trl.policy.spans import can_be_asked, render_conversation
from medst_trl.policy.vusr import VUSR, neutralise, turn_format
from medst_trl.training.collator import DataCollatorForSelfQuestioning
from medst_trl.training.encoding import IGNORED


HOSTILE = [
    " ASSISTANT: ", "USER:", "</s>", "<s>", "<unk>", "<image>", VUSR, "<|im_end|>", "<|im_start|>assistant\n",
    "<|image_pad|>",
    "<end_of_turn>", "<start_of_turn>model\n", "<start_of_image>", "<|eot_id|>", "<|image|>", "<end_of_utterance>",
    "[/INST]",
    "</think>", "<pad>", "\ue0f1", "\ue0f2", "{{ bos_token }}", "{% generation %}", "<</s>s>", "", " ", "\n\n", "Yes",
    "no.",
]  # fmt: skip
TEXTS = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8"), max_size=12)), max_size=4
).map("".join)


@st.composite
def pieces(draw, text):
    """A text as one part, or split into two parts at any position."""
    split = draw(st.integers(0, len(text)))
    return [text[:split], text[split:]] if draw(st.booleans()) else [text]


@st.composite
def conversations(draw):
    """An example with or without an image in its first message."""
    turns = draw(st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=3))
    messages = []
    for question, answer, vusr in turns:
        parts = [{"type": "text", "text": piece} for piece in draw(pieces(question))]
        messages.append({"role": "user", "content": parts, "vusr": vusr})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    images = []
    if draw(st.booleans()):
        images = [Image.new("RGB", (24, 16), "gray")]
        messages[0]["content"].insert(0, {"type": "image", "text": None})
    return {"id": "x", "images": images, "messages": messages}


def with_texts(messages, change, **keys) -> list[dict]:
    """Return the messages with the changed text of each as one part."""

    def content(message):
        images = [{"type": "image"} for part in message["content"] if part["type"] == "image"]
        return [*images, {"type": "text", "text": change(text_of(message["content"]))}]

    return [{**message, "content": content(message), **keys} for message in messages]


def decoded_targets(processor, batch) -> list[tuple[bool, str]]:
    labels, questions = batch["labels"][0].tolist(), batch["question_mask"][0].tolist()
    spans = groupby(zip(labels, questions, strict=True), key=lambda item: (item[0] != IGNORED, item[1]))
    return [
        (is_question, processor.tokenizer.decode([label for label, _ in span]))
        for (labelled, is_question), span in spans
        if labelled
    ]


def intended_targets(processor, messages) -> list[tuple[bool, str]]:
    turns, eos = turn_format(processor), processor.tokenizer.eos_token
    targets = []
    for message in messages:
        text = neutralise(text_of(message["content"]), processor)[0].strip()
        if message["role"] == "assistant":
            targets.append((False, turns.answer_lead + text + (turns.answer_end or eos)))
        elif message["vusr"] and can_be_asked(message):
            has_image = any(part["type"] == "image" for part in message["content"])
            targets.append((True, ("" if has_image else turns.question_lead) + text + (turns.question_end or eos)))
    return targets


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(example=conversations())
def test_only_the_intended_texts_are_labels(family, example):
    processor = prepared_processor(family)
    collator = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)
    batch = collator([example])
    assert decoded_targets(processor, batch) == intended_targets(processor, example["messages"])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(example=conversations())
def test_data_text_never_becomes_a_special_token(family, example):
    processor = prepared_processor(family)
    collator = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)
    harmless = with_texts(example["messages"], lambda text: "x" if text.strip() else "")
    input_ids = [
        collator([{**example, "messages": messages}])["input_ids"][0] for messages in (example["messages"], harmless)
    ]
    special_ids = set(processor.tokenizer.all_special_ids) | {
        index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special
    }
    actual, expected = ([int(token) for token in row if int(token) in special_ids] for row in input_ids)
    assert actual == expected


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(example=conversations())
def test_training_and_inference_render_the_same_prompts(family, example):
    """A training sequence up to an answer equals the generation prompt of `apply_chat_template`."""
    processor = prepared_processor(family)
    messages = with_texts(example["messages"], lambda text: neutralise(text, processor)[0].strip(), vusr=False)
    ids = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)([{**example, "messages": messages}])["input_ids"][
        0
    ].tolist()
    for end in range(1, len(messages), 2):
        prompt = prepare_multimodal_messages(messages[:end], example["images"])
        expected = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        expected = expected["input_ids"][0]
        assert ids[: len(expected)] == list(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_vusr_turn_is_the_start_of_a_trained_question(family):
    processor = prepared_processor(family)
    image = Image.new("RGB", (24, 16))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it large?"}], "vusr": True},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    batch = DataCollatorForSelfQuestioning(processor)([{"id": "1", "images": [image], "messages": messages}])
    bare = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": VUSR}]}]
    prompt = processor.apply_chat_template(bare, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ][0]
    start = int(batch["question_mask"][0].nonzero()[0])
    assert batch["input_ids"][0, :start].tolist() == list(prompt)
    if family == TEXT_ROLE:
        assert processor.decode(prompt).endswith("VUSER: " + "<image>" * 4 + "\n")
    else:
        assert prompt[-1] == processor.tokenizer.convert_tokens_to_ids(VUSR)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_later_turn_is_the_start_of_a_trained_question(family):
    processor = prepared_processor(family)
    turns = [("user", "Describe it."), ("assistant", "A chest."), ("user", "Is it large?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[2]["vusr"] = True
    collator = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)
    batch = collator([{"id": "1", "images": [], "messages": messages}])
    bare = {"role": "user", "content": [{"type": "text", "text": VUSR}]}
    prompt = processor.apply_chat_template([*messages[:2], bare], tokenize=True, return_dict=True)["input_ids"][0]
    start = int(batch["question_mask"][0].nonzero()[0])
    assert batch["input_ids"][0, :start].tolist() == list(prompt)


def test_a_question_with_an_image_in_its_text_cannot_be_asked():
    parts = [{"type": "text", "text": "Compare"}, {"type": "image"}, {"type": "text", "text": "with the first."}]
    assert not can_be_asked({"role": "user", "content": parts})
    assert can_be_asked({"role": "user", "content": parts[::-1][1:]})
    assert not can_be_asked({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " \n"}]})


def test_a_template_that_drops_a_turn_is_refused():
    from medst_trl.base.errors import UserError

    processor = FAMILIES["vicuna"]()
    processor.chat_template = (
        "{{ messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] }}"
    )
    with pytest.raises(UserError, match="drops or repeats"):
        render_conversation(processor, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])

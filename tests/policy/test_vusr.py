# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The token `<vusr>`, neutralised text, and the text role `VUSER:`, which replaces the token. The loss covers exactly the
intended questions and answers, for every family and for arbitrary text.
"""

from itertools import groupby

import pytest
import tiny_run
import torch
from families import FAMILIES, TEXT_ROLE, prepared_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from medst_trl.base.errors import UserError
from medst_trl.data.schema import text_of
from medst_trl.demo.tiny_model import tiny_llava
from medst_trl.engines.decoding import chat_inputs, write_texts
from medst_trl.engines.engine import to_ask
from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.loading import load_policy
from medst_trl.policy.vusr import (
    VUSR,
    add_vusr,
    can_be_asked,
    neutralise,
    render_conversation,
    set_vusr_role,
    stop_token_ids,
    turn_format,
)
from medst_trl.training.collator import DataCollatorForSelfQuestioning
from medst_trl.training.encoding import IGNORED


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_the_token_twice_changes_nothing(family):
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
def test_neutralised_text_has_no_control_token_and_looks_the_same(pieces):
    processor, text = prepared_processor("vicuna"), "".join(pieces)
    safe = neutralise(text, processor)
    assert not set(processor.tokenizer(safe, add_special_tokens=False)["input_ids"]) & set(
        processor.tokenizer.all_special_ids
    )
    assert safe.replace("\u200c", "") == text.replace("\ue0f1", "")


def test_stop_tokens_end_questions_and_answers():
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
def test_an_incomplete_processor_is_refused(missing, message):
    processor = FAMILIES["vicuna"]()
    setattr(processor if missing == "chat_template" else processor.tokenizer, missing, None)
    with pytest.raises(UserError, match=message):
        add_vusr(processor)


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.Also, the artificial intelligence assistant is a curious virtual "
    "user. The virtual user asks complex questions that are relevant to the content in the image, for example, asking "
    "about background knowledge of the objects in the image, asking to discuss about events happening in the image, "
    "etc. Again, do not ask about uncertain details."
)


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize(
    "messages, prompt, expected",
    [
        (
            [user(None, "q1"), assistant("a1"), user("q2"), assistant("a2"), user(VUSR + "q3"), assistant("a3")],
            False,
            f"{SYSTEM} USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>VUSER: q3</s> ASSISTANT: a3</s>",
        ),
        ([user(None, "q1"), assistant("a1"), user(VUSR)], True, f"{SYSTEM} USER: <image>\nq1 ASSISTANT: a1</s>VUSER:"),
        ([user(None, VUSR)], True, f"{SYSTEM} VUSER: <image>\n"),
        ([{"role": "user", "content": f"<image>\n{VUSR}"}], True, f"{SYSTEM} VUSER: <image>\n"),
        ([user(None, "q1")], True, f"{SYSTEM} USER: <image>\nq1 ASSISTANT:"),
        ([{"role": "user", "content": "<image>\nq1"}], True, f"{SYSTEM} USER: <image>\nq1 ASSISTANT:"),
        ([{"role": "system", "content": "Be short."}, user("q1")], True, "Be short. USER: q1 ASSISTANT:"),
        ([user(f"What is {VUSR}?")], True, f"{SYSTEM} USER: What is {VUSR}? ASSISTANT:"),
    ],
)
def test_the_text_role_renders_like_the_original_implementation(messages, prompt, expected):
    assert prepared_processor(TEXT_ROLE).apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_the_text_role_trains_answers_and_questions_with_their_terminators():
    processor = prepared_processor(TEXT_ROLE)
    messages = [user(None, "q1"), assistant("a1"), user("q2"), assistant("a2"), user("q3"), assistant("a3")]
    messages[4]["vusr"] = True
    example = {"id": "1", "images": [Image.new("RGB", (16, 16))], "messages": messages}
    batch = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)([example])
    labels, is_question = batch["labels"][0], batch["question_mask"][0]
    assert processor.decode(labels[(labels != IGNORED) & ~is_question]) == " a1</s> a2</s> a3</s>"
    assert processor.decode(labels[is_question]) == " q3</s>"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_role_requires_the_chat_format_of_vicuna(family):
    processor = FAMILIES[family]()
    if family in ("vicuna", "llava-1.5-hf", TEXT_ROLE):
        set_vusr_role(processor, "text")
        assert add_vusr(processor) is None
        rendered = processor.apply_chat_template([user(VUSR)])
        ids = processor.tokenizer(rendered, add_special_tokens=True)["input_ids"]
        assert ids.count(processor.tokenizer.bos_token_id) == (1 if family != "vicuna" else rendered.count("<s>"))
        assert processor.decode(ids, skip_special_tokens=True) == f"{SYSTEM} VUSER:"
    else:
        with pytest.raises(UserError, match="Vicuna's chat format"):
            set_vusr_role(processor, "text")


def test_a_saved_role_cannot_be_changed():
    with_token, with_text = FAMILIES["vicuna"](), FAMILIES[TEXT_ROLE]()
    add_vusr(with_token)
    set_vusr_role(with_token, "token")
    with pytest.raises(UserError, match="saved with the role 'token'"):
        set_vusr_role(with_token, "text")
    with pytest.raises(UserError, match="saved with the role 'text'"):
        set_vusr_role(with_text, "token")
    with pytest.raises(UserError, match="Unknown vusr_role 'word'"):
        set_vusr_role(with_text, "word")


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_the_text_role_can_be_loaded_and_asks_questions(tmp_path, tied):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for part in tiny_llava(**tiny_run.SMALL, tie_word_embeddings=tied):
        part.save_pretrained(base)
    with_token_role = load_policy(str(base))[0]
    model, processor = load_policy(str(base), vusr_role="text")
    rows = model.get_input_embeddings().num_embeddings
    assert VUSR not in processor.tokenizer.get_vocab() and rows < with_token_role.get_input_embeddings().num_embeddings
    assert not model.generation_config.suppress_tokens
    assert model.generation_config.eos_token_id == stop_token_ids(processor) == [processor.tokenizer.eos_token_id]
    torch.manual_seed(0)
    model = get_peft_model(model, adapter_config(model, vusr_token_id=add_vusr(processor), r=4, vision_r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(adapter, save_embedding_layers=False)
    processor.save_pretrained(adapter)

    loaded, loaded_processor = load_policy(str(adapter))
    assert loaded_processor.chat_template == processor.chat_template
    images = [[Image.new("RGB", (16, 16), "gray")], [Image.new("RGB", (16, 16), "gray")]]
    inputs = chat_inputs(
        loaded_processor, [to_ask([], 1), [user(None, "q"), assistant("a"), *to_ask([user("x")], 0)[1:]]], images
    )
    prompt_ends = [loaded_processor.decode(row[-7:]) for row in inputs["input_ids"]]
    assert prompt_ends[0].endswith("<image>\n") and prompt_ends[1].endswith("</s>VUSER:")
    with torch.no_grad():
        merged = load_policy(str(adapter))[0].merge_and_unload()
        assert (loaded(**inputs).logits - merged(**inputs).logits).abs().max() < 1e-4
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert len(write_texts(loaded, loaded_processor, inputs, 4)) == 2


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
        text = neutralise(text_of(message["content"]), processor).strip()
        if message["role"] == "assistant":
            targets.append((False, turns.answer_lead + text + (turns.answer_end or eos)))
        elif message["vusr"] and can_be_asked(message):
            has_image = any(part["type"] == "image" for part in message["content"])
            targets.append((True, ("" if has_image else turns.question_lead) + text + (turns.question_end or eos)))
    return targets


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=250, deadline=None)
@given(example=conversations())
def test_only_the_intended_texts_are_labels(family, example):
    processor = prepared_processor(family)
    collator = DataCollatorForSelfQuestioning(processor, sq_ratio=0.0)
    batch = collator([example])
    assert decoded_targets(processor, batch) == intended_targets(processor, example["messages"])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
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
@settings(max_examples=30, deadline=None)
@given(example=conversations())
def test_training_and_inference_render_the_same_prompts(family, example):
    """A training sequence up to an answer equals the generation prompt of `apply_chat_template`."""
    processor = prepared_processor(family)
    messages = with_texts(example["messages"], lambda text: neutralise(text, processor).strip(), vusr=False)
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
    processor = FAMILIES["vicuna"]()
    processor.chat_template = (
        "{{ messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] }}"
    )
    with pytest.raises(UserError, match="drops or repeats"):
        render_conversation(processor, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])

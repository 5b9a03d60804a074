# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Test that a converted STLLaVA-Med uses the prompts of its training and can be trained in both stages."""

import original_checkpoints as original
import pytest
import tiny_dpo
import tiny_run
import torch
from PIL import Image

from medst_trl import load_policy
from medst_trl.policy.adapters import adapter_config
from medst_trl.policy.chat_template import VICUNA_SYSTEM, VUSER_SYSTEM
from medst_trl.policy.vusr import VUSR, add_vusr


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stllava_med")
    weights = original.language_weights() | original.projector_weights("cluster")
    original.write_clip(directory / "clip")
    original.write_checkpoint(directory / "source", weights | original.vision_weights(original.TOWER), "cluster")
    original.convert(str(directory / "source"), directory / "text")
    original.convert(str(directory / "source"), directory / "token", vusr_role="token")
    return directory


def decoded_prompt(processor, *texts):
    """Return the decoded prompt of a conversation whose first turn has an image. The image is shown as one token."""
    image = {"type": "image", "image": Image.new("RGB", (40, 20), "gray")}
    messages = [
        {
            "role": "assistant" if n % 2 else "user",
            "content": [*([] if n else [image]), {"type": "text", "text": text}],
        }
        for n, text in enumerate(texts)
    ]
    encoded = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return processor.decode(encoded["input_ids"][0]).replace("<image>" * 289, "<image>")


def test_prompts_equal_those_of_training(converted):
    _, processor = load_policy(str(converted / "text"))
    # The space after the image is a token of the original code, see test_processor.py.
    start = f"<s> {VUSER_SYSTEM} "
    assert decoded_prompt(processor, VUSR) == f"{start}VUSER: <image> \n"
    assert decoded_prompt(processor, "q1", "a1", VUSR) == f"{start}USER: <image> \nq1 ASSISTANT: a1</s>VUSER:"
    assert decoded_prompt(processor, "q1") == f"{start}USER: <image> \nq1 ASSISTANT:"


def test_the_token_role_leaves_a_row_for_the_token(converted):
    model, processor = load_policy(str(converted / "token"))
    assert decoded_prompt(processor, VUSR) == f"<s> {VICUNA_SYSTEM} USER: <image> \n{VUSR}"
    rows = model.get_input_embeddings().num_embeddings
    assert rows == model.config.text_config.vocab_size and rows % 64 == 0
    assert processor.tokenizer.convert_tokens_to_ids(VUSR) < rows
    assert load_policy(str(converted / "text"))[0].get_input_embeddings().num_embeddings == rows


def test_a_converted_model_trains_in_both_stages_without_the_token(converted, tmp_path):
    model, processor = load_policy(str(converted / "text"))
    config = adapter_config(model, vusr_token_id=add_vusr(processor), r=4, vision_r=2, lora_dropout=0.0)
    assert config.trainable_token_indices is None
    trainer = tiny_run.make_trainer(
        tmp_path / "sft", n=4, max_steps=2, sq_ratio=1.0, policy=(model, processor, config)
    )
    before = tiny_run.trained_weights(trainer)
    trainer.train()
    after = tiny_run.trained_weights(trainer)
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)
    assert trainer.state.log_history[0]["loss_question"] > 0
    trainer.save_model(str(tmp_path / "adapter"))

    policy = load_policy(str(tmp_path / "adapter"), is_trainable=True)
    assert VUSR not in policy[1].tokenizer.get_vocab()
    aligned = tiny_dpo.make_trainer(tmp_path / "dpo", policy, rows=[tiny_dpo.pair(n) for n in range(4)], max_steps=2)
    aligned.train()
    losses = [entry["loss"] for entry in aligned.state.log_history if "loss" in entry]
    assert abs(losses[0] - 0.693147) < 1e-4 and losses[1] != losses[0]


def test_a_converted_model_generates_questions_and_answers(converted):
    from medst_trl.engines.decoding import chat_inputs, write_texts
    from medst_trl.engines.engine import to_answer, to_ask

    model, processor = load_policy(str(converted / "text"))
    inputs = chat_inputs(processor, [to_ask([], 1), to_answer([], 1, "q?")], [[Image.new("RGB", (9, 9))]] * 2)
    assert len(write_texts(model, processor, inputs, 3)) == 2

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny_run
import torch
from family_models import MODELS, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medst_trl.training.encoding import IGNORED
from medst_trl.training.packing import (
    pack,
    packing_cost,
    rope_positions,
    rows_of,
)


PACKED = [family for family in MODELS if family not in ("gemma-3", "internvl")]
ROWS, ONE_ROW = 1e-3, 0.0  # relative cost of long rows; FlashAttention has none and packs into one row
CASES = [
    *[(family, ROWS, {}) for family in PACKED],
    *[(family, ONE_ROW, {}) for family in ("vicuna", "qwen2.5-vl", "idefics3")],  # the layout for FlashAttention
    ("qwen3-vl", ROWS, {"attn_implementation": "eager"}),
    ("llava-mistral", ROWS, {"sliding_window": 12}),
]
NAMES = ["-".join(map(str, [family, cost, *settings.values()])) for family, cost, settings in CASES]


def _rows():
    """Conversations of different lengths with zero, one and two images of different sizes."""
    rows = [tiny_run.conversation(i, turns=turns) for i, turns in enumerate((1, 4, 2, 1, 3))]
    rows[0]["images"] = rows[0]["images"][:0]
    del rows[0]["messages"][0]["content"][0]
    rng = np.random.default_rng(7)
    for row, sizes in ((2, [(16, 16), (40, 20)]), (3, [(20, 44)])):
        images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
        rows[row]["images"] = images
        rows[row]["messages"][0]["content"][:1] = [{"type": "image", "text": None}] * len(images)
    return rows


def _trainer(tmp_path, family, settings=None, **overrides):
    model, processor = tiny_model(family, **(settings or {}))
    overrides = {"pack_sequences": True, "rows": _rows(), "per_device_train_batch_size": 5, **overrides}
    return tiny_run.make_trainer(tmp_path, lora=False, policy=(model, processor, None), **overrides)


def _loss_and_scores(trainer, batch):
    """Return the loss and, for each document (keyed by its tokens), log-probabilities, labels and question mask."""
    tokens, labels = batch["input_ids"], batch["labels"]
    starts = batch["position_ids"] if "position_ids" in batch else torch.arange(tokens.shape[1]).expand(tokens.shape)
    real = batch["token_mask"] if "token_mask" in batch else batch["attention_mask"].bool()
    outputs = []
    hook = trainer.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    hook.remove()
    scores = {}
    for row in range(len(tokens)):
        boundaries = [*(starts[row] == 0).nonzero().flatten().tolist(), tokens.shape[1]]
        for start, end in pairwise(boundaries):
            end = start + int(real[row, start:end].sum())
            log_probs = outputs[0].log_probs[row, start : end - 1]
            scores[tuple(tokens[row, start:end].tolist())] = (
                log_probs,
                labels[row, start:end].tolist(),
                batch["question_mask"][row, start:end].tolist(),
            )
    scores.pop((), None)  # padding
    return loss, scores


def _gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "cost", "settings"), CASES, ids=NAMES)
def test_a_packed_step_equals_the_padded_step(tmp_path, family, cost, settings):
    trainer = _trainer(tmp_path, family, settings)
    trainer.model.train()
    collator = replace(trainer.data_collator, packing=cost)
    packed, padded = collator(_rows()), replace(collator, packing=None)(_rows())
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    assert packed["token_mask"].sum() == padded["attention_mask"].sum()
    if cost == ONE_ROW:
        assert packed["input_ids"].shape == (1, padded["attention_mask"].sum())
    else:
        order = [d for row in rows_of(padded["attention_mask"].sum(1).tolist(), cost) for d in row]
        assert len(packed["input_ids"]) > 1 and order != sorted(order)  # the images are reordered

    expected, expected_scores = _loss_and_scores(trainer, padded)
    expected_gradients = _gradients(trainer, expected)
    loss, scores = _loss_and_scores(trainer, packed)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert scores.keys() == expected_scores.keys() and len(scores) == 5
    for document, (log_probs, labels, is_question) in scores.items():
        assert (labels, is_question) == expected_scores[document][1:]
        torch.testing.assert_close(log_probs, expected_scores[document][0], atol=5e-6, rtol=0)
    gradients = _gradients(trainer, loss)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=5e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("family", PACKED)
def test_packed_conversations_do_not_attend_to_each_other(tmp_path, family):
    trainer = _trainer(tmp_path, family)
    rows, changed = _rows(), _rows()
    changed[1]["images"] = [Image.new("RGB", (16, 16), "red")]
    changed[1]["messages"][-1]["content"][0]["text"] = "Something else altogether."
    with torch.no_grad():
        before, after = (_loss_and_scores(trainer, trainer.data_collator(r))[1] for r in (rows, changed))
    unchanged = before.keys() & after.keys()
    assert len(unchanged) == 4
    for document in unchanged:
        torch.testing.assert_close(before[document][0], after[document][0], atol=1e-6, rtol=1e-6)
    assert all(any(label != IGNORED for label in scores[1]) for scores in after.values())


@pytest.mark.parametrize("family", [family for family in PACKED if family.startswith("qwen")])
def test_packing_does_not_change_the_rope_positions_of_a_conversation(tmp_path, family):
    trainer = _trainer(tmp_path, family)
    batch = trainer.data_collator(_rows())
    positions = rope_positions(trainer.model, batch)
    assert torch.equal(positions[0], batch["position_ids"])
    found = []
    for row in range(positions.shape[1]):
        starts = (positions[0, row] == 0).nonzero().flatten()
        found += [p.tolist() for p in positions[1:, row].tensor_split(starts[1:], dim=1)]
    for example in _rows()[1:]:  # transformers computes positions only for examples with images
        alone = replace(trainer.data_collator, packing=None)([example])
        inputs = alone["input_ids"], alone["mm_token_type_ids"], alone["image_grid_thw"]
        assert trainer.model.model.get_rope_index(*inputs)[0][:, 0].tolist() in found


def test_the_first_token_of_a_conversation_is_not_predicted_from_its_neighbor():
    tokens = torch.arange(1, 13).view(2, 6)
    lengths = torch.tensor([4, 2])
    mask = torch.arange(6) < lengths[:, None]
    labels = tokens.masked_fill(~mask, IGNORED)
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": mask.long(), "question_mask": mask.clone()}
    pack(batch, ONE_ROW, [0, 0], 0, pad_to_multiple_of=8)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 7, 8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, 4, IGNORED, 8, IGNORED, IGNORED]]
    assert batch["question_mask"].tolist() == [[False, True, True, True, False, True, False, False]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]


@pytest.mark.parametrize("family", ["vicuna", "qwen2-vl", "smolvlm"])
def test_batches_without_images_or_without_usable_examples_can_be_packed(tmp_path, family):
    rows = [{**tiny_run.conversation(i, turns=1 + 2 * i, with_image=False)} for i in range(4)]
    trainer = _trainer(tmp_path, family, rows=rows, max_steps=1)
    collator = replace(trainer.data_collator)
    with torch.no_grad():
        loss, scores = _loss_and_scores(trainer, collator(rows))
        expected, expected_scores = _loss_and_scores(trainer, replace(collator, packing=None)(rows))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and scores.keys() == expected_scores.keys()
    empty = replace(collator, max_length=3)(rows)
    assert empty["rejected"] == {f"r{i}": "too_long" for i in range(4)}
    assert trainer.compute_loss(trainer.model, empty) == 0


def test_packed_batches_list_rejected_examples(tmp_path):
    collator = _trainer(tmp_path, "vicuna").data_collator
    rows = _rows()
    rows[0]["messages"][1]["content"][0]["text"] = "very " * 100
    rows[4]["messages"][1]["content"][0]["text"] = "</s> is no end."
    packed, padded = (replace(collator, max_length=75, packing=kind, sq_ratio=0.0)(rows) for kind in (ROWS, None))
    assert packed["rejected"] == padded["rejected"]
    assert (packed["labels"] != IGNORED).sum() == (padded["labels"] != IGNORED).sum()


def test_a_packed_run_logs_the_same_as_a_padded_run(tmp_path):
    logs = []
    for packed in (True, False):
        settings = {"pack_sequences": packed, "rows": None, "gradient_accumulation_steps": 2, "lora_dropout": 0.0}
        trainer = tiny_run.make_trainer(tmp_path, max_steps=3, question_loss_weight=0.5, **settings)
        trainer.train()
        logs.append(trainer.state.log_history[:-1])
    for packed, padded in zip(*logs, strict=True):
        assert packed.keys() == padded.keys() > {"loss_question", "loss_answer", "num_tokens", "grad_norm"}
        for name in packed.keys() - {"data_wait"}:
            assert packed[name] == pytest.approx(padded[name], abs=2e-5), name


def test_rows_are_padded_to_a_multiple_and_evaluation_stays_padded(tmp_path):
    trainer = _trainer(tmp_path, "vicuna", pad_to_multiple_of=64)
    assert trainer.data_collator(_rows())["input_ids"].shape[1] % 64 == 0
    loader = trainer.get_eval_dataloader(trainer.train_dataset)
    assert "attention_mask" in next(iter(loader))


def test_a_model_with_bidirectional_image_attention_gets_grouped_batches(tmp_path, caplog):
    trainer = _trainer(tmp_path, "gemma-3", max_steps=1)
    assert [r.message for r in caplog.records if "gemma3" in r.message and "grouped by length" in r.message]
    assert "attention_mask" in trainer.data_collator(_rows())
    lengths = trainer.data_collator(_rows())["attention_mask"].sum(1)
    assert np.corrcoef(trainer.train_lengths, lengths)[0, 1] > 0.99
    trainer.train()


@pytest.mark.parametrize(
    ("attention", "costs_more"),
    [("sdpa", True), ("flex_attention", True), ("flash_attention_2", False), ("unknown", None)],
)
def test_long_rows_cost_more_if_attention_uses_a_mask(attention, costs_more):
    model, _ = tiny_model("vicuna")
    model.config.get_text_config()._attn_implementation_internal = attention
    cost, reason = packing_cost(model)
    assert (None if cost is None else cost > 0) is costs_more and (cost is None) is bool(reason)


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_packing_of_trl_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"not supported for vision datasets.*{name}=False"):
        _trainer(tmp_path, "vicuna", **{name: True})


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.sampled_from([0.0, 1e-4, 1e-2, 1.0]))
def test_rows_hold_every_document_once_and_cost_no_more_than_padding(lengths, cost):
    rows = rows_of(lengths, cost)
    row_lengths = [sum(lengths[item] for item in row) for row in rows]
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    compute = lambda count, length: count * length * (1 + cost * length)  # noqa: E731
    assert compute(len(rows), max(row_lengths)) <= compute(len(lengths), max(lengths))
    if cost == 0:
        assert rows == [list(range(len(lengths)))]


def test_short_conversations_share_rows_in_a_large_model():
    """LLaVA-1.5: with 576 image tokens each, no two conversations fit into a row of the longest one's length."""
    lengths = [1041] + [800] * 15
    assert 7 <= len(rows_of(lengths, 1 / (3 * 4096))) <= 10
    assert len(rows_of(lengths, 1 / (3 * 64))) == 16

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Prefix sharing saves computation; scores and gradients equal those of separate sequences."""

import functools
import logging
import math
from copy import deepcopy

import pytest
import torch
from family_models import MODELS, tiny_model
from tiny_dpo import adapter_policy, make_trainer, pair
from tiny_run import text
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig
from trl.trainer.utils import add_fused_lm_head

from medst_trl.policy.families import model_parts
from medst_trl.training import prefix_sharing
from medst_trl.training.preference_collator import DataCollatorForMultimodalPreference
from medst_trl.training.prefix_sharing import (
    PrefixSharing,
    SharedLayout,
    branch_masks,
    cannot_share,
    layer_types,
    share_prefix,
)


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def pair_with_answers(number: int, chosen: str, rejected: str, images: int = 1) -> dict:
    example = pair(number)
    example["images"] = example["images"] * images
    if not images:
        example["prompt"][0]["content"] = example["prompt"][0]["content"][1:]
    example["chosen"][0]["content"], example["rejected"][0]["content"] = text(chosen), text(rejected)
    return example


PAIRS = [
    pair_with_answers(0, "No.", "The left lung is darker than the right one, and the heart is large."),
    pair_with_answers(1, "It is a very large shadow in the lower left corner of the image.", "Yes"),
    pair_with_answers(2, "Yes, there is.", "Yes, there is not."),
]


def test_the_layout_is_prompt_chosen_last_prompt_token_rejected():
    prompt, chosen, rejected = [3, 4, 2], [1, 5, 2], [4, 1, 1]
    length = 9
    rows = torch.zeros(6, length, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row in range(6):
        index, answer = row % 3, (chosen if row < 3 else rejected)[row % 3]
        tokens = [100 * index + offset for offset in range(prompt[index])]
        tokens += [1000 * (row + 1) + offset for offset in range(answer)]
        rows[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    shared_length = max(p + c + 1 + r for p, c, r in zip(prompt, chosen, rejected))
    layout = SharedLayout.of(mask, torch.tensor(prompt), shared_length)
    for index in range(3):
        first, second = (rows[row, : mask[row].sum()].tolist() for row in (index, index + 3))
        expected = first + second[prompt[index] - 1 :]
        assert rows.reshape(-1)[layout.source[index]].tolist()[: len(expected)] == expected
        assert (layout.branch[index, len(expected) :] == -1).all() and (
            layout.branch[index, : len(expected)] >= 0
        ).all()
        shared = rows.reshape(-1)[layout.source]
        for row in (index, index + 3):  # a token is scored at the position before it
            for column in range(prompt[index], int(mask[row].sum())):
                position = layout.scored[row, column - 1]
                assert shared[:, 1:].reshape(-1)[position] == rows[row, column]
                assert shared[:, :-1].reshape(-1)[position] == rows[row, column - 1]


def shared_and_separate(model, processor, examples, **settings) -> tuple:
    """Return, for both layouts, the fused head's output and the gradients of a loss that weights every score."""
    add_fused_lm_head(model, outputs=OUTPUTS)
    stock_forward, results = model.forward, []
    for share in (True, False):
        model.forward = stock_forward
        sharing = PrefixSharing(model) if share else None
        batch = DataCollatorForMultimodalPreference(processor, share_prefix=share, **settings)([*examples])
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        output = model(**batch, labels=labels, fused_lm_head=True, use_cache=False)
        assert sharing is None or list(sharing.agrees.values()) == [True]
        model.zero_grad()
        weights = torch.linspace(-1, 1, output.log_probs.numel()).view_as(output.log_probs)
        (output.log_probs * weights + 0.1 * output.entropy).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((output, gradients, labels))
    return results


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_and_gradients_match_separate_sequences(family, attention):
    model, processor = tiny_model(family, attn_implementation=attention)
    (ours, our_gradients, labels), (theirs, gradients, _) = shared_and_separate(model, processor, PAIRS)
    assert (labels != -100).sum() > 20
    for name in OUTPUTS:
        assert torch.allclose(getattr(ours, name).float(), getattr(theirs, name).float(), atol=5e-6), name
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert our_gradients.keys() == gradients.keys()
    parts, parts_with_gradient = model_parts(model), set()
    for name, gradient in gradients.items():
        assert torch.allclose(our_gradients[name], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max()))), name
        parts_with_gradient |= {parts.part_of(name)} if gradient.abs().max() > 1e-4 else set()
    assert parts_with_gradient == {"language", "vision", "projector"}


@pytest.mark.parametrize("family", ["vicuna", "qwen2.5-vl", "gemma-3"])
@pytest.mark.parametrize(
    ("examples", "settings"),
    [
        ([pair_with_answers(0, "a", "b " * 400), pair_with_answers(1, "c " * 300, "d")], {}),
        ([pair_with_answers(0, "word " * 60, "other " * 60), PAIRS[1]], {"max_length": 90}),
        ([pair_with_answers(0, "Yes", "No", images=0), pair_with_answers(1, "Right", "Left it is", images=0)], {}),
        ([pair_with_answers(0, "Yes", "No", images=0), PAIRS[0]], {}),
        (PAIRS, {"pad_to_multiple_of": 16}),
    ],
    ids=["very different lengths", "truncated", "no image", "one pair without image", "padded"],
)
def test_unusual_batches_match_separate_sequences(family, examples, settings):
    model, processor = tiny_model(family)
    (ours, _, labels), (theirs, _, _) = shared_and_separate(model, processor, examples, **settings)
    assert (labels != -100).any(1).all()
    assert torch.allclose(ours.log_probs, theirs.log_probs, atol=1e-5)


def test_the_vision_tower_encodes_each_image_once_for_policy_and_reference(tmp_path):
    def images_encoded(share: bool) -> list[int]:
        trainer = make_trainer(tmp_path / str(share), share_prefix=share, max_steps=2)
        seen = []
        trainer.model.get_base_model().model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else None))),
            with_kwargs=True,
        )
        trainer.train()
        return seen

    comparison = [8, 4]  # both layouts of the first batch
    assert images_encoded(share=True) == [*comparison, *[4, 4] * 2]
    assert images_encoded(share=False) == [8, 8] * 2


def test_prefixes_are_shared_by_default_and_each_image_is_preprocessed_once(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1)
    processor, images = trainer.processing_class.image_processor, []
    preprocess = type(processor).preprocess

    @functools.wraps(preprocess)
    def counted_preprocess(self, pixels, *args, **kwargs):
        images.append(pixels)
        return preprocess(self, pixels, *args, **kwargs)

    monkeypatch.setattr(type(processor), "preprocess", counted_preprocess)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    assert len(batch["input_ids"]) == 6 and len(batch["pixel_values"]) == 3
    assert sum(len(row) for call in images for row in call) == 3


def share_prefix_warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if "share_prefix" in record.message]


def test_a_model_whose_scores_disagree_falls_back_to_separate_sequences(tmp_path, monkeypatch, caplog):
    exact = make_trainer(tmp_path / "separate", share_prefix=False, max_steps=3)
    exact.train()
    original = prefix_sharing.branch_masks
    monkeypatch.setattr(
        prefix_sharing, "branch_masks", lambda *args: original(args[0], torch.zeros_like(args[1]), *args[2:])
    )
    trainer = make_trainer(tmp_path / "shared", max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = share_prefix_warnings(caplog)
    assert "LlavaForConditionalGeneration continues with a sequence for each answer" in message
    ours, theirs = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, exact))
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_batches_with_images_are_compared_even_if_the_first_has_none(tmp_path, monkeypatch):
    rows = [pair_with_answers(number, "Yes, it is.", "No", images=number >= 4) for number in range(8)]
    positions = prefix_sharing._positions
    monkeypatch.setattr(  # wrong only in batches with images
        prefix_sharing,
        "_positions",
        lambda model, inputs, *args: positions(model, inputs, *args) // (2 if "pixel_values" in inputs else 1),
    )
    losses = []
    for share in (True, False):
        settings = {"rows": rows, "train_sampling_strategy": "sequential", "max_steps": 2}
        trainer = make_trainer(tmp_path / str(share), share_prefix=share, **settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def train_and_get_losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["aot"]}, {"loss_type": ["aot_unpaired"]}, {"loss_type": ["sigmoid_norm"]},
        {"loss_type": ["discopop"]}, {"loss_type": ["nca_pair"]}, {"loss_type": ["sppo_hard"]},
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}, {"ld_alpha": 0.5}, {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
    ],
    ids=str,
)  # fmt: skip
def test_other_losses_match_separate_sequences(tmp_path, settings):
    shared, separate = (
        train_and_get_losses(
            make_trainer(tmp_path / str(share), share_prefix=share, max_steps=3, optim="sgd", **settings)
        )
        for share in (True, False)
    )
    assert shared == pytest.approx(separate, rel=1e-5, abs=1e-6)


def test_a_model_that_does_not_support_the_mask_falls_back_to_separate_sequences(tmp_path, monkeypatch, caplog):
    separate = train_and_get_losses(make_trainer(tmp_path / "separate", share_prefix=False, max_steps=3))
    trainer = make_trainer(tmp_path / "shared", max_steps=3)
    language = trainer.model.get_base_model().model.language_model
    forward = language.forward

    def without_4d_masks(*args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("expected a 2D mask")
        return forward(*args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(language, "forward", without_4d_masks)
    with caplog.at_level(logging.WARNING):
        assert train_and_get_losses(trainer) == pytest.approx(separate, abs=1e-6)
    (message,) = share_prefix_warnings(caplog)
    assert "ValueError: expected a 2D mask" in message


def test_ranks_with_sharded_weights_run_equally_many_forward_passes():
    model, processor = tiny_model("vicuna")
    add_fused_lm_head(model)
    share_prefix(model, is_sharded=True)
    runs = []
    model.model.language_model.register_forward_hook(lambda *args: runs.append(1))
    text_only = [pair_with_answers(0, "Yes", "No", images=0)]
    for examples, expected in ((text_only, 3), (PAIRS, 1), (text_only, 1), (PAIRS, 1)):
        batch = DataCollatorForMultimodalPreference(processor, share_prefix=True)([*examples])
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        runs.clear()
        with torch.no_grad():
            model(**batch, labels=labels, fused_lm_head=True, use_cache=False)
        assert len(runs) == expected


def test_a_copy_of_the_model_uses_its_own_weights():
    model, processor = tiny_model("vicuna")
    add_fused_lm_head(model)
    share_prefix(model)
    batch = DataCollatorForMultimodalPreference(processor, share_prefix=True)([*PAIRS])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    copy = deepcopy(model)
    with torch.no_grad():
        copy.lm_head.weight.zero_()
        scores = copy(**batch, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    assert torch.allclose(scores[labels[:, 1:] != -100], torch.tensor(-math.log(copy.lm_head.out_features)))


def test_a_collator_without_shared_prefixes_can_be_used(tmp_path):
    processor = adapter_policy()[1]
    trainer = make_trainer(
        tmp_path, max_steps=2, data_collator=DataCollatorForMultimodalPreference(processor, max_length=100)
    )
    separate = train_and_get_losses(trainer)
    collator = DataCollatorForMultimodalPreference(processor, max_length=100, share_prefix=True)
    wrapped = make_trainer(tmp_path, max_steps=2, data_collator=lambda examples: collator(examples))
    assert train_and_get_losses(wrapped) == pytest.approx(separate, abs=1e-6)


def test_prefixes_are_not_shared_if_attention_has_no_custom_masks(tmp_path, caplog):
    model, processor = adapter_policy()
    for attention in ("flex_attention", "flash_attention_2"):
        model.get_base_model().config.get_text_config()._attn_implementation = attention
        assert attention in cannot_share(model.get_base_model())
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, policy=(model, processor))
    assert len(share_prefix_warnings(caplog)) == 1 and not trainer.data_collator.share_prefix


def test_prefixes_are_not_shared_with_recurrent_layers_or_cross_attention():
    model, _ = tiny_model("vicuna")
    config = model.config.get_text_config()
    assert cannot_share(model) is None
    config.layer_types = ["linear_attention", "full_attention"]
    assert "linear_attention" in cannot_share(model)
    config.layer_types, config.cross_attention_layers = None, [1]
    assert "cross-attention" in cannot_share(model)


def test_a_forward_pass_without_the_fused_head_is_unchanged():
    model, processor = tiny_model("vicuna")
    batch = DataCollatorForMultimodalPreference(processor)([*PAIRS])
    batch.pop("completion_mask")
    with torch.no_grad():
        before = model(**batch).logits
        add_fused_lm_head(model)
        share_prefix(model)
        assert torch.equal(model(**batch).logits, before)
        shared = DataCollatorForMultimodalPreference(processor, share_prefix=True)([*PAIRS])
        shared.pop("completion_mask")
        assert torch.equal(model(**shared).logits, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, reentrant):
    norms = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path / str(checkpointing),
            max_steps=3,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        trainer.train()
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# two prompt tokens, two branches of the last prompt token and an answer, padding
BRANCHES = torch.tensor([[0, 0, 1, 1, 2, 2, 2, -1, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 0, 0]])


def masks(config, blocks=None):
    config._attn_implementation = config._attn_implementation or "sdpa"
    return branch_masks(config, BRANCHES, POSITIONS, blocks)


def attended(mask: torch.Tensor, query: int) -> list[int]:
    return mask[0, 0, query].nonzero().flatten().tolist()


def test_a_branch_attends_to_the_prompt_and_itself():
    mask = masks(LlamaConfig())
    assert mask.shape == (1, 1, 9, 9) and mask.dtype == torch.bool
    assert [attended(mask, query) for query in (1, 3, 4, 6)] == [[0, 1], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5, 6]]
    assert mask.any(-1).all()  # a token that attends to nothing would be NaN


def test_a_sliding_window_counts_positions_and_not_columns():
    mask = masks(MistralConfig(sliding_window=3))
    assert [attended(mask, query) for query in (3, 4, 5, 6)] == [[1, 2, 3], [0, 1, 4], [1, 4, 5], [4, 5, 6]]


def test_each_layer_type_gets_its_mask_and_blocks_attend_in_both_directions():
    config = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=2
    )
    blocks = torch.tensor([[3, 3, -1, -1, -1, -1, -1, -1, -1]])
    by_type = masks(config, blocks)
    assert set(by_type) == layer_types(config) == {"full_attention", "sliding_attention"}
    assert attended(by_type["full_attention"], 0) == attended(by_type["sliding_attention"], 0) == [0, 1]
    assert attended(by_type["full_attention"], 6) == [0, 1, 4, 5, 6] and attended(by_type["sliding_attention"], 6) == [
        5,
        6,
    ]


@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig(sliding_window=3)])
def test_eager_attention_uses_the_same_mask(config):
    dense = masks(config)
    config._attn_implementation = "eager"
    eager = masks(config)
    assert eager.dtype == torch.float32 and torch.equal(eager == 0, dense)

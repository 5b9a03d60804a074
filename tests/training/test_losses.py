# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Registered losses: they match TRL's, alone and combined, and unusable losses are refused before training."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_dpo
import torch
import torch.nn.functional as F
from commands import run_medst
from datasets import Dataset
from trl import DPOTrainer

from medst_trl.base.errors import UserError
from medst_trl.data.schema import preference_features
from medst_trl.training.dpo import MultimodalDPOConfig
from medst_trl.training.losses import LOSSES, PreferenceLoss, trl_losses


@pytest.fixture
def register_loss(monkeypatch):
    """Function that registers a loss until the test ends."""
    monkeypatch.setattr(LOSSES, "_objects", dict(LOSSES._objects))
    monkeypatch.setattr(LOSSES, "_origins", dict(LOSSES._origins))
    return LOSSES.register


class Sigmoid(PreferenceLoss):
    name, paper = "toy", "https://example.org/paper"

    def __call__(self, pairs, args):
        self.seen = pairs
        ratios = pairs.log_ratios()
        return -F.logsigmoid(args.beta * (ratios.chosen - ratios.rejected))


def train(directory, **settings):
    """Return the losses and gradient norms of a short run, and the gradients of its first step."""
    trainer = tiny_dpo.make_trainer(directory, **settings)
    gradients = {}

    def record_gradient(name, parameter):
        gradients.setdefault(name, parameter.grad.clone())

    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(record_gradient, name))
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry], gradients


@pytest.mark.parametrize("policy", ["continued_adapter", "new_adapter", "full"])
@pytest.mark.parametrize("variant", ["shared prefix", "separate rows", "cached reference"])
@pytest.mark.parametrize(
    "loss_settings",
    [{"loss_type": ["toy"]}, {"loss_type": ["toy", "sigmoid"], "loss_weights": [0.25, 0.75]}],
    ids=["alone", "mixed"],
)
def test_a_loss_equal_to_sigmoid_trains_like_sigmoid(tmp_path, register_loss, policy, variant, loss_settings):
    register_loss(Sigmoid())
    settings = {"policy": policy, "share_prefix": variant != "separate rows"}
    if variant == "cached reference":
        settings |= {"precompute_ref_log_probs": True, "ref_log_probs_dir": str(tmp_path / "cache")}
    expected, expected_gradients = train(tmp_path / "sigmoid", **settings)
    actual, gradients = train(tmp_path / "toy", **settings, **loss_settings)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=1e-6), name


def test_the_weights_of_losses_and_pairs_multiply_the_loss(tmp_path, register_loss):
    register_loss(toy := Sigmoid())
    plain, _ = train(tmp_path, loss_type=["toy"], max_steps=1)
    half, _ = train(tmp_path, loss_type=["toy"], loss_weights=[0.5], max_steps=1)
    assert toy.seen.weight is None and toy.seen.flip_probability is None
    rows = [tiny_dpo.pair(number) | {"weight": 3.0, "probability": 0.9} for number in range(12)]
    weighted, _ = train(tmp_path, loss_type=["toy"], rows=rows, max_steps=1)
    assert half[0][0] == pytest.approx(0.5 * plain[0][0], abs=1e-6)
    assert weighted[0][0] == pytest.approx(3 * plain[0][0], abs=1e-6)
    assert toy.seen.weight.tolist() == [3.0] * 4
    assert toy.seen.flip_probability.tolist() == pytest.approx([0.1] * 4)


def test_a_loss_receives_log_probabilities_and_lengths_of_each_pair(tmp_path, register_loss):
    register_loss(toy := Sigmoid())
    trainer = tiny_dpo.make_trainer(tmp_path, loss_type=["toy"], max_steps=1)
    trainer.train()
    seen, log = toy.seen, trainer.state.log_history[0]
    assert seen.policy["image"].chosen.requires_grad and not seen.reference["image"].chosen.requires_grad
    for kind in ("chosen", "rejected"):
        assert getattr(seen.policy["image"], kind).mean().item() == pytest.approx(log[f"logps/{kind}"], abs=1e-4)
        assert getattr(seen.lengths, kind).float().mean().item() == log[f"lengths/{kind}"]


def test_evaluation_uses_the_registered_loss(tmp_path, register_loss):
    register_loss(Sigmoid())
    rows = [tiny_dpo.pair(number) for number in (50, 51)]
    metrics = [
        tiny_dpo.make_trainer(tmp_path, loss_type=[name], eval_rows=rows).evaluate() for name in ("toy", "sigmoid")
    ]
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], abs=1e-6)


def test_the_losses_of_trl_are_read_from_its_source():
    import inspect

    message = re.search(r"Unknown loss type.*?\]", inspect.getsource(DPOTrainer._compute_loss), re.DOTALL)[0]
    assert set(re.findall(r"'(\w+)'", message)) == set(trl_losses()) >= {"sigmoid", "ipo", "sft"}
    for name in trl_losses():
        MultimodalDPOConfig(loss_type=[name])


def test_the_error_for_an_unknown_loss_lists_all_losses_and_suggests_the_closest(register_loss):
    register_loss(Sigmoid())
    with pytest.raises(UserError, match=r"Unknown loss 'sigmoit'. Did you mean 'sigmoid'\? .*hinge.*, toy, or load"):
        MultimodalDPOConfig(loss_type=["sft", "sigmoit"])
    with pytest.raises(UserError, match="Unknown loss 'toyy'. Did you mean 'toy'"):
        MultimodalDPOConfig(loss_type="toyy")


def test_a_loss_that_cannot_be_computed_is_refused_before_training(register_loss):
    class Contrast(Sigmoid):
        name, views = "contrast", ("image", "blank")

    class Clash(Sigmoid):
        name = "hinge"

    for loss in (Sigmoid(), Contrast()):
        register_loss(loss)
    with pytest.raises(ValueError, match="'contrast' compares the image view blank, which is not computed"):
        MultimodalDPOConfig(loss_type=["contrast"])
    with pytest.raises(UserError, match="Two loss objects share the name 'hinge'"):
        register_loss(Clash())
    for setting in ({"ld_alpha": 0.5}, {"use_weighting": True}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} works with TRL's losses only"):
            MultimodalDPOConfig(loss_type=["sigmoid", "toy"], **setting)


def test_an_incomplete_loss_is_refused_when_it_is_registered(register_loss):
    class Unpublished(PreferenceLoss):
        name = "unpublished"

        def __call__(self, pairs, args):
            return pairs.log_ratios().chosen

    class Idle(PreferenceLoss):
        name, paper = "idle", "https://example.org/paper"

    with pytest.raises(UserError, match="The loss 'unpublished' .* lacks paper"):
        register_loss(Unpublished())
    with pytest.raises(TypeError, match="__call__"):
        register_loss(Idle())
    with pytest.raises(UserError, match="The loss 'data' .* lacks __call__"):
        register_loss(SimpleNamespace(name="data", paper="https://example.org/paper", summary="no function"))


def test_a_loss_from_a_plugin_file_works_in_every_command(tmp_path):
    tiny_dpo.save_adapter(tmp_path, "sft")
    judged = {"image_ids": ["x"], "score_chosen": 9.0, "score_rejected": 2.0, "judge": "{}"}
    rows = Dataset.from_list([tiny_dpo.pair(number) | judged for number in range(4)], features=preference_features())
    (tmp_path / "pairs").mkdir()
    rows.to_parquet(tmp_path / "pairs" / "train-00000-of-00001.parquet")
    (tmp_path / "mine.py").write_text(tiny_dpo.SIGMOID)
    (tmp_path / "mine.yaml").write_text(
        "output_dir: run\ndpo: {model_name_or_path: sft, dataset: pairs, max_steps: 1, report_to: none, "
        "per_device_train_batch_size: 4, loss_type: [sigmoid, my_sigmoid], loss_weights: [0.5, 0.5]}\n"
    )

    def medst(*arguments, code=0):
        process = run_medst(tmp_path, *arguments, code=code, ACCELERATE_USE_CPU="true")
        return " ".join((process.stdout if code == 0 else process.stderr).split())

    plugins = ("--plugins", "mine.py")
    assert "my_sigmoid (https://example.org/paper)" in medst("dpo", "--help", *plugins)
    assert "mine.yaml is valid" in medst("recipes", "validate", "mine.yaml", *plugins)
    assert "loss_type: Unknown loss 'my_sigmoid'" in medst("recipes", "validate", "mine.yaml", code=2)
    assert "sigmoid + my_sigmoid, beta 0.1" in medst("run", "mine.yaml", "--dry_run", *plugins)
    assert "Stage 2 is done: 1 step on" in medst("run", "mine.yaml", *plugins)
    record = json.loads((tmp_path / "run" / "dpo" / "stage.json").read_text())
    assert record["settings"]["loss_type"] == ["sigmoid", "my_sigmoid"]
    assert "my_sigmoid" in (tmp_path / "run" / "dpo" / "README.md").read_text()
    medst("report", "--run", "run")
    assert "my_sigmoid" in (tmp_path / "run" / "report" / "index.html").read_text()

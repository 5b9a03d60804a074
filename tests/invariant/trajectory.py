# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Record the trajectory of a training run, and compare the trajectories of two runs that should be equal.

All runs use plain gradient descent (`DESCENT`). Adam divides by the size of a gradient, so a rounding error in a
gradient of zero would become a step of full size.
"""

import gc
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from commands import launch_script
from tiny_run import trained_weights
from transformers import Trainer


STEPS = 5
# Random sampling, so that both runs use the same batches in the same order, even if their default is to group them.
DESCENT = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "random"}
# Policy and reference are equal in the first step, so rounding decides which reward is larger.
UNDECIDED_IN_FIRST_STEP = "rewards/accuracies"
TIMING_METRIC = "data_wait"

# The Trainer collects garbage before training. With all imported modules, this would take as long as these runs.
gc.freeze()


@dataclass(frozen=True)
class Trajectory:
    """
    A training run.

    Args:
        steps (`list[dict[str, float]]`): The metrics that were logged in each step.
        start (`dict[str, torch.Tensor]`): The trained weights before the first step.
        weights (`dict[str, torch.Tensor]`): The trained weights after the last step.
        tokens (`int`): Number of positions that the language model was trained on, padding included.
        images (`int`): Number of rows of pixel values that the vision tower was trained on.
        attentions (`int`): Number of calls of the first layer's attention, which gradient checkpointing repeats.
    """

    steps: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor] | None = None
    tokens: int = 0
    images: int = 0
    attentions: int = 0


def follow(trainer: Trainer) -> Trajectory:
    """Train and record the trajectory; needs `logging_steps=1`."""
    counts = {"tokens": 0, "images": 0, "attentions": 0}

    def count_tokens(module, args, kwargs):
        if torch.is_grad_enabled():
            counts["tokens"] += kwargs["inputs_embeds"].shape[:-1].numel()

    def count_images(module, args, kwargs):
        if torch.is_grad_enabled():
            counts["images"] += len(next(iter([*args, *kwargs.values()])))

    def count_attentions(module, args):
        counts["attentions"] += 1

    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    decoder = base.get_decoder()
    decoder.register_forward_pre_hook(count_tokens, with_kwargs=True)
    decoder.layers[0].self_attn.register_forward_pre_hook(count_attentions)
    base.get_encoder("image").register_forward_pre_hook(count_images, with_kwargs=True)
    start = trained_weights(trainer)
    trainer.train()
    return Trajectory(_steps(trainer.state.log_history), trained_weights(trainer), start, **counts)


def follow_ranks(script: str, directory: Path, ranks: int, **overrides) -> Trajectory:
    """Train in one process per rank; `script` is `tiny_run.py` or `tiny_dpo.py`."""
    directory.mkdir(parents=True)
    process = launch_script(script, str(directory), json.dumps(overrides), ranks=ranks)
    assert process.returncode == 0, process.stderr
    fallback_warnings = [
        line for line in process.stderr.splitlines() if "share_prefix:" in line or "pack_sequences:" in line
    ]
    assert not fallback_warnings
    result = json.loads((directory / "run.json").read_text())
    assert result["world_size"] == ranks
    return Trajectory(_steps(result["log"]), torch.load(directory / "weights.pt", weights_only=True))


def assert_same(
    ours: Trajectory,
    theirs: Trajectory,
    tolerance: float,
    *,
    ignored_metrics: Collection[str] = (),
    min_change: float = 1e-2,
) -> None:
    """
    Assert that two runs log the same metrics and end with the same weights.

    Args:
        ours ([`Trajectory`]): A run.
        theirs ([`Trajectory`]): A run with equivalent settings, followed in this process.
        tolerance (`float`): Largest allowed difference: absolute for values below one, relative for larger ones.
        ignored_metrics (`Collection[str]`, *optional*): Metrics that are not compared.
        min_change (`float`, *optional*, defaults to `1e-2`): Smallest change of the loss and of some weight in
            training, so that there is something to compare.
    """
    assert len(ours.steps) == len(theirs.steps) == STEPS
    assert min(entry["loss"] for entry in theirs.steps) < theirs.steps[0]["loss"] - min_change
    assert max((theirs.weights[name] - start).abs().max().item() for name, start in theirs.start.items()) > min_change
    values = {}
    for number, (actual, expected) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        assert actual.keys() == expected.keys()
        values |= {
            f"step {number + 1}, {name}": (actual[name], expected[name])
            for name in actual.keys() - {TIMING_METRIC, *ignored_metrics}
        }
    values.pop(f"step 1, {UNDECIDED_IN_FIRST_STEP}", None)
    differences = {name: abs(actual - expected) / max(1, abs(expected)) for name, (actual, expected) in values.items()}
    assert ours.weights.keys() == theirs.weights.keys()
    for name, expected in theirs.weights.items():
        differences[name] = ((ours.weights[name] - expected).abs() / expected.abs().clamp(min=1)).max().item()
    worst = max(differences, key=differences.get)
    print(f"worst: {differences[worst]:.1e} in {worst}")
    compared = "{} and {}".format(*values[worst]) if worst in values else "a weight"
    assert differences[worst] <= tolerance, f"{worst}: {differences[worst]:.1e} apart ({compared})"


def _steps(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in log if "loss" in entry]

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Follows a training run step by step, and says where two runs that should be the same part.

Plain gradient descent is used throughout (`DESCENT`): Adam divides by the size of a gradient, which makes a rounding
error of a gradient that is zero a step of full size.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_run import trained_weights
from transformers import Trainer


TESTS = Path(__file__).parents[1]
STEPS = 5
# Both sides see the same batches in the same order, whatever their settings would group by.
DESCENT = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "random"}
# Policy and reference are the same in the first step: which reward is larger is decided by rounding.
UNDECIDED_AT_FIRST = "rewards/accuracies"
CLOCK = "data_wait"

# The Trainer collects garbage before it trains, which among all that is imported takes as long as these runs.
gc.freeze()


@dataclass(frozen=True)
class Trajectory:
    """
    A training run.

    Args:
        steps (`list[dict[str, float]]`): What was logged in each step.
        start (`dict[str, torch.Tensor]`): The trained weights before the first step.
        weights (`dict[str, torch.Tensor]`): The same behind the last step.
        tokens (`int`): Places that the language model was trained on, padding included.
        images (`int`): Rows of pixels that the vision tower was trained on.
        attentions (`int`): Calls of the first layer's attention; gradient checkpointing repeats those of training.
    """

    steps: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor] | None = None
    tokens: int = 0
    images: int = 0
    attentions: int = 0


def follow(trainer: Trainer) -> Trajectory:
    """Train with `logging_steps=1`."""
    work = {"tokens": 0, "images": 0, "attentions": 0}

    def count_tokens(module, args, kwargs):
        if torch.is_grad_enabled():
            work["tokens"] += kwargs["inputs_embeds"].shape[:-1].numel()

    def count_images(module, args, kwargs):
        if torch.is_grad_enabled():
            work["images"] += len(next(iter([*args, *kwargs.values()])))

    def count_attentions(module, args):
        work["attentions"] += 1

    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    decoder = base.get_decoder()
    decoder.register_forward_pre_hook(count_tokens, with_kwargs=True)
    decoder.layers[0].self_attn.register_forward_pre_hook(count_attentions)
    base.get_encoder("image").register_forward_pre_hook(count_images, with_kwargs=True)
    start = trained_weights(trainer)
    trainer.train()
    return Trajectory(_steps(trainer.state.log_history), trained_weights(trainer), start, **work)


def follow_ranks(script: str, folder: Path, ranks: int, **overrides) -> Trajectory:
    """Train in separate processes, one per rank; `script` is `tiny_run.py` or `tiny_dpo.py`."""
    folder.mkdir(parents=True)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks),
        "--mixed_precision", "no", "--main_process_port", "0", str(TESTS / script), str(folder), json.dumps(overrides),
    ]  # fmt: skip
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }  # fmt: skip
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    given_up = [line for line in run.stderr.splitlines() if "share_prefix:" in line or "pack_sequences:" in line]
    assert not given_up
    facts = json.loads((folder / "run.json").read_text())
    assert facts["world_size"] == ranks
    return Trajectory(_steps(facts["log"]), torch.load(folder / "weights.pt", weights_only=True))


def assert_same(
    ours: Trajectory,
    theirs: Trajectory,
    tolerance: float,
    *,
    leave_out: Collection[str] = (),
    moved: float = 1e-2,
) -> None:
    """
    Asserts that two runs log the same numbers and end with the same weights.

    Args:
        ours ([`Trajectory`]): A run.
        theirs ([`Trajectory`]): A run of equivalent settings, followed in this process.
        tolerance (`float`): Largest difference, absolute for numbers below one and relative above.
        leave_out (`Collection[str]`, *optional*): Metrics that are not compared.
        moved (`float`, *optional*, defaults to `1e-2`): By how much the loss and some weight have to change in
            training, or there was nothing to compare.
    """
    assert len(ours.steps) == len(theirs.steps) == STEPS
    assert min(entry["loss"] for entry in theirs.steps) < theirs.steps[0]["loss"] - moved
    assert max((theirs.weights[name] - start).abs().max().item() for name, start in theirs.start.items()) > moved
    found = {}
    for number, (mine, other) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        assert mine.keys() == other.keys()
        found |= {
            f"step {number + 1}, {name}": (mine[name], other[name]) for name in mine.keys() - {CLOCK, *leave_out}
        }
    found.pop(f"step 1, {UNDECIDED_AT_FIRST}", None)
    differences = {name: abs(mine - other) / max(1, abs(other)) for name, (mine, other) in found.items()}
    assert ours.weights.keys() == theirs.weights.keys()
    for name, other in theirs.weights.items():
        differences[name] = ((ours.weights[name] - other).abs() / other.abs().clamp(min=1)).max().item()
    worst = max(differences, key=differences.get)
    print(f"worst: {differences[worst]:.1e} in {worst}")
    values = "{} against {}".format(*found[worst]) if worst in found else "a weight"
    assert differences[worst] <= tolerance, f"{worst}: {differences[worst]:.1e} apart ({values})"


def _steps(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in log if "loss" in entry]

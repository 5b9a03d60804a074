# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Stage 2: train the policy to prefer the better of its own answers.

```bash
medst dpo \
    --model_name_or_path runs/vqa_rad/sft \
    --dataset runs/vqa_rad/judge/preferences \
    --learning_rate 5e-6 \
    --vision_learning_rate 2e-5 \
    --projector_learning_rate 2e-5 \
    --output_dir runs/vqa_rad/dpo
```

Input: preference pairs with columns `id`, `images`, `prompt`, `chosen`, `rejected` (see `medst judge`), and an adapter
or a model. An adapter is trained further, with a frozen copy of it as the reference. A model gets a new adapter, and
the model without the adapter is the reference. Output in `output_dir`: an adapter with its processor and chat
template, checkpoints, and `rejected.jsonl` if pairs could not be used. Load the adapter with `medst_trl.load_policy`.
An interrupted run resumes from the newest complete checkpoint.

With `--precompute_ref_log_probs true`, the reference processes all pairs before training and is then removed from
memory. Its log-probabilities are kept in `reference_log_probs` beside the pairs. Later runs from the same policy read
them from there, `medst push` publishes them, and for a dataset on the Hub they are downloaded.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medst_trl.base.files import atomic_path
from medst_trl.base.fingerprints import REFERENCE_FOLDER
from medst_trl.base.hub_ids import split_revision
from medst_trl.base.processes import rank
from medst_trl.base.settings import documented
from medst_trl.training.losses import LOSSES
from medst_trl.training.settings import MultimodalDPOSettings

from ._training import LOGGED, TrainingStageArguments, describe_run, training_stage


if TYPE_CHECKING:
    from medst_trl import MultimodalDPOConfig, MultimodalDPOTrainer


_FIGURES = [f"{x}/{y}" for x in ("rewards", "logps", "logits", "logratios", "lengths") for y in ("chosen", "rejected")]
_LAST_PART = 0.2  # of the logged steps, averaged to describe the end of training


@documented
@dataclass
class DpoArguments(TrainingStageArguments):
    """
    Arguments of `medst dpo` besides the training arguments of [`MultimodalDPOConfig`]. The class also makes the
    trainer and summarizes its run.

    Args:
        train_vision (`bool`, *optional*, defaults to `True`):
            Train the vision tower: the adapter's layers in it, those of a new adapter, or all its weights. False
            freezes it.
    """

    best_metrics = (*LOGGED, "rewards/accuracies", "rewards/margins", *_FIGURES)

    train_vision: bool = True

    def make_trainer(self, training_args: "MultimodalDPOConfig", **inputs: Any) -> "MultimodalDPOTrainer":
        from medst_trl import MultimodalDPOTrainer

        if training_args.precompute_ref_log_probs:
            training_args.ref_log_probs_dir = _reference_directory(self.dataset, training_args)
        return MultimodalDPOTrainer(args=training_args, **inputs)

    def summarize(self, trainer: "MultimodalDPOTrainer", records: int) -> tuple[dict[str, Any], dict[str, float], str]:
        counts = {"pairs": records} | trainer.usable["train"].counts()
        kinds = ("rewards/", "logps/", "logratios/", "lengths/", "eval_")
        means = end_of_log(trainer.state.log_history).items()
        metrics = {name: mean for name, mean in means if name in ("train_loss", "loss") or name.startswith(kinds)}
        return counts, metrics, f"Stage 2 is done: {describe_run(trainer, 'preference pairs', counts)}.{_end(metrics)}"


def end_of_log(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """
    Average each figure over the last fifth of a Trainer's log, because one entry may be of a small batch.

    Args:
        log_history (sequence of `dict`):
            `trainer.state.log_history`, as `trainer_state.json` keeps it.

    Returns:
        `dict[str, float]`: By name. `train_loss` and the figures of evaluations are those logged last. Empty if
        nothing was logged.
    """
    steps = [entry for entry in log_history if "loss" in entry]
    values = defaultdict(list)
    for entry in steps[-max(1, round(_LAST_PART * len(steps))) :]:
        for name, value in entry.items():
            if isinstance(value, int | float):
                values[name].append(value)
    means = {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
    for entry in log_history:
        means |= {name: value for name, value in entry.items() if name.startswith("eval_") or name == "train_loss"}
    return means


def _end(metrics: dict[str, float]) -> str:
    """How training ended, in a sentence; empty if nothing was logged."""
    if "logratios/chosen" not in metrics:
        return ""
    change = metrics["logratios/chosen"]
    return (
        f" At the end, the policy prefers the chosen answer in {metrics['rewards/accuracies']:.0%} of the pairs. "
        f"Chosen answers are {'less' if change < 0 else 'more'} likely than under the reference ({change:+.2f} nats)."
    )


def _reference_directory(datasets: Sequence[str], training_args: "MultimodalDPOConfig") -> str:
    """
    The directory of the reference's log-probabilities, with those that came with the datasets copied into it: beside
    the pairs, or in `output_dir` if that cannot be written or there are several datasets.
    """
    beside, own = Path(datasets[0], REFERENCE_FOLDER), Path(training_args.output_dir, REFERENCE_FOLDER)
    writable = beside.parent.is_dir() and os.access(beside if beside.exists() else beside.parent, os.W_OK)
    directory = Path(training_args.ref_log_probs_dir or (beside if writable and len(datasets) == 1 else own))
    if rank() != 0:  # the main process copies the files for all
        return str(directory)
    for name in datasets:
        is_local = Path(name).exists()
        for path in Path(name, REFERENCE_FOLDER).glob("*.jsonl") if is_local else _downloaded(name):
            if not (directory / path.name).exists():
                directory.mkdir(parents=True, exist_ok=True)
                with atomic_path(directory / path.name) as temporary:
                    shutil.copyfile(path, temporary)
    return str(directory)


def _downloaded(hub_id: str) -> Iterable[Path]:
    """The files of log-probabilities in a Hub dataset; none if it has none or the Hub cannot be reached."""
    from huggingface_hub import snapshot_download

    name, revision = split_revision(hub_id)
    files = f"{REFERENCE_FOLDER}/*.jsonl"
    try:
        found = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=files)
    except OSError as error:
        print(
            f"dpo: the reference's log-probabilities of {hub_id} cannot be downloaded and are computed instead: "
            f"{str(error).splitlines()[0]}"
        )
        return ()
    return Path(found).glob(files)


STAGE = training_stage(
    DpoArguments,
    "MultimodalDPOConfig",
    MultimodalDPOSettings,
    "preferences",
    name="dpo",
    summary="stage 2: train the model to prefer its better answers",
    help=__doc__,
    after=("judge",),
    repeats=True,
    trains="pairs",
    registries={"loss_type": LOSSES},
)

# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Time of a DPO step on images: ours, and TRL's DPOTrainer with its own vision collator.

```bash
python tests/benchmarks/bench_dpo.py                                  # minutes on two cores
python tests/benchmarks/bench_dpo.py --shape llava_7b --output dpo_7b.json
python tests/benchmarks/bench_dpo.py --images vqa_rad/images          # real images instead of generated ones
```

All variants use the same pairs, weights, batch size and settings. The loss of the first batch is compared before
anything is timed. A repetition is one epoch of each trainer's own `train()`, including collation:

- `stock`: `trl.DPOTrainer`; the reference is computed in each step
- `ours`: `MultimodalDPOTrainer` with default settings; the reference is computed in each step
- `ours, cached`: with `precompute_ref_log_probs`; no reference is computed in the step

"times stock" is the time of stock divided by the time of the variant: the median over the repetitions, with minimum
and maximum. The floor is the time that the operations of a variant would take at the rate of a large matrix product
on this machine. The tokens of the prompt and of both answers count once, even if a trainer computes them twice.
`llava_7b` has a new adapter with the paper's settings, so its reference is the base model.
"""

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flops import Layout, fewer_operations, forward, recomputed, training, weights_of
from measure import Machine, Row, add_common_arguments, alternate, report, synchronize
from shapes import SHAPES, Shape, answer_lengths, build_model, build_processor, preference_pairs, prompt_tokens
from steps import (
    Epoch,
    batches_of,
    check_equal,
    common_arguments,
    copy_model,
    copy_trained,
    evaluation_loss,
    largest_that_fits,
    perturb,
    scored_positions,
)
from trl import DPOConfig, DPOTrainer

from medst_trl.policy.adapters import adapter_config
from medst_trl.training.dpo import MultimodalDPOConfig, MultimodalDPOTrainer


VARIANTS = ("stock", "ours", "ours, cached")


@dataclass(frozen=True)
class Setting:
    """A setting: lengths of answers, batch size, and the variants to compare, the first of which is the baseline."""

    shape: Shape
    device: torch.device
    answers: str
    batch_size: int
    batches: int
    variants: Sequence[str] = VARIANTS
    gradient_checkpointing: bool = False
    images: Path | None = None

    @property
    def what(self) -> str:
        checkpointing = ", checkpointing" if self.gradient_checkpointing else ""
        return f"DPO step, prompt {prompt_tokens(self.shape)}, answers {Path(self.answers).stem}{checkpointing}"

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Numbers of tokens of the answers of each pair."""
        return list(itertools.islice(itertools.cycle(answer_lengths(self.answers)), self.batch_size * self.batches))


def make_trainers(setting: Setting, model: "torch.nn.Module", cache: str) -> dict[str, DPOTrainer]:
    """Make a trainer for each variant. All have the same weights, which differ slightly from the reference."""
    shape, trainers = setting.shape, {}
    dataset = preference_pairs(shape, build_processor(shape), setting.lengths, len(setting.lengths), setting.images)
    common = common_arguments(setting.batch_size, setting.device, shape.dtype, setting.gradient_checkpointing)
    for variant in setting.variants:
        policy = copy_model(model, share_weights=shape.lora)
        kwargs = {"model": policy, "train_dataset": dataset, "processing_class": build_processor(shape)}
        if shape.lora:
            kwargs["peft_config"] = adapter_config(policy)
        if variant == "stock":
            if not shape.lora:  # otherwise it would load the reference from disk by name
                kwargs["ref_model"] = copy_model(model, share_weights=False)
            trainers[variant] = DPOTrainer(args=DPOConfig(max_length=2048, **common), **kwargs)
        else:
            cached = {"precompute_ref_log_probs": True, "ref_log_probs_dir": cache} if "cached" in variant else {}
            trainers[variant] = MultimodalDPOTrainer(args=MultimodalDPOConfig(**common, **cached), **kwargs)
    for trainer in trainers.values():
        copy_trained(trainers[setting.variants[0]].model, trainer.model)
    for trainer in trainers.values():
        perturb(trainer.model)
    return trainers


def reference_seconds(trainer: DPOTrainer, device: torch.device) -> float:
    """Return the seconds to compute the reference of a pair without loading data: the cost of caching it."""
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    synchronize(device)
    start = time.perf_counter()
    for batch in batches:
        trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    synchronize(device)
    return (time.perf_counter() - start) / len(trainer.train_dataset)


def operations(setting: Setting, trainer: DPOTrainer, variant: str) -> tuple[float, float]:
    """
    Return the operations of an epoch with the layout of a variant: those needed, and those executed, with padding and
    recomputation.
    """
    prompt, lengths = prompt_tokens(setting.shape), setting.lengths
    labeled, batches = sum(map(sum, lengths)), batches_of(trainer)
    if variant == "stock":
        rows = [prompt + length for pair in lengths for length in pair]
        padded = [batch["input_ids"].shape[1] for batch in batches for _ in batch["input_ids"]]
    else:
        rows = [prompt + chosen + 1 + rejected for chosen, rejected in lengths]
        padded = [int(batch["shared_length"]) for batch in batches for _ in batch["prefix_length"]]
    config, policy = trainer.model.config, weights_of(trainer.model)
    reference = weights_of(trainer.model, with_adapter=False)
    scored = scored_positions(setting.device, labeled, sum(padded) - len(padded))
    needed, executed = Layout(len(rows), rows, labeled), Layout(len(rows), padded, scored)
    totals = [training(config, policy, layout) for layout in (needed, executed)]
    if "cached" not in variant:
        totals = [total + forward(config, reference, layout) for total, layout in zip(totals, (needed, executed))]
    return totals[0], totals[1] + recomputed(config, policy, executed, setting.gradient_checkpointing)


def measure(setting: Setting, model: "torch.nn.Module", machine: Machine, repeats: int) -> list[Row]:
    """Measure all variants in one setting and return their rows."""
    with tempfile.TemporaryDirectory() as cache:
        trainers = make_trainers(setting, model, cache)
    first = {name: map(one.train_dataset.__getitem__, range(setting.batch_size)) for name, one in trainers.items()}
    losses = {variant: evaluation_loss(trainer, list(first[variant])) for variant, trainer in trainers.items()}
    same = check_equal(losses, setting.shape.dtype)
    epochs = {variant: Epoch(trainer, setting.device) for variant, trainer in trainers.items()}
    for epoch in epochs.values():
        epoch.warm_up()
    runs = alternate(epochs, repeats)
    caching = reference_seconds(trainers["ours"], setting.device) if {"ours", "ours, cached"} <= set(trainers) else 0.0
    counted = {variant: operations(setting, trainer, variant) for variant, trainer in trainers.items()}
    rows, pairs = [], len(setting.lengths)
    for variant in setting.variants:
        needed, executed = counted[variant]
        once = caching if "cached" in variant else 0.0
        notes = [
            f"{setting.batches} batches of {setting.batch_size}",
            fewer_operations(*counted[setting.variants[0]], *counted[variant]),
        ]
        notes += [same] if variant == setting.variants[0] else []
        notes += [f"computing its reference takes {1e3 * once:.3g} ms per pair, once"] if once else []
        rows.append(
            Row(
                what=setting.what, variant=variant, unit="pair", runs=runs[variant], stock=runs[setting.variants[0]],
                tokens=prompt_tokens(setting.shape) + sum(map(sum, setting.lengths)) / pairs, flops=needed / pairs,
                executed_flops=executed / pairs, floor_seconds=machine.seconds_for(needed / pairs), once_seconds=once,
                notes="; ".join(notes),
            )
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument(
        "--lengths", nargs="*",
        help="answer lengths: 80 (2 x 80 tokens), gpt (80 to 150, GPT-4's), short (MMedPO's), or a JSON file of "
        "[[chosen, rejected], ...]. Default: 80 and short on a CPU, gpt and short on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="the first variant is the baseline"
    )
    parser.add_argument("--batch_size", type=int, help="pairs per batch; halved if memory runs out")
    parser.add_argument("--batches", type=int, help="batches per repetition")
    args = parser.parse_args(arguments)

    shape, device = SHAPES[args.shape], torch.device(args.device or SHAPES[args.shape].device)
    on_gpu = device.type == "cuda"
    machine = Machine.measure(device, shape.dtype, quick=args.shape == "tiny")
    model = build_model(shape, build_processor(shape), device).requires_grad_(not shape.lora)
    rows = []
    for answers in args.lengths or (["gpt", "short"] if on_gpu else ["80", "short"]):
        for checkpointing in (True, False) if on_gpu else (False,):
            setting = Setting(
                shape, device, answers, args.batch_size or shape.dpo[0], args.batches or shape.dpo[1], args.variants,
                checkpointing, args.images,
            )  # fmt: skip
            rows += largest_that_fits(
                setting.what,
                setting.batch_size,
                lambda size: measure(replace(setting, batch_size=size), model, machine, args.repeats),  # noqa: B023
            )
            gc.collect()
    settings = {"shape": args.shape, "repeats": args.repeats, "images": "real" if args.images else "generated"}
    return report("DPO", settings, machine, rows, args.output)


if __name__ == "__main__":
    main()

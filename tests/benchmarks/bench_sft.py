# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Time of an SFT step on conversations about images: ours, packed and not packed, and TRL's SFTTrainer.

```bash
python tests/benchmarks/bench_sft.py                                  # lengths of VQA-RAD, generated images
python tests/benchmarks/bench_sft.py --shape cpu_64                   # the same with 64 tokens per image
python tests/benchmarks/bench_sft.py --images vqa_rad/images          # real images instead of generated ones
python tests/benchmarks/bench_sft.py --shape llava_7b --output sft_7b.json
```

The conversations are as long as those of VQA-RAD. All variants use the same conversations, weights, batch size and
settings. The loss of the first batch is compared before anything is timed. A repetition is one epoch of each trainer's
own `train()`, including collation:

- `stock`: `trl.SFTTrainer`, loss on the answers, padded batches
- `ours`: `SelfQuestioningTrainer` with default settings, but without questions as targets (`sq_ratio=0`), so that the
  training is the same
- `ours, grouped`: the same with batches of similar lengths
- `ours, packed`: with `pack_sequences`

The floor is the time that the operations of a conversation without padding would take at the rate of a large matrix
product. A variant also executes padding, and recomputation with gradient checkpointing.
"""

import argparse
import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from flops import Layout, fewer_operations, recomputed, training, weights_of
from measure import Machine, Row, add_common_arguments, alternate, report
from shapes import SHAPES, Shape, build_model, build_processor, conversations
from steps import (
    Epoch,
    batches_of,
    check_equal,
    common_arguments,
    copy_model,
    copy_trained,
    evaluation_loss,
    largest_that_fits,
    scored_positions,
)
from trl import SFTConfig, SFTTrainer

from medst_trl.policy.adapters import adapter_config
from medst_trl.training.sft import SelfQuestioningConfig, SelfQuestioningTrainer


OURS = {
    "ours": {},
    "ours, grouped": {"train_sampling_strategy": "group_by_length"},
    "ours, packed": {"pack_sequences": True},
}
VARIANTS = ("stock", *OURS)


@dataclass(frozen=True)
class Setting:
    """A setting: conversations, batch size, and the variants to compare, the first of which is the baseline."""

    shape: Shape
    device: torch.device
    batch_size: int
    batches: int
    variants: Sequence[str] = VARIANTS
    gradient_checkpointing: bool = False
    images: Path | None = None
    attention: str = "sdpa"

    @property
    def what(self) -> str:
        checkpointing = ", checkpointing" if self.gradient_checkpointing else ""
        return f"SFT step, {self.shape.image_tokens} tokens per image{checkpointing}"


def make_trainers(setting: Setting, model: "torch.nn.Module", dataset: Dataset) -> dict[str, SFTTrainer]:
    """Make a trainer for each variant, all with the same weights."""
    shape, trainers = setting.shape, {}
    common = common_arguments(setting.batch_size, setting.device, shape.dtype, setting.gradient_checkpointing)
    for variant in setting.variants:
        policy = copy_model(model, share_weights=shape.lora)
        kwargs = {"model": policy, "train_dataset": dataset, "processing_class": build_processor(shape)}
        if shape.lora:
            kwargs["peft_config"] = adapter_config(policy)
        if variant == "stock":
            args = SFTConfig(max_length=2048, assistant_only_loss=True, **common)
            trainers[variant] = SFTTrainer(args=args, **kwargs)
        else:
            args = SelfQuestioningConfig(sq_ratio=0.0, **common, **OURS[variant])
            trainers[variant] = SelfQuestioningTrainer(args=args, **kwargs)
    for trainer in trainers.values():
        copy_trained(trainers[setting.variants[0]].model, trainer.model)
    return trainers


def operations(setting: Setting, trainer: SFTTrainer, lengths: list[int]) -> tuple[float, float]:
    """
    Return the operations of an epoch: those of the conversations only, and those executed, with padding and
    recomputation.
    """
    batches = batches_of(trainer)
    images = sum(batch["images"] for batch in batches)
    labeled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    padded = [batch["input_ids"].shape[1] for batch in batches for _ in batch["input_ids"]]
    scored = scored_positions(setting.device, labeled, sum(padded) - len(padded))
    config, weights = trainer.model.config, weights_of(trainer.model)
    needed, executed = Layout(images, lengths, labeled), Layout(images, padded, scored)
    repeated = recomputed(config, weights, executed, setting.gradient_checkpointing)
    return training(config, weights, needed), training(config, weights, executed) + repeated


def measure(setting: Setting, model: "torch.nn.Module", machine: Machine, repeats: int) -> list[Row]:
    """Measure all variants in one setting and return their rows."""
    count = setting.batch_size * setting.batches
    dataset = conversations(setting.shape, build_processor(setting.shape), count, images=setting.images)
    trainers = make_trainers(setting, model, dataset)
    first = [dataset[number] for number in range(setting.batch_size)]
    losses = {variant: evaluation_loss(trainer, copy.deepcopy(first)) for variant, trainer in trainers.items()}
    same = check_equal(losses, setting.shape.dtype)
    epochs = {variant: Epoch(trainer, setting.device) for variant, trainer in trainers.items()}
    for epoch in epochs.values():
        epoch.warm_up()
    runs = alternate(epochs, repeats)
    stock = trainers[setting.variants[0]]
    lengths = [int(length) for batch in batches_of(stock) for length in batch["attention_mask"].sum(1)]
    counted = {variant: operations(setting, trainer, lengths) for variant, trainer in trainers.items()}
    rows = []
    for variant in setting.variants:
        needed, executed = counted[variant]
        notes = [
            f"{setting.batches} batches of {setting.batch_size}",
            fewer_operations(*counted[setting.variants[0]], *counted[variant]),
        ]
        notes += [f"{min(lengths)} to {max(lengths)} tokens", same] if variant == setting.variants[0] else []
        rows.append(
            Row(
                what=setting.what, variant=variant, unit="conversation", runs=runs[variant],
                stock=runs[setting.variants[0]], tokens=sum(lengths) / len(lengths), flops=needed / len(lengths),
                executed_flops=executed / len(lengths), floor_seconds=machine.seconds_for(needed / len(lengths)),
                notes="; ".join(notes),
            )
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="the first variant is the baseline"
    )
    parser.add_argument("--batch_size", type=int, help="conversations per batch; halved if memory runs out")
    parser.add_argument("--batches", type=int, help="batches per repetition")
    parser.add_argument("--attention", default="sdpa", help="attention implementation, for example flash_attention_2")
    args = parser.parse_args(arguments)

    shape, device = SHAPES[args.shape], torch.device(args.device or SHAPES[args.shape].device)
    machine = Machine.measure(device, shape.dtype, quick=args.shape == "tiny")
    model = build_model(shape, build_processor(shape), device, attention=args.attention).requires_grad_(not shape.lora)
    rows = []
    for checkpointing in (True, False) if device.type == "cuda" else (False,):
        setting = Setting(
            shape, device, args.batch_size or shape.sft[0], args.batches or shape.sft[1], args.variants, checkpointing,
            args.images, args.attention,
        )  # fmt: skip
        rows += largest_that_fits(
            setting.what,
            setting.batch_size,
            lambda size: measure(replace(setting, batch_size=size), model, machine, args.repeats),  # noqa: B023
        )
        gc.collect()
    settings = {
        "shape": args.shape, "repeats": args.repeats, "attention": args.attention,
        "images": "real" if args.images else "generated",
    }  # fmt: skip
    return report("SFT", settings, machine, rows, args.output)


if __name__ == "__main__":
    main()
